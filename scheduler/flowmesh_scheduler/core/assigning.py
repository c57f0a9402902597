"""The assignment itself: work taken from the pool, written as a message, in the hands of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappush

from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import Assignment, Item, Located
from flowmesh_scheduler.core import fairness
from flowmesh_scheduler.core.checkpoints import located_for
from flowmesh_scheduler.core.commands import Assign
from flowmesh_scheduler.core.devices import device_class
from flowmesh_scheduler.core.folding import fold
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import executor_of, hand_over
from flowmesh_scheduler.core.state import Node, Outstanding, State, VertexState, Work, WorkState


def assign(
    state: State,
    node: Node,
    works: Sequence[Work],
    now_us: int,
    out: Outbox,
    why: Mapping[str, float],
    predicted_s: float = 0.0,
) -> str:
    """Give a batch to a node; return the assignment's id. ``predicted_s`` is until its results, load and fetch included.

    Work that runs already gets a second attempt beside the first.
    """
    head = works[0]
    state.next_assignment += 1
    identity = f"{state.epoch:x}-{state.next_assignment:x}"
    factor = fairness.factor_of(works, predicted_s)
    items = tuple(_item(state, work, identity, node.name, factor, now_us, out) for work in works)
    code = head.operator.code
    folded = fold(state, node, works)
    assignment = Assignment(
        epoch=state.epoch,
        id=identity,
        node=node.name,
        type=head.operator.type,
        version=head.operator.version,
        batch_key=head.batch_key,
        items=items,
        models=dict(head.models),
        model_digests=dict(head.model_digests),
        code=None if code is None else Located(code, tuple(state.holders(code.cid))),
        timeout_s=head.timeout_s,
        lease_s=state.settings.lease_s,
        memory_bytes=max(w.operator.resources.memory_bytes for w in works),
        numeric=head.operator.numeric,
        life=node.record.started_at_us,
        tails=folded.tails,
    )
    keys = {w.key: w for w in works}
    outstanding = Outstanding(
        identity,
        node.name,
        executor_of(head),
        keys,
        set(keys),
        now_us,
        kind=head.cost_kind,
        device=node.klass.device if node.klass is not None else device_class(node.record),
        max_steps=max(w.size[0] for w in works),
        sum_units=sum(w.size[1] for w in works),
        predicted_s=predicted_s + folded.seconds,
        chains=folded.chains,
        is_cold=bool(head.model) and head.model not in node.cached,
    )
    hand_over(state, node, outstanding)
    if state.checkpoints and any(item.checkpoint is not None for item in items):
        outstanding.items = 0  # what is left of a training tells nothing about what the whole costs
    if head.model:
        node.cached.add(head.model)
        if outstanding.executor == "engine":
            node.resident |= {head.model}
    if node.klass is not None and predicted_s:
        heappush(node.klass.ends, (now_us + int(outstanding.predicted_s * 1e6), identity))
    may_run_in_vain = all(w.operator.determinism != "effect" for w in works)
    out.assigns.append(Assign(assignment, why, may_run_in_vain))
    return identity


def _begin(state: State, work: Work, assignment: str, node: str, factor: float, now_us: int, out: Outbox) -> None:
    work.state = WorkState.ASSIGNED
    work.assignment = assignment
    fairness.begin(state, work, factor)
    for vertex in work.waiters:
        vertex.node, vertex.attempt, vertex.started_at_us = node, work.attempts, now_us
        out.set_state(vertex, VertexState.ASSIGNED)


def _item(state: State, work: Work, assignment: str, node: str, factor: float, now_us: int, out: Outbox) -> Item:
    checkpoint = located_for(state, work) if state.checkpoints else None
    work.attempts += 1
    work.issue(assignment, work.attempts, node)
    if work.state is WorkState.ASSIGNED:
        work.copy = assignment
    else:
        _begin(state, work, assignment, node, factor, now_us, out)
    operator, inputs = work.operator, work.inputs
    return Item(
        work.key,
        work.generation,
        work.attempts,
        operator.params,
        _located(state, inputs) if inputs else {},
        operator.name,
        checkpoint,
    )


def _located(state: State, inputs: Mapping[str, Sequence[Ref]]) -> dict[str, tuple[Located, ...]]:
    """Return the inputs, each with those who hold it."""
    holders = state.holders
    return {port: tuple(Located(ref, tuple(holders(ref.cid))) for ref in refs) for port, refs in inputs.items()}
