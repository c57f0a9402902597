"""The stage of a drill: a mesh with steady work, a recorder, and questions that a drill asks of what was stored."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chaos.functions import slept
from chaos.history import History, Issued, Stored, Wiped
from chaos.network import Network
from chaos.processes import TENANTS, ChaosMesh, Shape
from chaos.recorder import GUARDED, Recorder, begun_of
from chaos.seed import connect_recorder
from chaos.traffic import Traffic, now_us
from chaos.workload import Wish
from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh.workflow import Workflow

STEADY_S = 1.5
"""Pause before each fault: whoever was started again must be there."""

TRICKLE_S = 0.05
"""A small workflow is submitted this often, so that there is always something to assign."""

HELD_S = 6.0
"""How long the operators of :meth:`Stage.busy_node` take: longer than their node has to live."""


@dataclass(frozen=True, slots=True)
class Load:
    """Operators to keep under way; 0 for none."""

    outstanding: int


class _Steady:
    """A workload of sleeping no-ops: nothing but time, so that the machine's load stays out of the figures."""

    def __init__(self, source: random.Random) -> None:
        self._random = source
        self._nonce = source.randrange(2**40)

    def fresh(self) -> int:
        self._nonce += 1
        return self._nonce

    def wish(self, count: int, sleep_s: float) -> Wish:
        """Return a workflow of ``count`` operators, all of which wait for one that takes ``sleep_s``."""
        operators: dict[str, Any] = {"n0": {"type": "flow.noop", "with": {"nonce": self.fresh(), "sleep_s": sleep_s}}}
        for place in range(1, count):
            operators[f"n{place}"] = {"type": "flow.noop", "inputs": {"after": "n0.out"}, "with": {"nonce": self.fresh()}}
        document = {"apiVersion": "flowmesh/v1", "name": "steady", "operators": operators, "outputs": {"n": "n0.out"}}
        return Wish("steady", document, {"n": None})


