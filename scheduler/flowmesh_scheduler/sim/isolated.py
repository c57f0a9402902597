"""One pipeline per GPU: each workflow owns a machine from its start to its end. On the same truth, market and bills.

What is given to this baseline: it takes the machine on which this very workflow costs the fewest dollars by the true model
without noise, a host's slowness included; identical operators of one workflow run once; all ready operators of a kind go into one
batch; work for the processor runs beside work for the accelerator; results survive a machine that is taken away; an idle machine
that is still rented is taken over by the next workflow, with all that lies on its disk and in its memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b, sha256
from heapq import heappop, heappush

from flowmesh_cas.cid import RAW, cid_from_digest
from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.identity import batch_key
from flowmesh_mesh.manifest import Manifest, Operator, Ref
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.sim import truth
from flowmesh_scheduler.sim.fleet import Offer
from flowmesh_scheduler.sim.language_models import PINNED
from flowmesh_scheduler.sim.machine import HUB_BYTES_PER_S, Machine
from flowmesh_scheduler.sim.metrics import Figures, RunTimes
from flowmesh_scheduler.sim.rental import AWAY_S, Market, Terms
from flowmesh_scheduler.sim.truth import Demand, Spent
from flowmesh_scheduler.sim.worker import lane_of
from flowmesh_scheduler.sim.workloads import Arrival, Scenario, identities

_DIGITS = "0123456789"
_USER_LANES = ("user1", "user2", "user3", "user4")
_NO_LINKS: Mapping[bytes, float] = {}


@dataclass(slots=True)
class Step:
    """An operator as it will run: what it asks for, of what kind it is, after which others."""

    key: bytes
    operator: Operator
    kind: str
    executor: str
    inputs: dict[str, list[Ref]]
    demand: Demand
    after: set[int]
    outputs: list[Ref] = field(default_factory=list)


def plan(manifest: Manifest) -> list[Step]:
    """Return the operators of a workflow, each once, with their true demands."""
    keys = identities(manifest)
    index_of: dict[bytes, int] = {}
    made: list[dict[str, list[Ref]]] = []
    steps: list[Step] = []
    place = []
    for number, operator in enumerate(manifest.operators):
        if keys[number] in index_of:
            place.append(index_of[keys[number]])
            continue
        inputs: dict[str, list[Ref]] = {}
        after: set[int] = set()
        for port, sources in operator.inputs.items():
            refs = inputs[port] = []
            for source in sources:
                if source.ref is not None:
                    refs.append(source.ref)
                else:
                    after.add(place[source.op])
                    found = made[place[source.op]].get(source.port, [])
                    refs.extend(found if source.item < 0 else found[source.item : source.item + 1])
        digests = {role: PINNED[reference] for role, reference in operator.models.items()}
        demand = truth.demand_of(operator.type, operator.params, inputs, next(iter(digests.values()), ""))
        outputs: dict[str, list[Ref]] = {}
        for part, (port, form, size, rows) in enumerate(truth.output_shapes(operator.type, operator.params, inputs, demand)):
            digest = sha256(keys[number] + part.to_bytes(2, "big")).digest()
            outputs.setdefault(port, []).append(Ref(form, cid_from_digest(RAW, digest), digest, size, rows))
        index_of[keys[number]] = len(steps)
        place.append(len(steps))
        made.append(outputs)
        kind = batch_key(operator, inputs, digests, keys[number])
        refs = [ref for found in outputs.values() for ref in found]
        steps.append(Step(keys[number], operator, kind, CATALOG[operator.type].executor, inputs, demand, after, refs))
    return steps


Noise = Callable[[Sequence[Step]], float]


@dataclass(slots=True)
class Course:
    """How a workflow went on a machine: when it was over (seconds from its start there) and which steps are done by then."""

    seconds: float = 0.0
    done: set[int] = field(default_factory=set)
    batches: list[tuple[float, Spent, bool, int]] = field(default_factory=list)


def run(
    steps: Sequence[Step], done: set[int], machine: Machine, limits: Mapping[str, int], noise: Noise, until_s: float
) -> Course:
    """Run the steps that are not done on one machine, at most ``until_s`` seconds.

    The accelerator takes all ready steps of one kind at a time: of a model in memory if there are any, else of the first step
    that is ready. It waits while tables are being prepared that may go into the same batch.
    """
    course = Course(done=set(done))
    started = set(done)
    free = dict.fromkeys(("data", *_USER_LANES, "gpu"), True)
    ends: list[tuple[float, int, str, list[int], bool]] = []
    now_s, number = 0.0, 0
    while True:
        ready = [i for i, step in enumerate(steps) if i not in started and step.after <= course.done]
        for lane in free:
            mine = [i for i in ready if i not in started and lane_of(steps[i].operator.type) == lane.rstrip(_DIGITS)]
            if not free[lane] or not mine or (lane == "gpu" and not free["data"]):
                continue
            chosen = _choose(steps, mine, machine, limits)
            demands = [steps[i].demand for i in chosen]
            spent = machine.begin(demands, [steps[i].inputs for i in chosen], _NO_LINKS)
            factor = noise([steps[i] for i in chosen])
            spent = Spent(spent.fetch_s, spent.load_s * factor**0.5, spent.exec_s * factor, spent.power_share)
            course.batches.append((now_s, spent, lane == "gpu", len(chosen)))
            started.update(chosen)
            free[lane] = False
            parts = _parts(chosen, demands, now_s, spent)
            for at_s, group in parts:
                number += 1
                heappush(ends, (at_s, number, lane, group, at_s == parts[-1][0]))
        if not ends:
            break
        now_s, _, lane, group, is_last = heappop(ends)
        if now_s > until_s:
            course.seconds = until_s
            return course
        course.done.update(group)
        machine.blocks.update(ref.cid for i in group for ref in steps[i].outputs)
        free[lane] = is_last or free[lane]
    course.seconds = now_s
    return course


def _parts(chosen: Sequence[int], demands: Sequence[Demand], now_s: float, spent: Spent) -> list[tuple[float, list[int]]]:
    """Return which steps of a batch are done when."""
    found: dict[float, list[int]] = {}
    for index, share in zip(chosen, truth.shares(demands), strict=True):
        found.setdefault(now_s + spent.fetch_s + spent.load_s + share * spent.exec_s, []).append(index)
    return sorted(found.items())


def _choose(steps: Sequence[Step], ready: Sequence[int], machine: Machine, limits: Mapping[str, int]) -> list[int]:
    first = next((i for i in ready if _is_resident(steps[i], machine)), ready[0])
    if not CATALOG[steps[first].operator.type].batches:
        return [first]
    return [i for i in ready if steps[i].kind == steps[first].kind][: limits[steps[first].executor]]


def _is_resident(step: Step, machine: Machine) -> bool:
    model = step.demand.model
    return model is not None and step.executor == "engine" and model.digest in machine.resident


@dataclass(slots=True)
class _Pipeline:
    arrival: Arrival
    steps: list[Step]
    done: set[int] = field(default_factory=set)

    @property
    def vram_bytes(self) -> int:
        return max((step.operator.resources.vram_bytes for step in self.steps), default=0)


@dataclass
class Isolated:
    """A scenario under the baseline."""

    scenario: Scenario
    terms: Terms = field(default_factory=Terms)
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.market = Market(self.scenario.offers(), self.scenario.seed)
        self.times = RunTimes()
        self._waiting: deque[_Pipeline] = deque()
        self._idle: dict[str, tuple[Machine, float]] = {}
        self._dies_at_s: dict[str, float] = {}
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self._digest = blake2b(digest_size=16)
        self._operators = self._batches = self._preemptions = 0
        self._useful_s = self._lost_s = 0.0

    def run(self) -> Figures:
        """Play the scenario to its end; return what came of it."""
        for arrival in self.scenario.arrivals:
            self._at(arrival.at_s, partial(self._arrive, _Pipeline(arrival, plan(arrival.manifest))))
        while self._heap:
            now_s, _, action = heappop(self._heap)
            action(now_s)
        assert not self._waiting, "no machine on offer is large enough"
        return Figures.of(
            self.market.machines,
            self.times,
            operators=self._operators,
            hits=sum(len(a.manifest.operators) for a in self.scenario.arrivals) - self._operators,
            batches=self._batches,
            useful_s=self._useful_s,
            lost_s=self._lost_s,
            preemptions=self._preemptions,
            digest=self._digest.hexdigest(),
        )

    def _at(self, at_s: float, action: Callable[[float], None]) -> None:
        self._number += 1
        heappush(self._heap, (at_s, self._number, action))

    def _arrive(self, pipeline: _Pipeline, now_s: float) -> None:
        self.times.submitted(pipeline.arrival.run, round(pipeline.arrival.at_s * 1e6))
        self._waiting.append(pipeline)
        self._begin_some(now_s)

    def _begin_some(self, now_s: float) -> None:
        for _ in range(len(self._waiting)):
            pipeline = self._waiting.popleft()
            machine = self._best_machine(pipeline, now_s)
            if machine is None:
                self._waiting.append(pipeline)
            else:
                self._begin(pipeline, machine, max(now_s, machine.ready_at_s))

    def _best_machine(self, pipeline: _Pipeline, now_s: float) -> Machine | None:
        """Return the machine on which this workflow costs least, rented if need be."""
        best: tuple[float, str] | None = None
        chosen: Machine | Offer | None = None
        for candidate in self._candidates(pipeline.vram_bytes, now_s):
            offer = candidate.offer if isinstance(candidate, Machine) else candidate
            trial = _copy_of(candidate)
            boot_s = 0.0 if isinstance(candidate, Machine) else offer.boot_s
            course = run(pipeline.steps, pipeline.done, trial, self.settings.batch_limit, lambda steps: 1.0, float("inf"))
            usd = (boot_s + course.seconds) * offer.price_per_hour
            if best is None or (usd, offer.name) < best:
                best, chosen = (usd, offer.name), candidate
        if isinstance(chosen, Machine):
            del self._idle[chosen.name]
            return chosen
        if chosen is None:
            return None
        machine, lifetime_s = self.market.rent(chosen, now_s)
        self._dies_at_s[machine.name] = now_s + lifetime_s
        return machine

    def _candidates(self, vram_bytes: int, now_s: float) -> list[Machine | Offer]:
        """Return the idle machines that fit, and of each class the host that is cheapest for its speed."""
        found: list[Machine | Offer] = [m for m, _ in self._idle.values() if m.offer.device.vram_bytes >= vram_bytes]
        best: dict[str, Offer] = {}
        for offer in self.market.available(now_s):
            kind = offer.device
            if kind.vram_bytes >= vram_bytes and (kind.is_gpu or not vram_bytes):
                known = best.get(kind.name)
                if known is None or offer.price_per_hour * offer.slowness < known.price_per_hour * known.slowness:
                    best[kind.name] = offer
        return [*found, *best.values()]

    def _begin(self, pipeline: _Pipeline, machine: Machine, at_s: float) -> None:
        def noise(steps: Sequence[Step]) -> float:
            return truth.noise(self.scenario.seed, machine.offer.name, min(s.key for s in steps).hex(), 1)

        dies_at_s = self._dies_at_s[machine.name]
        course = run(pipeline.steps, pipeline.done, machine, self.settings.batch_limit, noise, dies_at_s - at_s)
        ends_s = at_s + course.seconds
        self._digest.update(f"{pipeline.arrival.run} {machine.name} {course.seconds:.6f}".encode())
        for began_s, spent, is_gpu, count in course.batches:
            is_whole = began_s + spent.seconds <= course.seconds + 1e-6
            share = 1.0 if is_whole else max(0.0, course.seconds - began_s) / spent.seconds
            machine.busy_s += spent.seconds * share if is_gpu else 0.0
            machine.busy_joules += machine.joules(spent, is_gpu=is_gpu) * share
            self._batches += 1
            if not is_whole:
                self._lost_s += spent.seconds * share
            else:
                self._useful_s += spent.exec_s
                self._operators += count
        pipeline.done = course.done
        if len(course.done) < len(pipeline.steps):
            self._at(dies_at_s, partial(self._die, pipeline, machine))
        else:
            outputs = [pipeline.steps[-1].outputs]
            ends_s += 0.02 + sum(ref.size for refs in outputs for ref in refs) / HUB_BYTES_PER_S
            self._at(ends_s, partial(self._end, pipeline, machine))

    def _die(self, pipeline: _Pipeline, machine: Machine, now_s: float) -> None:
        self._preemptions += 1
        self.market.give_back(machine, now_s, is_taken=True)
        self._waiting.appendleft(pipeline)
        self._begin_some(now_s)
        self._at(now_s + AWAY_S, self._begin_some)

    def _end(self, pipeline: _Pipeline, machine: Machine, now_s: float) -> None:
        self.times.ended(pipeline.arrival.run, round(now_s * 1e6), "succeeded")
        self._idle[machine.name] = (machine, now_s)
        self._at(now_s + self.terms.idle_release_s, partial(self._release, machine, now_s))
        self._begin_some(now_s)

    def _release(self, machine: Machine, since_s: float, now_s: float) -> None:
        idle = self._idle.get(machine.name)
        if idle is not None and idle[1] == since_s:
            del self._idle[machine.name]
            self.market.give_back(machine, now_s)
            self._begin_some(now_s)


def _copy_of(candidate: Machine | Offer) -> Machine:
    """Return a machine to try a workflow on, with what the candidate holds."""
    if isinstance(candidate, Offer):
        return Machine("trial", candidate, 0.0, 0.0)
    return Machine(
        "trial",
        candidate.offer,
        0.0,
        0.0,
        resident=dict(candidate.resident),
        disk=set(candidate.disk),
        blocks=set(candidate.blocks),
    )
