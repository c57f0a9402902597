"""Take-over: the state rebuilt from what ledger and streams hold, by evaluating every live run again."""

from __future__ import annotations

from collections.abc import Sequence

from flowmesh_cas.cid import digest_of
from flowmesh_mesh.manifest import Acceptance, Manifest, ResultRecord, RunEnd
from flowmesh_mesh.messages import Assignment, Reason
from flowmesh_scheduler.core import health
from flowmesh_scheduler.core.commands import Release
from flowmesh_scheduler.core.ending import cancelled_text, stop
from flowmesh_scheduler.core.events import Recovered, RecoveredRun
from flowmesh_scheduler.core.folding import resume
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import adopt, take_back
from flowmesh_scheduler.core.planning import deliver, identify, inputs_of, settle, start_run
from flowmesh_scheduler.core.state import Chain, Result, Run, State, TakenBack, Vertex, VertexState, Work, WorkState


def on_recovered(state: State, event: Recovered, now_us: int, out: Outbox) -> None:
    """Take in ledger and outstanding assignments. Runs before anything else of an epoch."""
    for cid, record in event.results:
        key = digest_of(record.operator)
        known = state.results.get(key)
        if known is None or known.generation < record.generation:
            state.results[key] = _result(cid, record)
    for found in event.runs:
        state.know_models(found.acceptance.model_bytes)
    health.inherit(state, event.health)
    for end, acceptance in event.ended:
        state.ended[(end.tenant, end.run)] = (end, acceptance)
    entering: list[Vertex] = []
    for found in event.runs:
        run = resume_run(state, found, out)
        entering.extend(v for v in run.vertices if v.waits_for == 0 and v.state is VertexState.WAITING)
    out.entering = entering


def _result(cid: bytes, record: ResultRecord) -> Result:
    metered = record.metered
    return Result(
        record.generation,
        record.result,
        record.outputs,
        cid,
        metered.exec_us,
        metered.load_us,
        record.attempt,
        record.receipt.node,
        record.log,
        record.committed_at_us,
    )


def evaluate(state: State, acceptance: Acceptance, manifest: Manifest, end: RunEnd | None) -> Run:
    """Return a run as the results tell it, without making it live: for questions about runs that have left memory."""
    scratch = State(state.settings, results=state.results, tenant_secrets=state.tenant_secrets)
    run = start_run(scratch, acceptance, manifest, out := Outbox())
    _follow_results(scratch, run, out)
    for vertex in run.vertices:
        if not vertex.state.is_final and end is not None:
            vertex.reason, vertex.actor = end.reason, end.actor
            out.set_state(vertex, VertexState.CANCELLED)
            vertex.ended_at_us = end.ended_at_us
    run.end = end
    return run


def resume_run(state: State, found: RecoveredRun, out: Outbox) -> Run:
    """Evaluate a run against the ledger: its own results stand without being asked for again."""
    run = start_run(state, found.acceptance, found.manifest, out)
    _follow_results(state, run, out)
    if found.cancelled_by:
        run.cancelled_by = found.cancelled_by
        run.detail = cancelled_text(found.cancelled_by)
        stop(state, run, Reason.CANCELLED, found.cancelled_by, out)
    return run


def _follow_results(state: State, run: Run, out: Outbox) -> None:
    """Settle every vertex of a run whose key the ledger has a result for, from the sources on."""
    out.entering.clear()
    fronts = [v for v in run.vertices if v.waits_for == 0]
    while fronts:
        vertex = fronts.pop()
        key, digests = identify(state, vertex, inputs := inputs_of(vertex))
        result = state.results.get(key)
        if result is None:
            out.identified[vertex] = (inputs, key, digests)
            continue
        vertex.key = key
        deliver(vertex, result, out)
        settle(state, vertex, result, out)
        fronts.extend(out.entering)
        out.entering.clear()


def readopt_all(state: State, assignments: Sequence[Assignment], now_us: int, out: Outbox) -> None:
    """Let the assignments of earlier epochs go on, those with chains from where the ledger shows that they have come."""
    starts: dict[bytes, list[Vertex]] = {item.key: [] for each in assignments if each.tails for item in each.items}
    if starts:
        for vertex in (vertex for run in state.runs.values() for vertex in run.vertices):
            if vertex.key in starts:
                starts[vertex.key].append(vertex)
    for assignment in assignments:
        _readopt(state, assignment, starts, now_us, out)


def _readopt(state: State, assignment: Assignment, starts: dict[bytes, list[Vertex]], now_us: int, out: Outbox) -> None:
    """An assignment of an earlier epoch goes on where its node is known and has not started again.

    Otherwise it is released, and so is a second attempt beside one that goes on; what its node may have done of it is taken
    when it comes.
    """
    node = state.nodes.get(assignment.node)
    attempts: dict[Work, int] = {}
    beside: dict[Work, int] = {}
    chains: dict[bytes, Chain] = {}
    for number, item in enumerate(assignment.items):
        found = resume(state, assignment, number, starts.get(item.key, ()))
        work, chain = found or (state.works.get(item.key), None)
        is_item = work is not None and work.key == item.key
        if work is None or work.is_hit or work.generation != (item.generation if is_item else 0):
            continue
        if work.state in (WorkState.QUEUED, WorkState.LOCATING):
            attempts[work] = item.attempt if is_item else 1
            if chain is not None and chain.rest:
                chains[work.key] = chain
        elif work.state is WorkState.ASSIGNED and is_item:
            beside[work] = item.attempt
    if node is not None and attempts and assignment.life == node.record.started_at_us:
        adopt(state, node, assignment.id, attempts, chains, now_us, out)
    else:
        out.add(Release(assignment.id, assignment.node))
        beside |= attempts
        keys = tuple(w.key for w in beside)
        take_back(state, assignment.id, TakenBack(assignment.node, assignment.life, keys, False, chains))
    for work, attempt in beside.items():
        work.attempts = max(work.attempts, attempt)
        work.issue(assignment.id, attempt, assignment.node)
