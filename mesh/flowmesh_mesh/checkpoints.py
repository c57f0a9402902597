"""What a checkpoint of a training is: a folder of plain files and a manifest that names each by its SHA-256.

Tensors are safetensors, everything else JSON: nothing in it is code, so a checkpoint may come from any node. Whoever goes on from
one checks the manifest first; a folder that lacks a file, or holds it half, is no checkpoint at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from flowmesh_cas import dag, dag_pb, unixfs
from flowmesh_cas.cid import DAG_PB, codec_of
from flowmesh_cas.errors import IntegrityError
from flowmesh_cas.store import BlockStore

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_MAX_BYTES = 1024 * 1024
PIN = "checkpoint"
"""Owner of the pins on checkpoints in a node's store; at the hub the operator key follows it."""


class File(msgspec.Struct, frozen=True):
    """One file of a checkpoint."""

    sha256: str
    size: int


class CheckpointManifest(msgspec.Struct, frozen=True):
    """Of which training a checkpoint is, how far that has come, by what it was made, and its files."""

    format: int
    operator: str
    generation: int
    attempt: int
    type: str
    model: str
    step: int
    steps: int
    made_by: dict[str, str]
    files: dict[str, File]

    def misfit(self, *, operator: str, generation: int, made_by: Mapping[str, str] | None = None) -> str:
        """Return why an attempt cannot go on from this checkpoint; empty when it can."""
        if self.operator != operator:
            return f"it is of operator {self.operator[:12]}, not {operator[:12]}"
        if self.generation != generation:
            return f"it is of generation {self.generation}, not {generation}"
        if not 0 < self.step < self.steps:
            return f"step {self.step} of {self.steps} is no place to go on from"
        names = sorted(
            name for name in {*self.made_by, *(made_by or {})} if made_by and made_by.get(name) != self.made_by.get(name)
        )
        if made_by is not None and names:
            name = names[0]
            return f"it was made by {name} {self.made_by.get(name, 'none')}, here is {made_by.get(name, 'none')}"
        return ""


def encode_manifest(manifest: CheckpointManifest) -> bytes:
    """Return the bytes of the file MANIFEST."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)


def decode_manifest(data: bytes) -> CheckpointManifest:
    """Return the manifest in ``data``; raise IntegrityError for what is none, or names files that no folder may hold."""
    try:
        manifest = msgspec.json.decode(data, type=CheckpointManifest)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"the manifest of a checkpoint cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise IntegrityError(f"a checkpoint of format {manifest.format} is not understood here")
    if any(name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name for name in manifest.files):
        raise IntegrityError("the manifest of a checkpoint names a file that no folder may hold")
    return manifest


def check_stored(store: BlockStore, root: bytes) -> CheckpointManifest:
    """Read a checkpoint in a store through and return its manifest; raise FlowmeshError unless it is whole. Blocking."""
    if codec_of(root) != DAG_PB:
        raise IntegrityError("a checkpoint is a folder")
    cids = {link.name: link.cid for link in dag_pb.decode(store.get(root)).links}
    if MANIFEST not in cids:
        raise IntegrityError("a checkpoint without a manifest was left half-way")
    manifest = decode_manifest(unixfs.read_bytes(store, cids.pop(MANIFEST), max_bytes=MANIFEST_MAX_BYTES))
    if cids.keys() != manifest.files.keys():
        raise IntegrityError("a checkpoint holds other files than its manifest names")
    for name, file in manifest.files.items():
        digest, size = hashlib.sha256(), 0
        for chunk in unixfs.read_chunks(store, cids[name], max_bytes=file.size):
            digest.update(chunk)
            size += len(chunk)
        if (digest.hexdigest(), size) != (file.sha256, file.size):
            raise IntegrityError(f"file {name} of a checkpoint is not what its manifest says")
    return manifest


def remove_dags(store: BlockStore, goners: Iterable[bytes], keep: Iterable[bytes]) -> int:
    """Remove the blocks that only the DAGs under ``goners`` hold, as far as ``keep`` knows; return how many. Blocking."""
    doomed = dag.reachable(store, goners)
    doomed -= dag.reachable(store, keep)
    store.delete_many(doomed)
    return len(doomed)


def give_back_space(store: BlockStore) -> None:
    """Let a store on disk rewrite what has become mostly empty; blocking."""
    while store is not None:
        compact = getattr(store, "compact", None)
        if compact is not None:
            compact()
            return
        store = getattr(store, "inner", None)  # type: ignore[assignment]
