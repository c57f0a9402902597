"""The executor processes of a node: started on demand, kept while useful, ended to make room."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import psutil

from flowmesh_cas.errors import TransientError
from flowmesh_node.executor import Executor
from flowmesh_node.lanes import Lane

ROOM_BYTES = {"engine": 1536 * 2**20, "train": 2 * 2**30, "data": 512 * 2**20, "user": 256 * 2**20}
"""Memory that should be free before a process of this kind starts; idle processes are ended until it is."""

_LANE = {"engine": "accelerator", "train": "accelerator", "data": "data", "user": "user"}


def executor_environment(*, cpus: float, slots: int, allow_hub: bool) -> dict[str, str]:
    """Return the environment of executors: offline, and numbers that do not depend on threads or neighbours.

    What the node's own environment sets stays. MKL_CBWR and the capability make batched results repeatable on CPUs of
    one instruction set.
    """
    threads = str(max(1, int(cpus) // max(1, slots)))
    defaults = {
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }
    if not allow_hub:
        defaults |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if " avx2 " in _cpu_flags():
        defaults |= {"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "avx2"}
    return defaults | dict(os.environ)


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return line + " "
    return ""


class Executors:
    """Lends processes, one batch each. ``slots`` engines and trainers together, one for data, ``user_slots`` for functions.

    An engine that takes new rows between its steps would be lent to several batches at once; that is decided here alone.
    """

    def __init__(
        self,
        environment: dict[str, str],
        *,
        slots: int,
        user_slots: int,
        memory_bytes: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._environment = environment
        self._memory_bytes = memory_bytes
        self._on_change = on_change
        sizes = {"accelerator": slots, "data": 1, "user": user_slots}
        self._lanes = {lane: Lane(size) for lane, size in sizes.items()}
        self._limits = {kind: sizes[lane] for kind, lane in _LANE.items()}
        self._all: list[Executor] = []
        self._is_closed = False

    @property
    def resident(self) -> tuple[str, ...]:
        """Return the digests of the models that processes keep loaded."""
        return tuple(sorted({digest for each in self._all if each.is_alive for digest in each.resident}))

    @property
    def running(self) -> int:
        """Return how many processes are at work."""
        return sum(each.is_busy for each in self._all)

    def checkpoint_now(self) -> None:
        """Let everything that trains write a checkpoint after the step that it is at: this node may be gone soon."""
        for each in self._all:
            each.checkpoint_now()

    def describe(self) -> list[dict[str, object]]:
        """Return the processes for people."""
        return [
            {"kind": each.kind, "pid": each.pid, "busy": each.is_busy, "resident": list(each.resident)}
            for each in self._all
            if each.is_alive
        ]

    @contextlib.asynccontextmanager
    async def lent(self, kind: str, digests: Iterable[str] = (), memory_bytes: int = 0) -> AsyncIterator[Executor]:
        """Lend a process of ``kind`` as soon as its lane is free, one that keeps a model of ``digests`` first."""
        lane, wanted = self._lanes[_LANE[kind]], frozenset(digests)
        await lane.enter(lambda: self._must_load(kind, wanted))
        try:
            executor = await self._choose(kind, wanted, memory_bytes)
            executor.is_lent = True
            try:
                yield executor
            finally:
                executor.is_lent = False
                await self._forget_dead()
                self._on_change()
        finally:
            lane.leave()

    def _must_load(self, kind: str, digests: frozenset[str]) -> bool:
        """Tell whether no idle process keeps these models; only engines keep any."""
        return kind == "engine" and bool(digests) and not any(digests <= set(each.resident) for each in self._idle(kind))

    def _idle(self, kind: str) -> list[Executor]:
        """Return the processes of ``kind`` that nobody uses, the one used last at the end."""
        return sorted(
            (each for each in self._all if each.kind == kind and each.is_alive and not each.is_lent),
            key=lambda each: each.used_at,
        )

    async def _choose(self, kind: str, digests: frozenset[str], memory_bytes: int) -> Executor:
        await self._forget_dead()
        if self._is_closed:
            raise TransientError("this node is stopping")
        idle = self._idle(kind)
        keeping = [each for each in idle if digests & set(each.resident)]
        blank = [each for each in idle if not each.resident]
        if keeping or blank:
            return (keeping or blank)[-1]
        # A process that keeps another model is worth more untouched, as long as there is room for one more process.
        same_kind = sum(each.kind == kind for each in self._all)
        if idle and (not digests or same_kind >= self._limits[kind]):
            return idle[0] if digests else idle[-1]
        await self._make_room(max(memory_bytes, ROOM_BYTES[kind]))
        executor = Executor(kind, self._environment)
        executor.is_lent = True
        self._all.append(executor)
        try:
            await executor.start()
        except BaseException:
            self._all.remove(executor)
            await executor.kill()
            raise
        return executor

    async def _make_room(self, wanted_bytes: int) -> None:
        """End idle processes, the least recently used first, until there is room or nobody left to end."""
        for each in sorted(self._all, key=lambda each: each.used_at):
            if self._free_bytes() >= wanted_bytes:
                return
            if not each.is_lent:
                await each.kill()
                self._all.remove(each)

    def _free_bytes(self) -> int:
        mine = 0
        for each in self._all:
            with contextlib.suppress(psutil.Error):
                mine += psutil.Process(each.pid).memory_info().rss if each.pid else 0
        return min(psutil.virtual_memory().available, self._memory_bytes - mine)

    async def _forget_dead(self) -> None:
        for each in [each for each in self._all if not each.is_alive and not each.is_lent]:
            self._all.remove(each)
            await each.kill()

    async def close(self) -> None:
        """End all processes."""
        self._is_closed = True
        await asyncio.gather(*(each.kill() for each in self._all), return_exceptions=True)
        self._all.clear()
