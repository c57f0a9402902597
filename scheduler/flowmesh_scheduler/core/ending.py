"""How runs end: success once every output is held, failure or cancellation once nothing of them runs any more."""

from __future__ import annotations

from flowmesh_mesh.manifest import Cancellation, Ref, RunEnd
from flowmesh_mesh.messages import Reason
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import fairness
from flowmesh_scheduler.core.commands import EndRun, Keep, RecordCancel
from flowmesh_scheduler.core.events import CancelRequested, Kept
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import take_away
from flowmesh_scheduler.core.planning import SCHEDULER, detach, reopen
from flowmesh_scheduler.core.state import Run, State, Vertex, VertexState, WorkState

OUTPUTS_TOLD_MAX = 256
"""Most outputs that the end of a run names itself; of larger runs they are asked for, page by page."""


def on_cancel(state: State, event: CancelRequested, now_us: int, out: Outbox) -> None:
    """Stop a run: its operators leave their work; work that nobody else waits for is stopped."""
    run = state.runs.get((event.tenant, event.run))
    if run is None or run.end is not None or run.cancelled_by:
        return
    run.cancelled_by = event.actor or "tenant"
    out.add(RecordCancel(Cancellation(run.tenant, run.id, run.cancelled_by, now_us)))
    run.detail = run.detail or cancelled_text(run.cancelled_by)
    stop(state, run, Reason.CANCELLED, run.cancelled_by, out)


def cancelled_text(actor: str) -> str:
    """Return what is told of a run that somebody cancelled."""
    return f"cancelled by {actor}"


def stop(state: State, run: Run, reason: str, actor: str, out: Outbox) -> None:
    """End every vertex of a run that has not ended."""
    run.reason, run.actor = reason, actor
    out.touched[run.id_pair] = run
    for vertex in run.vertices:
        if vertex.state.is_final or (vertex.work is not None and vertex.work.state is WorkState.COMMITTING):
            continue
        abandoned = detach(state, vertex, out)
        if abandoned is not None:
            fairness.abandon(state, abandoned)
            take_away(state, abandoned, out)
            state.works.pop(abandoned.key, None)
        vertex.reason, vertex.actor = reason, actor
        out.set_state(vertex, VertexState.CANCELLED)


def watch_deadlines(state: State, now_us: int, out: Outbox) -> None:
    """Stop runs whose deadline has passed."""
    for run in list(state.runs.values()):
        if run.deadline_us and now_us > run.deadline_us and run.end is None and run.unfinished:
            run.detail = run.detail or "the deadline of the workflow has passed: give it a later one, or the mesh more nodes"
            stop(state, run, Reason.TIMEOUT, SCHEDULER, out)


def outputs_of(run: Run) -> dict[str, list[Ref]]:
    """Return the declared outputs of a run that exist."""
    found: dict[str, list[Ref]] = {}
    for name, output in run.manifest.outputs.items():
        vertex = run.vertices[output.op]
        if vertex.state is VertexState.DONE and vertex.outputs is not None:
            found[name] = vertex.outputs.get(output.port, [])
    return found


def end_if_settled(state: State, run: Run, now_us: int, out: Outbox) -> None:
    """End a run in which nothing is left to do."""
    if run.unfinished or run.end is not None:
        return
    succeeded = not run.reason and run.counts.get(VertexState.DONE.value, 0) == len(run.vertices)
    outputs = outputs_of(run)
    if succeeded and not run.kept:
        roots = {ref.cid: state.holders(ref.cid) for refs in outputs.values() for ref in refs}
        away = {root: holders for root, holders in roots.items() if HUB not in holders}
        if away:
            if not run.keeping:
                run.keeping = True
                out.add(Keep(run.tenant, run.id, away))
            return
    state_word = "succeeded" if succeeded else "cancelled" if run.reason == Reason.CANCELLED else "failed"
    run.end = RunEnd(
        tenant=run.tenant,
        run=run.id,
        reason=Reason.SUCCEEDED if succeeded else run.reason or Reason.INTERNAL,
        actor=run.actor or run.failed_by or SCHEDULER,
        ended_at_us=now_us,
        detail=run.detail,
        outputs=outputs if len(outputs) <= OUTPUTS_TOLD_MAX else {},
        records=_records(run) if len(outputs) <= OUTPUTS_TOLD_MAX else {},
        outputs_total=len(outputs),
        counts={name: n for name, n in run.counts.items() if n},
        saved_us=run.saved_us,
    )
    run.account.runs -= 1
    out.ends.append(EndRun(run.end, state_word))


def _records(run: Run) -> dict[str, bytes]:
    return {name: record for name, output in run.manifest.outputs.items() if (record := run.vertices[output.op].record)}


def on_kept(state: State, event: Kept, out: Outbox) -> None:
    """The hub has the outputs; what nobody could give any more is computed again."""
    run = state.runs.get((event.tenant, event.run))
    if run is None or run.end is not None:
        return
    run.keeping = False
    out.touched[run.id_pair] = run
    missing = set(event.missing)
    kept = [ref.cid for refs in outputs_of(run).values() for ref in refs if ref.cid not in missing]
    for root in kept:
        state.places.setdefault(root, set()).add(HUB)
    if not missing:
        run.kept = True
        return
    for root in missing:
        state.places.pop(root, None)
    for vertex in _makers(run, missing):
        reopen(state, vertex, out)


def _makers(run: Run, roots: set[bytes]) -> list[Vertex]:
    makers = [run.vertices[index] for index in dict.fromkeys(output.op for output in run.manifest.outputs.values())]
    return [v for v in makers if v.outputs and any(ref.cid in roots for refs in v.outputs.values() for ref in refs)]


def on_ended(state: State, pair: tuple[str, str]) -> None:
    """The ledger shows the end: keep the run for questions, and only so many of them."""
    run = state.runs.get(pair)
    if run is None or run.end is None:
        return
    if pair not in state.ended:
        state.finished.append(pair)
    state.ended[pair] = (run.end, run.acceptance)
    while len(state.finished) > state.settings.run_history:
        state.runs.pop(state.finished.popleft(), None)