class Stage:
    """A mesh of ``shape`` under ``load``, as an asynchronous context; everything is ended with it."""

    def __init__(self, folder: Path, shape: Shape, load: Load) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.history = History()
        self.network = Network()
        self.mesh = ChaosMesh(folder, shape, self.network)
        self._load = load
        self._steady = _Steady(random.Random(str(folder)))
        self._stored: list[Stored] = []
        self._changed = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()
        self._loading: list[asyncio.Task[None]] = []
        self._held: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._enter()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _enter(self) -> None:
        stack = self._stack
        stack.push_async_callback(self.network.close)
        stack.push_async_callback(self.mesh.stop)
        await self.mesh.prepare()
        await self.mesh.start()
        self.bus = await connect_recorder(self.mesh)
        stack.push_async_callback(self.bus.close)
        self.recorder = Recorder(self.bus, self.history, self._on_stored)
        await self.recorder.start()
        stack.push_async_callback(self.recorder.stop)
        self.traffic = Traffic(self.mesh, self.history, 0)
        stack.push_async_callback(self.traffic.close)
        await self.traffic.ready()
        if self._load.outstanding:
            self._loading = [asyncio.create_task(self._keep_busy()), asyncio.create_task(self._trickle())]
        stack.push_async_callback(self._stop_load)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self.history.write(self.mesh.folder / "history.jsonl")
        await self._stack.aclose()

    def _on_stored(self, entry: Stored) -> None:
        self._stored.append(entry)
        self._changed.set()

    # --- work

    async def _keep_busy(self) -> None:
        """Keep a number of operators under way, most of them waiting, so that nodes have room for what trickles in."""
        while True:
            await self._submit(self._load.outstanding, 4.0)

    async def _trickle(self) -> None:
        while True:
            await asyncio.sleep(TRICKLE_S)
            if self.traffic.open_runs < 60:
                self.traffic.begin(TENANTS[1], self._steady.wish(1, 0.05))

    async def _submit(self, count: int, sleep_s: float) -> None:
        await self.traffic.live(TENANTS[0], self._steady.wish(max(1, count), sleep_s))

    async def _stop_load(self) -> None:
        for task in self._loading:
            task.cancel()
        await asyncio.gather(*self._loading, return_exceptions=True)
        self._loading = []

    # --- what a drill asks

    async def _until(self, is_reached: Callable[[], Any], timeout_s: float) -> Any:
        """Return what ``is_reached`` finds, as soon as it finds something; raise TimeoutError otherwise."""
        deadline = time.monotonic() + timeout_s
        while not (found := is_reached()):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"not within {timeout_s:g} s")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, 0.2))
        return found

    async def steady(self) -> str:
        """Wait until every process runs and somebody leads and is heard; return who."""
        for _ in range(60):
            for name in self.mesh.processes:
                self.mesh.processes[name].start()
            with contextlib.suppress(FlowmeshError):
                await self.traffic.client.nodes()
                leader = self.recorder.leader
                await asyncio.sleep(STEADY_S)
                if leader and leader == self.recorder.leader:
                    return leader
            await asyncio.sleep(0.2)
        raise TimeoutError("nobody leads")

    def fences(self) -> dict[str, int]:
        """Return the sequences of the epoch records that the present leader names in its writes."""
        return {stream: self.recorder.epochs[stream].seq for stream in GUARDED}

    async def first_assignment_after(self, since_us: int, deposed: str, timeout_s: float) -> float:
        """Return the seconds from ``since_us`` to the first assignment stored behind an epoch record of somebody else."""

        def found() -> Stored | None:
            record = next(
                (
                    entry
                    for entry in self._stored
                    if entry.kind == "epoch" and entry.stream == "ASSIGN" and entry.at_us > since_us and entry.leader != deposed
                ),
                None,
            )
            if record is None:
                return None
            after = (entry for entry in self._stored if entry.kind == "assignment" and entry.seq > record.seq)
            return min(after, key=lambda entry: entry.seq, default=None)

        first: Stored = await self._until(found, timeout_s)
        return (first.at_us - since_us) / 1e6

    def longest_gap_s(self, stream: str, since_us: int) -> float:
        """Return the longest pause between two writes that were stored after ``since_us``, the one before it included."""
        times = sorted(entry.at_us for entry in self._stored if entry.stream == stream)
        before = max((at_us for at_us in times if at_us <= since_us), default=since_us)
        later = [before, *(at_us for at_us in times if at_us > since_us), now_us()]
        return max(right - left for left, right in pairwise(later)) / 1e6

    def note_wipe(self) -> None:
        """Write down that the broker's store was removed."""
        self.history.add(Wiped(now_us()))

    async def serves(self, timeout_s: float) -> bool:
        """Tell whether a small workflow that is submitted now runs to its end."""
        wish = self._steady.wish(1, 0.0)
        try:
            async with asyncio.timeout(timeout_s):
                run = await self.traffic.client.submit(wish.document, deadline_s=timeout_s)
                return (await run.wait(timeout_s)).state == "succeeded"
        except (FlowmeshError, TimeoutError):
            return False

    async def busy_node(self) -> tuple[str, set[str]]:
        """Give the mesh operators that hold their nodes for a while; return a node and the keys that it holds."""
        seen = len(self.history.entries)
        self._held = asyncio.create_task(self._hold())

        def holders() -> dict[str, set[str]]:
            held: dict[str, set[str]] = {}
            for entry in self.history.entries[seen:]:
                if isinstance(entry, Issued):
                    held.setdefault(entry.node, set()).add(entry.key)
            return held

        await self._until(lambda: sum(map(len, holders().values())) >= 6, 20.0)
        await asyncio.sleep(0.7)  # so that all of them are at work
        held = holders()
        node = max(held, key=lambda name: len(held[name]))
        return node, held[node]

    async def _hold(self) -> None:
        workflow = Workflow("held")
        for place in range(2):
            workflow.call(slept, name=f"call-{place}", args={"seconds": HELD_S, "text": str(self._steady.fresh())})
        for place in range(4):
            workflow.add(f"n{place}", "flow.noop", nonce=self._steady.fresh(), sleep_s=HELD_S)
        workflow.output("n", "n0.out")
        await self.traffic.live(TENANTS[0], Wish("held", workflow.to_document(), {"n": None}))

    async def given_elsewhere(self, node: str, keys: set[str], since_us: int, timeout_s: float) -> float:
        """Return the seconds from ``since_us`` until each of ``keys`` was given to another node, or has a result."""

        def found() -> int | None:
            at: dict[str, int] = {}
            for entry in self.history.entries:
                if isinstance(entry, Issued) and entry.key in keys and entry.node != node and entry.at_us > since_us:
                    at.setdefault(entry.key, entry.at_us)
                elif isinstance(entry, Stored) and entry.kind == "result" and (key := entry.subject.split(".")[2]) in keys:
                    at.setdefault(key, entry.at_us)
            return max(at.values()) if at.keys() == keys else None

        last: int = await self._until(found, timeout_s)
        return (last - since_us) / 1e6

    async def finished(self) -> None:
        """Wait until the operators of :meth:`busy_node` are done."""
        if self._held is not None:
            await self._held

    async def conclude(self) -> list[str]:
        """Stop the work, let everything end, and read everything; return the runs that did not end."""
        await self._stop_load()
        for name in self.mesh.processes:
            self.mesh.processes[name].start()
        left = await self.traffic.settle(60.0)
        await self.traffic.look_again()
        await asyncio.sleep(0.5)
        await self.recorder.read_ledger()
        for name in self.mesh.names("node"):
            for begun in begun_of(name, self.mesh.log_text(name)):
                self.history.add(begun)
        return left
