"""Blocks on their way: a store that lives as long as one submission or one download."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flowmesh_cas.store import Block, BlockStore, MemoryStore, Pin, Swept

MEMORY_MAX_BYTES = 64 * 1024 * 1024
"""Blocks up to this size together are held in memory; the rest goes to disk."""


class ScratchStore(BlockStore):
    """Holds blocks in memory, and in a temporary folder once they are many; both are gone after :meth:`close`."""

    def __init__(self, memory_max_bytes: int = MEMORY_MAX_BYTES) -> None:
        self._stores: list[BlockStore] = [MemoryStore()]
        self._left_bytes = memory_max_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def get(self, cid: bytes) -> bytes:
        held = self.has_many((cid,))[0] and len(self._stores) > 1 and not self._stores[0].has(cid)
        return self._stores[1 if held else 0].get(cid)

    def has_many(self, cids: Sequence[bytes]) -> list[bool]:
        flags = [store.has_many(cids) for store in self._stores]
        return [any(held) for held in zip(*flags, strict=True)]

    def put_many(self, blocks: Iterable[Block]) -> None:
        for cid, block in blocks:
            self._left_bytes -= len(block)
            if self._left_bytes < 0 and self._folder is None:
                self._spill()
            self._stores[-1].put_many(((cid, block),))

    def _spill(self) -> None:
        from flowmesh_cas.pack_store import PackStore

        self._folder = tempfile.TemporaryDirectory(prefix="flowmesh-")
        self._stores.append(PackStore(Path(self._folder.name) / "blocks", sync=False))

    def delete_many(self, cids: Iterable[bytes]) -> None:
        gone = list(cids)
        for store in self._stores:
            store.delete_many(gone)

    def cids(self) -> Iterator[bytes]:
        for store in self._stores:
            yield from store.cids()

    def pin_many(self, roots: Iterable[bytes], owner: str, expires_at_us: int | None = None) -> None:
        self._stores[0].pin_many(roots, owner, expires_at_us)

    def unpin(self, root: bytes, owner: str) -> None:
        self._stores[0].unpin(root, owner)

    def all_pins(self) -> list[Pin]:
        return self._stores[0].all_pins()

    def sweep(self, now_us: int, grace_us: int) -> Swept:
        """Remove nothing: the store itself is short-lived."""
        return Swept(0, 0, 0, 0, 0)

    def close(self) -> None:
        for store in self._stores:
            store.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()


@contextmanager
def scratch() -> Iterator[BlockStore]:
    """Yield an empty store that is removed afterwards."""
    store = ScratchStore()
    try:
        yield store
    finally:
        store.close()
