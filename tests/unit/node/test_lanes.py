"""Turns on processes: order, models that are there already, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from flowmesh_node import executors
from flowmesh_node.executors import Executors
from flowmesh_node.lanes import PASSED_OVER_MAX, Lane


class _Process:
    """An executor without a process: it keeps the models that it is told to."""

    made: ClassVar[list[_Process]] = []

    def __init__(self, kind: str, environment: Mapping[str, str]) -> None:
        self.kind = kind
        self.resident: tuple[str, ...] = ()
        self.used_at = 0
        self.is_busy = self.is_lent = False
        self.is_alive = True
        self.pid = 0
        self.made.append(self)

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def kill(self) -> None:
        self.is_alive = False


class _Batches:
    """Batches on executors; each runs until it is told to end."""

    def __init__(self, slots: int) -> None:
        self.pool = Executors({}, slots=slots, user_slots=1, memory_bytes=2**40)
        self.began: list[str] = []
        self.ran_on: dict[str, Any] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._clock = 0

    async def arrive(self, name: str, *models: str, kind: str = "engine") -> None:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._run(name, models, kind))
        await self.settle()

    async def _run(self, name: str, models: tuple[str, ...], kind: str) -> None:
        async with self.pool.lent(kind, models) as process:
            self.began.append(name)
            self.ran_on[name] = process
            await self._ends[name].wait()
            self._clock += 1
            process.resident = models or process.resident
            process.used_at = self._clock

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> list[_Process]:
    monkeypatch.setattr(executors, "Executor", _Process)
    monkeypatch.setattr(_Process, "made", [])
    monkeypatch.setattr(Executors, "_free_bytes", lambda self: 2**40)
    return _Process.made


async def test_batches_of_one_kind_follow_each_other_on_one_process(processes: list[_Process]) -> None:
    batches = _Batches(slots=1)
    for name in ("a", "b", "c"):
        await batches.arrive(name, "x")
    assert batches.began == ["a"]
    await batches.end("a")
    assert batches.began == ["a", "b"]
    await batches.end("b")
    assert batches.began == ["a", "b", "c"]
    assert len(processes) == 1


async def test_a_batch_whose_model_is_loaded_goes_before_one_that_must_load() -> None:
    batches = _Batches(slots=1)
    await batches.arrive("first", "x")
    await batches.arrive("other", "y")
    await batches.arrive("same", "x")
    await batches.end("first")
    assert batches.began == ["first", "same"]
    await batches.end("same")
    assert batches.began == ["first", "same", "other"]


async def test_a_batch_without_a_model_is_not_passed_over() -> None:
    batches = _Batches(slots=1)
    await batches.arrive("first", "x")
    await batches.arrive("plain")
    await batches.arrive("training", "x", kind="train")
    await batches.arrive("same", "x")
    for name in ("first", "plain", "training"):
        await batches.end(name)
    assert batches.began == ["first", "plain", "training", "same"]


async def test_a_batch_that_must_load_is_passed_over_so_often_and_no_more() -> None:
    batches = _Batches(slots=1)
    await batches.arrive("0", "x")
    await batches.arrive("other", "y")
    for number in range(1, PASSED_OVER_MAX + 3):
        await batches.arrive(str(number), "x")
    for number in range(PASSED_OVER_MAX + 1):
        await batches.end(str(number))
    assert batches.began == [*(str(number) for number in range(PASSED_OVER_MAX + 1)), "other"]


async def test_each_model_stays_on_its_process(processes: list[_Process]) -> None:
    batches = _Batches(slots=2)
    await batches.arrive("x1", "x")
    await batches.arrive("y1", "y")
    await batches.arrive("y2", "y")
    await batches.arrive("x2", "x")
    await batches.end("x1")
    assert batches.began == ["x1", "y1", "x2"]
    await batches.end("y1")
    assert batches.ran_on["x2"] is batches.ran_on["x1"]
    assert batches.ran_on["y2"] is batches.ran_on["y1"]
    assert len(processes) == 2


async def test_a_new_model_goes_to_a_process_that_keeps_none(processes: list[_Process]) -> None:
    batches = _Batches(slots=2)
    await batches.arrive("x1", "x")
    await batches.arrive("plain")
    await batches.end("plain")
    await batches.end("x1")
    await batches.arrive("y1", "y")
    assert batches.ran_on["y1"] is batches.ran_on["plain"]
    assert len(processes) == 2


async def test_a_batch_that_leaves_the_queue_holds_no_turn() -> None:
    batches = _Batches(slots=1)
    for name in ("a", "b", "c"):
        await batches.arrive(name)
    await batches.cancel("b")
    await batches.end("a")
    assert batches.began == ["a", "c"]
    await batches.cancel("c")
    await batches.arrive("d")
    assert batches.began == ["a", "c", "d"]


async def test_a_turn_that_comes_with_the_cancellation_goes_to_the_next() -> None:
    lane, entered = Lane(1), []

    async def one(name: str) -> None:
        await lane.enter(lambda: False)
        entered.append(name)

    await one("holder")
    tasks = [asyncio.create_task(one(name)) for name in ("gone", "next")]
    await asyncio.sleep(0)
    lane.leave()
    tasks[0].cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await tasks[0]
    await tasks[1]
    assert entered == ["holder", "next"]


async def test_a_turn_given_back_as_the_one_who_waits_is_cancelled_is_not_lost() -> None:
    lane = Lane(1)
    await lane.enter(bool)
    waiting = [asyncio.create_task(lane.enter(bool)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    lane.leave()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert waiting[0].cancelled()
    assert waiting[1].exception() is None
    lane.leave()
    await asyncio.wait_for(lane.enter(bool), 10)
