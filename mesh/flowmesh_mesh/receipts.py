"""Receipts: one Ed25519 signature per batch, over the Merkle root of its results; each result keeps its path.

Leaf and node digests are separated by a prefix byte (RFC 6962, section 2.1); an odd node is carried up unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from flowmesh_mesh.messages import Outcome

_CONTEXT = b"flowmesh/receipt/1\0"


def leaf(outcome: Outcome) -> bytes:
    """Return the leaf digest of one outcome: which attempt, how it ended, with what result."""
    head = outcome.key + outcome.generation.to_bytes(8, "big") + outcome.attempt.to_bytes(8, "big")
    return sha256(b"\0" + head + outcome.result + outcome.reason.encode()).digest()


def levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """Return the tree over ``leaves`` (at least one), from the leaves up; the last level holds the root alone."""
    tree = [list(leaves)]
    while len(tree[-1]) > 1:
        row = tree[-1]
        above = [sha256(b"\1" + row[i] + row[i + 1]).digest() for i in range(0, len(row) - 1, 2)]
        if len(row) % 2:
            above.append(row[-1])
        tree.append(above)
    return tree


def path(tree: Sequence[Sequence[bytes]], index: int) -> tuple[bytes, ...]:
    """Return the sibling digests from leaf ``index`` to the root; a missing sibling is left out."""
    siblings: list[bytes] = []
    for row in tree[:-1]:
        sibling = index ^ 1
        if sibling < len(row):
            siblings.append(row[sibling])
        index //= 2
    return tuple(siblings)


def root_from_path(leaf_digest: bytes, index: int, count: int, siblings: Sequence[bytes]) -> bytes:
    """Return the root that a leaf and its path lead to, in a tree over ``count`` leaves."""
    digest, width, rest = leaf_digest, count, list(siblings)
    while width > 1:
        if index % 2:
            digest = sha256(b"\1" + rest.pop(0) + digest).digest()
        elif index + 1 < width:
            digest = sha256(b"\1" + digest + rest.pop(0)).digest()
        index, width = index // 2, (width + 1) // 2
    return digest


def statement(node: str, assignment: str, epoch: int, root: bytes, count: int) -> bytes:
    """Return the bytes that the node signs."""
    return _CONTEXT + b"\0".join((node.encode(), assignment.encode(), str(epoch).encode(), str(count).encode(), root))
