"""The events of one run, in order, with gaps healed by asking the leader for the whole state."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from flowmesh_cas.errors import FlowmeshError, UsageError
from flowmesh_mesh.messages import RunEvent, decode, is_json

KEPT_EVENTS = 4096
"""Events kept for readers that come late or are slow; older ones are replaced by a ``state`` event."""

SILENCE_S = 5.0
"""After so long without an event the state is asked for: events are sent once and may be lost."""

_STATES = {"received": "received", "accepted": "accepted", "operators": "accepted", "rejected": "rejected"}

ENDS = frozenset({"succeeded", "failed", "cancelled", "rejected"})


def decode_event(data: bytes) -> RunEvent:
    """Return the event in a payload, msgpack or JSON; raise UsageError when it is neither."""
    if not is_json(data):
        return decode(data, RunEvent)
    try:
        plain = msgspec.json.decode(data, type=dict[str, Any])
        run, seq, at_us, kind = (plain.pop(name) for name in ("run", "seq", "at_us", "kind"))
        return RunEvent(str(run), int(seq), int(at_us), str(kind), plain)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"unreadable event: {error!r}") from error


def ended_event(run: str, state: dict[str, Any]) -> RunEvent:
    """Return the ``ended`` event that a run's state amounts to, for whoever missed the real one."""
    names = ("state", "reason", "actor", "detail", "counts", "outputs", "outputs_total", "saved_us")
    body = {name: state[name] for name in names if state.get(name) is not None}
    return RunEvent(run, int(state.get("seq") or 0), int(state.get("ended_at_us") or 0), "ended", body)


class Feed:
    """Collects a run's events for any number of readers.

    Readers see: every event since the feed was opened, in order; after a gap one event of kind ``state``, whose body is the
    leader's answer to ``run`` and stands for all that was missed; and ``ended`` last, once, whatever was lost.
    """

    def __init__(
        self, run: str, state: Callable[[], Awaitable[dict[str, Any]]], on_end: Callable[[], None] = lambda: None
    ) -> None:
        self.run = run
        self.end: RunEvent | None = None
        self.state = ""
        self._state = state
        self._on_end = on_end
        self._events: deque[RunEvent] = deque()
        self._first = 0
        self._last_seq: int | None = None
        self._held_back: list[RunEvent] = []
        self._healing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def receive(self, data: bytes) -> None:
        """Take one payload from the bus; what cannot be read is dropped, and shows as a gap."""
        try:
            event = decode_event(data)
        except UsageError:
            return
        if self._healing is not None:
            self._held_back.append(event)
        elif self._is_next(event):
            self._append(event)
        elif self._last_seq is None or event.seq > self._last_seq:
            self._held_back.append(event)
            self.heal()

    def _is_next(self, event: RunEvent) -> bool:
        if self._last_seq is None:
            return event.kind in ("received", "accepted", "rejected")
        return event.seq == self._last_seq + 1 or event.kind == "ended"

    def _append(self, event: RunEvent) -> None:
        if self.end is not None:
            return
        self._last_seq = event.seq
        if event.kind == "ended":
            if event.body.get("changes"):  # the last of them came with the end: readers see them before it
                self._events.append(RunEvent(event.run, event.seq, event.at_us, "operators", event.body))
            self.end = event
        elif event.kind == "rejected":
            body = {"state": "rejected", "reason": "rejected", "detail": event.body.get("error", "")}
            self.end = (
                event if "state" in event.body else RunEvent(event.run, event.seq, event.at_us, event.kind, event.body | body)
            )
        self.state = _STATES.get(event.kind) or str(event.body.get("state") or self.state)
        self._events.append(self.end or event)
        if len(self._events) > KEPT_EVENTS:
            self._events.popleft()
            self._first += 1
        self._changed.set()
        self._changed = asyncio.Event()
        if self.end is not None:
            self._on_end()

    def heal(self) -> None:
        """Ask for the state unless that is under way; it arrives as an event of kind ``state``."""
        if self._healing is None and self.end is None:
            self._healing = asyncio.get_running_loop().create_task(self._heal())

    async def _heal(self) -> None:
        try:
            self._take_state(await self._state())
        except FlowmeshError:
            pass  # asked again after the next silence; the waiter's own deadline decides how often
        finally:
            self._healing = None
            held, self._held_back = self._held_back, []
            for event in held:
                if event.kind == "ended" or self._last_seq is None or event.seq > self._last_seq:
                    self._append(event)

    def _take_state(self, state: dict[str, Any]) -> None:
        seq = int(state.get("seq") or 0)
        ended = state.get("state") in ENDS
        if self._last_seq is None or seq > self._last_seq or ended:
            self._append(RunEvent(self.run, max(seq, self._last_seq or 0), int(state.get("accepted_at_us") or 0), "state", state))
        if ended:
            self._append(ended_event(self.run, state))

    async def wait(self, timeout_s: float) -> bool:
        """Wait for the next event; return False when none came in ``timeout_s`` seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def until(self, is_reached: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until ``is_reached`` holds, asking for the state after a silence; return False at the timeout."""
        loop = asyncio.get_running_loop()
        end = None if timeout_s is None else loop.time() + timeout_s
        while not is_reached():
            left = SILENCE_S * random.uniform(0.8, 1.2) if end is None else end - loop.time()
            if left <= 0:
                return False
            if not await self.wait(min(left, SILENCE_S)):
                self.heal()
        return True

    @property
    def position(self) -> int:
        """Return the number that the next event will have."""
        return self._first + len(self._events)

    async def events(self) -> AsyncIterator[RunEvent]:
        """Yield the events kept so far, then those that come, up to and with the end of the run."""
        async for _, event in self.numbered(self._first):
            yield event

    async def numbered(self, position: int) -> AsyncIterator[tuple[int, RunEvent]]:
        """Yield (number, event) from number ``position`` on, up to and with the end of the run."""
        while True:
            if position < self._first:  # this reader was slower than the events
                position = self.position - (self.end is not None)
                yield position, RunEvent(self.run, self._last_seq or 0, 0, "state", await self._state())
            elif position < self.position:
                event = self._events[position - self._first]
                position += 1
                yield position - 1, event
                if event is self.end:
                    return
            elif self.end is not None:
                return
            elif not await self.wait(SILENCE_S * random.uniform(0.8, 1.2)):
                self.heal()

    async def close(self) -> None:
        """Stop asking."""
        task, self._healing = self._healing, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, FlowmeshError):
                await task
