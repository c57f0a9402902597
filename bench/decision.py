"""What a decision costs: the core alone, a thousand nodes of eight kinds, two hundred batch keys, so many ready operators.

The operators become ready while the core is cut off; then it gets its nodes back and works everything off: each batch is
answered, its results are committed, the freed node gets the next. Counted is the time inside ``step`` from then on, per operator.
Not counted is encoding (result records, receipts), which is the ledger's, and what the benchmark itself does. Memory is what the
process grew by while the operators became ready, the workflow's own records not counted.

``python -m bench.decision COUNT [FILE]`` measures one size in a process of its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.workloads import Figure
from flowmesh_cas.cid import RAW, cid_of, sha256
from flowmesh_mesh import receipts
from flowmesh_mesh.manifest import Manifest, Metered, Operator, Ref, ResultManifest, encode_record, record_cid
from flowmesh_mesh.messages import Device, Done, NodeRecord, Outcome
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core import outcomes
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step
from flowmesh_scheduler.process import GC_THRESHOLDS

NODES = 1_000
BATCH_KEYS = 200
PER_RUN = 1_000
KINDS = (
    ("NVIDIA GeForce RTX 3090", 24, 0.2),
    ("NVIDIA GeForce RTX 4090", 24, 0.35),
    ("NVIDIA RTX A6000", 48, 0.45),
    ("NVIDIA L40S", 48, 0.8),
    ("NVIDIA A100-SXM4-80GB", 80, 1.3),
    ("NVIDIA H100 80GB HBM3", 80, 2.2),
    ("NVIDIA L4", 24, 0.25),
    ("NVIDIA H200", 141, 3.0),
)
SECOND_US = 1_000_000
_PROBES = 100_000


class _Aside:
    """The time spent in functions that are not counted, and in timing them."""

    def __init__(self) -> None:
        self.ns = 0
        self.calls = 0

    def watch(self, module: Any, name: str) -> None:
        """Time every call of a function that ``module`` uses."""
        function: Callable[..., Any] = getattr(module, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            began_ns = time.perf_counter_ns()
            try:
                return function(*arguments, **named)
            finally:
                self.ns += time.perf_counter_ns() - began_ns

        setattr(module, name, timed)

    def total_ns(self) -> float:
        """Return all of it: each call was also slowed by its own timing, as much as one of a function that does nothing."""
        probe, module = _Aside(), SimpleNamespace(nothing=lambda: None)
        direct_ns = _took_ns(module.nothing)
        probe.watch(module, "nothing")
        return self.ns + self.calls * max(0.0, _took_ns(module.nothing) - direct_ns - probe.ns / probe.calls)


def _took_ns(function: Callable[[], object]) -> float:
    """Return the nanoseconds of a call."""
    began_ns = time.perf_counter_ns()
    for _ in range(_PROBES):
        function()
    return (time.perf_counter_ns() - began_ns) / _PROBES


def _record(index: int) -> NodeRecord:
    name, gibibytes, price = KINDS[index % len(KINDS)]
    device = Device("cuda", name, f"GPU-{index}", gibibytes << 30)
    return NodeRecord(f"n{index}", f"U{index}", 1, ("llm.generate",), "3.11", 16.0, 64 << 30, (device,), price)


def _operator(index: int) -> Operator:
    key = index % BATCH_KEYS
    params = {
        "prompt": f"Question {index}: {{{{ prompt }}}}",
        "max_new_tokens": 64 + index % 7 * 32,
        "dtype": ("float32", "bfloat16")[key % 2],
    }
    return Operator(f"o{index}", "llm.generate", 1, params, models={"model": f"hf:model-{key // 2}"})


def _manifests(count: int) -> list[Manifest]:
    return [
        Manifest(f"flow {first}", [_operator(i) for i in range(first, min(first + PER_RUN, count))])
        for first in range(0, count, PER_RUN)
    ]


def _memory_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Bench:
    """A core with nodes that answer at once."""

    def __init__(self) -> None:
        self.state = State(Settings(run_history=1 << 30), epoch=1)
        self.now_us = 1_000 * SECOND_US
        self.step_ns = 0
        self.assigned: deque[c.Assign] = deque()
        self.batches = 0
        ref = Ref("rows", cid_of(RAW, b"result"), sha256(b"result"), 6, 1)
        self.outputs = {"rows": [ref]}
        self.result = record_cid(encode_record(ResultManifest(self.outputs)))

    def apply(self, event: e.Event) -> None:
        """Let the core decide; the ledger shows at once what it is to be told."""
        events: deque[e.Event] = deque([event])
        while events:
            began_ns = time.perf_counter_ns()
            commands = step(self.state, events.popleft(), self.now_us)
            self.step_ns += time.perf_counter_ns() - began_ns
            for command in commands:
                if isinstance(command, c.Assign):
                    self.assigned.append(command)
                elif isinstance(command, c.CommitResults):
                    events.append(e.Committed([(key, record_cid(block)) for key, _, block in command.records]))

    def answer(self) -> None:
        """Let the oldest batch end well."""
        assignment = self.assigned.popleft().assignment
        self.batches += 1
        self.now_us += 1_000
        found = tuple(
            Outcome(i.key, i.generation, i.attempt, "succeeded", self.result, self.outputs, metered=Metered(exec_us=50_000))
            for i in assignment.items
        )
        self.apply(e.DoneReceived(Done(assignment.node, assignment.id, 1, found, "U", b"")))

    def wait(self) -> None:
        """Let a moment pass in which all nodes show that they are there; their beats are not counted."""
        self.now_us += SECOND_US // 10
        for node in self.state.nodes.values():
            node.last_beat_us = self.now_us
        self.apply(e.Tick())


def measure(count: int) -> list[Figure]:
    """Return microseconds and bytes per operator with ``count`` operators ready."""
    bench, models = _Bench(), {f"hf:model-{i}": f"sha256:{i:064x}" for i in range(BATCH_KEYS // 2)}
    sizes = {digest: (2 + index % 7) << 30 for index, digest in enumerate(models.values())}
    manifests = _manifests(count)
    bench.apply(e.CutOff())
    for index in range(NODES):
        bench.apply(e.NodeJoined(_record(index)))
    before_bytes = _memory_bytes()
    for number, manifest in enumerate(manifests):
        bench.apply(e.Submitted(f"tenant{number % 4}", f"r{number}", manifest, bytes(36), models, model_bytes=sizes))
    grown_bytes = _memory_bytes() - before_bytes
    aside = _Aside()
    for name in ("encode_record", "record_cid"):
        aside.watch(outcomes, name)
    for name in ("levels", "leaf", "path"):
        aside.watch(receipts, name)
    gc.collect()
    gc.set_threshold(*GC_THRESHOLDS)
    gc.freeze()
    bench.step_ns = 0
    bench.apply(e.Restored())
    while len(bench.state.results) < count:
        if bench.assigned:
            bench.answer()
        else:
            bench.wait()
    assert len(bench.state.results) == count, f"{len(bench.state.results)} results of {count} operators"
    label = f"decision.{count}"
    return [
        Figure(f"{label}.time", (bench.step_ns - aside.total_ns()) / 1e3 / count, "us/operator"),
        Figure(f"{label}.memory", grown_bytes / count, "B/operator"),
        Figure(f"{label}.batch", count / bench.batches, "operators"),
    ]


if __name__ == "__main__":
    lines = [json.dumps(asdict(figure)) for figure in measure(int(sys.argv[1]))]
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text("\n".join(lines) + "\n")
    else:
        print("\n".join(lines))
