"""Why an operator does not run yet, in words: what it waits for, what nodes lack, who is before it, what it is held back for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowmesh_mesh.catalog import CATALOG
from flowmesh_scheduler.core.lacking import hindrances
from flowmesh_scheduler.core.outstanding import executor_of
from flowmesh_scheduler.core.planning import sources_of
from flowmesh_scheduler.core.pooling import pool_key
from flowmesh_scheduler.core.queues import Queue
from flowmesh_scheduler.core.state import Node, State, Vertex, VertexState, Work, WorkState

_COUNTED_MAX = 50_000
"""A place in a queue longer than this is not counted: that would take too long."""

_NAMED = 5


@dataclass(frozen=True, slots=True)
class Wait:
    """Why something waits: a word for scripts, a sentence, and by node what it lacks."""

    kind: str
    text: str
    nodes: dict[str, list[str]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, "nodes": self.nodes}


def why_waiting(state: State, vertex: Vertex, now_us: int) -> Wait:
    """Return why a vertex that is not final and not assigned waits."""
    work = vertex.work
    if vertex.state is VertexState.WAITING or work is None:
        return _for_sources(vertex)
    if work.state is WorkState.LOCATING:
        if work.is_hit:
            return Wait("hit", "its result is in the ledger; its holders are being asked whether they still have it")
        return Wait("locating", f"it is being asked who holds {_count(len(work.awaited), 'input')} of it")
    if work.state is WorkState.COMMITTING:
        return Wait("committing", "it has run; its result is being written into the ledger")
    if state.is_cut_off:
        return Wait("cut-off", "the leader has lost the broker: nothing is assigned until it is back")
    if work.not_before_us > now_us:
        seconds = (work.not_before_us - now_us) / 1e6
        cause = f"attempt {work.attempts} failed" if work.failures else "an input could not be fetched"
        return Wait("paused", f"{cause}; it is tried again in {seconds:.1f} s")
    if not state.may_start(work.tenant):
        return Wait("quota", f"the quota of {_whose(vertex, work)} allows no further assignment while as many run")
    return _for_node(state, work, now_us)


def _for_sources(vertex: Vertex) -> Wait:
    found = [vertex.run.vertices[index] for index in sources_of(vertex.operator)]
    lacking = [v for v in found if v.outputs is None]
    named = ", ".join(f"{v.operator.name} ({v.state.value})" for v in lacking[:_NAMED])
    rest = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    return Wait("inputs", f"it waits for {named}{rest}" if named else "it is about to be looked at")


def _whose(vertex: Vertex, work: Work) -> str:
    return "your tenant" if work.tenant == vertex.run.tenant else "the tenant under whom it waits"


def _for_node(state: State, work: Work, now_us: int) -> Wait:
    kept: dict[str, list[str]] = {}
    able: list[Node] = []
    for name, node in sorted(state.nodes.items()):
        found = hindrances(node, work)
        if found:
            kept[name] = found
        else:
            able.append(node)
    if not able:
        told = "; ".join(f"{name}: {', '.join(why)}" for name, why in list(kept.items())[:_NAMED])
        return Wait("no-node", f"no node can run it: {told}" if kept else "the mesh has no nodes", kept)
    queue = state.pool.get(pool_key(work))
    if queue is None:
        return Wait("queued", "it is about to be placed", kept)
    idle = [n for n in able if n.klass is not None and n.name in n.klass.idle[queue.market]]
    if not idle:
        return Wait("busy", _busy(state, able, now_us) + _place(queue, work), kept)
    if queue.market in state.fleet.recheck_us:
        return _held_back(state, work, queue, idle, now_us)
    rest = sum(q.count for q in state.pool.values() if q.market == queue.market and q is not queue)
    return Wait("behind", f"{_count(rest, 'operator')} of other kinds may go before it{_place(queue, work)}", kept)


def _busy(state: State, able: list[Node], now_us: int) -> str:
    """Return that all nodes are busy, and when the first is expected to be idle."""
    ends_us = [
        (o.begun_us or o.assigned_at_us) + int(o.predicted_s * 1e6)
        for node in able
        for o in node.assignments.values()
        if o.running and o.predicted_s
    ]
    text = "the node that can run it is busy" if len(able) == 1 else f"all {len(able)} nodes that can run it are busy"
    if not ends_us:
        return text
    seconds = (min(ends_us) - now_us) / 1e6
    return f"{text}, the first for about {seconds:.1f} s more" if seconds > 0 else f"{text}, longer than predicted"


def _held_back(state: State, work: Work, queue: Queue, idle: list[Node], now_us: int) -> Wait:
    """An idle node is there, and the placement chose to wait: for company, or for a node that suits better."""
    names = ", ".join(node.name for node in idle[:_NAMED])
    waited_s = (now_us - work.queued_at_us) / 1e6
    linger_s = state.settings.linger_s.get(executor_of(work), 0.0)
    if CATALOG[work.operator.type].batches and waited_s < linger_s and len(state.fleet.classes) == 1:
        return Wait("linger", f"its batch waits up to {linger_s:g} s for more operators of its kind, which arrive often")
    text = f"a node that is busy would suit it better, even after the wait, than {names} now"
    return Wait("held-back", f"{text}; after {state.settings.hold_back_max_s:g} s it goes anyway")


def _place(queue: Queue, work: Work) -> str:
    """Return where work stands among those that may share a batch with it."""
    if queue.count <= 1:
        return ""
    if queue.count > _COUNTED_MAX:
        return f"; it is one of {queue.count} operators in its queue"
    ahead = queue.ahead_of(work)
    return f"; {ahead} of {queue.count} operators in its queue go before it"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
