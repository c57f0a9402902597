"""Assignments in the hands of nodes: given, adopted, answered, taken away, released, closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappush

from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.messages import Abort, Commit
from flowmesh_scheduler.core import fairness
from flowmesh_scheduler.core.commands import Release, Tell
from flowmesh_scheduler.core.learning import expect
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.state import Chain, Node, Outstanding, State, TakenBack, VertexState, Work, WorkState

_TAKEN_BACK_LIMIT = 10_000


def hand_over(state: State, node: Node, outstanding: Outstanding) -> None:
    """Note that a node has an assignment; it takes a slot while something of it runs."""
    state.assignments[outstanding.id] = node.assignments[outstanding.id] = outstanding
    if outstanding.running:
        outstanding.tenants = tuple(dict.fromkeys(fairness.tenant_of(work) for work in outstanding.open.values()))
        expect(state, outstanding)
        outstanding.count = len(outstanding.running)
        _take_slot(state, node, outstanding)


def _take_slot(state: State, node: Node, outstanding: Outstanding) -> None:
    fairness.occupy(state, outstanding.tenants)
    busy = node.busy[outstanding.executor] = node.busy.get(outstanding.executor, 0) + 1
    if busy <= width(node, outstanding.executor) and not outstanding.begun_us:
        _begin(state, outstanding)
    state.touch(node)


def width(node: Node, kind: str) -> int:
    """Return how many assignments of a kind a node works on at once; what it has beyond that waits there."""
    return node.record.slots if kind in ("engine", "train", "user") else 1


def _begin(state: State, outstanding: Outstanding) -> None:
    """The node can begin with an assignment: note when it will be late."""
    outstanding.begun_us = state.now_us
    predicted_s, settings = outstanding.predicted_s, state.settings
    if predicted_s and settings.speculation_share:
        spread = state.costs.line(outstanding.kind, outstanding.device).spread
        late_s = predicted_s * (settings.straggler_factor + settings.straggler_spreads * spread)
        grace_s = settings.straggler_min_s if spread < 1.0 else settings.straggler_unknown_s
        late_us = int(max(late_s, predicted_s + grace_s) * 1e6)
        heappush(state.copies.due, (state.now_us + late_us, outstanding.id))


def adopt(
    state: State,
    node: Node,
    assignment: str,
    attempts: Mapping[Work, int],
    chains: dict[bytes, Chain],
    now_us: int,
    out: Outbox,
) -> None:
    """Let work go on in an assignment that its node has in hand; ``attempts`` tells which attempt each is."""
    for work, attempt in attempts.items():
        _run_in(state, work, assignment, node.name, attempt, now_us, out)
    executor = executor_of(next(iter(attempts)))
    works = {work.key: work for work in attempts}
    hand_over(state, node, Outstanding(assignment, node.name, executor, works, set(works), now_us, chains=chains))


def _run_in(state: State, work: Work, assignment: str, node: str, attempt: int, now_us: int, out: Outbox) -> None:
    fairness.begin(state, work)
    work.state = WorkState.ASSIGNED
    work.assignment = assignment
    work.not_before_us = 0
    work.attempts = max(work.attempts, attempt)
    work.issue(assignment, attempt, node)
    for vertex in work.waiters:
        vertex.node, vertex.attempt, vertex.started_at_us = node, attempt, now_us
        out.set_state(vertex, VertexState.ASSIGNED)


def join(state: State, outstanding: Outstanding, work: Work, now_us: int, out: Outbox) -> None:
    """Let new work run in an assignment whose node goes on to it by itself; it is the first attempt."""
    _run_in(state, work, outstanding.id, outstanding.node, 1, now_us, out)
    if not outstanding.running:
        _take_slot(state, state.nodes[outstanding.node], outstanding)
    outstanding.running.add(work.key)
    outstanding.open[work.key] = work
    outstanding.folded.add(work.key)


def take_back(state: State, assignment: str, taken: TakenBack) -> None:
    """Remember that a node may still be working on what it was given; the oldest memories go."""
    state.taken_back[assignment] = taken
    if len(state.taken_back) > _TAKEN_BACK_LIMIT:
        del state.taken_back[next(iter(state.taken_back))]


def free_slot(state: State, outstanding: Outstanding) -> None:
    """The node has nothing left to run of this assignment: it can take another."""
    if outstanding.running:
        outstanding.running.clear()
        fairness.occupy(state, outstanding.tenants, -1)
        node = state.nodes[outstanding.node]
        node.busy[outstanding.executor] -= 1
        if node.busy[outstanding.executor] >= width(node, outstanding.executor):
            _begin_next(state, node, outstanding.executor)
        state.touch(node)


def _begin_next(state: State, node: Node, kind: str) -> None:
    """Let the first assignment that waits on a node begin, if it works on fewer than it can."""
    begun, first = 0, None
    for outstanding in node.assignments.values():
        if outstanding.executor == kind and outstanding.running:
            if outstanding.begun_us:
                begun += 1
            elif first is None:
                first = outstanding
    if first is not None and begun < width(node, kind):
        _begin(state, first)


def note_answer(state: State, outstanding: Outstanding, key: bytes) -> None:
    running = outstanding.running
    if len(running) > 1:
        running.discard(key)
    elif key in running:
        free_slot(state, outstanding)


def close_if_empty(state: State, outstanding: Outstanding, out: Outbox) -> None:
    """Once every item is committed, failed or taken away, the node may drop the assignment."""
    if outstanding.open or state.assignments.get(outstanding.id) is not outstanding:
        return
    _drop(state, outstanding)
    out.add(Tell(outstanding.node, Commit(state.epoch, outstanding.id, tuple(outstanding.confirmed), closed=True)))


def _drop(state: State, outstanding: Outstanding) -> None:
    free_slot(state, outstanding)
    del state.assignments[outstanding.id]
    state.nodes[outstanding.node].assignments.pop(outstanding.id, None)


def take_away(state: State, work: Work, out: Outbox, keep: str = "") -> None:
    """Stop the attempts that run for this work, but for one to ``keep``: their results are not wanted any more."""
    ended = [identity for identity in (work.assignment, work.copy) if identity and identity != keep]
    work.assignment, work.copy = keep, ""
    for identity in ended:
        stop_attempt(state, work, identity, "no longer needed", out)


def stop_attempt(state: State, work: Work, identity: str, reason: str, out: Outbox) -> None:
    """Let the node of one attempt stop it. The work must not name it any more."""
    outstanding = state.assignments.get(identity)
    if outstanding is None or outstanding.open.pop(work.key, None) is None:
        return
    outstanding.chains.pop(work.key, None)
    out.add(Tell(outstanding.node, Abort(state.epoch, outstanding.id, (work.key,), reason)))
    note_answer(state, outstanding, work.key)
    close_if_empty(state, outstanding, out)


def step_down(work: Work, identity: str) -> bool:
    """One attempt at work has ended without a result; tell whether another goes on with it."""
    if not work.copy:
        return False
    if identity == work.assignment:
        work.assignment, work.copy = work.copy, ""
    elif identity == work.copy:
        work.copy = ""
    return True


def release(state: State, outstanding: Outstanding, out: Outbox) -> Sequence[Work]:
    """Take a whole assignment back; return the work that was still open and runs nowhere else."""
    _drop(state, outstanding)
    out.add(Release(outstanding.id, outstanding.node))
    held = [w for w in outstanding.open.values() if w.state is WorkState.ASSIGNED]
    works = [w for w in held if not step_down(w, outstanding.id) and w.assignment == outstanding.id]
    for work in works:
        fairness.end(state, work, 0)
    return works


def executor_of(work: Work) -> str:
    """Return the kind of executor that runs this work."""
    return CATALOG[work.operator.type].executor
