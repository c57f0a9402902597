"""The workloads: who submits which documents when, and on what market.

Every seed varies content, sizes and times. Seeds 1 to 9 are for tuning; results are reported from 1001 on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from flowmesh_mesh.identity import identity_record, operator_key
from flowmesh_mesh.manifest import Manifest, Ref, Source
from flowmesh_scheduler.sim import documents
from flowmesh_scheduler.sim.documents import Author
from flowmesh_scheduler.sim.draws import exponential, pick
from flowmesh_scheduler.sim.fleet import Offer, market
from flowmesh_scheduler.sim.language_models import MODELS, PINNED, LanguageModel

OVERLAP = 0.4
"""Share of each document of ``mix`` that tenants have in common, unless a study varies it."""

_OFFERS = 400
_HAZARD = 0.05
_SWEEP_S = 120.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A workflow submitted at a moment of virtual time."""

    at_s: float
    tenant: str
    run: str
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens, whatever the policy: submissions, and the hosts on offer: ``hosts``, or so many made up."""

    name: str
    seed: int
    arrivals: tuple[Arrival, ...]
    hazard_per_hour: float
    offers_count: int
    hosts: tuple[Offer, ...] = ()

    def offers(self) -> list[Offer]:
        return list(self.hosts) or market(self.seed, self.offers_count, self.hazard_per_hour)

    @property
    def operators(self) -> int:
        return sum(len(arrival.manifest.operators) for arrival in self.arrivals)


Pick = Sequence[str]


def _model(names: Pick, *draw: object) -> LanguageModel:
    return MODELS[names[pick(len(names), *draw)]]


def _pipeline(tenant: str, index: int, seed: int, overlap: float) -> Manifest:
    """Return the index-th post-training workflow of a tenant: its first operators, by number, are those of everyone's."""
    everyone, own = f"{seed} pipeline {index}", f"{seed} {tenant} pipeline {index}"
    kind = (documents.sft, documents.dpo, documents.ppo, documents.reward)[pick(4, seed, "sweep", index // 4)]

    def written(common: int) -> Manifest:
        author = Author(own, everyone, common)
        base = _model(("3b", "8b", "8b"), everyone, "base")
        if kind is documents.sft:
            return documents.sft(author, base, MODELS["14b"])
        if kind is documents.reward:
            return documents.reward(author, MODELS["reward-3b"], base, MODELS["14b"])
        rewards = MODELS["reward-3b"]
        if kind is documents.dpo:
            return documents.dpo(author, base, rewards)
        return documents.ppo(author, base, rewards, rounds=4)

    return written(round(overlap * len(written(0).operators)))


def _submit_times(count: int, mean_s: float, *draw: object) -> list[float]:
    at_s, found = 0.0, []
    for index in range(count):
        at_s += exponential(mean_s, *draw, index)
        found.append(at_s)
    return found


def _arrivals(tenant: str, times: Sequence[float], write: Callable[[int], Manifest]) -> list[Arrival]:
    return [Arrival(at_s, tenant, f"{tenant}-{index}", write(index)) for index, at_s in enumerate(times)]


def _ordered(arrivals: Sequence[Arrival]) -> tuple[Arrival, ...]:
    return tuple(sorted(arrivals, key=lambda a: (a.at_s, a.run)))


def mix(seed: int, overlap: float = OVERLAP, sweep_s: float = _SWEEP_S) -> Scenario:
    """Four tenants post-train: SFT, DPO, PPO-like rounds and reward models, partly from the same recipes.

    Each starts sweeps of four variants, ``sweep_s`` apart on average.
    """
    found = []
    for tenant in ("ada", "ben", "cyd", "dov"):
        starts = _submit_times(6, sweep_s, "mix", seed, tenant)
        times = [at_s + 5.0 * variant for at_s in starts for variant in range(4)]
        found += _arrivals(tenant, times, lambda index, tenant=tenant: _pipeline(tenant, index, seed, overlap))  # type: ignore[misc]
    return Scenario("mix", seed, _ordered(found), _HAZARD, _OFFERS)


def mix_sparse(seed: int) -> Scenario:
    """The mix with half as much going on at a time: how much of the gain rests on a mesh that is busy."""
    return replace(mix(seed, sweep_s=2 * _SWEEP_S), name=SPARSE)


def _agent(tenant: str, index: int, seed: int, models: Pick, common: int) -> Manifest:
    everyone = f"{seed} agent {pick(24, seed, tenant, index)}"
    author = Author(f"{seed} {tenant} agent {index}", everyone, common)
    return documents.agent(author, _model(models, everyone, "worker"), MODELS["judge-7b"], 1 + pick(3, everyone, "width"))


def agents(seed: int) -> Scenario:
    """Agents of four tenants answer questions; many begin with the same documents and plans."""
    found = []
    models = ("chat-8b", "chat-3b", "coder-7b")
    for tenant in ("ada", "ben", "cyd", "dov"):
        times = _submit_times(60, 60.0, "agents", seed, tenant)

        def write(index: int, tenant: str = tenant) -> Manifest:
            return _agent(tenant, index, seed, models, 2 * (pick(5, seed, tenant, index, "c") < 2))

        found += _arrivals(tenant, times, write)
    return Scenario("agents", seed, _ordered(found), _HAZARD, _OFFERS)


def bursts(seed: int) -> Scenario:
    """Nothing for long, then thirty workflows at once: agents, and some pipelines."""
    found = []
    for wave, at_s in enumerate(_submit_times(5, 2400.0, "bursts", seed)):
        for index in range(30):
            tenant = ("ada", "ben", "cyd")[index % 3]
            number = wave * 100 + index
            manifest = (
                _pipeline(tenant, number, seed, 0.0)
                if index % 10 == 0
                else _agent(tenant, number, seed, ("chat-8b", "chat-3b"), 2 * (index % 4 == 0))
            )
            found.append(Arrival(at_s + 20.0 * index / 30, tenant, f"{tenant}-{number}", manifest))
    return Scenario("bursts", seed, _ordered(found), _HAZARD, _OFFERS)


def steady(seed: int) -> Scenario:
    """One tenant, one workflow after the other, nothing in common between them."""
    times = _submit_times(60, 180.0, "steady", seed)
    return Scenario(
        "steady", seed, _ordered(_arrivals("ada", times, lambda index: _pipeline("ada", index, seed, 0.0))), _HAZARD, _OFFERS
    )


def preempt(seed: int) -> Scenario:
    """Two tenants on hosts that are taken away about three times an hour."""
    found = []
    for tenant in ("ada", "ben"):
        times = _submit_times(24, 300.0, "preempt", seed, tenant)
        found += _arrivals(tenant, times, lambda index, tenant=tenant: _pipeline(tenant, index, seed, 0.2))  # type: ignore[misc]
    return Scenario("preempt", seed, _ordered(found), 3.0, _OFFERS)


def hot_model(seed: int) -> Scenario:
    """Most questions go to one model, the others to any of many."""
    found = []
    for tenant in ("ada", "ben", "cyd"):
        times = _submit_times(80, 45.0, "hot", seed, tenant)

        def write(index: int, tenant: str = tenant) -> Manifest:
            is_hot = pick(10, seed, tenant, index, "hot") < 7
            names = ("chat-8b",) if is_hot else ("1b", "3b", "7b", "8b", "chat-3b", "coder-7b", "14b")
            return _agent(tenant, index, seed, names, 2 * (pick(5, seed, tenant, index, "c") < 1))

        found += _arrivals(tenant, times, write)
    return Scenario("hot-model", seed, _ordered(found), _HAZARD, _OFFERS)


SPARSE = "mix-sparse"
"""Reported beside the workloads, against one pipeline per GPU only."""

WORKLOADS: dict[str, Callable[..., Scenario]] = {
    "mix": mix,
    "agents": agents,
    "bursts": bursts,
    "steady": steady,
    "preempt": preempt,
    "hot-model": hot_model,
}


@dataclass(frozen=True, slots=True)
class Shared:
    """What documents have in common, by the identity of their operators: shares of all operators.

    ``between_tenants``: operators that another tenant's document has too. ``within_tenant``: those that only another document of
    the same tenant has. ``needless``: what need not run if everything is run once.
    """

    between_tenants: float
    within_tenant: float
    needless: float


def shared(scenario: Scenario) -> Shared:
    """Measure what the documents of a scenario have in common."""
    tenants: dict[bytes, set[str]] = {}
    runs: Counter[bytes] = Counter()
    placed: list[tuple[str, bytes]] = []
    for arrival in scenario.arrivals:
        keys = identities(arrival.manifest)
        runs.update(set(keys))
        for key in keys:
            tenants.setdefault(key, set()).add(arrival.tenant)
            placed.append((arrival.tenant, key))
    total = len(placed)
    between = sum(len(tenants[key]) > 1 for _, key in placed)
    within = sum(len(tenants[key]) == 1 and runs[key] > 1 for _, key in placed)
    return Shared(between / total, within / total, 1 - len(tenants) / total)


def _made(maker: bytes, source: Source) -> Ref:
    return Ref("made", b"", sha256(maker + source.port.encode()).digest(), source.item)


def identities(manifest: Manifest) -> list[bytes]:
    """Return for each operator what it is: the key it would have if every input were named by what makes it."""
    found: list[bytes] = []
    for operator in manifest.operators:
        inputs = {
            port: [s.ref if s.ref is not None else _made(found[s.op], s) for s in sources]
            for port, sources in operator.inputs.items()
        }
        digests = {role: PINNED[reference] for role, reference in operator.models.items()}
        found.append(operator_key(identity_record(operator, inputs, digests)))
    return found
