"""Stragglers: an assignment that runs far longer than predicted gets a second attempt on a free node; the first result wins.

Assignments stand in a heap by the time at which they are late, so what runs as predicted is never looked at. A copy is paid by
the mesh, not by a tenant, and all copies of the last hour together may cost only a share of what the nodes cost in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import islice

from flowmesh_scheduler.core import health
from flowmesh_scheduler.core.assigning import assign
from flowmesh_scheduler.core.classes import MARKETS
from flowmesh_scheduler.core.fleet import can_run, free_slots
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import stop_attempt, width
from flowmesh_scheduler.core.standing import Copy
from flowmesh_scheduler.core.state import Node, Outstanding, State, Work, WorkState

_ACCRUE_EVERY_US = 1_000_000
_COPIES_PER_TICK = 8
_LOOKS_PER_TICK = 64
_LOOK_AGAIN = 1.25
"""A straggler for which nothing could be done is looked at again once it has run this many times as long."""

_GAIN = {"train": 1.5}
"""How many times longer than the copy the rest of the original must be expected to take, by kind of executor; 1 if not named."""

_NODES_COMPARED = 16
"""Idle nodes of each class that are considered for a copy."""

_INPUTS_SAMPLED = 16
_BOOKED_AHEAD_S = 1.0
"""Spending is booked this long before it is made, so that what is not affordable is stopped in time."""


def watch(state: State, now_us: int, out: Outbox) -> None:
    """Settle what copies cost; copy what is late."""
    copies = state.copies
    if now_us - copies.accrued_at_us >= _ACCRUE_EVERY_US:
        copies.accrue(sum(_usd_per_s(state, n) for n in state.nodes.values() if n.state != "gone"), now_us)
    _settle(state, now_us, out)
    made = looked = 0
    while copies.due and copies.due[0][0] <= now_us and not state.is_cut_off and looked < _LOOKS_PER_TICK:
        _, identity = heappop(copies.due)
        late = state.assignments.get(identity)
        if late is None or not late.running:
            continue
        looked += 1
        node = state.nodes[late.node]
        if node.health.canary == identity:
            health.note_late_canary(state, node)
        if made < _COPIES_PER_TICK and _copy(state, late, now_us, out):
            made += 1
        else:
            elapsed_us = now_us - late.begun_us
            heappush(copies.due, (late.begun_us + max(int(_LOOK_AGAIN * elapsed_us), elapsed_us + 1_000_000), identity))


def _copy(state: State, late: Outstanding, now_us: int, out: Outbox) -> bool:
    """Give what still runs of an assignment to a second node, if one is free, fast enough and affordable."""
    works = [work for key in late.open if key in late.running and _may_be_copied(work := late.open[key], late)]
    if not works:
        return True
    share = len(works) / late.count
    best: tuple[float, float, str] | None = None
    for node in _spare(state, late, works):
        seconds = _copy_s(state, node, late, works, share)
        candidate = (seconds, _usd_per_s(state, node) / width(node, late.executor), node.name)
        if best is None or candidate < best:
            best = candidate
    if best is None:
        return False
    seconds, usd_per_s, name = best
    remaining_s = _remaining_s(late, now_us)
    amount_usd = (seconds + _BOOKED_AHEAD_S) * usd_per_s
    if remaining_s <= _GAIN.get(late.executor, 1.0) * seconds or not _can_afford(state, amount_usd):
        return False
    why = {"delay": (remaining_s - seconds) * usd_per_s, "price": -amount_usd}
    identity = assign(state, state.nodes[name], works, now_us, out, why, seconds)
    state.copies.running[identity] = Copy(now_us, usd_per_s, amount_usd)
    state.copies.book(amount_usd)
    for work in works:
        work.is_copied = True
    state.totals["speculated"] += len(works)
    return True


def _may_be_copied(work: Work, late: Outstanding) -> bool:
    """Tell whether a second attempt does no harm and there is none yet; work is copied once in its life."""
    return (
        work.state is WorkState.ASSIGNED
        and work.assignment == late.id
        and not work.copy
        and not work.is_copied
        and work.key not in late.folded
        and work.operator.determinism != "effect"
    )


def _spare(state: State, late: Outstanding, works: Sequence[Work]) -> list[Node]:
    """Return some nodes that could begin with the copy at once and have nothing better to do."""
    barred = {late.node}.union(*(work.avoided | work.unfit for work in works))
    market, found = MARKETS[late.executor], []
    for klass in state.fleet.classes.values():
        idle = klass.idle[market]
        if idle and can_run(klass.sample, works[0]):
            for node in islice(idle.values(), _NODES_COMPARED):
                is_free = (
                    node.busy.get(late.executor, 0) < width(node, late.executor) and free_slots(state, node, late.executor) > 0
                )
                if is_free and node.is_usable and node.name not in barred and health.may_take(state, node, state.now_us):
                    found.append(node)
    return found


def _copy_s(state: State, node: Node, late: Outstanding, works: Sequence[Work], share: float) -> float:
    """Return what a share of an assignment is expected to take on another node, load and fetch included."""
    costs, device = state.costs, node.klass.device if node.klass is not None else late.device
    seconds = costs.exec_s(late.kind, device, node.name, late.max_steps, late.sum_units * share)
    if works[0].model and works[0].model not in node.resident:
        seconds += costs.load_s(works[0].model, device)
    missing = 0
    for work in works:
        for refs in work.inputs.values():
            missing += sum(max(r.size, 0) for r in refs[:_INPUTS_SAMPLED] if node.name not in state.places.get(r.cid, ()))
    return seconds + costs.fetch_s(node.name, missing)


def _remaining_s(late: Outstanding, now_us: int) -> float:
    """Return how long an assignment is expected to go on: at its pace so far, or else as long as it is late already."""
    elapsed_s = (now_us - late.begun_us) / 1e6
    answered = late.count - len(late.running)
    return elapsed_s * len(late.running) / answered if answered else elapsed_s - late.predicted_s


def _usd_per_s(state: State, node: Node) -> float:
    return (node.record.price_per_hour or state.settings.price_per_hour) / 3600


def _can_afford(state: State, amount_usd: float) -> bool:
    copies = state.copies
    return copies.spent_usd() + amount_usd <= state.settings.speculation_share * copies.rent_usd()


def _settle(state: State, now_us: int, out: Outbox) -> None:
    """Charge copies that ended with what they cost; stop one that takes longer than was booked and cannot be afforded."""
    copies = state.copies
    for identity, copy in list(copies.running.items()):
        found = state.assignments.get(identity)
        cost_usd = copy.cost_usd(now_us)
        if found is None or all(work.copy != identity for work in found.open.values()):
            copies.book(cost_usd - copy.booked_usd)
            del copies.running[identity]
        elif copy.cost_usd(now_us + int(_BOOKED_AHEAD_S * 1e6)) > copy.booked_usd:
            more_usd = max(_BOOKED_AHEAD_S * copy.usd_per_s, copy.booked_usd / 2)
            if _can_afford(state, more_usd):
                copies.book(more_usd)
                copy.booked_usd += more_usd
            else:
                for work in [w for w in found.open.values() if w.copy == identity]:
                    work.copy = ""
                    stop_attempt(state, work, identity, "the copy has become too dear", out)


def note_win(state: State, work: Work, winner: str, now_us: int) -> None:
    """An attempt succeeded while another ran: count a win of the copy, and what that says of the node that was slower."""
    if work.copy != winner:
        return
    state.totals["speculation_won"] += 1
    loser = state.assignments.get(work.assignment)
    if loser is not None and loser.running == {work.key} and loser.predicted_s:
        elapsed_s = (now_us - loser.begun_us) / 1e6
        health.note_batch(state, loser, elapsed_s, loser.predicted_s / state.costs.node_ratio(loser.node), now_us)
