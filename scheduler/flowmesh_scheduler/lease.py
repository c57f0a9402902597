"""The scheduler's lease: a key with a time to live, renewed by compare-and-set.

The lease may be wrong (clocks, pauses); the fence of the guarded streams may not. So the lease only has to make one leader
likely, and a dead one's place free quickly. It is kept beside the leader's loop, which may be busy for seconds, but only while
that loop shows signs of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from flowmesh_cas.errors import FencedError, FlowmeshError, TransientError, UsageError
from flowmesh_mesh import subjects, tasks
from flowmesh_mesh.bus import Bus, Delivery, Expect, StoredMessage
from flowmesh_mesh.clock import monotonic_s, now_us
from flowmesh_mesh.messages import Lease, decode, encode

log = logging.getLogger("flowmesh.scheduler")

LEASE_S = 2.0
"""How long a lease lasts without being renewed; standbys count it themselves."""

BROKER_LEASE_S = 3.0
"""When the broker forgets a lease that is not renewed: it counts whole seconds, and is a little late."""

LOOK_TIMEOUT_S = 1.0

RENEW_S = 0.5
STUCK_S = 10.0
"""A leader whose loop shows no sign of life for so long is stuck: its lease is not renewed."""

_RELEASED = "KV-Operation"
_RAN_OUT = "Nats-Marker-Reason"


@dataclass(frozen=True, slots=True)
class Sight:
    """The lease as somebody saw it; without ``holder`` it is free, released if the holder gave it back itself."""

    seq: int = 0
    holder: str = ""
    life: str = ""
    secret: str = ""
    is_released: bool = False


class Change(Enum):
    """What became of the lease at the last look. RETAKEN: it had run out, and nobody else had taken it."""

    KEPT = "kept"
    RETAKEN = "retaken"
    UNSURE = "unsure"
    LOST = "lost"


async def look(bus: Bus) -> Sight:
    """Return who has the lease now; raise NotFoundError when its stream is gone."""
    return _sight(await bus.last_message(subjects.LEASE_STREAM, subjects.LEASE_SUBJECT, timeout_s=LOOK_TIMEOUT_S))


def _sight(last: StoredMessage | None) -> Sight:
    if last is None:
        return Sight()
    if not last.data or _RAN_OUT in last.headers or _RELEASED in last.headers:
        return Sight(last.seq, is_released=_RELEASED in last.headers)
    try:
        found = decode(last.data, Lease)
    except UsageError:  # a newer build wrote it: somebody holds it
        return Sight(last.seq, "?")
    return Sight(last.seq, found.leader, found.life, found.secret)


class SchedulerLease:
    """The right to lead, for one life of one process. ``revision`` grows with every renewal and every change of holder.

    ``held_until_s`` and ``pulse_s`` are read and written by two threads, one of them writing each.
    """

    def __init__(self, leader: str, secret: str = "") -> None:
        self.leader = leader
        self.secret = secret
        self.life = f"{random.getrandbits(64):016x}"
        self.revision = 0
        self.held_until_s = 0.0
        self.pulse_s = monotonic_s()

    @property
    def is_held(self) -> bool:
        """Tell whether nobody else can have it by now."""
        return monotonic_s() < self.held_until_s

    @property
    def is_stuck(self) -> bool:
        """Tell whether the leader's loop has stood still for long."""
        return monotonic_s() - self.pulse_s > STUCK_S

    def beat(self, allowance_s: float = 0.0) -> None:
        """Show a sign of life of the leader's loop; ``allowance_s``: something that takes so long comes now."""
        self.pulse_s = monotonic_s() + allowance_s

    async def take(self, bus: Bus, seq: int) -> bool:
        """Take the lease over what was seen at ``seq``; tell whether nobody was faster."""
        try:
            await self._put(bus, seq)
        except FencedError:
            return False
        self.beat()
        return True

    async def _put(self, bus: Bus, seq: int) -> None:
        began_s = monotonic_s()
        record = encode(Lease(self.leader, now_us(), life=self.life, secret=self.secret))
        self.revision = await bus.store(
            subjects.LEASE_SUBJECT, record, expect=Expect(seq), ttl_s=BROKER_LEASE_S, timeout_s=2 * RENEW_S
        )
        self.held_until_s = began_s + LEASE_S

    async def renew(self, bus: Bus) -> Change:
        """Extend the lease, or take it again where it ran out and is free; raise TransientError if the broker does not answer."""
        try:
            await self._put(bus, self.revision)
            return Change.KEPT
        except FencedError:
            seen = await look(bus)
        is_mine = seen.life == self.life and bool(seen.holder)  # the answer to a renewal was lost
        if seen.holder and not is_mine:
            return Change.LOST
        if not await self.take(bus, seen.seq):
            return Change.LOST
        return Change.KEPT if is_mine else Change.RETAKEN

    async def release(self, bus: Bus) -> None:
        """Give the lease back, so that a standby need not wait for its end."""
        self.held_until_s = 0.0
        headers = {_RELEASED: "DEL"}
        try:
            await bus.store(subjects.LEASE_SUBJECT, b"", headers=headers, expect=Expect(self.revision), timeout_s=0.5)
        except FlowmeshError as error:
            log.info("lease not released: %s", error)


