"""Peers ``ray`` and ``ray-actor``: tasks on two workers, and two actors, as its documentation shows them. Nothing is synced."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from typing import Any

from bench.workloads import BATCH_S, ITEM_S

WORKERS = 2


def _noop(number: int, before: Any = None) -> int:
    return number


def _give(number: int, size_bytes: int, before: Any = None) -> bytes:
    return os.urandom(size_bytes)


def _take(*parts: bytes) -> int:
    return sum(len(part) for part in parts)


def _wait(numbers: Sequence[int]) -> list[int]:
    time.sleep(BATCH_S + ITEM_S * len(numbers))
    return list(numbers)


class RayTasks:
    """Ray's tasks, behind the contract of the benchmarks."""

    def start(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        self._ray = ray
        ray.init(
            num_cpus=WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=1_000_000_000,
        )

        self._place(ray)
        self.independent(2_000, 0)
        self.single(50, 0)

    def _place(self, ray: Any) -> None:
        """Set what the workloads call ``remote`` on."""
        self._noop, self._give, self._take, self._wait = (ray.remote(function) for function in (_noop, _give, _take, _wait))

    def independent(self, count: int, seed: int) -> float:
        began = time.perf_counter()
        results = self._ray.get([self._noop.remote(number) for number in range(count)])
        took_s = time.perf_counter() - began
        assert len(results) == count
        return took_s

    def single(self, count: int, seed: int) -> list[float]:
        took_s = []
        for number in range(count):
            began = time.perf_counter()
            self._ray.get(self._noop.remote(number))
            took_s.append(time.perf_counter() - began)
            time.sleep(0.002)
        return took_s

    def chain(self, count: int, seed: int) -> float:
        began = time.perf_counter()
        last: Any = None
        for number in range(count):
            last = self._noop.remote(number, last)
        assert self._ray.get(last) == count - 1
        return time.perf_counter() - began

    def _collected(self, count: int, size_bytes: int, before: Any) -> float:
        began = time.perf_counter()
        parts = [self._give.remote(number, size_bytes, before) for number in range(count)]
        assert self._ray.get(self._take.remote(*parts)) == count * size_bytes
        return time.perf_counter() - began

    def fan(self, width: int, size_bytes: int, seed: int) -> float:
        began = time.perf_counter()
        self._collected(width, size_bytes, self._noop.remote(seed))
        return time.perf_counter() - began

    def gather(self, count: int, size_bytes: int, seed: int) -> float:
        return self._collected(count, size_bytes, None)

    def batched(self, count: int, seed: int) -> list[float]:
        """Run the requests one by one: tasks are not batched."""
        return [self._waited(count, 1)]

    def _waited(self, count: int, size: int) -> float:
        began = time.perf_counter()
        numbers = range(count)
        results = self._ray.get([self._wait.remote(numbers[first : first + size]) for first in range(0, count, size)])
        took_s = time.perf_counter() - began
        assert sum(len(part) for part in results) == count
        return took_s

    def stop(self) -> None:
        self._ray.shutdown()


class _Actor:
    """Everything that the workloads call, as methods of one worker that stays."""

    def noop(self, number: int, before: Any = None) -> int:
        return _noop(number, before)

    def give(self, number: int, size_bytes: int, before: Any = None) -> bytes:
        return _give(number, size_bytes, before)

    def take(self, *parts: bytes) -> int:
        return _take(*parts)

    def wait(self, numbers: Sequence[int]) -> list[int]:
        return _wait(numbers)


class _Spread:
    """One method of several actors, called in turn."""

    def __init__(self, methods: Sequence[Any]) -> None:
        self._methods = itertools.cycle(methods)

    def remote(self, *arguments: Any) -> Any:
        return next(self._methods).remote(*arguments)


class RayActors(RayTasks):
    """Two actors, calls spread over them; W7 in the two batches that somebody who knows the costs would cut by hand."""

    def _place(self, ray: Any) -> None:
        actors = [ray.remote(_Actor).remote() for _ in range(WORKERS)]
        self._noop, self._give, self._take, self._wait = (
            _Spread([getattr(actor, name) for actor in actors]) for name in ("noop", "give", "take", "wait")
        )

    def batched(self, count: int, seed: int) -> list[float]:
        return [self._waited(count, -(-count // WORKERS))]
