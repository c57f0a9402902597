"""What operators produced, kept: content into the store, one result manifest per item, small blocks inline for the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowmesh_cas.cid import DAG_CBOR, RAW, cid_of
from flowmesh_cas.errors import ExecutionError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import content
from flowmesh_mesh.manifest import Ref, ResultManifest, encode_record
from flowmesh_node.operators.base import Content, Produced

INLINE_MAX_BYTES = 4096
"""Outputs up to this size in total travel with the result; larger ones are pulled."""

REFS_MAX = 4096
"""Most contents of one result: they must fit into one message with their digests."""

_BUFFERED_MAX_BYTES = 8 * 1024 * 1024
_LEAF_BYTES = 1024 * 1024

Wire = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Kept:
    """A result that is in the store: its manifest's CID, what it holds, and the blocks worth sending along."""

    result: bytes
    outputs: dict[str, list[Ref]]
    inline: tuple[Wire, ...]


def keep_all(store: BlockStore, produced: Sequence[Produced]) -> list[Kept | ExecutionError]:
    """Put the outputs of several items into the store with one write for all that is small; blocking.

    An item whose output cannot be kept (a file that is gone, too many contents) fails alone.
    """
    kept: list[Kept | ExecutionError] = []
    blocks: list[tuple[bytes, bytes]] = []
    for each in produced:
        try:
            kept.append(_keep(store, blocks, each))
        except ExecutionError as error:
            kept.append(error)
    if blocks:
        store.put_many(blocks)
    return kept


def _keep(store: BlockStore, blocks: list[tuple[bytes, bytes]], produced: Produced) -> Kept:
    if sum(len(contents) for contents in produced.outputs.values()) > REFS_MAX:
        raise ExecutionError(f"more than {REFS_MAX} contents in one result", hint="Split in several steps.")
    mine: list[tuple[bytes, bytes]] = []
    outputs = {port: [_reference(store, mine, each) for each in contents] for port, contents in produced.outputs.items()}
    kept = manifest_of(outputs, [block for _, block in mine])
    blocks += mine
    blocks.append((kept.result, kept.inline[0][1]))
    return kept


def manifest_of(outputs: dict[str, list[Ref]], leaves: Sequence[bytes]) -> Kept:
    """Return the result over ``outputs``; ``leaves`` are their blocks, taken along when small and complete."""
    manifest = encode_record(ResultManifest(outputs))
    inline: tuple[Wire, ...] = ((DAG_CBOR, manifest),)
    sizes = sum(ref.size for refs in outputs.values() for ref in refs)
    if sizes <= INLINE_MAX_BYTES and all(ref.cid[1] == RAW for refs in outputs.values() for ref in refs):
        inline += tuple((RAW, leaf) for leaf in leaves)
    return Kept(cid_of(DAG_CBOR, manifest), outputs, inline)


def leaf_ref(kind: str, data: bytes, rows: int = -1) -> Ref:
    """Return the reference of bytes that fit into one block."""
    cid = cid_of(RAW, data)
    return Ref(kind, cid, cid[4:], len(data), rows)


def _reference(store: BlockStore, blocks: list[tuple[bytes, bytes]], each: Content) -> Ref:
    data = each.data
    if data is None and each.kind != "folder":
        path = Path(each.path)
        try:
            data = path.read_bytes() if path.stat().st_size <= _BUFFERED_MAX_BYTES else None
        except OSError as error:
            raise ExecutionError(f"output file {path.name} cannot be read: {error.strerror}", reason="internal") from error
    if data is not None and len(data) <= _LEAF_BYTES:
        ref = leaf_ref(each.kind, data, each.rows)
        blocks.append((ref.cid, data))
        return ref
    return _large(store, each, data)


def _large(store: BlockStore, each: Content, data: bytes | None) -> Ref:
    """Store what needs a DAG of its own; such an output is worth a write of its own."""
    if each.kind == "folder":
        return content.put_folder(store, Path(each.path))
    ref = content.put_file(store, Path(each.path)) if data is None else content.put_file_bytes(store, data)
    return Ref(each.kind, ref.cid, ref.digest, ref.size, each.rows)
