"""A node as the simulator plays it: takes assignments, runs them in its lanes, keeps what it made, tells what became of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from flowmesh_cas.cid import DAG_CBOR, RAW, cid_from_digest
from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.manifest import Metered, Ref, ResultManifest, encode_record
from flowmesh_mesh.messages import Assignment, Beat, Done, Item, NodeRecord, Outcome
from flowmesh_scheduler.sim import truth
from flowmesh_scheduler.sim.machine import Machine
from flowmesh_scheduler.sim.truth import Demand, Spent

INLINE_MAX_BYTES = 512 * 1024
"""Results up to this size travel to the hub with the report."""

_GPU = ("engine", "train")


@dataclass(slots=True)
class Batch:
    """An assignment on its way through a worker.

    ``ends_us`` is when it will be done, unless it is stopped; ``parts`` tell which of its ``count`` operators are done when.
    """

    assignment: Assignment
    items: dict[bytes, Item]
    demands: dict[bytes, Demand]
    began_us: int = 0
    ends_us: int = 0
    spent: Spent | None = None
    joules: float = 0.0
    fetched_bytes: int = 0
    count: int = 0
    parts: list[tuple[int, list[bytes]]] = field(default_factory=list)
    is_stopped: bool = False

    @property
    def is_gpu(self) -> bool:
        return CATALOG[self.assignment.type].executor in _GPU


@dataclass(slots=True)
class Lane:
    """What waits for one resource of a machine (its accelerator, or its processor), and what runs on it."""

    waiting: deque[Batch] = field(default_factory=deque)
    running: Batch | None = None

    @property
    def is_empty(self) -> bool:
        return self.running is None and not self.waiting

    def __len__(self) -> int:
        return len(self.waiting) + (self.running is not None)


@dataclass(slots=True)
class Worker:
    """A machine with its agent: ``held`` are the assignments that it has, ``made`` the sizes of the contents that it produced."""

    machine: Machine
    record: NodeRecord
    seed: int
    lanes: dict[str, list[Lane]] = field(default_factory=dict)
    held: dict[str, Batch] = field(default_factory=dict)
    made: dict[bytes, int] = field(default_factory=dict)
    told_resident: tuple[str, ...] = ()
    is_leaving: bool = False
    idle_since_us: int = 0

    @property
    def name(self) -> str:
        return self.record.node

    def __post_init__(self) -> None:
        self.lanes = {"gpu": [Lane()], "data": [Lane()], "user": [Lane() for _ in range(self.record.slots)]}

    def every_lane(self) -> list[Lane]:
        return [lane for lanes in self.lanes.values() for lane in lanes]

    @property
    def is_idle(self) -> bool:
        return all(lane.is_empty for lanes in self.lanes.values() for lane in lanes)

    def take(self, assignment: Assignment) -> Lane:
        """Put an assignment into the emptiest of its lanes."""
        digest = next(iter(assignment.model_digests.values()), "")
        items = {item.key: item for item in assignment.items}
        demands = {item.key: truth.demand_of(assignment.type, item.params, _refs(item), digest) for item in assignment.items}
        batch = Batch(assignment, items, demands)
        self.held[assignment.id] = batch
        lane = min(self.lanes[lane_of(assignment.type)], key=len)
        lane.waiting.append(batch)
        return lane

    def start(self, lane: Lane, now_us: int, link_of: Callable[[str], float]) -> Batch | None:
        """Start the next batch of a lane that is free; return it."""
        if lane.running is not None:
            return None
        while lane.waiting:
            batch = lane.waiting.popleft()
            if batch.items:
                break
        else:
            return None
        lane.running = batch
        inputs = [_refs(item) for item in batch.items.values()]
        links = {
            x.ref.cid: max(map(link_of, x.holders))
            for i in batch.items.values()
            for p in i.inputs.values()
            for x in p
            if x.holders
        }
        batch.fetched_bytes = sum(
            max(0, ref.size) for ports in inputs for refs in ports.values() for ref in refs if ref.cid not in self.machine.blocks
        )
        clean = self.machine.begin(list(batch.demands.values()), inputs, links)
        factor = truth.noise(self.seed, self.machine.offer.name, min(batch.items).hex(), batch.assignment.items[0].attempt)
        batch.spent = Spent(clean.fetch_s, clean.load_s * factor**0.5, clean.exec_s * factor, clean.power_share)
        batch.joules = self.machine.joules(batch.spent, is_gpu=batch.is_gpu)
        batch.began_us = now_us
        batch.ends_us = now_us + max(1, round(batch.spent.seconds * 1e6))
        batch.count = len(batch.items)
        done_at: dict[float, list[bytes]] = {}
        for key, share in zip(batch.items, truth.shares(list(batch.demands.values())), strict=True):
            done_at.setdefault(share, []).append(key)
        begun_us = batch.ends_us - round(batch.spent.exec_s * 1e6)
        ends = [(begun_us + round(share * batch.spent.exec_s * 1e6), keys) for share, keys in sorted(done_at.items())]
        batch.parts = [*ends[:-1], (batch.ends_us, ends[-1][1])]
        return batch

    def stop(self, lane: Lane, now_us: int) -> float:
        """Stop what runs in a lane; return the seconds that went into it for nothing."""
        batch, lane.running = lane.running, None
        if batch is None:
            return 0.0
        batch.is_stopped = True
        seconds = (now_us - batch.began_us) / 1e6
        self.machine.busy_s += seconds if batch.is_gpu else 0.0
        self.machine.busy_joules += batch.joules * seconds / max(1e-9, (batch.ends_us - batch.began_us) / 1e6)
        return seconds

    def finish(self, lane: Lane, keys: Sequence[bytes]) -> tuple[Batch, Done | None, dict[bytes, bytes]]:
        """End some operators of the batch that runs in a lane; return it with the report and the small results.

        There is no report where all of them were taken away. With the last the lane is free.
        """
        batch = lane.running
        assert batch is not None
        assert batch.spent is not None
        is_last = keys is batch.parts[-1][1]
        if is_last:
            lane.running = None
            self.machine.busy_s += batch.spent.seconds if batch.is_gpu else 0.0
            self.machine.busy_joules += batch.joules
        inline: dict[bytes, bytes] = {}
        outcomes = tuple(self._outcome(batch, batch.items.pop(key), inline) for key in keys if key in batch.items)
        assignment = batch.assignment
        done = Done(self.name, assignment.id, assignment.epoch, outcomes, self.record.public_key, b"simulated", last=is_last)
        return batch, done if outcomes else None, inline

    def _outcome(self, batch: Batch, item: Item, inline: dict[bytes, bytes]) -> Outcome:
        assert batch.spent is not None
        kind, count = batch.assignment.type, batch.count
        shapes = truth.output_shapes(kind, item.params, _refs(item), batch.demands[item.key])
        outputs: dict[str, list[Ref]] = {}
        for index, (port, form, size, rows) in enumerate(shapes):
            digest = sha256(item.key + index.to_bytes(2, "big")).digest()
            ref = Ref(form, cid_from_digest(RAW, digest), digest, size, rows)
            outputs.setdefault(port, []).append(ref)
            self.machine.blocks.add(ref.cid)
            self.made[ref.cid] = size
            if size <= INLINE_MAX_BYTES:
                inline[ref.cid] = b""
        demand = batch.demands[item.key]
        metered = Metered(
            load_us=round(batch.spent.load_s * 1e6) // count,
            fetch_us=round(batch.spent.fetch_s * 1e6) // count,
            exec_us=round(batch.spent.exec_s * 1e6) // count,
            rows=demand.rows,
            tokens_in=round(demand.prompt_tokens),
            tokens_out=round(demand.row_steps),
            bytes_fetched=batch.fetched_bytes // count,
        )
        result = cid_from_digest(DAG_CBOR, sha256(encode_record(ResultManifest(outputs))).digest())
        return Outcome(item.key, item.generation, item.attempt, "succeeded", result, outputs, metered=metered)

    def beat(self, now_us: int, epoch: int) -> Beat:
        """Return what this node says when it tells that it lives."""
        self.told_resident = tuple(self.machine.resident)
        running = sum(lane.running is not None for lane in self.every_lane())
        used = sum(self.machine.resident.values())
        free = max(0, self.machine.offer.device.vram_bytes - used)
        return Beat(self.name, now_us, epoch, tuple(self.held), running, self.told_resident, float(running > 0), free)


def lane_of(kind: str) -> str:
    """Return which resource of a machine an operator type takes: the accelerator, the worker for tables, a process for users."""
    executor = CATALOG[kind].executor
    return "gpu" if executor in _GPU else "user" if executor == "user" else "data"


def _refs(item: Item) -> Mapping[str, list[Ref]]:
    return {port: [located.ref for located in found] for port, found in item.inputs.items()}
