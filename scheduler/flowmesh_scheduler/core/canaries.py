"""Small real work for nodes that have to prove themselves: one cheap operator at a time, of the type that made them ill."""

from __future__ import annotations

from itertools import islice

from flowmesh_scheduler.core.assigning import assign
from flowmesh_scheduler.core.devices import device_class
from flowmesh_scheduler.core.fleet import can_run, free_slots
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import executor_of
from flowmesh_scheduler.core.queues import Queue
from flowmesh_scheduler.core.standing import CANARY
from flowmesh_scheduler.core.state import Node, State, Work

_QUEUES_CONSIDERED = 16


def place(state: State, now_us: int, out: Outbox) -> None:
    """Give every canary that runs nothing one operator, before the placement takes them all."""
    if state.is_cut_off or not state.pool:
        return
    for name in list(state.ward.patients):
        node = state.nodes[name]
        health = node.health
        if health.state != CANARY or not node.is_usable:
            continue
        if health.canary or name in state.ward.verdicts or any(node.busy.values()):
            continue
        found = _choose(state, node)
        if found is not None:
            queue, seconds = found
            works = queue.take(1, state.works, None, state.may_start)
            state.fleet.note_change(queue)
            state.unsettled.add(queue.market)
            if works:
                health.canary = assign(state, node, works, now_us, out, {"canary": 0.0}, seconds)


def _choose(state: State, node: Node) -> tuple[Queue, float] | None:
    """Return the queue whose first operator suits best: of the type on which the node fell ill, then the quickest."""
    best: tuple[tuple[bool, float, int], Queue] | None = None
    for queue in islice(state.pool.values(), _QUEUES_CONSIDERED):
        head = queue.first(state.works, state.may_start)
        if head is None or not _suits(state, node, head):
            continue
        seconds = _seconds(state, node, head)
        rank = (head.operator.type != node.health.kind, seconds, queue.number)
        if seconds <= state.settings.canary_max_s and (best is None or rank < best[0]):
            best = rank, queue
    return None if best is None else (best[1], best[0][1])


def _suits(state: State, node: Node, head: Work) -> bool:
    """Tell whether an operator may be tried here: no harm is done if it fails or is late."""
    kind = executor_of(head)
    return (
        head.operator.determinism != "effect"
        and kind != "train"
        and node.name not in head.unfit
        and node.name not in head.avoided
        and can_run(node.record, head)
        and free_slots(state, node, kind) > 0
    )


def _seconds(state: State, node: Node, head: Work) -> float:
    device = device_class(node.record)
    seconds = state.costs.line(head.cost_kind, device).seconds(head.steps, head.units)
    return seconds + (state.costs.load_s(head.model, device) if head.model and head.model not in node.resident else 0.0)
