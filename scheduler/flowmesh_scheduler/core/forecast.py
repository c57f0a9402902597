"""What a workflow would take if it were submitted now: what is shared, which seconds and dollars are predicted.

First each operator gets the key that it would get. What an operator will produce is not known before it has run, so where that
enters the key of another a stand-in does, made of the producer's key: equal stand-ins mean equal contents, so what is found to
be shared is shared in truth; more may be. Then the rest is dealt out to the present nodes (:mod:`dealing`).

A generator, because a large workflow takes longer than a leader may be silent: it yields after each slice of work.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from flowmesh_mesh.identity import batch_key
from flowmesh_mesh.manifest import Acceptance, Manifest, Operator, Ref
from flowmesh_scheduler.core.costs import CostClass, Costs, cost_class, size_of
from flowmesh_scheduler.core.dealing import Deal, Job, deal
from flowmesh_scheduler.core.planning import identify, sources_of
from flowmesh_scheduler.core.state import Run, State, Vertex, Work, WorkState

SLICE = 500
"""Operators looked at between two yields."""

HIT, IN_FLIGHT, MERGED, RUN = "hits", "in_flight", "merged", "to_run"


@dataclass(slots=True)
class Fate:
    """What would become of one operator: ``outputs`` are known of hits alone, ``twin`` is its equal in the same workflow."""

    key: bytes
    what: str
    kind: CostClass
    outputs: Mapping[str, Sequence[Ref]] | None = None
    twin: int = -1
    saved_us: int = 0
    remaining_s: float = 0.0
    job: Job | None = None


@dataclass(slots=True)
class Row:
    """Operators of one type and model together."""

    type: str
    model: str
    operators: int = 0
    hits: int = 0
    in_flight: int = 0
    merged: int = 0
    to_run: int = 0
    batches: int = 0
    node_s: float = 0.0
    usd: float = 0.0
    samples: int = 0
    spread: float = 0.0
    devices: set[str] = field(default_factory=set)


def forecast(
    state: State, costs: Costs, acceptance: Acceptance, manifest: Manifest, now_us: int
) -> Generator[None, None, tuple[list[Fate], Deal]]:
    """Return what would become of each operator, and how what is left to run would be dealt out; yield now and then."""
    fates: list[Fate] = []
    first: dict[bytes, int] = {}
    private: list[bool] = []
    run = Run(acceptance.tenant, acceptance.run, manifest, acceptance)
    names = State(state.settings, tenant_secrets=state.tenant_secrets)  # a question is no event: no recording hears of its keys
    for index, operator in enumerate(manifest.operators):
        private.append(_is_private(operator, acceptance, private))
        inputs = _inputs(operator, fates)
        key, digests = identify(names, Vertex(run, index, operator, 0, is_private=private[index]), inputs)
        fates.append(_fate(state, index, operator, inputs, key, digests, fates, first, now_us))
        if index % SLICE == SLICE - 1:
            yield
    for index, (operator, fate) in enumerate(zip(manifest.operators, fates, strict=True)):
        if fate.job is not None:
            fate.job.after = _awaited(operator, fates)
        if index % (10 * SLICE) == 0:
            yield
    dealt = yield from deal(state, costs, {i: f.job for i, f in enumerate(fates) if f.job is not None})
    return fates, dealt


def _is_private(operator: Operator, acceptance: Acceptance, private: Sequence[bool]) -> bool:
    if operator.share == "private" or (acceptance.share == "private" and operator.share != "mesh"):
        return True
    return any(private[source] for source in sources_of(operator))


def _fate(
    state: State,
    index: int,
    operator: Operator,
    inputs: dict[str, list[Ref]],
    key: bytes,
    digests: Mapping[str, str],
    fates: list[Fate],
    first: dict[bytes, int],
    now_us: int,
) -> Fate:
    fate = Fate(key, RUN, cost_class(operator, digests))
    twin = first.setdefault(key, index)
    if twin != index:
        fate.what, fate.twin, fate.outputs = MERGED, twin, fates[twin].outputs
        return fate
    result = state.results.get(key)
    if result is not None and _is_held(state, result.outputs):
        fate.what, fate.outputs, fate.saved_us = HIT, result.outputs, result.exec_us
        return fate
    work = state.works.get(key)
    if work is not None:
        fate.what, fate.remaining_s = IN_FLIGHT, _remaining_s(state, work, now_us)
        fate.outputs = work.pending.outputs if work.state is WorkState.COMMITTING and work.pending is not None else None
        return fate
    fate.job = Job(operator, fate.kind, size_of(operator, inputs), batch_key(operator, inputs, digests, key))
    return fate


def _is_held(state: State, outputs: Mapping[str, Sequence[Ref]]) -> bool:
    """Tell whether nobody is known to have lost them: who was never asked may still hold them."""
    roots = (ref.cid for refs in outputs.values() for ref in refs)
    return all(root not in state.places or state.holders(root) for root in roots)


def _inputs(operator: Operator, fates: Sequence[Fate]) -> dict[str, list[Ref]]:
    found: dict[str, list[Ref]] = {}
    for port, sources in operator.inputs.items():
        refs: list[Ref] = []
        for source in sources:
            if source.ref is not None:
                refs.append(source.ref)
                continue
            producer = fates[source.op]
            if producer.outputs is None:
                name = f"{source.port}/{source.item}".encode()
                refs.append(Ref("", b"", sha256(b"stands in for " + producer.key + name).digest(), -1))
                continue
            produced = producer.outputs.get(source.port, [])
            refs.extend(produced if source.item < 0 else produced[source.item : source.item + 1])
        found[port] = refs
    return found


def _remaining_s(state: State, work: Work, now_us: int) -> float:
    """Return the seconds until work that is under way is predicted to end; of what still waits, what it takes."""
    outstanding = state.assignments.get(work.assignment)
    if outstanding is None:
        return work.seconds
    begun_us = outstanding.begun_us or outstanding.assigned_at_us
    return max(0.0, outstanding.predicted_s - (now_us - begun_us) / 1e6)


def _awaited(operator: Operator, fates: Sequence[Fate]) -> list[tuple[int, float]]:
    """Return the jobs that an operator waits for, as their indices, and the seconds of what runs already as (-1, seconds)."""
    found: dict[int, float] = {}
    running_s = 0.0
    for source in sources_of(operator):
        fate = fates[source]
        index = source if fate.twin < 0 else fate.twin
        if fates[index].job is not None:
            found[index] = 0.0
        else:
            running_s = max(running_s, fates[index].remaining_s)
    return [*found.items(), *([(-1, running_s)] if running_s else [])]


def told(state: State, costs: Costs, manifest: Manifest, fates: Sequence[Fate], dealt: Deal) -> dict[str, Any]:
    """Return a forecast as plain data."""
    rows: dict[tuple[str, str], Row] = {}
    for operator, fate in zip(manifest.operators, fates, strict=True):
        model = next(iter(operator.models.values()), "")
        row = rows.setdefault((operator.type, model), Row(operator.type, model))
        row.operators += 1
        setattr(row, fate.what, getattr(row, fate.what) + 1)
        if fate.job is not None:
            _add(costs, row, fate.job)
    running_s = max((fate.remaining_s for fate in fates), default=0.0)
    counts = {what: sum(fate.what == what for fate in fates) for what in (HIT, IN_FLIGHT, MERGED, RUN)}
    return {
        "name": manifest.name,
        "operators": len(manifest.operators),
        **counts,
        "saved_s": sum(fate.saved_us for fate in fates) / 1e6,
        "critical_path_s": max(dealt.critical_s, running_s),
        "makespan_s": max(dealt.makespan_s, running_s),
        "node_s": dealt.node_s,
        "usd": dealt.usd,
        "nodes": dealt.nodes,
        "queued": sum(queue.count for queue in state.pool.values()),
        "unknown_sizes": sum(fate.job is not None and fate.job.is_guessed for fate in fates),
        "lacking": dealt.lacking,
        "unplaced": sum(fate.job is not None and not fate.job.device for fate in fates),
        "rows": [_plain(row) for row in rows.values()],
    }


def _add(costs: Costs, row: Row, job: Job) -> None:
    row.batches += job.begins_batch
    row.node_s += job.node_s
    row.usd += job.usd
    if job.device and job.device not in row.devices:
        samples = costs.samples(job.kind, job.device)
        row.samples = samples if not row.devices else min(samples, row.samples)
        row.spread = max(row.spread, costs.line(job.kind, job.device).spread)
        row.devices.add(job.device)


def _plain(row: Row) -> dict[str, Any]:
    """Return a row; ``samples`` 0 means that the figures are a prior, guessed from the device's specification."""
    names = ("type", "model", "operators", HIT, IN_FLIGHT, MERGED, RUN, "batches", "node_s", "usd", "samples", "spread")
    return {name: getattr(row, name) for name in names}
