"""A core subscription and its callbacks."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from typing import TYPE_CHECKING

from flowmesh_mesh import tasks
from flowmesh_mesh.delivery import Delivery
from flowmesh_mesh.pull import Callback

if TYPE_CHECKING:
    from flowmesh_mesh.bus import Bus

log = logging.getLogger("flowmesh.bus")

BACKLOG_MAX_MESSAGES = 65_536
"""Messages that wait for a subscription's coroutine; beyond, the newest are dropped and logged."""


class Subscription:
    """A core subscription. Coroutines run one at a time and in order; what they raise is logged."""

    def __init__(self, bus: Bus, subject: str, queue: str, callback: Callback) -> None:
        self._bus = bus
        self._callback = callback
        self._backlog: deque[Delivery] = deque()
        self._wake = asyncio.Event()
        self.subject = subject
        self._worker = asyncio.create_task(self._work()) if inspect.iscoroutinefunction(callback) else None
        self._number = bus.connection.listen(subject, self._receive, queue)

    def _receive(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        delivery = Delivery(self._bus, subject.decode(), reply.decode(), data, headers)
        if self._worker is None:
            self._callback(delivery)
        elif len(self._backlog) < BACKLOG_MAX_MESSAGES:
            self._backlog.append(delivery)
            self._wake.set()
        else:
            log.warning("subscription to %s is too slow: dropped a message", self.subject)

    async def _work(self) -> None:
        while True:
            if not self._backlog:
                self._wake.clear()
                await self._wake.wait()
            delivery = self._backlog.popleft()
            try:
                result = self._callback(delivery)
                if result is not None:
                    await result
            except Exception:
                log.exception("callback for %s failed", delivery.subject)

    def mute(self) -> None:
        """Let the broker send nothing more; what is on its way is still delivered, until the bus was flushed."""
        if self._bus.connected:
            self._bus.connection.send(f"UNSUB {self._number}\r\n".encode())

    async def unsubscribe(self) -> None:
        """End the subscription; what waits is dropped."""
        self._bus.connection.unlisten(self._number)
        self._bus.forget(self)
        if self._worker is not None and self._worker is not asyncio.current_task():
            await tasks.end([self._worker])
