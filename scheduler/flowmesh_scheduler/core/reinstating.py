"""Runs that come back after the take-over: their acceptance was lost and found, or their manifest is there only now."""

from __future__ import annotations

from flowmesh_mesh.manifest import RunEnd
from flowmesh_mesh.messages import Reason
from flowmesh_scheduler.core.commands import EndRun
from flowmesh_scheduler.core.events import GivenUp, Reinstated
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.recovery import resume_run
from flowmesh_scheduler.core.state import State, VertexState

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


def on_given_up(state: State, event: GivenUp, now_us: int, out: Outbox) -> None:
    """End a run of which nobody has the manifest: it has no operators to end, only a reason to name."""
    acceptance = event.acceptance
    pair = (acceptance.tenant, acceptance.run)
    if pair in state.runs or pair in state.ended:
        return
    end = RunEnd(acceptance.tenant, acceptance.run, Reason.INPUT_MISSING, AUDIT, now_us, detail=event.detail)
    state.ended[pair] = (end, acceptance)
    out.ends.append(EndRun(end, "failed"))
