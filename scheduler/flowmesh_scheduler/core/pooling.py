"""The pool of ready work: by batch key, and in order of priority, then arrival. And who holds what it needs."""

from __future__ import annotations

from heapq import heappop, heappush

from flowmesh_mesh.messages import Reason
from flowmesh_scheduler.core.events import Located
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.planning import await_roots, fail_work, reopen, replace_result, serve_hit
from flowmesh_scheduler.core.state import State, Vertex, VertexState, Work, WorkState


def queue(state: State, work: Work, out: Outbox) -> None:
    """Put work into the pool once the holders of its inputs are known."""
    unknown = {root for root in work.roots() if not state.holders(root)}
    if unknown:
        await_roots(state, work, unknown, out)
        return
    work.state = WorkState.QUEUED
    work.assignment = ""
    for vertex in work.waiters:
        out.set_state(vertex, VertexState.READY)
    if work.not_before_us:
        heappush(state.delayed, (work.not_before_us, state.take_order(), work))
        work.not_before_us = 0
    else:
        push(state, work)


def push(state: State, work: Work) -> None:
    """Make work available to the placement."""
    heap = state.pool.get(work.batch_key)
    if heap is None:
        heap = state.pool[work.batch_key] = []
    heappush(heap, (-work.priority, work.order, state.take_order(), work))


def release_delayed(state: State, now_us: int) -> None:
    """Move work whose pause is over into the pool."""
    while state.delayed and state.delayed[0][0] <= now_us:
        work = heappop(state.delayed)[2]
        if state.works.get(work.key) is work and work.state is WorkState.QUEUED:
            push(state, work)


def on_located(state: State, event: Located, out: Outbox) -> None:
    """Note who holds what; go on with the work that waited for it."""
    settled: dict[bytes, Work] = {}
    for root, holders in event.holders.items():
        state.places[root] = set(holders)
        for work in state.locating.pop(root, ()):
            work.awaited.discard(root)
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
        state.results.pop(work.key, None)
        replace_result(work, work.previous)
        for vertex in work.waiters:
            vertex.shared = vertex is not work.waiters[0]
        queue(state, work, out)
        return
    missing = {root for root in work.roots() if not state.places.get(root)}
    if missing:
        recover_inputs(state, work, missing, out)
    else:
        queue(state, work, out)


def recover_inputs(state: State, work: Work, missing: set[bytes], out: Outbox) -> None:
    """Inputs are held by nobody: their producers run again, and whoever waited for this work waits for them."""
    del state.works[work.key]
    for vertex in work.waiters:
        vertex.work = None
        producers = _producers(vertex, missing)
        if producers is None:
            text = "an input that was given with the workflow is no longer held by anybody"
            state.works[work.key] = work
            fail_work(state, work, Reason.INPUT_MISSING, text, "", out)
            return
        sources = {s.op for port in vertex.operator.inputs.values() for s in port if s.op >= 0}
        vertex.waits_for = sum(vertex.run.vertices[s].outputs is None for s in sources)
        vertex.shared = False
        out.set_state(vertex, VertexState.WAITING)
        for producer in producers:
            reopen(state, producer, out)
        if vertex.waits_for == 0:
            out.entering.append(vertex)


def _producers(vertex: Vertex, missing: set[bytes]) -> list[Vertex] | None:
    """Return the sources of a vertex that made the missing roots; None if one was given by the author."""
    found: dict[int, Vertex] = {}
    explained: set[bytes] = set()
    for sources in vertex.operator.inputs.values():
        for source in sources:
            if source.op < 0:
                continue
            producer = vertex.run.vertices[source.op]
            roots = {ref.cid for refs in (producer.outputs or {}).values() for ref in refs}
            if producer.outputs is None or roots & missing:
                explained |= roots
                if producer.outputs is not None:
                    found[source.op] = producer
    return list(found.values()) if missing <= explained else None
