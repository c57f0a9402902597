"""Chains folded onto one node: what follows an operator goes along with it, and the node runs it without asking again.

The leader sends the operators, never their keys; it computes each key itself once the result before has been accepted, and takes
only what it expects then. After a cut (a hit, other work under way, a stopped run) the rest is planned like anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.manifest import Operator
from flowmesh_mesh.messages import Abort, Assignment, Done, Hop, encode
from flowmesh_scheduler.core import fairness
from flowmesh_scheduler.core.commands import Tell
from flowmesh_scheduler.core.costs import cost_class, size_of
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import join
from flowmesh_scheduler.core.planning import enter, salt_of, sources_of
from flowmesh_scheduler.core.pooling import seconds_of
from flowmesh_scheduler.core.state import Chain, Node, Outstanding, State, Vertex, VertexState, Work, WorkState

LIGHT = frozenset({"inline", "data", "user"})
"""Executors whose operators may be folded. Engines gain nothing (a batch takes far longer than a round trip), and would lose the
other operators that share their batches."""

TAILS_MAX_BYTES = 12 * 1024
"""Most that the tails add to an assignment: with them it still is sent at once."""


class Folded(NamedTuple):
    """What follows a batch: tails by item (none if nothing follows any), the same as chains by key, and the seconds of all."""

    tails: tuple[tuple[Hop, ...], ...]
    chains: dict[bytes, Chain]
    seconds: float


def fold(state: State, node: Node, works: Sequence[Work]) -> Folded:
    """Return what the node is to go on to after these operators."""
    hops_max = state.settings.fold_hops // len(works)
    if not hops_max or CATALOG[works[0].operator.type].executor not in LIGHT:
        return Folded((), {}, 0.0)
    tails: list[tuple[Hop, ...]] = []
    chains: dict[bytes, Chain] = {}
    room_bytes, total_s = TAILS_MAX_BYTES, 0.0
    for work in works:
        hops: list[Hop] = []
        indices: list[int] = []
        for vertex, seconds in _foldable(state, node, work, len(works)):
            hop = Hop(vertex.operator, salt_of(state, vertex))
            room_bytes -= len(encode(hop))
            if room_bytes < 0 or len(hops) == hops_max:
                break
            hops.append(hop)
            indices.append(vertex.index)
            total_s += seconds
        tails.append(tuple(hops))
        if hops:
            chains[work.key] = Chain(next(iter(work.waiters)).run.id_pair, indices[::-1])
    return Folded(tuple(tails) if chains else (), chains, total_s)


def _foldable(state: State, node: Node, work: Work, items: int) -> Iterator[tuple[Vertex, float]]:
    """Yield the vertices after the only waiter of this work that the same node should run at once, and the seconds of each."""
    if len(work.waiters) != 1 or work.generation or work.operator.determinism == "effect":
        return
    vertex = follower(next(iter(work.waiters)))
    budget_s = state.settings.lease_s
    while vertex is not None:
        operator = vertex.operator
        if not _goes_with(operator, work.operator, node) or vertex.former is not None or vertex.repeats:
            return
        seconds = predicted_s(state, operator, node)
        budget_s -= seconds
        if budget_s < 0 or seconds * items > state.settings.fold_s:
            return
        yield vertex, seconds
        vertex = follower(vertex)


def follower(vertex: Vertex) -> Vertex | None:
    """Return the vertex that waits for this one alone, if nothing else consumes it."""
    consumers = vertex.run.consumers[vertex.index]
    if len(consumers) != 1:
        return None
    found = vertex.run.vertices[consumers[0]]
    return found if len(sources_of(found.operator)) == 1 and found.state is VertexState.WAITING else None


def _goes_with(operator: Operator, head: Operator, node: Node) -> bool:
    """Tell whether what runs the head on this node may run the operator too, with the same right to be served."""
    return (
        CATALOG[operator.type].executor in LIGHT
        and operator.type in node.record.types
        and not operator.models
        and operator.determinism != "effect"
        and (operator.priority, operator.numeric, operator.resources) == (head.priority, head.numeric, head.resources)
    )


def predicted_s(state: State, operator: Operator, node: Node) -> float:
    """Return how long one operator like this is likely to take on a node; nobody knows its inputs yet."""
    if CATALOG[operator.type].executor == "inline":
        return float(operator.params.get("sleep_s", 0.0))
    size = size_of(operator, {})
    device = node.klass.device if node.klass is not None else ""
    return state.costs.exec_s(cost_class(operator, {}), device, node.name, size.steps, size.units)


def chains_of(state: State, done: Done, outstanding: Outstanding | None) -> dict[bytes, Chain]:
    """Return the chains of the assignment that a node reports on, also if it was taken back."""
    if outstanding is not None:
        return outstanding.chains
    taken = state.taken_back.get(done.assignment)
    return taken.chains if taken is not None and taken.node == done.node else {}


def follow(
    state: State,
    done: Done,
    work: Work,
    is_reported: Mapping[bytes, bool],
    now_us: int,
    out: Outbox,
) -> None:
    """Work of a chain has succeeded: expect what its node goes on to, if that is still to be done and nobody else does it.

    ``is_reported`` tells whether the rest of this report has an outcome for a key. A node that has said its last word, and one
    whose assignment was taken back, goes on to nothing that is not in the report.
    """
    outstanding = state.assignments.get(done.assignment)
    chains = chains_of(state, done, outstanding)
    chain = chains.pop(work.key, None)
    if chain is None:
        return
    vertex = _enter_next(state, chain, work, out)
    found = None if vertex is None else vertex.work
    if found is None or not _is_fresh(found):
        if outstanding is not None and not done.last:
            out.add(Tell(done.node, Abort(state.epoch, done.assignment, (work.key,), "what follows is known already")))
        return
    if is_reported.get(found.key, False) or (outstanding is not None and not done.last):
        if outstanding is not None:
            found.seconds = seconds_of(state, found)
            fairness.enter(state, found, found.seconds)
            join(state, outstanding, found, now_us, out)
        else:
            found.attempts = 1
            found.issue(done.assignment, 1, done.node)
        if chain.rest:
            chains[found.key] = chain


def _enter_next(state: State, chain: Chain, work: Work, out: Outbox) -> Vertex | None:
    """Let the next vertex of a chain enter; return it, or None if it waits for something else by now."""
    run = state.runs.get(chain.run)
    if run is None:
        return None
    vertex = run.vertices[chain.rest.pop()]
    source = run.vertices[sources_of(vertex.operator)[0]]
    if source not in work.waiters or vertex.state is not VertexState.WAITING or vertex.waits_for:
        return None
    enter(state, vertex, out)
    return vertex


def _is_fresh(work: Work) -> bool:
    """Tell whether nobody has done anything about this work yet."""
    return work.state is WorkState.QUEUED and work.previous is None and not (work.ticket or work.attempts or work.assignment)


def resume(state: State, assignment: Assignment, number: int, starts: Sequence[Vertex]) -> tuple[Work, Chain] | None:
    """Return how far the chain after an item of an earlier epoch has come: the first work that is not done, and what follows it.

    ``starts`` are the vertices with the key of the item. What the ledger shows is done; the node goes on from there.
    """
    hops = assignment.tails[number] if assignment.tails else ()
    for start in starts:
        vertices = [start]
        for hop in hops:
            consumers = start.run.consumers[vertices[-1].index]
            after = start.run.vertices[consumers[0]] if len(consumers) == 1 else None
            if after is None or after.operator != hop.operator or len(sources_of(after.operator)) != 1:
                break
            vertices.append(after)
        for place, vertex in enumerate(vertices):
            if vertex.outputs is None:
                if vertex.work is None or vertex.state.is_final:
                    break
                return vertex.work, Chain(start.run.id_pair, [v.index for v in reversed(vertices[place + 1 :])])
    return None
