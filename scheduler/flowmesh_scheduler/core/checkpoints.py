"""Checkpoints of operators that run: from which one the next attempt goes on, and when none is wanted any more."""

from __future__ import annotations

from collections.abc import Sequence

from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import Checkpoint, Located
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core.commands import DropCheckpoint
from flowmesh_scheduler.core.events import Checkpointed
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.state import KeptCheckpoint, State, Work, WorkState

IDLE_US = 60_000_000
"""So long a checkpoint outlives the work that it is of: a lost input may be made again, a run be found again."""

Order = tuple[int, int, int]


def order_of(made: Checkpoint) -> Order:
    """Return what only grows from one pointer of an operator to the next: generation, attempt, step."""
    return (made.generation, made.attempt, made.step)


def refusal(state: State, made: Checkpoint) -> str:
    """Return why a checkpoint is not that of an attempt which runs now, by this leader's books; empty when it is."""
    work = state.works.get(made.key)
    if work is None or work.state is not WorkState.ASSIGNED:
        return "nothing runs under its key"
    if made.assignment not in (work.assignment, work.copy) or work.issued.get(made.assignment) != (made.attempt, made.node):
        return f"attempt {made.attempt} on {made.node} is not the one that runs"
    if made.generation != work.generation:
        return f"generation {work.generation} runs, not {made.generation}"
    if made.epoch > state.epoch or not made.assignment.startswith(f"{made.epoch:x}-"):
        return f"assignment {made.assignment} is not of epoch {made.epoch}"
    if not 0 < made.step < made.steps:
        return f"step {made.step} of {made.steps} is no place to go on from"
    known = state.checkpoints.get(made.key)
    if known is not None and order_of(made) < order_of(known.made):
        return f"a later one is known (attempt {known.made.attempt}, step {known.made.step})"
    return ""


def on_checkpointed(state: State, event: Checkpointed) -> None:
    """The pointer to a checkpoint is written: the next attempt goes on from there. It only ever moves forward."""
    made = event.checkpoint
    known = state.checkpoints.get(made.key)
    if known is not None and order_of(made) <= order_of(known.made):
        return
    if known is not None and known.made.at.cid != made.at.cid:
        state.places.pop(known.made.at.cid, None)
    state.checkpoints[made.key] = KeptCheckpoint(made)
    places = state.places.setdefault(made.at.cid, set())
    if event.is_at_hub:
        places.add(HUB)
    if made.node in state.nodes:
        places.add(made.node)


def located_for(state: State, work: Work) -> Located | None:
    """Return the checkpoint that the next attempt at work goes on from, with those who hold it.

    A new leader knows only the attempts that were outstanding when it took over: the next one comes after that of the checkpoint.
    """
    known = state.checkpoints.get(work.key)
    if known is None or known.made.generation != work.generation:
        return None
    work.attempts = max(work.attempts, known.made.attempt)
    made, maker = known.made, state.nodes.get(known.made.node)
    holders = set(state.holders(made.at.cid))
    if maker is not None and maker.state != "gone" and not maker.disconnected_at_us:
        holders.add(maker.name)
    return Located(made.at, tuple(sorted(holders)))


def refs_of(state: State, work: Work) -> Sequence[Sequence[Ref]]:
    """Return what a node must fetch for work beside its inputs, in the form of ports."""
    known = state.checkpoints.get(work.key) if state.checkpoints else None
    return ((known.made.at,),) if known is not None and known.made.generation == work.generation else ()


def drop_idle(state: State, now_us: int, out: Outbox) -> None:
    """Let go of what nobody will go on from: at once when the result is there, after a while when the work has just ended."""
    for key, known in list(state.checkpoints.items()):
        if key in state.works:
            known.idle_since_us = 0
            continue
        known.idle_since_us = known.idle_since_us or now_us
        result = state.results.get(key)
        is_done = result is not None and result.generation >= known.made.generation
        if is_done or now_us - known.idle_since_us >= IDLE_US:
            del state.checkpoints[key]
            state.places.pop(known.made.at.cid, None)
            out.add(DropCheckpoint(key))
