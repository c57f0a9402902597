"""The pool of ready work: queues of what may run in one batch, by priority, then arrival. And who holds what it needs."""

from __future__ import annotations

from heapq import heappop, heappush

from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.manifest import Resources
from flowmesh_mesh.messages import Reason
from flowmesh_scheduler.core import fairness
from flowmesh_scheduler.core.classes import MARKETS
from flowmesh_scheduler.core.deadlines import note_deadlines
from flowmesh_scheduler.core.events import Located
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.planning import (
    await_roots,
    fail_vertex,
    reopen,
    replace_result,
    serve_hit,
    sources_of,
    wait_for_sources,
)
from flowmesh_scheduler.core.queues import Queue
from flowmesh_scheduler.core.state import PoolKey, State, Vertex, VertexState, Work, WorkState

_NO_DEMAND = Resources()
_COMPANY = 8
"""With how many others an operator is taken to share what a batch pays once, when it is told what the operator is worth."""


def queue(state: State, work: Work, out: Outbox) -> None:
    """Put work into the pool once the holders of its inputs are known."""
    work.assignment = ""
    for vertex in work.waiters:
        if vertex.state is not VertexState.READY:
            out.set_state(vertex, VertexState.READY)
    has_roots = work.inputs or work.operator.code is not None
    if has_roots and (unknown := [root for root in work.roots() if not state.holders(root)]):
        await_roots(state, work, unknown, out)
        return
    work.state = WorkState.QUEUED
    work.queued_at_us = state.now_us
    if work.not_before_us:
        work.ticket = state.take_order()
        heappush(state.delayed, (work.not_before_us, work.ticket, work))
    else:
        push(state, work)


def push(state: State, work: Work) -> None:
    """Make work available to the placement; its earlier place, if it has one, is void."""
    work.ticket = state.take_order()
    key = pool_key(work)
    queue = state.pool.get(key)
    if queue is None:
        kind = CATALOG[work.operator.type]
        queue = Queue(key, state.take_order(), MARKETS[kind.executor], work.model, state.shares, kind.batches)
        state.pool[key] = queue
        state.fleet.markets.add(queue.market)
    if work.batch_key == queue.key:
        work.batch_key = queue.key  # the same text, kept once: it may be long, and there may be a million
    work.seconds = seconds_of(state, work)
    for vertex in work.waiters:
        if vertex.run.deadline_us:
            note_deadlines(state, work)
            break
    fairness.enter(state, work, work.seconds)
    queue.add(work, state.now_us)
    state.fleet.note_change(queue)
    state.unsettled.add(queue.market)


def seconds_of(state: State, work: Work) -> float:
    """Return what work takes of a usual node's time as one of a batch."""
    reference = state.fleet.reference
    line = state.costs.line(work.cost_kind, reference.device if reference is not None else "")
    steps, units = work.size
    company = _COMPANY if CATALOG[work.operator.type].batches else 1
    return (line.fixed_s + line.step_s * steps) / company + line.unit_s * units


def pool_key(work: Work) -> PoolKey:
    """Return the queue of this work: all that decides where and in what company it may run.

    So the first in a queue stands for all of it, and what finds no place holds up only what would find none either.
    """
    operator = work.operator
    if CATALOG[operator.type].batches:
        kind = work.batch_key
    else:
        kind = "|".join([operator.type, operator.numeric, *work.model_digests.values()])
    if not (work.timeout_s or work.avoided or work.unfit or operator.resources != _NO_DEMAND):
        return kind
    return (kind, operator.resources, work.timeout_s, tuple(sorted(work.avoided)), tuple(sorted(work.unfit)))


def release_delayed(state: State, now_us: int) -> None:
    """Move work whose pause is over into the pool."""
    while state.delayed and state.delayed[0][0] <= now_us:
        _, ticket, work = heappop(state.delayed)
        if work.ticket == ticket and work.state is WorkState.QUEUED and state.works.get(work.key) is work:
            work.not_before_us = 0
            push(state, work)


def on_located(state: State, event: Located, out: Outbox) -> None:
    """Note who holds what; go on with the work that waited for it."""
    settled: dict[bytes, Work] = {}
    for root, holders in event.holders.items():
        state.places[root] = set(holders)
        for name in holders:
            node = state.nodes.get(name)
            if node is not None and node.state != "gone":
                node.disconnected_at_us = 0
                state.touch(node)
        for work in state.locating.pop(root, ()):
            work.awaited = [other for other in work.awaited if other != root]
            if not work.awaited and work.state is WorkState.LOCATING and state.works.get(work.key) is work:
                settled[work.key] = work
    for work in settled.values():
        _go_on(state, work, out)


def _go_on(state: State, work: Work, out: Outbox) -> None:
    if work.is_hit:
        assert work.previous is not None
        outputs = (ref.cid for refs in work.previous.outputs.values() for ref in refs)
        if all(state.holders(root) for root in outputs):
            serve_hit(state, work, out)
            return
        replace_result(work)
        first = next(iter(work.waiters))
        for vertex in work.waiters:
            vertex.shared = vertex is not first
        queue(state, work, out)
        return
    missing = {root for root in work.roots() if root in state.places and not state.places[root]}
    if missing:
        recover_inputs(state, work, missing, out)
    else:
        queue(state, work, out)


def recover_inputs(state: State, work: Work, missing: set[bytes], out: Outbox) -> None:
    """Inputs are held by nobody: their producers run again, and whoever waited for this work waits for them.

    Each waiter by itself: the same input may be the author's gift in one run and an operator's result in another.
    """
    fairness.end(state, work, 0)
    del state.works[work.key]
    for vertex in work.waiters:
        vertex.work, vertex.former = None, work
        vertex.shared = False
        if not missing.isdisjoint(_given(vertex)):
            text = "an input that was given with the workflow is no longer held by anybody"
            fail_vertex(vertex, Reason.INPUT_MISSING, text, "", out)
            continue
        for index in sources_of(vertex.operator):
            producer = vertex.run.vertices[index]
            roots = (ref.cid for refs in (producer.outputs or {}).values() for ref in refs)
            if not missing.isdisjoint(roots):
                reopen(state, producer, out)
        wait_for_sources(vertex, out)


def _given(vertex: Vertex) -> list[bytes]:
    """Return the roots that came with the workflow."""
    operator = vertex.operator
    found = [source.ref.cid for sources in operator.inputs.values() for source in sources if source.ref is not None]
    return found if operator.code is None else [*found, operator.code.cid]
