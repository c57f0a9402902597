"""DAGs of blocks: what a block links to, what is reachable from a root, what of it is not here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flowmesh_cas import dag_pb
from flowmesh_cas.cid import CID_LENGTH, DAG_PB, RAW, codec_of, decode_dag_cbor
from flowmesh_cas.errors import UsageError

if TYPE_CHECKING:
    from flowmesh_cas.store import BlockStore

_LINK_TAG = b"\xd8\x2a"


def links(cid: bytes, block: bytes) -> list[bytes]:
    """Return the CIDs that a block links to, in its order; raise IntegrityError when it is not of its codec."""
    codec = codec_of(cid)
    if codec == RAW:
        return []
    if codec == DAG_PB:
        return [link.cid for link in dag_pb.decode(block).links]
    # Most small records hold no link; whoever has none cannot hold the tag of one.
    return list(cbor_links(decode_dag_cbor(block))) if _LINK_TAG in block else []


def walk(store: BlockStore, root: bytes) -> Iterator[bytes]:
    """Yield the CIDs under ``root``, depth first, parents before children, each once; raise NotFoundError on a gap.

    Raw leaves are named without being read.
    """
    seen: set[bytes] = set()
    pending = [root]
    while pending:
        cid = pending.pop()
        if cid in seen:
            continue
        seen.add(cid)
        children = [] if codec_of(cid) == RAW else links(cid, store.get(cid))
        yield cid
        pending.extend(reversed(children))


def frontier(store: BlockStore, cids: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return which of ``cids`` are not here, and the children of those that are. A block that went bad is not here."""
    inner = [cid for cid in cids if codec_of(cid) != RAW]
    leaves = [cid for cid in cids if codec_of(cid) == RAW]
    absent = [cid for cid, held in zip(leaves, store.has_many(leaves), strict=True) if not held] if leaves else []
    children: list[bytes] = []
    for cid, block in zip(inner, store.get_many(inner), strict=True):
        if block is None:
            absent.append(cid)
        else:
            children.extend(links(cid, block))
    return absent, children


def missing(store: BlockStore, *roots: bytes) -> list[bytes]:
    """Return the CIDs under ``roots`` that are known not to be here (below a missing block more may lack)."""
    absent: list[bytes] = []
    seen: set[bytes] = set()
    level = _unseen(roots, seen)
    while level:
        lacking, children = frontier(store, level)
        absent.extend(lacking)
        level = _unseen(children, seen)
    return absent


def reachable(store: BlockStore, roots: Iterable[bytes]) -> set[bytes]:
    """Return the CIDs of the blocks that are here and under one of ``roots``; gaps are passed over."""
    seen: set[bytes] = set()
    absent: set[bytes] = set()
    level = _unseen(roots, seen)
    while level:
        lacking, children = frontier(store, level)
        absent.update(lacking)
        level = _unseen(children, seen)
    return seen - absent


def is_whole(store: BlockStore, root: bytes, *, max_bytes: int) -> bool:
    """Tell whether the DAG under ``root`` is here, reading and verifying up to ``max_bytes`` of its leaves.

    Inner blocks are always read; leaves beyond the budget are only looked up.
    """
    seen: set[bytes] = set()
    level = _unseen((root,), seen)
    while level:
        leaves = [cid for cid in level if codec_of(cid) == RAW]
        for cid in leaves:
            if max_bytes <= 0:
                break
            block = store.get_many((cid,))[0]
            if block is None:
                return False
            max_bytes -= len(block)
        lacking, children = frontier(store, level)
        if lacking:
            return False
        level = _unseen(children, seen)
    return True


def _unseen(cids: Iterable[bytes], seen: set[bytes]) -> list[bytes]:
    fresh = []
    for cid in cids:
        if cid not in seen:
            seen.add(cid)
            fresh.append(cid)
    return fresh


def cbor_links(value: Any) -> Iterator[bytes]:
    """Yield the links in decoded DAG-CBOR, depth first."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(reversed(item.values()))
        elif isinstance(item, list):
            pending.extend(reversed(item))
        elif isinstance(item, bytes) and len(item) == CID_LENGTH and is_cid(item):
            yield item


def is_cid(data: bytes) -> bool:
    """Tell whether 36 bytes are a CID of ours; in canonical DAG-CBOR such bytes are always a link."""
    try:
        codec_of(data)
    except UsageError:
        return False
    return True
