"""Every invariant of the scheduler's state, asserted. Tests call it after each step; nothing in the mesh does.

All of them hold between two steps; inside a step they may not. What needs the past (a result never changes) is asserted
against what :class:`Memory` saw before.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core.ending import outputs_of
from flowmesh_scheduler.core.fleet import can_run, free_slots
from flowmesh_scheduler.core.health import may_take
from flowmesh_scheduler.core.pooling import pool_key
from flowmesh_scheduler.core.reinstating import adrift
from flowmesh_scheduler.core.state import STORY_MAX, Node, Outstanding, Run, State, Vertex, VertexState, Work, WorkState

_LIVE = (VertexState.READY, VertexState.ASSIGNED)
_ENDED_BADLY = (VertexState.FAILED, VertexState.SKIPPED, VertexState.CANCELLED)


@dataclass(slots=True)
class Memory:
    """What earlier checks saw: results by (key, generation), ends by run."""

    records: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    generations: dict[bytes, int] = field(default_factory=dict)
    ends: dict[tuple[str, str], object] = field(default_factory=dict)

    def check(self, state: State) -> None:
        """Assert that nothing which was final has changed.

        Invariant: a committed result keeps its record; the generation that is served for a key never falls.
        Invariant: a run that has ended keeps its end.
        """
        for key, result in state.results.items():
            known = self.records.setdefault((key, result.generation), result.record)
            assert known == result.record, f"result {key.hex()} generation {result.generation} changed"
            assert result.generation >= self.generations.get(key, 0), f"result {key.hex()} went back"
            self.generations[key] = result.generation
        for pair, run in state.runs.items():
            if run.end is not None:
                assert self.ends.setdefault(pair, run.end) == run.end, f"run {pair} ended twice"


def check(state: State) -> None:
    """Raise AssertionError where the state breaks an invariant; it must be called between steps."""
    for pair, run in state.runs.items():
        assert run.id_pair == pair
        _check_run(state, run)
        assert pair not in state.ended or run.end is not None, f"{pair} has ended and goes on"
        assert not any(adrift(state, vertex) for vertex in run.vertices), f"an operator of {pair} is adrift"
    for key, work in state.works.items():
        assert work.key == key
        _check_work(state, work)
    for identity, outstanding in state.assignments.items():
        assert outstanding.id == identity
        _check_outstanding(state, outstanding)
    for name, node in state.nodes.items():
        assert node.name == name
        _check_node(state, node)
    _check_health(state)
    _check_pool(state)
    _check_fleet(state)
    _check_idle(state)
    _check_shares(state)
    _check_places(state)
    _check_checkpoints(state)


def _check_run(state: State, run: Run) -> None:
    """Assert what holds of a run.

    Invariant: the counts of a run are the states of its vertices, and ``unfinished`` those that are not final.
    Invariant: a run ends exactly when nothing of it is unfinished, with a reason and an actor; until then, a run in which
    everything is done waits for the hub to hold its outputs.
    Invariant: a run that succeeded has every vertex done and every declared output.
    """
    counts = Counter(v.state.value for v in run.vertices)
    assert {k: n for k, n in run.counts.items() if n} == dict(counts), f"{run.id}: {run.counts} is not {counts}"
    assert run.unfinished == sum(not v.state.is_final for v in run.vertices)
    assert not run.changes, "changes are told at the end of each step"
    for vertex in run.vertices:
        assert vertex.run is run
        assert run.vertices[vertex.index] is vertex
        _check_vertex(state, vertex)
    if run.end is None:
        assert run.unfinished or run.keeping, f"{run.id} has nothing to wait for and does not end"
        return
    assert run.unfinished == 0
    assert run.end.reason
    assert run.end.actor
    assert run.end.ended_at_us
    assert run.end.detail or run.end.reason == "succeeded", f"{run.id} ended as {run.end.reason}, and nothing is told of it"
    assert run.end.counts == dict(counts)
    if run.end.reason == "succeeded":
        assert counts == {"done": len(run.vertices)} or not run.vertices
        assert set(outputs_of(run)) == set(run.manifest.outputs)


def _check_vertex(state: State, vertex: Vertex) -> None:
    """Assert what holds of a vertex.

    Invariant: a WAITING vertex has no work and waits for exactly its sources without outputs; all of them may still deliver.
    Invariant: a READY or ASSIGNED vertex waits for the one work of its key; ASSIGNED only while that runs or is being committed.
    Invariant: a DONE vertex has outputs and a ledger record; the ledger knows its key.
    Invariant: a vertex that ended otherwise has a reason. No final vertex waits for work.
    """
    where = f"{vertex.run.id}/{vertex.operator.name} ({vertex.state.value})"
    work = vertex.work
    _check_end(vertex, where)
    if vertex.state is VertexState.WAITING:
        indices = {s.op for port in vertex.operator.inputs.values() for s in port if s.op >= 0}
        missing = [v for v in (vertex.run.vertices[i] for i in indices) if v.outputs is None]
        assert work is None, f"{where} has work"
        assert vertex.waits_for == len(missing), f"{where} waits for {vertex.waits_for}, not {len(missing)}"
        assert missing, f"{where} waits for nothing"
        assert all(not v.state.is_final for v in missing), f"{where} waits for what has ended"
    elif vertex.state in _LIVE:
        assert work is not None, f"{where} has no work"
        assert state.works.get(vertex.key) is work, f"{where} waits for work that is not known"
        assert vertex in work.waiters, f"{where} is no waiter of its work"
        if vertex.state is VertexState.ASSIGNED:
            assert work.state in (WorkState.ASSIGNED, WorkState.COMMITTING), f"{where} but its work is {work.state.value}"
        else:
            assert work.state is not WorkState.ASSIGNED, f"{where} but its work runs"
    elif vertex.state is VertexState.DONE:
        assert work is None, where
        assert vertex.outputs is not None, f"{where} has no outputs"
        assert vertex.record, f"{where} has no record"
        assert state.results[vertex.key].generation >= vertex.generation
    else:
        assert vertex.state in _ENDED_BADLY
        assert work is None, where
        assert vertex.reason, f"{where} has no reason"


def _check_end(vertex: Vertex, where: str) -> None:
    """Assert what holds of the end of a vertex, and of the attempts before it.

    Invariant: whatever has ended tells who ended it and when, and why unless it went well.
    Invariant: so does every attempt that gave no result; only the last ones are remembered.
    """
    if vertex.state.is_final:
        assert vertex.actor, f"{where} has ended as {vertex.state.value}, and nobody ended it"
        assert vertex.ended_at_us, f"{where} has ended at no time"
        assert vertex.reason or vertex.state is VertexState.DONE, f"{where} has ended as {vertex.state.value} for no reason"
    assert len(vertex.story) <= STORY_MAX
    for end in vertex.story:
        assert end.reason, f"attempt {end.attempt} at {where} ended for no reason"
        assert end.actor
        assert end.at_us


def _check_work(state: State, work: Work) -> None:
    """Assert what holds of work.

    Invariant: somebody waits for it, nobody twice, and all of them by its key.
    Invariant: QUEUED work is in the pool or paused; LOCATING work awaits an answer that is asked for.
    Invariant: ASSIGNED work is open in exactly the assignments that it names, one or two, on different nodes that are not gone.
    Invariant: what has effects runs once at a time.
    Invariant: COMMITTING work, and no other, has a pending result, of its generation.
    Invariant: what replaces a lost result has the next generation.
    """
    where = f"work {work.operator.name} ({work.state.value})"
    assert work.waiters, f"{where} has no waiter"
    for vertex in work.waiters:
        assert vertex.work is work
        assert vertex.key == work.key
        assert not vertex.state.is_final
    if work.state is WorkState.LOCATING:
        assert work.awaited, f"{where} awaits nothing"
        assert all(any(w is work for w in state.locating.get(root, ())) for root in work.awaited), where
    elif work.state is WorkState.QUEUED:
        assert _is_queued(state, work), f"{where} is in no queue"
    elif work.state is WorkState.ASSIGNED:
        outstanding = state.assignments.get(work.assignment)
        assert outstanding is not None, f"{where} names no assignment"
        assert outstanding.open.get(work.key) is work, where
        attempt, node = work.issued[work.assignment]
        assert 0 < attempt <= work.attempts, where
        assert node == outstanding.node, where
        assert state.nodes[outstanding.node].state != "gone", f"{where} on a node that is gone"
        if work.copy:
            copy = state.assignments.get(work.copy)
            assert copy is not None, f"{where} names no second assignment"
            assert copy.open.get(work.key) is work, where
            assert copy.node != outstanding.node, f"{where} runs twice on one node"
            assert state.nodes[copy.node].state != "gone", f"{where} on a node that is gone"
            assert work.operator.determinism != "effect", f"{where} has effects and runs twice"
    elif work.pending is not None:
        assert work.pending.generation == work.generation
    assert (work.pending is not None) == (work.state is WorkState.COMMITTING), where
    assert not work.copy or work.state is WorkState.ASSIGNED, f"{where} names a second assignment"
    if work.state in (WorkState.LOCATING, WorkState.QUEUED):
        assert not work.assignment, f"{where} names an assignment"
    if not work.is_hit:
        assert work.generation == (0 if work.previous is None else work.previous.generation + 1), where


def _is_queued(state: State, work: Work) -> bool:
    if any(entry[2] is work and entry[1] == work.ticket for entry in state.delayed):
        return bool(work.not_before_us)
    queue = state.pool.get(pool_key(work))
    heaps = [] if queue is None else queue.heaps.values()
    return any(entry[3] is work and entry[2] == work.ticket for heap in heaps for entry in heap)


def _check_outstanding(state: State, outstanding: Outstanding) -> None:
    """Assert what holds of an assignment.

    Invariant: something of it is open, all of that is known work which names it, and it is listed by its node.
    Invariant: what still runs is open.
    Invariant: a chain goes on from work that is open and not yet done, and somewhere.
    """
    assert outstanding.open, f"assignment {outstanding.id} has nothing open"
    for key, work in outstanding.open.items():
        assert state.works.get(key) is work
        assert outstanding.id in (work.assignment, work.copy)
        assert work.state in (WorkState.ASSIGNED, WorkState.COMMITTING)
    assert outstanding.running <= outstanding.open.keys()
    for key, chain in outstanding.chains.items():
        assert outstanding.open[key].state is WorkState.ASSIGNED, f"a chain of {outstanding.id} hangs on what is done"
        assert chain.rest, f"a chain of {outstanding.id} leads nowhere"
    assert state.nodes[outstanding.node].assignments.get(outstanding.id) is outstanding


def _check_node(state: State, node: Node) -> None:
    """Assert what holds of a node.

    Invariant: a node lists exactly the assignments that name it, and is busy with those of which something runs.
    Invariant: nothing is outstanding on a node that is gone, except results that it delivered late.
    """
    here = {o.id for o in state.assignments.values() if o.node == node.name}
    assert set(node.assignments) == here, f"node {node.name} lists {set(node.assignments)}, not {here}"
    busy = Counter(o.executor for o in node.assignments.values() if o.running)
    assert {k: n for k, n in node.busy.items() if n} == dict(busy), f"node {node.name} is busy {node.busy}, not {busy}"
    if node.state == "gone":
        assert not busy


def _check_health(state: State) -> None:
    """Assert what holds of trust and of spending.

    Invariant: who is not trusted is listed, and nobody else. The placement has none of them among the nodes that it may choose.
    Invariant: copies that run are booked, and nothing is booked twice.
    """
    assert set(state.ward.patients) == {n.name for n in state.nodes.values() if n.health.state != "ok"}
    for node in state.nodes.values():
        if node.health.state != "ok" and node not in state.fleet.stale:
            assert node.klass is None, f"{node.name} is {node.health.state} and may be chosen"
        if node.health.canary:
            assert node.health.state == "canary"
    for work in state.works.values():
        assert not work.copy or work.copy in state.copies.running, f"the copy of {work.operator.name} is not paid"


def _check_pool(state: State) -> None:
    """Assert what holds of the pool.

    Invariant: a queue counts what is in its heaps, and sums what that takes, brings and belongs to; what is live in a heap
    agrees in everything that decides where it may run.
    """
    for key, queue in state.pool.items():
        entries = [entry for heap in queue.heaps.values() for entry in heap]
        assert queue.count == len(entries)
        assert queue.runs == Counter(entry[4].id_pair for entry in entries), f"{queue.number} counts {queue.runs}"
        for told, found in (
            (queue.units, sum(entry[3].units for entry in entries)),
            (queue.worth_s, sum(entry[5] for entry in entries)),
        ):
            assert abs(told - found) <= 1e-6 * max(1.0, abs(found)), f"a queue sums {told}, not {found}"
        assert queue.steps >= max((entry[3].steps for entry in entries), default=0.0)
        for heap in queue.heaps.values():
            for index, (_, _, ticket, work, *_) in enumerate(heap):
                assert index == 0 or heap[(index - 1) // 2][:3] <= heap[index][:3]
                if _is_live(state, work, ticket):
                    assert pool_key(work) == key, f"{work.operator.name} is in the wrong queue"


def _is_live(state: State, work: Work, ticket: int) -> bool:
    return work.ticket == ticket and work.state is WorkState.QUEUED and state.works.get(work.key) is work


def _check_fleet(state: State) -> None:
    """Assert that the classes agree with the nodes, but for those that have changed since they were told.

    Invariant: each trusted node that can be used is in one class, the others in none; idle where it has a free slot, warm and
    cached by the models that it has.
    """
    fleet = state.fleet
    for name, node in state.nodes.items():
        if node in fleet.stale:
            continue
        may_be_chosen = node.is_usable and may_take(state, node, state.now_us)
        assert (node.klass is not None) == may_be_chosen, f"{name} is {node.state} and in class {node.klass is not None}"
        for klass in fleet.classes.values():
            is_here = klass is node.klass
            assert (klass.nodes.get(name) is node) == is_here, f"{name} in class {klass.number}"
            for market, idle in klass.idle.items():
                is_idle = is_here and free_slots(state, node, market) > 0
                assert (idle.get(name) is node) == is_idle, f"{name} is {'' if is_idle else 'not '}idle for {market}"
            for held, digests in ((klass.warm, node.resident), (klass.cached, node.cached)):
                listed = {digest for digest, nodes in held.items() if nodes.get(name) is node}
                assert listed == (set(digests) if is_here else set()), f"{name} holds {digests}, not {listed}"
    for klass in fleet.classes.values():
        for name, node in klass.nodes.items():
            assert state.nodes.get(name) is node or node in fleet.stale, f"{name} is listed in a former life"


def _check_idle(state: State) -> None:
    """Assert that nothing waits beside an idle node without a reason, and without something that will end the wait.

    Invariant: ready work whose tenant may start it, and a class with an idle node that can run it: then it is kept back there,
    until a time at which it is looked at again, or until another node is idle because it must not go to those that are.
    """
    fleet = state.fleet
    if state.is_cut_off or fleet.stale or fleet.changed or state.unsettled:
        return
    for queue in state.pool.values():
        live = [
            e[3] for heap in queue.heaps.values() for e in heap if _is_live(state, e[3], e[2]) and state.may_start(e[3].tenant)
        ]
        for klass in fleet.classes.values() if live else ():
            idle, ranking = klass.idle[queue.market], klass.ranking[queue.market]
            if not idle or not can_run(klass.sample, live[0]):
                continue
            where = f"{live[0].operator.name} beside idle {list(idle)}"
            looked_at_us = fleet.recheck_us.get(queue.market)
            if ranking.kept.get(queue) == queue.version and queue in ranking.barred:
                assert all(_is_barred(state, node, live[0]) for node in klass.idle[queue.market].values()), (
                    f"{where} is not barred"
                )
                continue
            if all(_is_barred(state, node, live[0]) for node in idle.values()):
                continue  # some of the queue went to a node that was fed early: the rest is as barred here as it was
            assert looked_at_us is not None, f"{where} waits for nothing"
            untils_us = [until_us for until_us, _, other in ranking.waiting if other is queue]
            if ranking.kept.get(queue) == queue.version:
                assert untils_us, f"{where} is kept back and not looked at again"
                assert looked_at_us <= min(untils_us), f"{where} is looked at too late"
            else:
                assert queue in ranking.pending, f"{where} is forgotten"


def _is_barred(state: State, node: Node, work: Work) -> bool:
    """Tell whether work must not go to a node: it never may, or it avoids it and there is another."""
    others = [
        n.name for n in state.nodes.values() if n.is_usable and may_take(state, n, state.now_us) and can_run(n.record, work)
    ]
    return node.name in work.unfit or (node.name in work.avoided and not work.avoided.union(work.unfit).issuperset(others))


def _check_shares(state: State) -> None:
    """Assert what holds of the tenants' accounts.

    Invariant: what waits and runs of a tenant is its part of the work that waits and runs; work in the pool waits, and stands
    under a tenant that pays for it. Nothing else is counted: accounts do not leak.
    Invariant: an account counts the tenant's live runs, their unfinished operators, and the assignments that run for it.
    """
    waiting, running, slots = Counter[str](), Counter[str](), Counter[str]()
    for work in state.works.values():
        assert not work.standing or work.charged_us, f"{work.operator.name} is counted and not charged"
        if work.state is WorkState.QUEUED and not work.not_before_us:
            assert work.standing == "waiting", f"{work.operator.name} is in the pool and not counted"
        counts = {work.tenant: 1} if work.payers is None else work.payers
        if work.standing:
            assert work.tenant in counts
            sums = waiting if work.standing == "waiting" else running
            for tenant, count in counts.items():
                sums[tenant] += work.charged_us * count // sum(counts.values())
    for outstanding in state.assignments.values():
        slots.update(outstanding.tenants if outstanding.running else ())
    runs = Counter(run.tenant for run in state.runs.values() if run.end is None)
    operators = Counter[str]()
    for run in state.runs.values():
        operators[run.tenant] += run.unfinished
    for tenant, account in state.shares.accounts.items():
        found = (account.waiting_us, account.running_us, account.slots, account.runs, account.operators)
        expected = (waiting[tenant], running[tenant], slots[tenant], runs[tenant], operators[tenant])
        assert found == expected, f"the account of {tenant} is {found}, not {expected}"
    assert state.shares.slots == sum(bool(o.running) for o in state.assignments.values())


def _check_checkpoints(state: State) -> None:
    """Assert what holds of checkpoints.

    Invariant: each is of its key, by an attempt that was issued, and between the first and the last step.
    Invariant: what is not wanted now is timed.
    """
    for key, known in state.checkpoints.items():
        made = known.made
        assert made.key == key
        assert made.attempt > 0
        assert 0 < made.step < made.steps
        assert known.idle_since_us <= state.now_us


def _check_places(state: State) -> None:
    """Assert that only nodes and the hub are believed to hold anything.

    Invariant: ``places`` names known nodes and the hub; ``locating`` holds only questions that are asked.
    """
    for holders in state.places.values():
        assert all(name == HUB or name in state.nodes for name in holders)
    assert all(state.locating.values())
