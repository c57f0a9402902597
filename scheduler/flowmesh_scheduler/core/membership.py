"""Nodes: joining, heartbeats, suspicion, loss. What a lost node held runs elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from flowmesh_mesh.messages import Beat, Commit, NodeRecord, Reason
from flowmesh_scheduler.core import health
from flowmesh_scheduler.core.commands import Tell
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import adopt, release, take_away, take_back
from flowmesh_scheduler.core.planning import SCHEDULER, fail_work
from flowmesh_scheduler.core.state import AttemptEnd, Node, Outstanding, State, TakenBack, WorkState

_CHEAP = frozenset({"inline", "data"})

_BEATS_APART_US = 2_500_000
"""Beats further apart tell of a gap: what a node held in between it may not have heard of yet."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Why attempts end of which the node did not say how they went. ``is_of_node``: counts as a node lost with the operator."""

    reason: Reason
    actor: str
    detail: str
    is_of_node: bool = True


_FORGOTTEN = Loss(Reason.LEASE_EXPIRED, SCHEDULER, "the heartbeats of its node do not name it", is_of_node=False)
_SUSPECTED = Loss(
    Reason.LEASE_EXPIRED, SCHEDULER, "the connection of its node ended, and did not come back soon", is_of_node=False
)


def on_joined(state: State, record: NodeRecord, now_us: int, out: Outbox) -> None:
    """Know a node, or know it anew: an agent that started again holds nothing of what it held before.

    One that started again without a goodbye has crashed: that counts as the loss of a node. What an earlier life said is ignored.
    """
    known = state.nodes.get(record.node)
    if known is not None and record.started_at_us < known.record.started_at_us:
        return
    if record.state == "left":
        if known is not None:
            lose(state, known, now_us, out, _left(known))
        return
    if known is not None and known.record.started_at_us == record.started_at_us and known.state != "gone":
        known.record = record
        known.state = record.state
        known.last_beat_us = now_us
        known.disconnected_at_us = 0
        state.touch(known)
        return
    if known is not None:
        _take_back(state, known, out, Loss(Reason.NODE_LOST, record.node, "its agent ended without a goodbye and started again"))
        state.touch(known)
    node = state.nodes[record.node] = Node(record, now_us, record.state)
    health.admit(state, node, known, now_us)
    state.touch(node)
    state.costs.know_node(record.node, record.bandwidth_bytes_per_s)


def on_beat(state: State, beat: Beat, now_us: int, out: Outbox) -> None:
    """Renew the leases of what a node holds; notice what it has lost and what it should drop."""
    node = state.nodes.get(beat.node)
    if node is None or (beat.life and beat.life != node.record.started_at_us):
        return
    if beat.state in ("left", "died"):
        died = Loss(Reason.NODE_LOST, node.name, "its agent ended without a goodbye")
        lose(state, node, now_us, out, died if beat.state == "died" else _left(node))
        return
    is_after_gap = now_us - node.last_beat_us > _BEATS_APART_US
    resident = frozenset(beat.resident) | _being_loaded(node)
    if node.disconnected_at_us or node.state != beat.state or node.resident != resident:
        state.touch(node)
    node.last_beat_us = now_us
    node.disconnected_at_us = 0
    node.state = beat.state
    node.resident = resident
    node.cached |= resident
    node.load, node.memory_free_bytes = beat.load, beat.memory_free_bytes
    node.running, node.queued = beat.running, beat.queued
    held = dict.fromkeys(beat.held)
    for assignment in held:
        if assignment not in state.assignments and not _give_back(state, node, assignment, now_us, out):
            out.add(Tell(beat.node, Commit(state.epoch, assignment, (), closed=True)))
    for outstanding in list(node.assignments.values()):
        if outstanding.id in held or is_after_gap:
            outstanding.unnamed_since_us = 0
        if _is_forgotten(state, outstanding, outstanding.id in held, now_us):
            _requeue(state, outstanding, out, _FORGOTTEN)


def _being_loaded(node: Node) -> frozenset[str]:
    """Return the models of what was given to a node and still runs: it has them, or is loading them."""
    here = (o for o in node.assignments.values() if o.running and o.executor == "engine")
    return frozenset(o.kind[1] for o in here if o.kind[1])


def _is_forgotten(state: State, outstanding: Outstanding, is_held: bool, now_us: int) -> bool:
    """Tell whether work waits on a node that does not hold it, or that has said its last word without a word on it.

    The clock of what it does not hold runs from the first heartbeat that leaves it out, and only while heartbeats come.
    """
    if is_held:
        since_us, patience_s = outstanding.answered_at_us, state.settings.lease_s
    else:
        outstanding.unnamed_since_us = outstanding.unnamed_since_us or now_us
        since_us, patience_s = outstanding.unnamed_since_us, state.settings.unnamed_s
    is_over = 0 < since_us < now_us - int(patience_s * 1e6)
    return is_over and any(w.state is WorkState.ASSIGNED for w in outstanding.open.values())


