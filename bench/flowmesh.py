"""FlowMesh itself: an embedded mesh of two nodes, credentials on, through the Python client as users have it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from bench.workloads import BATCH_S, ITEM_S
from flowmesh_mesh.client import connect

NODES = 2
WARM_UPS = 2
"""Rounds of W7 before those that are timed: the mesh learns what a batch costs."""

TIMED_ROUNDS = 3
COMMAND = str(Path(sys.executable).with_name("flowmesh"))
RUN_TIMEOUT_S = 300.0
T = TypeVar("T")
Document = dict[str, Any]


def document(operators: dict[str, Document], last: str) -> Document:
    """Return a workflow of ``operators`` whose result is what ``last`` gives."""
    return {"apiVersion": "flowmesh/v1", "name": "bench", "operators": operators, "outputs": {"last": f"{last}.out"}}


def noop(nonce: int, after: str | list[str] = "", size_bytes: int = 0) -> Document:
    """Return one no-op; ``nonce`` makes it differ from every other."""
    operator: Document = {"type": "flow.noop", "with": {"nonce": nonce, "bytes": size_bytes}}
    if after:
        operator["inputs"] = {"after": after}
    return operator


def delay(nonce: int) -> Document:
    """Return one request of W7."""
    return {"type": "flow.delay", "with": {"nonce": nonce, "batch_s": BATCH_S, "item_s": ITEM_S}}


def collected(count: int, size_bytes: int, first: int, before: str = "") -> dict[str, Document]:
    """Return ``count`` operators that give ``size_bytes`` each, and ``last``, which takes them all."""
    parts = {f"n{number}": noop(first + number, before, size_bytes) for number in range(count)}
    return parts | {"last": noop(first + count, [f"{name}.out" for name in parts])}


class FlowMesh:
    """The mesh, behind the contract of the benchmarks."""

    def start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bench-flowmesh-"))
        self._runner = asyncio.Runner()
        subprocess.run([COMMAND, "up", "--nodes", str(NODES), "--dir", str(self._folder)], check=True, timeout=60)
        self._mesh = connect(self._folder)
        self._run(self._mesh.open())
        self._run(self._nodes_are_there())
        self.independent(500, 0)
        self.single(20, 0)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    async def _nodes_are_there(self) -> None:
        async with asyncio.timeout(60):
            while len(await self._mesh.nodes()) < NODES:  # noqa: ASYNC110 - the leader is asked, it does not tell
                await asyncio.sleep(0.1)

    async def _result(self, workflow: Document) -> None:
        run = await self._mesh.submit(workflow)
        results = await run.result(RUN_TIMEOUT_S)
        counts = dict(results.counts or {})
        assert counts.get("done") == len(workflow["operators"]), f"not every operator is done: {counts}"

    def _timed(self, workflow: Document) -> float:
        began = time.perf_counter()
        self._run(self._result(workflow))
        return time.perf_counter() - began

    def independent(self, count: int, seed: int) -> float:
        operators = {f"n{number}": noop(seed * 1_000_000 + number) for number in range(count)}
        return self._timed(document(operators, f"n{count - 1}"))

    def single(self, count: int, seed: int) -> list[float]:
        async def each() -> list[float]:
            took_s = []
            for number in range(count):
                workflow = document({"one": noop(seed * 1_000_000 + 500_000 + number)}, "one")
                began = time.perf_counter()
                await self._result(workflow)
                took_s.append(time.perf_counter() - began)
                await asyncio.sleep(0.002)
            return took_s

        return self._run(each())

    def chain(self, count: int, seed: int) -> float:
        operators = {
            f"n{number}": noop(seed * 1_000_000 + number, f"n{number - 1}.out" if number else "") for number in range(count)
        }
        return self._timed(document(operators, f"n{count - 1}"))

    def fan(self, width: int, size_bytes: int, seed: int) -> float:
        first = seed * 1_000_000
        return self._timed(document({"first": noop(first)} | collected(width, size_bytes, first + 1, "first.out"), "last"))

    def gather(self, count: int, size_bytes: int, seed: int) -> float:
        return self._timed(document(collected(count, size_bytes, seed * 1_000_000), "last"))

    def batched(self, count: int, seed: int) -> list[float]:
        took_s = []
        for number in range(WARM_UPS + TIMED_ROUNDS):
            first = seed * 1_000_000 + number * count
            operators = {f"n{place}": delay(first + place) for place in range(count)}
            took_s.append(self._timed(document(operators, f"n{count - 1}")))
        return took_s[WARM_UPS:]

    def stop(self) -> None:
        self._run(self._mesh.close())
        self._runner.close()
        subprocess.run([COMMAND, "down", "--dir", str(self._folder)], check=False, timeout=60)
        shutil.rmtree(self._folder, ignore_errors=True)
