"""The scheduler's lease: a key with a time to live, renewed by compare-and-set.

The lease may be wrong (clocks, pauses); the fence of the guarded streams may not. So the lease only has to make one
leader likely, and a dead one's place free quickly.
"""

from __future__ import annotations

import asyncio
import logging

from flowmesh_cas.errors import FencedError, TransientError
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus, Expect, NoAnswerError
from flowmesh_mesh.messages import Lease, encode

log = logging.getLogger("flowmesh.scheduler")

LEASE_TTL_S = 3.0
RENEW_S = 1.0
_TOMBSTONES = ("Nats-Marker-Reason", "KV-Operation")


class SchedulerLease:
    """The right to lead, for one process. ``revision`` grows with every change of holder."""

    def __init__(self, bus: Bus, leader: str) -> None:
        self._bus = bus
        self._leader = leader
        self.revision = 0
        self.held_until = 0.0

    async def try_acquire(self, now_us: int) -> bool:
        """Take the lease if it is free, expired, or held by somebody who does not answer."""
        last = await self._bus.last_message(subjects.LEASE_STREAM, subjects.LEASE_SUBJECT)
        if last is not None and last.data and not any(name in last.headers for name in _TOMBSTONES) and await self._is_alive():
            return False
        return await self._put(last.seq if last is not None else 0, now_us)

    async def _is_alive(self) -> bool:
        try:
            await self._bus.request(subjects.LEADER_ALIVE, b"", timeout_s=LEASE_TTL_S)
        except NoAnswerError:
            return False
        except TransientError:
            return True  # there is a connection that does not answer: its lease decides
        return True

    async def _put(self, expected: int, now_us: int) -> bool:
        began = asyncio.get_running_loop().time()
        try:
            self.revision = await self._bus.store(
                subjects.LEASE_SUBJECT,
                encode(Lease(self._leader, now_us)),
                expect=Expect(expected),
                ttl_s=LEASE_TTL_S,
                timeout_s=RENEW_S,
            )
        except FencedError:
            return False
        self.held_until = began + LEASE_TTL_S
        return True

    async def renew(self, now_us: int) -> bool:
        """Extend the lease; False if somebody else has it now. Raise TransientError when the broker does not answer."""
        return await self._put(self.revision, now_us)

    async def release(self) -> None:
        """Give the lease back, so that a standby need not wait for its end."""
        try:
            await self._bus.store(
                subjects.LEASE_SUBJECT, b"", headers={"KV-Operation": "DEL"}, expect=Expect(self.revision), timeout_s=0.5
            )
        except (FencedError, TransientError) as error:
            log.info("lease not released: %s", error)
