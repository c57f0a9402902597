"""A store that takes small blocks at once and writes them a moment later, many with one sync."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from flowmesh_cas.errors import FlowmeshError
from flowmesh_cas.store import Block, BlockStore
from flowmesh_cas.wrappers import WrapperStore

log = logging.getLogger("flowmesh.scheduler")

WRITE_BEHIND_S = 0.05
RETRY_S = 1.0


class WriteBehindStore(WrapperStore):
    """What is put with ``put_soon`` can be read at once and is durable soon; ``put_many`` is durable on return, as ever.

    A crash loses the blocks of the last moment: put only what the ledger or a node still holds.
    """

    def __init__(self, inner: BlockStore) -> None:
        super().__init__(inner)
        self._waiting: dict[bytes, bytes] = {}
        self._writer: asyncio.Task[None] | None = None

    def put_soon(self, blocks: Iterable[Block]) -> None:
        """Take blocks that match their CIDs; call it in the event loop."""
        self._waiting.update(blocks)
        if self._waiting and self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        await asyncio.sleep(WRITE_BEHIND_S)
        while self._waiting:
            batch = dict(self._waiting)
            try:
                await asyncio.to_thread(self.inner.put_many, batch.items())
            except FlowmeshError:
                log.exception("cannot write %d blocks; they are kept in memory", len(batch))
                await asyncio.sleep(RETRY_S)
                continue
            for cid in batch:
                self._waiting.pop(cid, None)
        self._writer = None

    async def drain(self, timeout_s: float = 5.0) -> None:
        """Wait until everything is written, at most ``timeout_s`` seconds."""
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=timeout_s)

    def get(self, cid: bytes) -> bytes:
        block = self._waiting.get(cid)
        return self.inner.get(cid) if block is None else block

    def has_many(self, cids: Sequence[bytes]) -> list[bool]:
        waiting = self._waiting
        held = [cid in waiting for cid in cids]
        unsure = [cid for cid, is_held in zip(cids, held, strict=True) if not is_held]
        if not unsure:
            return held
        found = iter(self.inner.has_many(unsure))
        return [is_held or next(found) for is_held in held]
