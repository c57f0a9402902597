"""Executor processes of a simulation: they take virtual time, and what they give follows from what they are given alone.

They replace ``flowmesh_node.executor.Executor`` under the production code that lends, feeds, watches and kills them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import msgspec
from tests.faults.loop import current_process

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import operator_type, output_kind
from flowmesh_mesh.clock import monotonic_s
from flowmesh_mesh.messages import Reason
from flowmesh_node import frames
from flowmesh_node.executor import Watch
from flowmesh_node.executors import Executors
from flowmesh_node.operators.base import Batch, Content, Failed, Item, Produced
from flowmesh_node.operators.noop import noop_value

_encode = msgspec.json.Encoder(order="sorted").encode

_PADDING = "." * 6000
"""Makes tables too large to travel with results: they are fetched from who made them, and lost with all who have them."""

FAILS = "fails"
"""Name of a user's function that always fails."""


@dataclass(slots=True)
class Execution:
    """One item on one node: when it began, when and how it ended."""

    key: str
    node: str
    life: int
    began_s: float
    type: str
    seconds: float
    ended_s: float = 0.0
    how: str = "running"


@dataclass(slots=True)
class Bench:
    """What the executors of all nodes are told, and what they tell."""

    now_s: Callable[[], float]
    rng: random.Random
    executions: list[Execution] = field(default_factory=list)
    crash_next: dict[str, int] = field(default_factory=dict)
    """So many of the next batches of a node crash."""
    slow: dict[str, float] = field(default_factory=dict)
    """How many times as long as usual everything takes on a node."""
    lives: dict[str, int] = field(default_factory=dict)


def digest_of(type_name: str, params: Mapping[str, Any], inputs: Mapping[str, Sequence[str]]) -> bytes:
    """Return what everything that an operator gives is made of."""
    parts = [type_name, dict(params), {port: list(digests) for port, digests in inputs.items()}]
    return sha256(_encode(parts)).digest()


def outputs_of(type_name: str, params: Mapping[str, Any], inputs: Mapping[str, Sequence[str]]) -> dict[str, list[Content]]:
    """Return what an operator gives, the same wherever and how often it runs."""
    if type_name == "flow.noop":
        return {"out": [Content("value", noop_value(dict(params)))]}
    seed = digest_of(type_name, params, inputs)
    kind = operator_type(type_name)
    found: dict[str, list[Content]] = {}
    for port in kind.outputs:
        count = int(params.get("parts", 1)) if type_name == "data.split" else 1
        found[port] = [_content(output_kind(kind, port, params), seed, port, number) for number in range(count)]
    return found


def _content(kind: str, seed: bytes, port: str, number: int) -> Content:
    text = sha256(seed + f"{port} {number}".encode()).hexdigest()
    if kind == "rows":
        return Content("rows", _encode({"of": text, "padding": _PADDING}) + b"\n", rows=1)
    return Content("value", _encode(text))


def seconds_of(item: Item, type_name: str) -> float:
    """Return how long an item takes on a node that is not slow."""
    params = item.params
    if type_name == "flow.delay":
        return float(params.get("batch_s", 0.0)) + float(params.get("item_s", 0.0))
    if type_name == "python.call":
        return float(params.get("args", {}).get("seconds", 0.2))
    return 0.05 + int(item.key[:4], 16) / 65536 * 1.5


class SimExecutor:
    """An executor process that is none. ``node`` is known from the process that made it."""

    def __init__(self, bench: Bench, kind: str) -> None:
        process = current_process()
        self.node = process.name if process is not None else ""
        self.kind = kind
        self.resident: tuple[str, ...] = ()
        self.used_at = monotonic_s()
        self.is_busy = False
        self.is_lent = False
        self.pid = 0
        self.is_alive = False
        self._bench = bench

    async def start(self) -> None:
        await asyncio.sleep(self._bench.rng.uniform(0.05, 0.3))
        self.is_alive = True

    async def run(self, batch: Batch, watch: Watch, timeout_s: float = 0.0) -> None:
        """Settle the items one after the other."""
        self.is_busy = True
        begun: list[Execution] = []
        try:
            watch.on_loaded(frames.Loaded(1000, (), batch.numeric if batch.numeric != "any" else ""))
            async with asyncio.timeout(timeout_s or None):
                await self._items(batch, watch, begun)
        except TimeoutError as error:
            self._finish(begun, "timeout")
            await self.kill()
            raise ExecutionError(f"still running after {timeout_s:g} s", reason="timeout") from error
        except asyncio.CancelledError:
            self._finish(begun, "cancelled")
            await self.kill()
            raise
        finally:
            self.is_busy, self.used_at = False, monotonic_s()

    async def _items(self, batch: Batch, watch: Watch, begun: list[Execution]) -> None:
        factor = self._bench.slow.get(self.node, 1.0)
        for item in batch.items:
            life = self._bench.lives.get(self.node, 0)
            seconds = seconds_of(item, batch.type) * factor
            begun.append(Execution(item.key, self.node, life, self._bench.now_s(), batch.type, seconds))
            self._bench.executions.append(begun[-1])
        for index, (item, execution) in enumerate(zip(batch.items, begun, strict=True)):
            if batch.type == "python.call" and batch.timeout_s and execution.seconds > batch.timeout_s:
                await asyncio.sleep(batch.timeout_s)  # the process that watches a user's function ends it
                execution.ended_s, execution.how = self._bench.now_s(), "timeout"
                watch.on_settled(frames.Settled(index, failed=Failed(Reason.TIMEOUT, "it ran too long")))
                continue
            await asyncio.sleep(execution.seconds * (0.5 if self._bench.crash_next.get(self.node) else 1.0))
            if self._bench.crash_next.get(self.node):
                self._bench.crash_next[self.node] -= 1
                self._finish(begun, "crashed")
                await self.kill()
                raise ExecutionError("the process was killed", reason="crashed")
            execution.ended_s, execution.how = self._bench.now_s(), "settled"
            watch.on_settled(_settled(index, item, batch.type))

    def _finish(self, begun: list[Execution], how: str) -> None:
        for each in begun:
            if each.how == "running":
                each.ended_s, each.how = self._bench.now_s(), how

    def checkpoint_now(self) -> None:
        """Nothing here writes checkpoints."""

    def note_kept(self, behind_s: float) -> None:
        """Nothing here writes checkpoints."""

    async def kill(self) -> None:
        self.is_alive = False


def _settled(index: int, item: Item, type_name: str) -> frames.Settled:
    if item.params.get("function") == FAILS:
        return frames.Settled(index, failed=Failed(Reason.USER_ERROR, "it always fails"))
    inputs = {port: [each.digest for each in contents] for port, contents in item.inputs.items()}
    return frames.Settled(index, produced=Produced(outputs_of(type_name, item.params, inputs), rows=1))


class SimExecutors(Executors):
    """The production executors, on a machine with memory enough."""

    def _free_bytes(self) -> int:
        return 1 << 40
