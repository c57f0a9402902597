"""The one function that changes the state: ``step(state, event, now_us) -> commands``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowmesh_scheduler.core import (
    canaries,
    checkpoints,
    ending,
    fairness,
    health,
    membership,
    outcomes,
    planning,
    pooling,
    recovery,
    reinstating,
    speculation,
)
from flowmesh_scheduler.core.commands import Command
from flowmesh_scheduler.core.events import (
    BeatReceived,
    CancelRequested,
    Checkpointed,
    Committed,
    CordonRequested,
    CutOff,
    DoneReceived,
    Ended,
    Event,
    GivenUp,
    Kept,
    Located,
    NodeDisconnected,
    NodeJoined,
    QuarantineLifted,
    ReadySeen,
    Recovered,
    Reinstated,
    Replanned,
    Restored,
    Submitted,
    Tick,
)
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.placement import place
from flowmesh_scheduler.core.state import State, VertexState, WorkState

Placer = Callable[[State, int, Outbox], None]
"""What gives ready work to nodes: (state, now_us, out)."""


def step(state: State, event: Event, now_us: int, placer: Placer = place) -> list[Command]:
    """Apply one event; return what is to be done about it, in order.

    Deterministic: the same events at the same times give the same commands. Another ``placer`` is another policy, for comparison.
    """
    out = Outbox(now_us=now_us)
    state.now_us = now_us
    state.shares.advance(now_us, state.shares.slots)
    _HANDLERS[type(event)](state, event, now_us, out)
    _drain(state, out)
    if type(event) is Recovered:
        recovery.readopt_all(state, event.assignments, now_us, out)
    if state.ward.patients:
        canaries.place(state, now_us, out)
    placer(state, now_us, out)
    if type(event) is Tick:
        speculation.watch(state, now_us, out)
    while out.touched:
        touched, out.touched = out.touched, {}
        for run in touched.values():
            ending.end_if_settled(state, run, now_us, out)
    return out.close()


def _drain(state: State, out: Outbox) -> None:
    """Follow what became ready until nothing new does; no recursion, however long a chain of hits is."""
    while out.entering or out.queueing:
        vertices, out.entering = out.entering, []
        for vertex in vertices:
            if vertex.state is VertexState.WAITING and not vertex.waits_for:
                planning.enter(state, vertex, out)
        works, out.queueing = out.queueing, []
        for work in works:
            if state.works.get(work.key) is not work or work.state is WorkState.COMMITTING or work.assignment:
                continue
            if work.waiters:
                pooling.queue(state, work, out)
            else:
                fairness.end(state, work, 0)
                del state.works[work.key]


def _on_tick(state: State, event: Tick, now_us: int, out: Outbox) -> None:
    pooling.release_delayed(state, now_us)
    membership.watch_leases(state, now_us, out)
    health.watch(state, now_us, out)
    ending.watch_deadlines(state, now_us, out)
    checkpoints.drop_idle(state, now_us, out)


def _on_cut_off(state: State, event: CutOff, now_us: int, out: Outbox) -> None:
    state.is_cut_off = True


def _on_restored(state: State, event: Restored, now_us: int, out: Outbox) -> None:
    state.is_cut_off = False
    membership.restore_leases(state, now_us)


def _on_ready(state: State, event: ReadySeen, now_us: int, out: Outbox) -> None:
    run = state.runs.get((event.tenant, event.run))
    if run is not None:
        out.touched[run.id_pair] = run


_HANDLERS: dict[type, Callable[[State, Any, int, Outbox], None]] = {
    Submitted: planning.submit,
    CancelRequested: ending.on_cancel,
    NodeJoined: lambda state, event, now, out: membership.on_joined(state, event.record, now, out),
    BeatReceived: lambda state, event, now, out: membership.on_beat(state, event.beat, now, out),
    NodeDisconnected: lambda state, event, now, out: membership.on_disconnected(state, event.node, now),
    CordonRequested: health.on_cordon,
    QuarantineLifted: lambda state, event, now, out: health.on_lifted(state, event, out),
    DoneReceived: outcomes.on_done,
    Committed: lambda state, event, now, out: outcomes.on_committed(state, event, out),
    Located: lambda state, event, now, out: pooling.on_located(state, event, out),
    Kept: lambda state, event, now, out: ending.on_kept(state, event, out),
    Ended: lambda state, event, now, out: ending.on_ended(state, (event.tenant, event.run)),
    ReadySeen: _on_ready,
    CutOff: _on_cut_off,
    Restored: _on_restored,
    Recovered: recovery.on_recovered,
    Reinstated: reinstating.on_reinstated,
    Replanned: reinstating.on_replanned,
    GivenUp: reinstating.on_given_up,
    Checkpointed: lambda state, event, now, out: checkpoints.on_checkpointed(state, event),
    Tick: _on_tick,
}
