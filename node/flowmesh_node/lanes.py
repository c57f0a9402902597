"""Turns on processes: so many batches at a time, in order of arrival, those that load nothing before those that must."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

PASSED_OVER_MAX = 4
"""How many later batches may go before one that must load a model first: each saves a load, but nobody waits for ever."""


@dataclass(slots=True, eq=False)
class _Waiter:
    needs_load: Callable[[], bool]
    turn: asyncio.Future[None]
    passed_over: int = 0


class Lane:
    """Gives ``size`` turns at a time. What waits here has its inputs laid out: it begins as soon as a turn is free."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiting: list[_Waiter] = []

    async def enter(self, needs_load: Callable[[], bool]) -> None:
        """Wait for a turn; ``needs_load`` tells whether, at that moment, no idle process keeps what the batch needs."""
        if self._free and not self._waiting:
            self._free -= 1
            return
        waiter = _Waiter(needs_load, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.cancelled():
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
            else:
                self.leave()  # the turn came in the same moment
            raise

    def leave(self) -> None:
        """Give a turn back, to the next that waits."""
        self._free += 1
        # One that was cancelled a moment ago may not have run since: it takes no turn with it.
        self._waiting = [each for each in self._waiting if not each.turn.cancelled()]
        if self._waiting:
            self._free -= 1
            self._waiting.pop(self._next()).turn.set_result(None)

    def _next(self) -> int:
        if self._waiting[0].passed_over >= PASSED_OVER_MAX:
            return 0
        ready = next((place for place, each in enumerate(self._waiting) if not each.needs_load()), 0)
        for each in self._waiting[:ready]:
            each.passed_over += 1
        return ready