OnChange = Callable[[Change], None]


async def keep(bus: Bus, lease: SchedulerLease, tell: OnChange) -> None:
    """Renew a lease until it is lost, and answer those who ask whether its holder is alive."""

    def answer(delivery: Delivery) -> None:
        if not lease.is_stuck:
            delivery.post_respond(lease.leader.encode())

    asked = await bus.subscribe(subjects.LEADER_ALIVE, answer)
    try:
        change = Change.KEPT
        was_stuck = False
        while change is not Change.LOST:
            await asyncio.sleep(RENEW_S * random.uniform(0.8, 1.0))
            if lease.is_stuck:
                if not was_stuck:
                    log.error("the leader's loop has shown no sign of life for %.0f s: the lease runs out", STUCK_S)
                    faulthandler.dump_traceback()
                was_stuck = True
                continue
            was_stuck = False
            change = await _renewed(bus, lease)
            tell(change)
    finally:
        with contextlib.suppress(FlowmeshError):
            await asked.unsubscribe()


async def _renewed(bus: Bus, lease: SchedulerLease) -> Change:
    try:
        return await lease.renew(bus)
    except FlowmeshError as error:
        log.info("the lease is not renewed: %s", error)
        if not isinstance(error, TransientError) or monotonic_s() > lease.held_until_s - 2 * RENEW_S:
            return Change.UNSURE
        return Change.KEPT


class Keeper(Protocol):
    """Keeps the lease of a leader beside its work."""

    async def open(self) -> None:
        """Connect."""

    async def hold(self, lease: SchedulerLease, tell: OnChange) -> None:
        """Keep this lease from now on; ``tell`` is called in the loop of the caller."""

    async def drop(self, *, is_released: bool) -> None:
        """Keep it no more; give it back if it ``is_released``."""

    async def close(self) -> None:
        """Disconnect."""


Connect = Callable[[], Awaitable[Bus]]


class TaskKeeper:
    """Keeps a lease in the loop of the leader: where one loop is all there is."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._bus: Bus | None = None
        self._lease: SchedulerLease | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._bus = await self._connect()

    async def hold(self, lease: SchedulerLease, tell: OnChange) -> None:
        assert self._bus is not None
        await self.drop(is_released=False)
        self._lease = lease
        self._keeping = asyncio.get_running_loop().create_task(keep(self._bus, lease, tell))

    async def drop(self, *, is_released: bool) -> None:
        keeping, self._keeping = self._keeping, None
        lease, self._lease = self._lease, None
        if keeping is not None:
            await tasks.end([keeping])
        if lease is not None and is_released and self._bus is not None:
            await lease.release(self._bus)

    async def close(self) -> None:
        await self.drop(is_released=False)
        if self._bus is not None:
            await self._bus.close()


class ThreadKeeper:
    """Keeps a lease from a thread with a loop and a connection of its own, whatever the leader's loop is busy with."""

    def __init__(self, connect: Connect) -> None:
        self._inner = TaskKeeper(connect)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def open(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="lease", daemon=True)
        self._thread.start()
        await self._there(self._inner.open())

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        loop.close()

    async def _there(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def hold(self, lease: SchedulerLease, tell: OnChange) -> None:
        loop = asyncio.get_running_loop()

        def tell_there(change: Change) -> None:
            with contextlib.suppress(RuntimeError):  # the leader's loop has ended
                loop.call_soon_threadsafe(tell, change)

        await self._there(self._inner.hold(lease, tell_there))

    async def drop(self, *, is_released: bool) -> None:
        await self._there(self._inner.drop(is_released=is_released))

    async def close(self) -> None:
        if self._loop is None or self._thread is None:
            return
        await self._there(self._inner.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join, 2.0)
