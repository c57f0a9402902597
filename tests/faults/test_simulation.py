"""The production code under faults, on seeds that must keep every promise; and the simulation itself: it repeats to the bit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from tests.faults.loop import FROZEN, Process, VirtualLoop
from tests.faults.simulation import simulate
from tests.hash_seeds import told_under

from flowmesh_node.epochs import Epochs
from flowmesh_scheduler.guarded import GuardedStream
from flowmesh_scheduler.lease import SchedulerLease

MINUTES = 3.0
SEEDS = range(25)

_DIGESTS = """
import logging; logging.disable(logging.CRITICAL)
from tests.faults.simulation import simulate
for seed in (2, 5, 9): print(simulate(seed, 2.0).digest)
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_promises_hold_under_faults(seed: int) -> None:
    report = simulate(seed, MINUTES)
    again = f"again: .venv/bin/python -m tests.faults --seed {seed} --minutes {MINUTES:g}"
    assert not report.problems, "\n".join([*report.problems, again])
    assert report.executions > 0


def test_a_seed_gives_the_same_history_whatever_the_order_of_sets() -> None:
    first, second = told_under(("1", "2"), _DIGESTS, timeout_s=300)
    assert len(first) == 3
    assert first == second


# --- planted faults of the product: what the checkers are for


def broken(seeds: range, text: str, kinds: tuple[str, ...]) -> bool:
    """Tell whether one of these seeds breaks P3 in these words."""
    found = (simulate(seed, MINUTES, kinds).problems for seed in seeds)
    return any(problem.startswith("P3") and text in problem for problems in found for problem in problems)


async def _unfenced(self: GuardedStream, *arguments: Any) -> int:
    """Raise the epoch, and forget to name it with every write."""
    epoch = await _raise_epoch(self, *arguments)
    self._fence = None
    return epoch


_raise_epoch = GuardedStream.raise_epoch


def test_a_leader_without_a_fence_is_found() -> None:
    with (
        mock.patch.object(GuardedStream, "raise_epoch", _unfenced),
        mock.patch.object(SchedulerLease, "is_held", mock.PropertyMock(return_value=True)),
    ):
        assert broken(range(1, 9), " wrote ", ("scheduler-freeze", "scheduler-hole"))


def test_a_node_that_hears_deposed_leaders_is_found() -> None:
    with (
        mock.patch.object(GuardedStream, "raise_epoch", _unfenced),
        mock.patch.object(SchedulerLease, "is_held", mock.PropertyMock(return_value=True)),
        mock.patch.object(Epochs, "is_stale", return_value=False),
    ):
        assert broken(range(1, 9), " began ", ("scheduler-freeze",))


# --- the loop


def run(work: Callable[[VirtualLoop], Any]) -> None:
    loop = VirtualLoop(1)
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(work(loop))
    finally:
        asyncio.set_event_loop(None)


def test_time_jumps_to_what_is_due_and_the_frozen_and_dead_do_nothing() -> None:
    seen: list[tuple[float, str]] = []

    async def main(loop: VirtualLoop) -> None:
        began_s = loop.time()

        async def tick(name: str) -> None:
            for _ in range(5):
                await asyncio.sleep(100.0)
                await asyncio.to_thread(lambda: None)
                seen.append((round(loop.time() - began_s), name))

        frozen, dead = Process(loop, "frozen", random.Random(1)), Process(loop, "dead", random.Random(1))
        frozen.start(lambda: tick("frozen"))
        dead.start(lambda: tick("dead"))
        await asyncio.sleep(150.0)
        frozen.freeze()
        assert frozen.state is FROZEN
        dead.kill()
        await asyncio.sleep(250.0)
        frozen.thaw()
        await asyncio.sleep(1000.0)

    run(main)
    assert sorted(seen) == [(100, "dead"), (100, "frozen"), (400, "frozen"), (500, "frozen"), (600, "frozen"), (700, "frozen")]
