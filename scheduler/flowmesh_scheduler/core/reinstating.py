"""Runs that come back after the take-over: their acceptance was lost and found, or their manifest is there only now."""

from __future__ import annotations

from flowmesh_mesh.manifest import RunEnd
from flowmesh_mesh.messages import Reason
from flowmesh_scheduler.core import fairness
from flowmesh_scheduler.core.commands import EndRun
from flowmesh_scheduler.core.events import GivenUp, Reinstated, Replanned
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.planning import detach, sources_of, wait_for_sources
from flowmesh_scheduler.core.recovery import resume_run
from flowmesh_scheduler.core.state import State, Vertex, VertexState, WorkState

AUDIT = "audit"


def on_reinstated(state: State, event: Reinstated, now_us: int, out: Outbox) -> None:
    """Plan accepted runs that are not known yet, from what the ledger has of their results."""
    for found in event.runs:
        pair = (found.acceptance.tenant, found.acceptance.run)
        if pair in state.runs or pair in state.ended:
            continue
        state.know_models(found.acceptance.model_bytes)
        entering = out.entering
        out.entering = []
        run = resume_run(state, found, out)
        out.entering = entering + [v for v in run.vertices if v.waits_for == 0 and v.state is VertexState.WAITING]


def adrift(state: State, vertex: Vertex) -> str:
    """Return what is wrong with an operator that will never end by itself; empty if nothing is."""
    work = vertex.work
    if vertex.state.is_final:
        return ""
    if vertex.state is VertexState.WAITING:
        lacking = sum(vertex.run.vertices[source].outputs is None for source in sources_of(vertex.operator))
        return "" if lacking and vertex.waits_for == lacking else f"it waits for {vertex.waits_for} sources, {lacking} are open"
    if work is None or state.works.get(vertex.key) is not work:
        return f"it is {vertex.state.word} and nothing is known of its work"
    if work.state is WorkState.ASSIGNED and work.assignment not in state.assignments:
        return f"its assignment {work.assignment} is not known"
    return ""


def on_replanned(state: State, event: Replanned, now_us: int, out: Outbox) -> None:
    """Let operators that are adrift find their way again, as if their run had just begun."""
    run = state.runs.get((event.tenant, event.run))
    if run is None or run.end is not None:
        return
    for index in event.indices:
        vertex = run.vertices[index] if 0 <= index < len(run.vertices) else None
        if vertex is None or not adrift(state, vertex):
            continue
        work = vertex.work
        if work is not None and state.works.get(vertex.key) is work:
            abandoned = detach(state, vertex, out)
            if abandoned is not None:
                fairness.abandon(state, abandoned)
                state.works.pop(abandoned.key, None)
        vertex.work = None
        wait_for_sources(vertex, out)
    out.touched[run.id_pair] = run


def on_given_up(state: State, event: GivenUp, now_us: int, out: Outbox) -> None:
    """End a run of which nobody has the manifest: it has no operators to end, only a reason to name."""
    acceptance = event.acceptance
    pair = (acceptance.tenant, acceptance.run)
    if pair in state.runs or pair in state.ended:
        return
    end = RunEnd(acceptance.tenant, acceptance.run, Reason.INPUT_MISSING, AUDIT, now_us, detail=event.detail)
    state.ended[pair] = (end, acceptance)
    out.ends.append(EndRun(end, "failed"))
