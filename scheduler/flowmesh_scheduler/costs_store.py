"""Learned costs in the broker, so that a new leader need not learn them again: stream COSTS, the last value of each entry.

They carry no authority. Whoever leads writes what has changed; what a deposed leader may still write does no harm, and a leader
that cannot read them begins with what figures say.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from typing import Any

import msgspec

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_scheduler.core.costs import Costs

log = logging.getLogger("flowmesh.scheduler")

WRITE_S = 5.0
"""Pause between writes: what was learned in it is lost with the leader."""

_AT_ONCE = 64
_LAST_WRITE_S = 1.0


class CostsStore:
    """Keeps the costs of one leader."""

    def __init__(self, bus: Bus, costs: Costs) -> None:
        self._bus = bus
        self._costs = costs

    async def read(self) -> None:
        """Take over what earlier leaders have learned, as far as it can be read."""
        entries: list[Any] = []
        try:
            async for message in self._bus.read_stream(subjects.COSTS):
                with contextlib.suppress(msgspec.DecodeError):
                    entries.append(msgspec.msgpack.decode(message.data))
        except FlowmeshError as error:
            log.warning("learned costs cannot be read, beginning with the figures of devices: %s", error)
        refused = self._costs.restore(entries)
        if refused:
            log.warning("%d of %d entries of learned costs cannot be read", refused, len(entries))

    async def run(self) -> None:
        """Write what has changed, again and again."""
        while True:
            await asyncio.sleep(WRITE_S)
            await self.write()

    async def write(self, timeout_s: float = 2.0) -> None:
        """Write what has changed since the last time; what cannot be written is written with its next change."""
        changes = self._costs.take_changes()
        for begin in range(0, len(changes), _AT_ONCE):
            part = [(_subject(name), msgspec.msgpack.encode(entry)) for name, entry in changes[begin : begin + _AT_ONCE]]
            written = await asyncio.gather(
                *(self._bus.store(subject, data, timeout_s=timeout_s) for subject, data in part), return_exceptions=True
            )
            failed = next((each for each in written if isinstance(each, BaseException)), None)
            if isinstance(failed, FlowmeshError):
                log.warning("learned costs cannot be written: %s", failed)
                return
            if failed is not None:
                raise failed

    async def close(self) -> None:
        """Write what is left, briefly."""
        with contextlib.suppress(FlowmeshError, TimeoutError):
            async with asyncio.timeout(_LAST_WRITE_S):
                await self.write(_LAST_WRITE_S)


def _subject(name: str) -> str:
    return subjects.cost(hashlib.sha256(name.encode()).hexdigest()[:24])
