"""Deadlines of stages: what is left until a run's deadline is divided along the longest path that is left.

An operator's part is its predicted time to that of the path from it to the end, looked at anew when it becomes ready: time that
an earlier stage saved or lost goes on to those that follow (two-level scheduling as in HexGen-Flow).
"""

from __future__ import annotations

from collections.abc import Sequence

from flowmesh_scheduler.core.costs import cost_class, size_of
from flowmesh_scheduler.core.state import Run, State, Vertex, Work


def path_seconds(state: State, run: Run) -> Sequence[float]:
    """Return, for each operator of a run with a deadline, the seconds of the longest path after it on usual nodes."""
    reference = state.fleet.reference
    device = reference.device if reference is not None else ""
    pinned = run.acceptance.models
    after = [0.0] * len(run.vertices)
    for vertex in reversed(run.vertices):
        operator = vertex.operator
        digests = {role: pinned.get(reference, reference) for role, reference in operator.models.items()}
        line = state.costs.line(cost_class(operator, digests), device)
        seconds = after[vertex.index] + line.seconds(*size_of(operator, {}))
        for source in {s.op for port in operator.inputs.values() for s in port if s.op >= 0}:
            after[source] = max(after[source], seconds)
    return after


def stage_deadline_us(state: State, vertex: Vertex, work: Work) -> int:
    """Return when an operator that is ready now should have ended; 0 without a deadline."""
    run = vertex.run
    if not run.deadline_us:
        return 0
    after_s = run.paths_s[vertex.index] if run.paths_s else 0.0
    left_us = max(0, run.deadline_us - state.now_us)
    return state.now_us + int(left_us * work.seconds / max(work.seconds + after_s, 1e-9))


def note_deadlines(state: State, work: Work) -> None:
    """Give work the earliest deadline of those who wait for it."""
    found = [due for vertex in work.waiters if (due := stage_deadline_us(state, vertex, work))]
    work.deadline_us = min(found, default=0)
