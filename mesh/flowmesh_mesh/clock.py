"""The time of this process: the wall clock that others may read, and a clock that only runs forward.

Everything that runs in a mesh asks here, so that a simulation can put one virtual clock under all of it, and a fault can make the
wall clock of one process jump (``FLOWMESH_CLOCK_OFFSET_FILE`` names a file with seconds to add, looked at again and again).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

OFFSET_FILE = "FLOWMESH_CLOCK_OFFSET_FILE"
_LOOK_AGAIN_NS = 50_000_000


class Clock(Protocol):
    """What a clock can be asked for."""

    def now_us(self) -> int:
        """Return microseconds since 1970; may jump."""

    def monotonic_ns(self) -> int:
        """Return nanoseconds since some moment; never goes back."""


class SystemClock:
    """The machine's own clocks."""

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()


class JumpingClock(SystemClock):
    """The machine's clocks, with the wall clock off by what a file says, in seconds; a missing file says 0."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_ns = -_LOOK_AGAIN_NS
        self._offset_us = 0

    def now_us(self) -> int:
        now_ns = time.monotonic_ns()
        if now_ns - self._looked_ns >= _LOOK_AGAIN_NS:
            self._looked_ns = now_ns
            try:
                self._offset_us = int(float(self._path.read_text()) * 1e6)
            except (OSError, ValueError):
                self._offset_us = 0
        return super().now_us() + self._offset_us


class SteadyClock:
    """The wall clock as it was when this began, and running evenly since: what is done to the wall clock does not reach it.

    For whoever tells from differences of times that something has been silent for too long.
    """

    def __init__(self) -> None:
        self._offset_us = now_us() - monotonic_ns() // 1000

    def now_us(self) -> int:
        """Return microseconds since 1970, as far as the wall clock was right at the beginning."""
        return monotonic_ns() // 1000 + self._offset_us


def _first_clock() -> Clock:
    path = os.environ.get(OFFSET_FILE)
    return JumpingClock(Path(path)) if path else SystemClock()


_current = _first_clock()


def replace(clock: Clock) -> Clock:
    """Put another clock in the place of this process's clock; return the one that was there."""
    global _current
    before, _current = _current, clock
    return before


def now_us() -> int:
    """Return the wall clock in microseconds since 1970."""
    return _current.now_us()


def monotonic_ns() -> int:
    """Return nanoseconds that never go back."""
    return _current.monotonic_ns()


def monotonic_s() -> float:
    """Return seconds that never go back."""
    return _current.monotonic_ns() / 1e9
