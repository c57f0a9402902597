"""A scheduler that stands by keeps for the leader: sealed acceptances, their contents in its hub, a journal of the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import FlowmeshError, UsageError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import subjects, tasks
from flowmesh_mesh.bus import Bus, Delivery, Subscription
from flowmesh_mesh.keeping import PAGE_BYTES, Keeper
from flowmesh_mesh.messages import Guard, Recall, Recalled, Unguard, decode, encode
from flowmesh_scheduler import journal
from flowmesh_scheduler.journal import Journal

log = logging.getLogger("flowmesh.scheduler")

FOLDER = "kept"
FOLLOW_S = 2.0
"""Pause between two looks of a standby at the ledger."""

Asked = Guard | Unguard | Recall


class StandbyKeeper:
    """What a scheduler process keeps in its folder, whoever leads. While this process leads, its leader writes ``journal``."""

    def __init__(self, bus: Bus, store: BlockStore, name: str, folder: Path, *, journal_max_bytes: int = 1 << 30) -> None:
        self.name = name
        self.journal = Journal(folder / journal.FOLDER, max_bytes=journal_max_bytes)
        self.keeper = Keeper(bus, store, subjects.hub_of(name), folder / FOLDER)
        self._bus = bus
        self._listening: list[Subscription] = []
        self._following: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Learn what is here."""
        await asyncio.to_thread(self.journal.open)
        await asyncio.to_thread(self.keeper.restore)

    async def stand_by(self) -> None:
        """Hear the leader and follow the ledger; does nothing while it does so already."""
        if self._listening:
            return
        subscribe: Callable[..., Any] = self._bus.subscribe
        self._listening = [
            await subscribe(subjects.scheduler_control(self.name), self._on_control),
            await subscribe(subjects.ALL_SCHEDULERS_CONTROL, self._on_control),
        ]
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def lead(self) -> None:
        """Stop all that: this process asks the others now."""
        listening, self._listening = self._listening, []
        for subscription in listening:
            with contextlib.suppress(FlowmeshError):
                await subscription.unsubscribe()
        following, self._following = self._following, None
        if following is not None:
            await tasks.end([following])

    async def close(self) -> None:
        """Write what waits and let go."""
        await self.lead()
        await self.keeper.close()
        await self.journal.flush()
        self.journal.close()

    def _on_control(self, delivery: Delivery) -> None:
        try:
            message: Asked = decode(delivery.data, Asked)  # type: ignore[arg-type]
        except UsageError as error:
            log.info("not for a keeper: %s", error.message)
            return
        if isinstance(message, Recall) and message.what == "records":
            delivery.post_respond(encode(self.records(message.cursor)))
        else:
            self.keeper.receive(message, delivery)

    def records(self, cursor: int) -> Recalled:
        """Return a page of the journal."""
        page, following = self.journal.page(cursor, PAGE_BYTES)
        return Recalled(self.name, cursor=following, records=tuple((entry.subject, entry.record) for entry in page))

    async def _follow(self) -> None:
        while True:
            await self.journal.flush()  # what this process noted while it led
            try:
                await self.journal.follow(self._bus)
            except FlowmeshError as error:
                log.info("the journal does not follow: %s", error)
            await asyncio.sleep(FOLLOW_S * random.uniform(0.8, 1.2))
