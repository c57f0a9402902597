"""Peer ``ray``: Ray tasks on two workers, as its documentation shows them. Nothing is synced to disk."""

from __future__ import annotations

import os
import time
from typing import Any


def _noop(number: int, before: Any = None) -> int:
    return number


def _give(number: int, size_bytes: int, before: Any = None) -> bytes:
    return os.urandom(size_bytes)


def _take(*parts: bytes) -> int:
    return sum(len(part) for part in parts)


class RayTasks:
    """Ray's tasks, behind the contract of the benchmarks."""

    def start(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        self._ray = ray
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=1_000_000_000
        )

        self._noop, self._give, self._take = (ray.remote(function) for function in (_noop, _give, _take))
        self.independent(2_000, 0)
        self.single(50, 0)

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

    def stop(self) -> None:
        self._ray.shutdown()
