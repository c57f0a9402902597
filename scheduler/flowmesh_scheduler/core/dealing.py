"""Jobs dealt out to the present nodes by list scheduling, with learned costs: how long a workflow takes, and what it pays.

A sketch of what the placement does, not the placement: batches are as large as the rules of size allow, each goes where it ends
first, and nothing else runs. Transfers between nodes and round trips are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.manifest import Operator, Resources
from flowmesh_scheduler.core.classes import MARKETS, NodeClass
from flowmesh_scheduler.core.costs import CostClass, Costs, Size
from flowmesh_scheduler.core.lacking import lacks
from flowmesh_scheduler.core.state import State

_SLICE = 200
_NAMED = 8


@dataclass(slots=True, eq=False)
class Job:
    """One operator to run. ``after`` are jobs to wait for, or (-1, seconds) for what runs already.

    What follows is filled in by the dealing.
    """

    operator: Operator
    kind: CostClass
    size: Size
    batch: str
    after: list[tuple[int, float]] = field(default_factory=list)
    begins_batch: bool = False
    node_s: float = 0.0
    usd: float = 0.0
    device: str = ""

    @property
    def is_guessed(self) -> bool:
        """Tell whether its size depends on what another operator has yet to produce."""
        return any(index >= 0 for index, _ in self.after)

    @property
    def executor(self) -> str:
        return CATALOG[self.operator.type].executor


@dataclass(slots=True)
class Deal:
    """How jobs were dealt out."""

    critical_s: float = 0.0
    makespan_s: float = 0.0
    node_s: float = 0.0
    usd: float = 0.0
    nodes: dict[str, float] = field(default_factory=dict)
    """Busy seconds of each node that got something."""

    lacking: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Slot:
    """A place on a node: when it is free, and which models are loaded there."""

    node: str
    loaded: set[str]
    free_s: float = 0.0


_Slots = list[tuple[float, int, _Slot]]
_BucketKey = tuple[str, Resources, str]


@dataclass(slots=True, eq=False)
class _Bucket:
    """Jobs that are ready and may share a batch."""

    jobs: deque[int]
    market: str
    able: list[NodeClass]


def deal(state: State, costs: Costs, jobs: Mapping[int, Job]) -> Generator[None, None, Deal]:
    """Deal jobs out, keyed by their place in the workflow; yield now and then."""
    table = _Table(state, costs, jobs)
    yield from table.clear()
    table.dealt.critical_s = yield from table.critical_s()
    table.tell_lacking()
    return table.dealt


class _Table:
    def __init__(self, state: State, costs: Costs, jobs: Mapping[int, Job]) -> None:
        self.state = state
        self.costs = costs
        self.jobs = jobs
        self.dealt = Deal()
        self._classes = [c for c in state.fleet.classes.values() if c.nodes]
        self._slots: dict[tuple[int, str], _Slots] = {}
        self._able: dict[tuple[str, str, Resources], list[NodeClass]] = {}
        self._buckets: dict[_BucketKey, _Bucket] = {}
        self._waits = {index: sum(i >= 0 for i, _ in job.after) for index, job in jobs.items()}
        self._ready_s = {index: max((s for _, s in job.after), default=0.0) for index, job in jobs.items()}
        self._consumers: dict[int, list[int]] = {}
        self._unable: dict[str, list[Job]] = {}
        for index, job in jobs.items():
            for source, _ in job.after:
                if source >= 0:
                    self._consumers.setdefault(source, []).append(index)

    # --- who can run what

    def _able_to(self, job: Job) -> list[NodeClass]:
        key = (job.operator.type, job.operator.numeric, job.operator.resources)
        found = self._able.get(key)
        if found is None:
            found = self._able[key] = [c for c in self._classes if not lacks(c.sample, job.operator)]
        return found

    def _slots_of(self, klass: NodeClass, market: str) -> _Slots:
        found = self._slots.get((klass.number, market))
        if found is None:
            per_node = klass.sample.slots if market in ("engine", "user") else 1
            found = [
                (0.0, number, _Slot(node.name, set(node.resident)))
                for number, node in enumerate(each for each in klass.nodes.values() for _ in range(per_node))
            ]
            heapify(found)
            self._slots[klass.number, market] = found
        return found

    # --- dealing

    def clear(self) -> Generator[None, None, None]:
        """Go through time: what is ready gets a slot as soon as one is free."""
        events: list[tuple[float, int, tuple[int, ...]]] = [
            (self._ready_s[index], index, (index,)) for index, waits in self._waits.items() if not waits
        ]
        heapify(events)
        count, number = 0, len(self.jobs)
        while events:
            now_s = events[0][0]
            while events and events[0][0] <= now_s:
                for index in heappop(events)[2]:
                    self._make_ready(index)
            for key, bucket in list(self._buckets.items()):
                while bucket.jobs:
                    taken = self._place(bucket, now_s)
                    if taken is None:
                        break
                    number += 1
                    count += 1
                    heappush(events, (taken[0], number, tuple(self._released(taken[1], taken[0]))))
                    if count % _SLICE == 0:
                        yield
                if not bucket.jobs:
                    del self._buckets[key]

    def _make_ready(self, index: int) -> None:
        job = self.jobs[index]
        able = self._able_to(job)
        if not able:
            self._unable.setdefault(job.operator.type, []).append(job)
            return
        key = (job.batch if CATALOG[job.operator.type].batches else job.operator.type, job.operator.resources, job.kind[1])
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(deque(), MARKETS[job.executor], able)
        bucket.jobs.append(index)

    def _released(self, ended: list[int], at_s: float) -> list[int]:
        found: list[int] = []
        for index in ended:
            for consumer in self._consumers.get(index, ()):
                self._waits[consumer] -= 1
                self._ready_s[consumer] = max(self._ready_s[consumer], at_s)
                if not self._waits[consumer]:
                    found.append(consumer)
        return found

    def _place(self, bucket: _Bucket, now_s: float) -> tuple[float, list[int]] | None:
        """Give the next batch of a bucket to the slot on which it ends first; None where none is free."""
        idle = {c: slots[0][2] for c in bucket.able if (slots := self._slots_of(c, bucket.market)) and slots[0][0] <= now_s}
        if not idle:
            return None
        first = self.jobs[bucket.jobs[0]]
        places = sum(len(self._slots_of(c, bucket.market)) for c in bucket.able)
        indices = [bucket.jobs.popleft() for _ in range(self._batch_count(first, len(bucket.jobs), places))]
        jobs = [self.jobs[index] for index in indices]
        spans = {c: self._span_s(jobs, c, slot) for c, slot in idle.items()}
        klass = min(spans, key=lambda c: (spans[c], c.number))
        slots = self._slots_of(klass, bucket.market)
        _, number, slot = slots[0]
        span_s = spans[klass]
        heapreplace(slots, (now_s + span_s, number, slot))
        self._note(jobs, klass, slot, span_s, now_s)
        return now_s + span_s, indices

    def _batch_count(self, job: Job, ready: int, places: int) -> int:
        settings, kind = self.state.settings, job.executor
        if not CATALOG[job.operator.type].batches:
            return 1
        return min(settings.batch_limit[kind], ready, max(settings.batch_floor[kind], -(-ready // places)))

    def _span_s(self, jobs: list[Job], klass: NodeClass, slot: _Slot) -> float:
        costs, first = self.costs, jobs[0]
        line = costs.line(first.kind, klass.device)
        exec_s = line.seconds(max(job.size.steps for job in jobs), sum(job.size.units for job in jobs))
        model = first.kind[1] if first.operator.models else ""
        load_s = costs.load_s(model, klass.device) if model and model not in slot.loaded else 0.0
        return exec_s * costs.node_ratio(slot.node) + load_s

    def _note(self, jobs: list[Job], klass: NodeClass, slot: _Slot, span_s: float, now_s: float) -> None:
        dealt = self.dealt
        price = (klass.sample.price_per_hour or self.state.settings.price_per_hour) / 3600
        if jobs[0].operator.models:
            slot.loaded.add(jobs[0].kind[1])
        jobs[0].begins_batch = True
        for job in jobs:
            job.node_s, job.usd, job.device = span_s / len(jobs), price * span_s / len(jobs), klass.device
        dealt.makespan_s = max(dealt.makespan_s, now_s + span_s)
        dealt.node_s += span_s
        dealt.usd += price * span_s
        dealt.nodes[slot.node] = dealt.nodes.get(slot.node, 0.0) + span_s

    # --- beside the dealing

    def critical_s(self) -> Generator[None, None, float]:
        """Return the longest way through the jobs if each ran alone at once, on the fastest node that can, its model loaded."""
        ends_s: dict[int, float] = {}
        alone_s: dict[tuple[CostClass, Size, str, Resources], float] = {}
        for count, (index, job) in enumerate(self.jobs.items()):
            able = self._able_to(job)
            key = (job.kind, job.size, job.operator.numeric, job.operator.resources)
            if key not in alone_s:
                costs = self.costs
                found = (costs.line(job.kind, c.device).seconds(job.size.steps, job.size.units) for c in able)
                alone_s[key] = min(found, default=0.0)
            begins_s = max((ends_s[i] if i >= 0 else s for i, s in job.after), default=0.0)
            ends_s[index] = begins_s + alone_s[key]
            if count % (10 * _SLICE) == 0:
                yield
        return max(ends_s.values(), default=0.0)

    def tell_lacking(self) -> None:
        """Tell which operators no node can run, and what each node lacks for them."""
        for name, jobs in self._unable.items():
            nodes = sorted(self.state.nodes.values(), key=lambda node: node.name)
            self.dealt.lacking.append(
                {
                    "type": name,
                    "operators": len(jobs),
                    "first": jobs[0].operator.name,
                    "nodes": {
                        n.name: lacks(n.record, jobs[0].operator) or [f"it is {n.state}, suspected or cordoned"]
                        for n in nodes[:_NAMED]
                    },
                }
            )
