"""Getting results to the leader: published at once, offered again until the leader shows that they are in the ledger.

The broker's acknowledgement ends nothing: only a Commit does (the stream of results lives in memory).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh import receipts, subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.messages import Assignment, Done, Outcome, encode
from flowmesh_node.spool import Spool

log = logging.getLogger("flowmesh.node")

SPOOL_AFTER_S = 1.0
OFFER_AGAIN_S = 3.0
OFFER_AGAIN_MAX_S = 60.0
OFFER_SOON_S = 0.5
STORE_TIMEOUT_S = 2.0
WARN_EVERY_S = 30.0


@dataclass(slots=True)
class Part:
    """One unconfirmed message of an assignment."""

    number: int
    data: bytes
    is_last: bool
    made_at_s: float
    offers: int = 0
    sent: int = 0
    next_offer_at_s: float = 0.0
    is_spooled: bool = False


@dataclass(slots=True)
class Delivery:
    """Sends, keeps, offers again, forgets. ``clock`` gives monotonic seconds."""

    bus: Bus
    node: str
    credentials: Credentials
    spool: Spool
    clock: Callable[[], float]
    _open: dict[str, list[Part]] = field(default_factory=dict)
    _sending: set[asyncio.Task[None]] = field(default_factory=set)
    _order: asyncio.Lock = field(default_factory=asyncio.Lock)
    _last_warned_s: float = -1e9

    def unconfirmed(self) -> tuple[str, ...]:
        """Return the assignments that have messages out."""
        return tuple(self._open)

    def is_complete(self, assignment: str) -> bool:
        """Tell whether everything of this assignment has been said (and only waits for the leader)."""
        parts = self._open.get(assignment)
        return (
            bool(parts)
            and any(part.is_last for part in parts or ())
            and len(parts or ()) == 1 + max(p.number for p in parts or ())
        )

    def restore(self) -> None:
        """Take up what an earlier life of this agent left; blocking."""
        for number, done, data in self.spool.read_all():
            part = Part(number, data, done.last, self.clock(), is_spooled=True)
            self._open.setdefault(done.assignment, []).append(part)

    def sign(
        self,
        assignment: Assignment,
        outcomes: tuple[Outcome, ...],
        *,
        numeric: str,
        blocks: tuple[tuple[int, bytes], ...],
        is_last: bool,
    ) -> Done:
        """Return the message for some outcomes of an assignment, with the node's receipt for them."""
        root = receipts.levels([receipts.leaf(outcome) for outcome in outcomes])[-1][0]
        statement = receipts.statement(self.node, assignment.id, assignment.epoch, root, len(outcomes))
        return Done(
            self.node,
            assignment.id,
            assignment.epoch,
            outcomes,
            self.credentials.public_key,
            self.credentials.sign(statement),
            numeric,
            blocks,
            is_last,
        )

    def send(self, done: Done, *, is_safe_first: bool = False) -> None:
        """Publish a message and keep it until :meth:`settle`; never waits.

        ``is_safe_first``: it is on disk before anybody hears of it. What may have had effects should not run again only because
        this agent ended a moment after it had told of the result.
        """
        parts = self._open.setdefault(done.assignment, [])
        number = 1 + max((part.number for part in parts), default=-1)
        part = Part(number, encode(done), done.last, self.clock())
        parts.append(part)
        if not is_safe_first:
            self._offer(done.assignment, part)
            return
        part.next_offer_at_s = self.clock() + OFFER_AGAIN_MAX_S
        task = asyncio.create_task(self._keep_and_offer(done.assignment, part))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _keep_and_offer(self, assignment: str, part: Part) -> None:
        async with self._order:  # parts are told in the order in which they were made
            await self._spool([(assignment, part)])
            if part in self._open.get(assignment, ()):
                self._offer(assignment, part)

    def _offer(self, assignment: str, part: Part) -> None:
        part.offers += 1
        part.sent += 1
        pause = min(OFFER_AGAIN_MAX_S, OFFER_AGAIN_S * 2 ** (part.offers - 1)) * random.uniform(0.8, 1.2)
        part.next_offer_at_s = self.clock() + pause
        if part.sent == 1 and self.bus.connected:
            # The stream takes it without an answer; what counts is the leader's commit, and without one it is offered again.
            self.bus.post(subjects.node_done(self.node), part.data)
            self.bus.push()
            return
        # A name of its own for every offer: the broker must not take a deliberate repetition for a duplicate.
        task = asyncio.create_task(self._store(part, f"{assignment}.{part.number}.{part.sent}"))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _store(self, part: Part, message_id: str) -> None:
        try:
            await self.bus.store(subjects.node_done(self.node), part.data, message_id=message_id, timeout_s=STORE_TIMEOUT_S)
        except FlowmeshError as error:
            log.info("result %s is not with the broker yet: %s", message_id, error)
            part.next_offer_at_s = min(part.next_offer_at_s, self.clock() + random.uniform(0.5, 1.5))

    def offer_all(self) -> None:
        """Offer everything again, now and again soon: the connection is new, or the leader is, who may not listen yet."""
        for assignment, parts in self._open.items():
            for part in parts:
                part.offers = 0
                self._offer(assignment, part)
                part.next_offer_at_s = self.clock() + OFFER_SOON_S * random.uniform(0.8, 1.2)

    def settle(self, assignment: str) -> None:
        """Forget an assignment: the leader has shown that it is closed."""
        parts = self._open.pop(assignment, None)
        if parts and any(part.is_spooled for part in parts):
            task = asyncio.create_task(asyncio.to_thread(self.spool.drop, assignment))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def watch(self) -> None:
        """Spool what waits too long and offer again what is due, for ever."""
        while True:
            await asyncio.sleep(0.25)
            await self._spool_old()
            now = self.clock()
            due = [(name, part) for name, parts in self._open.items() for part in parts if part.next_offer_at_s <= now]
            for name, part in due:
                self._offer(name, part)

    async def _spool_old(self, older_than_s: float = SPOOL_AFTER_S) -> None:
        limit = self.clock() - older_than_s
        fresh = [(name, part) for name, parts in self._open.items() for part in parts if not part.is_spooled]
        await self._spool([(name, part) for name, part in fresh if part.made_at_s <= limit])

    async def _spool(self, old: list[tuple[str, Part]]) -> None:
        """Keep messages on disk. Where there is no room they stay in memory, and are offered all the same."""
        old = [(name, part) for name, part in old if not part.is_spooled]
        if not old:
            return
        for _, part in old:
            part.is_spooled = True
        try:
            await asyncio.to_thread(self.spool.write, [(name, part.number, part.data) for name, part in old])
        except OSError as error:
            if self.clock() - self._last_warned_s > WARN_EVERY_S:
                self._last_warned_s = self.clock()
                log.error("results cannot be kept on disk, only in memory: %s. Make room in %s", error, self.spool.folder)
            for _, part in old:
                part.is_spooled = False
        for name, _ in old:
            if name not in self._open:  # settled while it was written
                await asyncio.to_thread(self.spool.drop, name)

    async def close(self) -> None:
        """Spool what is left and let the messages on their way out go."""
        await self._spool_old(0.0)
        if self._sending:
            await asyncio.wait(self._sending, timeout=STORE_TIMEOUT_S)
