"""A ledger that was lost, made anew: from the journals of all schedulers, before anything else of a leadership.

A ledger that is whole bears a mark, written once everything that journals hold is in it. One without the mark is new, or its
restoring was interrupted; one that ends before the journal does has lost its tail. What the ledger shows is never changed: its
subjects are written once, and what stands there is right.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_mesh import subjects
from flowmesh_mesh.messages import Recall, Recalled, decode, encode
from flowmesh_scheduler.journal import is_noted

if TYPE_CHECKING:
    from flowmesh_mesh.bus import Bus, Delivery
    from flowmesh_scheduler.guarded import GuardedStream
    from flowmesh_scheduler.journal import Journal

log = logging.getLogger("flowmesh.scheduler")

GATHER_S = 0.5
"""How long other schedulers may take to answer once one has."""

FIRST_ANSWER_S = 1.5
"""How long a scheduler may take to answer at all. Where there is no other, the broker says so at once."""

ANSWER_TIMEOUT_S = 10.0
PAGE_BYTES = 4 * 1024 * 1024


class Restoring:
    """Brings the ledger up to what the journals know. ``lost`` is done when this leadership is over."""

    def __init__(self, bus: Bus, ledger: GuardedStream, journal: Journal | None, lost: asyncio.Future[str]) -> None:
        self._bus = bus
        self._ledger = ledger
        self._journal = journal
        self._lost = lost
        self._known: set[str] | None = None
        self.restored = 0

    async def run(self, epoch: int) -> int:
        """Restore the ledger if it lacks anything; return how many entries came back."""
        if await self._is_whole():
            return 0
        if self._journal is not None:
            cursor = 0
            while cursor >= 0:
                page, cursor = await asyncio.to_thread(self._journal.page, cursor, PAGE_BYTES)
                await self.write((entry.subject, entry.record) for entry in page)
        for scheduler, first in (await self._others()).items():
            await self._take_journal(scheduler, first)
        await self._write([(subjects.ledger_restored(epoch), encode(Recall(self.restored, "records")))])
        if self.restored:
            log.warning("the ledger was lost or cut short: %d entries came back from journals", self.restored)
        return self.restored

    async def _is_whole(self) -> bool:
        mark = await self._bus.last_message(subjects.LEDGER, subjects.LEDGER_RESTORED)
        if mark is None or self._journal is None or not self._journal.last_seq:
            return mark is not None
        state = await self._bus.stream_state(subjects.LEDGER)
        return state is not None and state.last_seq >= self._journal.last_seq

    async def write(self, entries: Iterable[tuple[str, bytes]]) -> None:
        """Write entries that the ledger lacks; what it shows under their subjects stays."""
        wanted = [(subject, record) for subject, record in entries if is_noted(subject)]
        if not wanted:
            return
        if self._known is None:
            self._known = {message.subject async for message in self._bus.read_stream(subjects.LEDGER)}
        fresh: dict[str, bytes] = {}
        for subject, record in wanted:
            if subject not in self._known:
                fresh.setdefault(subject, record)
        self._known.update(fresh)
        await self._write(list(fresh.items()))
        self.restored += len(fresh)

    async def _write(self, entries: list[tuple[str, bytes]]) -> None:
        if not entries:
            return
        left = len(entries)
        written = asyncio.get_running_loop().create_future()

        def stored(_: int) -> None:
            nonlocal left
            left -= 1
            if not left and not written.done():
                written.set_result(None)

        for subject, record in entries:
            self._ledger.write(subject, record, stored)
        self._ledger.flush()
        await asyncio.wait({written, self._lost}, return_when=asyncio.FIRST_COMPLETED)
        if not written.done():
            raise TransientError(f"the leadership ended while the ledger was being restored: {self._lost.result()}")

    async def _others(self) -> dict[str, Recalled]:
        """Return the first page of every other scheduler's journal: nobody answers where there is no other."""
        inbox, found = self._bus.new_inbox(), dict[str, Recalled]()
        arrived = asyncio.Event()

        def receive(delivery: Delivery) -> None:
            try:
                answer = decode(delivery.data, Recalled)
                found[answer.holder] = answer
            except UsageError as error:
                log.info("not a journal: %s", error.message)
            arrived.set()

        listening = await self._bus.subscribe(inbox, receive)
        try:
            self._bus.post(subjects.ALL_SCHEDULERS_CONTROL, encode(Recall(0, "records")), reply=inbox)
            await asyncio.wait_for(arrived.wait(), FIRST_ANSWER_S)
            if found:
                await asyncio.sleep(GATHER_S)
        except (TimeoutError, FlowmeshError) as error:
            log.info("no other scheduler tells its journal: %s", error)
        finally:
            await listening.unsubscribe()
        return found

    async def _take_journal(self, scheduler: str, page: Recalled) -> None:
        while True:
            await self.write(page.records)
            if page.cursor < 0:
                return
            question = encode(Recall(page.cursor, "records"))
            try:
                answer = await self._bus.request(subjects.scheduler_control(scheduler), question, timeout_s=ANSWER_TIMEOUT_S)
                page = decode(answer, Recalled)
            except FlowmeshError as error:
                log.warning("the journal of %s breaks off: %s", scheduler, error)
                return