def _give_back(state: State, node: Node, assignment: str, now_us: int, out: Outbox) -> bool:
    """Let a node that was silent go on with what it holds; tell whether that is still wanted.

    What nobody else runs is the node's again. What runs elsewhere too is decided by the first result. An agent that started
    again has only results to offer: these are taken when they come.
    """
    taken = state.taken_back.get(assignment)
    if taken is None or taken.node != node.name:
        return False
    wanted = [w for key in taken.keys if (w := state.works.get(key)) is not None and assignment in w.issued]
    if not wanted:
        del state.taken_back[assignment]
        return False
    idle = [w for w in wanted if w.state in (WorkState.QUEUED, WorkState.LOCATING)]
    for work in idle:
        work.story = tuple(end for end in work.story if end.attempt != work.issued[assignment][0])
    if idle and taken.started_at_us == node.record.started_at_us:
        del state.taken_back[assignment]
        if taken.counts_as_loss:
            for work in idle:
                work.nodes_lost -= 1
                work.lost_on = work.lost_on[:-1]
        chains = {w.key: taken.chains[w.key] for w in idle if w.key in taken.chains}
        adopt(state, node, assignment, {w: w.issued[assignment][0] for w in idle}, chains, now_us, out)
    return True


def on_disconnected(state: State, name: str, now_us: int) -> None:
    """The broker saw the connection end; after a short while without a beat it counts."""
    node = state.nodes.get(name)
    if node is not None and not node.disconnected_at_us and node.state != "gone":
        node.disconnected_at_us = now_us
        state.touch(node)


def watch_leases(state: State, now_us: int, out: Outbox) -> None:
    """Take back what suspected nodes hold (cheap work soon, dear work after the lease)."""
    if state.is_cut_off:
        return
    settings = state.settings
    for node in list(state.nodes.values()):
        if node.state == "gone":
            continue
        if now_us - node.last_beat_us > settings.node_lease_us:
            silent_s = (now_us - node.last_beat_us) / 1e6
            lose(state, node, now_us, out, Loss(Reason.LEASE_EXPIRED, SCHEDULER, f"no heartbeat for {silent_s:.1f} s"))
        elif node.disconnected_at_us and now_us - node.disconnected_at_us > settings.suspicion_us:
            for outstanding in list(node.assignments.values()):
                if outstanding.executor in _CHEAP:
                    _requeue(state, outstanding, out, _SUSPECTED)


def _left(node: Node) -> Loss:
    told = "it was taken away, as announced" if node.record.leaving_at_us else "it left the mesh"
    return Loss(Reason.PREEMPTED, node.name, told, is_of_node=False)


def lose(state: State, node: Node, now_us: int, out: Outbox, loss: Loss) -> None:
    """A node is gone: whatever it held runs elsewhere."""
    node.state = "gone"
    node.disconnected_at_us = node.disconnected_at_us or now_us
    state.touch(node)
    _take_back(state, node, out, loss)


def _take_back(state: State, node: Node, out: Outbox, loss: Loss) -> None:
    for outstanding in list(node.assignments.values()):
        _requeue(state, outstanding, out, loss)


def _requeue(state: State, outstanding: Outstanding, out: Outbox, loss: Loss) -> None:
    """Take an assignment from its node; what runs nowhere else goes back into the pool."""
    counts_as_loss = loss.is_of_node
    name, life = outstanding.node, state.nodes[outstanding.node].record.started_at_us
    held = [w for w in outstanding.open.values() if w.state is WorkState.ASSIGNED]
    works = dict.fromkeys(release(state, outstanding, out))
    keys = tuple(w.key for w in held)
    take_back(state, outstanding.id, TakenBack(name, life, keys, counts_as_loss, outstanding.chains))
    for work in held:
        work.avoided |= {name}
        attempt = work.issued[outstanding.id][0] if outstanding.id in work.issued else work.attempts
        work.note_end(AttemptEnd(attempt, name, loss.reason, loss.actor, state.now_us, loss.detail))
        if counts_as_loss:
            work.nodes_lost += 1
            work.lost_on = (*work.lost_on, name)
        if work.nodes_lost >= state.settings.nodes_lost_limit:
            take_away(state, work, out)
            fail_work(state, work, Reason.POISON, health.quarantine(state, work, out), name, out)
        elif work in works:
            work.assignment = ""
            state.totals["repeated"] += counts_as_loss
            out.queueing.append(work)


def restore_leases(state: State, now_us: int) -> None:
    """The leader was cut off: every lease starts anew, and every suspicion."""
    for node in state.nodes.values():
        if node.state != "gone":
            node.last_beat_us = now_us
            node.disconnected_at_us = node.disconnected_at_us and now_us
            state.touch(node)
