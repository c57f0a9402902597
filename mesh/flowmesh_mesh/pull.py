"""The pull loop: messages of a durable consumer, as fast as they come.

Two requests are outstanding at any time, each on an inbox of its own, so that there is no gap while one is renewed.
A request is renewed when it is used up, when it expires, when the connection or the consumer changed under it, and
when its heartbeats stop.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh import tasks
from flowmesh_mesh.delivery import DESCRIPTION, STATUS, Delivery, parse_headers

if TYPE_CHECKING:
    from flowmesh_mesh.bus import Bus

log = logging.getLogger("flowmesh.bus")

HEARTBEAT_S = 5.0
RETRY_MAX_S = 1.0
_SLOTS = 2
_QUIET = {"404", "408"}

Callback = Callable[[Delivery], Awaitable[None] | None]


class _Slot:
    """One outstanding request."""

    def __init__(self) -> None:
        self.number = 0
        self.inbox = ""
        self.left = 0
        self.heard_at = 0.0
        self.retry: asyncio.TimerHandle | None = None


class Pull:
    """A running pull. Callbacks run one at a time, in order; what they raise is logged and the message stays unsettled.

    A plain function is called in the read loop itself and must be quick; a coroutine function runs in a task.
    """

    def __init__(self, bus: Bus, stream: str, consumer: str, callback: Callback, *, batch: int, expires_s: float) -> None:
        self._bus = bus
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._callback = callback
        self._batch = batch
        self._request = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (
            batch,
            int(expires_s * 1e9),
            int(min(HEARTBEAT_S, expires_s / 2.5) * 1e9),
        )
        self._patience_s = 2.4 * min(HEARTBEAT_S, expires_s / 2.5)
        self._loop = asyncio.get_running_loop()
        self._slots = [_Slot() for _ in range(_SLOTS)]
        self._failures = 0
        self._is_stopped = False
        self._queue: deque[tuple[_Slot, Delivery]] = deque()
        self._wake = asyncio.Event()
        self._worker = asyncio.create_task(self._work()) if inspect.iscoroutinefunction(callback) else None
        self._watch = asyncio.create_task(self._watch_heartbeats())

    def start(self) -> None:
        """Ask with every slot, each on a fresh inbox; also after a reconnection."""
        for slot in self._slots:
            self._renew(slot)

    def _renew(self, slot: _Slot) -> None:
        """Forget the old request of a slot and ask anew."""
        if slot.number:
            self._bus.connection.unlisten(slot.number)
        slot.inbox = self._bus.new_inbox()
        slot.number = self._bus.connection.listen(slot.inbox, lambda *message: self._receive(slot, *message))
        self._ask(slot)

    def _ask(self, slot: _Slot) -> None:
        if slot.retry is not None:
            slot.retry.cancel()
            slot.retry = None
        if self._is_stopped or not self._bus.connected:
            return
        slot.left = self._batch
        slot.heard_at = self._loop.time()
        self._bus.post(self._subject, self._request, reply=slot.inbox)

    def _ask_later(self, slot: _Slot) -> None:
        self._failures += 1
        bound = min(RETRY_MAX_S, 0.01 * 2 ** min(self._failures, 10))
        slot.retry = self._loop.call_later(random.uniform(bound / 2, bound), self._ask, slot)

    def _receive(self, slot: _Slot, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        slot.heard_at = self._loop.time()
        if headers and not reply.startswith(b"$JS.ACK"):
            self._receive_status(slot, parse_headers(headers))
            return
        self._failures = 0
        self._bus.note_answer()
        delivery = Delivery(self._bus, subject.decode(), reply.decode(), data, headers)
        if self._worker is None:
            try:
                self._callback(delivery)
            except Exception:
                log.exception("callback for %s failed", delivery.subject)
            self._settle(slot)
        else:
            self._queue.append((slot, delivery))
            self._wake.set()

    def _receive_status(self, slot: _Slot, headers: dict[str, str]) -> None:
        status = headers.get(STATUS, "")
        if status == "503":
            self._bus.note_silence(self._subject)
        else:
            self._bus.note_answer()
        if status == "100" or slot.retry is not None:
            return
        if status in _QUIET:
            self._ask(slot)
            return
        if status != "503" and "Leadership" not in headers.get(DESCRIPTION, ""):
            log.info("pull from %s: %s %s", self._subject, status, headers.get(DESCRIPTION, ""))
        self._ask_later(slot)

    def _settle(self, slot: _Slot) -> None:
        """Count a message that was worked off; ask again when the request is used up."""
        slot.left -= 1
        if slot.left == 0:
            self._ask(slot)

    async def _work(self) -> None:
        while not self._is_stopped:
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            slot, delivery = self._queue.popleft()
            try:
                result = self._callback(delivery)
                if result is not None:
                    await result
            except Exception:
                log.exception("callback for %s failed", delivery.subject)
            self._settle(slot)

    async def _watch_heartbeats(self) -> None:
        """Renew what went silent although connected: the broker has forgotten the request."""
        while not self._is_stopped:
            await asyncio.sleep(self._patience_s / 3)
            for slot in self._slots:
                silent_s = self._loop.time() - slot.heard_at
                if silent_s > self._patience_s and slot.retry is None and self._bus.connected and not self._queue:
                    self._bus.note_silence(self._subject)
                    try:
                        self._renew(slot)
                    except FlowmeshError as error:
                        log.warning("pull from %s: %s", self._subject, error)

    async def stop(self) -> None:
        """End the pull; a message that is being worked on is finished by nobody and comes again later."""
        self._is_stopped = True
        self._bus.forget(self)
        for slot in self._slots:
            self._bus.connection.unlisten(slot.number)
            if slot.retry is not None:
                slot.retry.cancel()
        running = [task for task in (self._worker, self._watch) if task is not None and task is not asyncio.current_task()]
        await tasks.end(running)
