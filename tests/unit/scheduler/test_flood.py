"""A light tenant beside one who floods the mesh: it waits hardly longer than alone, and hardly longer than in a fluid."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, operator, workflow

from flowmesh_mesh.manifest import Metered
from flowmesh_mesh.messages import Assignment
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings, TenantSettings

NODES = 2
LONGEST_S = 1.0
SHORTEST_S = 0.1
LIGHT, HEAVY, OTHER = "ta", "tb", "tc"


class Request(NamedTuple):
    """A run of one operator that takes so long."""

    at_s: float
    tenant: str
    steps: int

    @property
    def seconds(self) -> float:
        return self.steps * SHORTEST_S


def requests(seed: int, demand: float, until_s: float, flood: int) -> list[Request]:
    """Return what a light tenant asks for by and by (Poisson; ``demand`` nodes on average), and another one all at once."""
    numbers = random.Random(seed)
    count = round(demand * until_s / 0.55)
    steps = [numbers.randint(1, 10) for _ in range(count)]
    gaps = [numbers.expovariate(1.0) for _ in range(count)]
    scale_s = sum(steps) * SHORTEST_S / demand / sum(gaps)
    found, at_s = [], 0.0
    for gap, each in zip(gaps, steps, strict=True):
        at_s += gap * scale_s
        found.append(Request(at_s, LIGHT, each))
    found += [Request(5.0, HEAVY, numbers.randint(1, 10)) for _ in range(flood)]
    return sorted(found, key=lambda r: r.at_s)


def fluid_ends(asked: list[Request], weights: dict[str, float]) -> list[float]:
    """Return when each request would end if nodes could be divided: exact shares by weight, an operator on one node at most."""
    ends = [0.0] * len(asked)
    waiting: dict[str, list[list[float]]] = {tenant: [] for tenant in weights}
    now_s, index = 0.0, 0
    while index < len(asked) or any(waiting.values()):
        served: list[tuple[list[float], float]] = []
        for tenant, rate in _rates(waiting, weights).items():
            for request in waiting[tenant]:
                if rate > 1e-12:
                    served.append((request, min(1.0, rate)))
                    rate -= min(1.0, rate)
        next_s = asked[index].at_s if index < len(asked) else float("inf")
        elapsed_s = min([next_s - now_s, *(request[1] / rate for request, rate in served)])
        for request, rate in served:
            request[1] -= elapsed_s * rate
        now_s += elapsed_s
        for tenant, line in waiting.items():
            for request in line:
                if request[1] <= 1e-9:
                    ends[int(request[0])] = now_s
            waiting[tenant] = [request for request in line if request[1] > 1e-9]
        while index < len(asked) and asked[index].at_s <= now_s + 1e-12:
            waiting[asked[index].tenant].append([index, asked[index].seconds])
            index += 1
    return ends


def _rates(waiting: dict[str, list[list[float]]], weights: dict[str, float]) -> dict[str, float]:
    """Return how many nodes each tenant gets; what one cannot use goes to the others."""
    rates: dict[str, float] = {}
    active = [tenant for tenant in waiting if waiting[tenant]]
    left = float(NODES)
    while active:
        whole = sum(weights[tenant] for tenant in active)
        content = [t for t in active if len(waiting[t]) <= left * weights[t] / whole + 1e-12]
        if not content:
            return {**rates, **{t: left * weights[t] / whole for t in active}}
        rates.update({t: float(len(waiting[t])) for t in content})
        left -= sum(len(waiting[t]) for t in content)
        active = [t for t in active if t not in content]
    return rates


@dataclass
class Mesh:
    """Two nodes of one slot each on a clock of their own, driven through ``step``.

    What the flood is made of may be in so many ``queues``: kinds of work that cannot share a batch.
    """

    settings: Settings
    queues: int = 1
    ends: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.desk = Desk(self.settings, checks_every=200)
        self.events: list[tuple[int, int, object]] = []
        self.number = self.batch = 0
        self.begun_us = self.desk.now_us
        self.desk.join(*(f"n{n}" for n in range(NODES)), types=("train.sft",))
        self.queued: dict[str, list[Assignment]] = {f"n{n}": [] for n in range(NODES)}
        self.seconds: dict[str, float] = {}

    def run(self, asked: list[Request]) -> list[float]:
        """Submit the requests at their times, once it is known what such operators take; return when each has ended."""
        known = [Request(3.0 * number, OTHER, number % 10 + 1) for number in range(20)]
        self._run(known)
        self.begun_us = self.desk.now_us
        return self._run(asked)

    def _run(self, asked: list[Request]) -> list[float]:
        self.ends.clear()
        self.batch += 1
        for index, request in enumerate(asked):
            self._at(request.at_s, index)
        while self.events:
            self.desk.now_us, _, what = heappop(self.events)
            if isinstance(what, int):
                self._submit(what, asked[what])
            elif isinstance(what, Assignment):
                self._finish(what)
            else:
                self._hear(self.desk.apply(e.Tick()))
        return [self.ends[index] for index in range(len(asked))]

    def _at(self, at_s: float, what: object) -> None:
        self.number += 1
        heappush(self.events, (self.begun_us + int(at_s * SECOND), self.number, what))

    def _submit(self, index: int, request: Request) -> None:
        self.seconds[f"r{index}"] = request.seconds
        params = {"seed": self.batch * 10_000 + index, "steps": request.steps}
        begun = len(self.desk.commands)
        timeout_s = 1000.0 + index % self.queues if request.tenant == HEAVY else 1000.0
        flow = workflow([operator(f"r{index}", type="train.sft", params=params, timeout_s=timeout_s)])
        self.desk.submit(flow, f"r{self.batch}-{index}", request.tenant)
        self._hear(self.desk.commands[begun:])

    def _hear(self, commands: list[c.Command]) -> None:
        for command in commands:
            if isinstance(command, c.Assign):
                line = self.queued[command.assignment.node]
                line.append(command.assignment)
                if len(line) == 1:
                    self._start(command.assignment)

    def _start(self, assignment: Assignment) -> None:
        now_s = (self.desk.now_us - self.begun_us) / SECOND
        self._at(now_s + sum(self.seconds[item.name] for item in assignment.items), assignment)

    def _finish(self, assignment: Assignment) -> None:
        line = self.queued[assignment.node]
        line.remove(assignment)
        if line:
            self._start(line[0])
        outcomes = []
        for item in assignment.items:
            metered = Metered(exec_us=int(self.seconds[item.name] * SECOND))
            outcomes.append(self.desk.outcome(item, assignment.type, metered=metered))
            self.ends[int(item.name[1:])] = (self.desk.now_us - self.begun_us) / SECOND
        self._hear(self.desk.report(assignment, outcomes))


def settings(light: float, heavy: float, **more: float) -> Settings:
    tenants = {LIGHT: TenantSettings(weight=light), HEAVY: TenantSettings(weight=heavy)}
    return Settings(tenants=tenants, node_lease_us=10**12, **more)  # type: ignore[arg-type]


def mean_response_s(asked: list[Request], ends: list[float]) -> float:
    spans = [end - request.at_s for request, end in zip(asked, ends, strict=True) if request.tenant == LIGHT]
    return sum(spans) / len(spans)


WEIGHTS = [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0)]
SEEDS = (3, 5)


@pytest.mark.parametrize(("load", "queues"), [(0.4, 1), (0.8, 1), (0.8, 2), (0.8, 50)])
@pytest.mark.parametrize(("light", "heavy"), WEIGHTS)
def test_a_light_tenant_hardly_feels_the_flood_of_another(light: float, heavy: float, load: float, queues: int) -> None:
    share = NODES * light / (light + heavy)
    for seed in SEEDS:
        asked = requests(seed, load * share, 100.0, 200)
        alone = [request for request in asked if request.tenant == LIGHT]
        alone_s = mean_response_s(alone, Mesh(settings(light, heavy)).run(alone))
        ends = Mesh(settings(light, heavy), queues).run(asked)
        assert mean_response_s(asked, ends) <= 1.5 * alone_s
        fluid = fluid_ends(asked, {LIGHT: light, HEAVY: heavy})
        late = [end - exact for request, end, exact in zip(asked, ends, fluid, strict=True) if request.tenant == LIGHT]
        assert max(late) <= LONGEST_S


@pytest.mark.parametrize(("light", "heavy"), WEIGHTS)
def test_with_exact_shares_no_operator_ends_later_than_in_a_fluid_by_more_than_one(light: float, heavy: float) -> None:
    share = NODES * light / (light + heavy)
    for seed in SEEDS:
        asked = requests(seed, 0.8 * share, 100.0, 200)
        ends = Mesh(settings(light, heavy, fair_burst_s=0.0)).run(asked)
        fluid = fluid_ends(asked, {LIGHT: light, HEAVY: heavy})
        assert max(end - exact for end, exact in zip(ends, fluid, strict=True)) <= LONGEST_S
