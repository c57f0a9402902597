"""Batch and node, chosen together by one utility in dollars; every term is kept.

U(B, w) = value of the work done - price(w) * T(B, w), with T = load + fetch + exec. A batch is worth the dollars that
a node of the usual price would cost for it, raised by priority. Of all feasible pairs the best is assigned, until none is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop

from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.messages import Assignment, Item, Located
from flowmesh_scheduler.core.commands import Assign
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outcomes import can_run, speed_key
from flowmesh_scheduler.core.outstanding import executor_of, hand_over
from flowmesh_scheduler.core.state import Node, Outstanding, PoolKey, State, VertexState, Work, WorkState

_QUEUES_CONSIDERED = 64
_INPUTS_SAMPLED = 16
_ROUND_TRIP_S = 0.002


@dataclass(frozen=True, slots=True)
class Candidate:
    """The first of a queue on a node, with the terms of its utility (seconds and dollars)."""

    queue: PoolKey
    node: Node
    count: int
    terms: dict[str, float]

    @property
    def score(self) -> float:
        return self.terms["utility"]


def place(state: State, now_us: int, out: Outbox) -> None:
    """Assign the best pair of batch and node while there is one."""
    while state.pool and not state.is_cut_off:
        best = max(_candidates(state), key=lambda c: c.score, default=None)
        if best is None:
            return
        _assign(state, best, now_us, out)


def _candidates(state: State) -> Iterator[Candidate]:
    heads: list[tuple[tuple[int, int], PoolKey, Work]] = []
    for key in list(state.pool):
        head = _head(state, key)
        if head is not None:
            heads.append(((-head.priority, head.order), key, head))
    heads.sort(key=lambda h: h[0])
    considered = 0
    for _, key, head in heads:
        nodes = feasible(state, head)
        if not nodes:
            continue
        count = batch_size(state, head, len(state.pool[key]), sum(free for _, free in nodes))
        for node, _ in nodes:
            yield Candidate(key, node, count, utility(state, head, count, node))
        considered += 1
        if considered == _QUEUES_CONSIDERED:
            return


def _head(state: State, key: PoolKey) -> Work | None:
    """Return the first work of a queue that still wants a place; forget the others before it."""
    heap = state.pool[key]
    while heap:
        _, _, ticket, work = heap[0]
        if _wants_place(state, work, ticket):
            return work
        heappop(heap)
    del state.pool[key]
    return None


def _wants_place(state: State, work: Work, ticket: int) -> bool:
    return work.ticket == ticket and work.state is WorkState.QUEUED and state.works.get(work.key) is work


def batch_size(state: State, work: Work, ready: int, free: int) -> int:
    """Return how many of the ready operators to take, with ``free`` slots on all nodes that can run them.

    Kinds that queue on a node shrink towards the end, so that all nodes finish together; others are dealt out evenly.
    """
    settings, kind = state.settings, executor_of(work)
    if not CATALOG[work.operator.type].batches:
        return 1
    if settings.depth_limit[kind] > 1:
        free = settings.depth_limit[kind] * sum(n.record.slots for n in state.nodes.values() if n.is_usable and can_run(n, work))
    share = -(-ready // max(1, free))
    speed = state.speeds.get(speed_key(work))
    is_quick = speed is None or speed.operator_s * settings.batch_floor[kind] < settings.quick_batch_s
    return min(settings.batch_limit[kind], max(settings.batch_floor[kind] if is_quick else 1, share))


def feasible(state: State, work: Work) -> list[tuple[Node, int]]:
    """Return the nodes that can run this work now, with their free slots; avoided ones only if there is no other."""
    kind = executor_of(work)
    depth = state.settings.depth_limit[kind]
    able = [n for n in state.nodes.values() if n.is_usable and n.name not in work.unfit and can_run(n, work)]
    wanted = [n for n in able if n.name not in work.avoided] or able
    found = []
    for node in wanted:
        slots = depth * node.record.slots if kind in ("engine", "train", "user") else depth
        free = slots - node.busy.get(kind, 0)
        if kind in ("engine", "train"):
            free = min(free, node.record.slots - node.busy.get("engine", 0) - node.busy.get("train", 0))
        if free > 0:
            found.append((node, free))
    return found


def utility(state: State, work: Work, count: int, node: Node) -> dict[str, float]:
    """Return the terms of running ``count`` operators like ``work`` on a node: seconds, and dollars with sign."""
    settings = state.settings
    speed = state.speeds.get(speed_key(work))
    exec_s = (speed.operator_s if speed else settings.operator_s) * count
    load_s = 0.0
    if work.model_digests and not node.resident.issuperset(work.model_digests.values()):
        load_s = speed.load_s if speed and speed.load_s else settings.model_load_s
    missing = [
        ref for refs in work.inputs.values() for ref in refs[:_INPUTS_SAMPLED] if node.name not in state.places.get(ref.cid, ())
    ]
    fetch_s = sum(_ROUND_TRIP_S + max(ref.size, 0) / settings.bandwidth_bytes_per_s for ref in missing)
    price = (node.record.price_per_hour or settings.price_per_hour) / 3600
    value = settings.price_per_hour / 3600 * max(exec_s, 1e-6) * 2 * 1.25**work.priority
    seconds = load_s + fetch_s + exec_s
    waiting = 1e-9 * len(node.assignments)
    return {
        "value": value,
        "load_s": load_s,
        "fetch_s": fetch_s,
        "exec_s": exec_s,
        "cost": -price * seconds,
        "queue": -waiting,
        "utility": value - price * seconds - waiting,
    }


def _take(state: State, candidate: Candidate) -> list[Work]:
    """Take up to ``count`` work from a queue."""
    heap = state.pool[candidate.queue]
    taken: list[Work] = []
    while heap and len(taken) < candidate.count:
        _, _, ticket, work = heappop(heap)
        if _wants_place(state, work, ticket):
            taken.append(work)
    if not heap:
        del state.pool[candidate.queue]
    return taken


def _assign(state: State, candidate: Candidate, now_us: int, out: Outbox) -> None:
    works = _take(state, candidate)
    if not works:
        return
    node, head = candidate.node, works[0]
    state.next_assignment += 1
    identity = f"{state.epoch:x}-{state.next_assignment:x}"
    executor = executor_of(head)
    items = tuple(_item(state, work, identity, node.name, now_us, out) for work in works)
    code = head.operator.code
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
    )
    hand_over(state, node, Outstanding(identity, node.name, executor, {w.key: w for w in works}, {w.key for w in works}, now_us))
    may_run_in_vain = all(w.operator.determinism != "effect" for w in works)
    out.assigns.append(Assign(assignment, candidate.terms, may_run_in_vain))


def _item(state: State, work: Work, assignment: str, node: str, now_us: int, out: Outbox) -> Item:
    work.state = WorkState.ASSIGNED
    work.assignment = assignment
    work.attempts += 1
    work.issued[assignment] = (work.attempts, node)
    for vertex in work.waiters:
        vertex.node, vertex.attempt, vertex.started_at_us = node, work.attempts, now_us
        out.set_state(vertex, VertexState.ASSIGNED)
    holders = state.holders
    return Item(
        work.key,
        work.generation,
        work.attempts,
        work.operator.params,
        {port: tuple(Located(ref, tuple(holders(ref.cid))) for ref in refs) for port, refs in work.inputs.items()},
        work.operator.name,
    )
