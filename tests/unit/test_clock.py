"""Clocks that jump, and one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh_mesh import clock


class Hands:
    """A clock whose hands a test moves."""

    wall_us = 1_000_000
    even_ns = 0

    def now_us(self) -> int:
        return self.wall_us

    def monotonic_ns(self) -> int:
        return self.even_ns


@pytest.fixture
def hands() -> Iterator[Hands]:
    made = Hands()
    before = clock.replace(made)
    yield made
    clock.replace(before)


def test_a_steady_clock_runs_on_evenly_whatever_is_done_to_the_wall_clock(hands: Hands) -> None:
    steady = clock.SteadyClock()
    assert steady.now_us() == 1_000_000
    hands.wall_us += 60_000_000
    assert steady.now_us() == 1_000_000
    hands.even_ns += 5_000
    assert steady.now_us() == 1_000_005


def test_a_file_moves_the_wall_clock_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "offset"
    jumping = clock.JumpingClock(path)
    path.write_text("3600")
    assert jumping.now_us() - clock.SystemClock().now_us() == pytest.approx(3600e6, abs=60e6)
    assert abs(jumping.monotonic_ns() - clock.SystemClock().monotonic_ns()) < 60 * 10**9
