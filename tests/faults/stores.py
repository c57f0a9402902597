"""The disk of a simulated machine: blocks that outlive the processes on it, and that rot, are lost, or do not fit."""

from __future__ import annotations

from collections.abc import Iterable

from flowmesh_cas.cid import cid_text
from flowmesh_cas.errors import IntegrityError, TransientError
from flowmesh_cas.store import Block, MemoryStore


class SimStore(MemoryStore):
    """What a pack store on this disk would do. It stays open when a process closes it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_full = False
        self.rotten: set[bytes] = set()

    def get(self, cid: bytes) -> bytes:
        if cid in self.rotten:
            self.rotten.discard(cid)
            self.delete(cid)
            raise IntegrityError(f"block {cid_text(cid)} went bad on disk and was dropped", hint="Fetch it from another holder.")
        return super().get(cid)

    def put_many(self, blocks: Iterable[Block]) -> None:
        if self.is_full:
            raise TransientError("no space left on device", hint="Make room.")
        kept = list(blocks)
        super().put_many(kept)
        self.rotten.difference_update(cid for cid, _ in kept)

    def close(self) -> None:
        return None
