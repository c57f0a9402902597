"""The promises, checked on what happened. Every checker takes plain records, so that each can be shown a planted violation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.executors import Execution
from tests.faults.history import Begun, Fault, Told, Write
from tests.faults.workload import Order
from tests.faults.world import World

from flowmesh_mesh.manifest import ResultRecord, decode_record
from flowmesh_mesh.messages import Epoch, Reason, decode

ENDS = ("succeeded", "failed", "cancelled", "rejected")
LEASE_S = 10.0
SETTLED_S = 1.0
"""An assignment this old is written to its stream, and its node has said in a heartbeat that it holds it."""

NEAR_S = 3.0
"""Longest take-over; and how soon work is stopped that nobody waits for any more."""

_BY_ACCIDENT = frozenset({Reason.CRASHED, Reason.INTERNAL, Reason.INPUT_MISSING})


@dataclass(slots=True)
class Facts:
    """What the checkers look at."""

    orders: Sequence[Order]
    writes: Sequence[Write] = ()
    begun: Sequence[Begun] = ()
    told: Sequence[Told] = ()
    faults: Sequence[Fault] = ()
    executions: Sequence[Execution] = ()
    speculates: bool = False
    """Whether second attempts were made beside stragglers."""


def check(world: World, orders: Sequence[Order]) -> list[str]:
    """Return every violation of a promise, in words."""
    history = world.history
    facts = Facts(orders, history.writes, history.begun, history.told, history.faults, world.bench.executions, world.speculates)
    found: list[str] = []
    for checker in (p1_no_run_is_lost, p2_one_result, p3_no_deposed_leader, p4_p5_no_work_is_repeated, p7_status_is_true):
        found += checker(facts)
    return found


def is_settled(world: World) -> bool:
    """Tell whether every client has heard the end of everything it asked for."""
    told = {(each.tenant, each.run) for each in world.history.told if each.state in ENDS}
    return all((order.tenant, order.run) in told for client in world.clients for order in client.orders)


def p1_no_run_is_lost(facts: Facts) -> list[str]:
    """Every run that was sent ends, and as it must."""
    found = []
    ends = {(each.tenant, each.run): each for each in facts.told if each.state in ENDS}
    accepted = {(each.tenant, each.run) for each in facts.told if each.state == "accepted"}
    for order in facts.orders:
        end = ends.get((order.tenant, order.run))
        if end is None:
            how = "accepted and never ended" if (order.tenant, order.run) in accepted else "never accepted"
            found.append(f"P1: {order.run} of {order.tenant} ({order.document['name']}) was {how}")
        elif wrong := _wrong_end(order, end, facts):
            found.append(f"P1: {order.run} of {order.tenant} ({order.document['name']}) {wrong}")
    return found


def _wrong_end(order: Order, end: Told, facts: Facts) -> str:
    reason = str(end.body.get("reason", ""))
    if end.state == "succeeded":
        if order.must_fail:
            return "succeeded although it must fail"
        if end.body.get("outputs") != order.digests:
            return "succeeded with other results than its operators give"
        return ""
    if end.state == "cancelled":
        return "" if order.cancel_after_s else f"was cancelled by nobody ({reason})"
    if end.state == "failed" and order.must_fail:
        return ""
    if end.state == "failed" and reason in _BY_ACCIDENT and _accidents(facts):
        return ""
    return f"ended as {end.state}: {reason} {end.body.get('detail', '')}"


def _accidents(facts: Facts) -> int:
    """Return how many times something broke that may use up an operator's attempts."""
    kinds = ("executor-crash", "node-disk-full", "node-blocks-lost", "node-blocks-rotten")
    return sum(fault.kind in kinds for fault in facts.faults)


def p2_one_result(facts: Facts) -> list[str]:
    """One result of a key and generation, ever: also over the loss of the whole store, as everything here is deterministic."""
    found = []
    results: dict[str, bytes] = {}
    seen: set[tuple[int, str]] = set()
    for write in facts.writes:
        if not write.subject.startswith("led.result."):
            continue
        if (write.life, write.subject) in seen:
            found.append(f"P2: {write.subject} was written twice in one life of the ledger")
        seen.add((write.life, write.subject))
        result = decode_record(write.data, ResultRecord).result
        if results.setdefault(write.subject, result) != result:
            found.append(f"P2: {write.subject} has two different results")
    return found


def p3_no_deposed_leader(facts: Facts) -> list[str]:
    """Nothing of a leader takes effect once another has raised the epoch, in the streams or on a node."""
    found = []
    leaders: dict[tuple[int, str], str] = {}
    epochs: dict[str, int] = {}
    for write in facts.writes:
        place = (write.life, write.stream)
        if ".epoch." in write.subject:
            epoch = decode(write.data, Epoch).epoch
            if epoch <= epochs.get(write.stream, 0):
                found.append(f"P3: epoch {epoch} of {write.stream} is not above the one before")
            epochs[write.stream] = epoch
            leaders[place] = write.writer
        elif write.writer != leaders.get(place):
            found.append(
                f"P3: {write.writer} wrote {write.subject} while {leaders.get(place, 'nobody')} led, at {write.at_s:.3f}"
            )
    for begun in facts.begun:
        if begun.epoch < begun.highest:
            found.append(f"P3: {begun.node} began {begun.assignment} of epoch {begun.epoch} after it had seen {begun.highest}")
    return found


def p4_p5_no_work_is_repeated(facts: Facts) -> list[str]:
    """Work runs again only where its own node failed, or where it was younger than its record when a leader or broker failed."""
    found = []
    by_key: dict[str, list[Execution]] = {}
    for execution in facts.executions:
        by_key.setdefault(execution.key, []).append(execution)
    for key, executions in by_key.items():
        for position, execution in enumerate(executions[1:], 1):
            for before in executions[:position]:
                if not _is_excused(before, execution, facts) and not _was_second(before, executions, facts):
                    first = f"on {before.node} from {before.began_s:.3f} ({before.how} at {before.ended_s:.3f})"
                    second = f"on {execution.node} at {execution.began_s:.3f}"
                    found.append(f"P4/P5: {key[:12]} ({before.type}) ran {first} and again {second}: nothing failed there")
    return found


def _was_second(before: Execution, executions: list[Execution], facts: Facts) -> bool:
    """Tell whether this was begun beside an earlier attempt whose node had a fault, and stopped as that one came back."""
    firsts = [each for each in executions if each.node != before.node and each.began_s <= before.began_s]
    return before.how == "cancelled" and any(
        fault.who == first.node and fault.at_s <= before.began_s <= fault.until_s + LEASE_S
        for first in firsts
        for fault in facts.faults
    )


def _is_excused(before: Execution, again: Execution, facts: Facts) -> bool:
    if before.how in ("crashed", "timeout") or before.seconds < SETTLED_S:
        return True
    if before.how == "cancelled" and any(_ends_waiting(told) and abs(told.at_s - before.ended_s) < NEAR_S for told in facts.told):
        return True
    if facts.speculates and (before.how in ("running", "cancelled") or again.began_s < before.ended_s + SETTLED_S):
        return True
    for fault in facts.faults:
        overlaps = fault.at_s <= again.began_s and fault.until_s + LEASE_S >= before.began_s
        if overlaps and (fault.who in (before.node, "everything") or fault.kind == "broker-wipe"):
            return True
        if fault.who == again.node and fault.at_s <= before.began_s and again.began_s <= fault.until_s + LEASE_S:
            return True  # it had the work first, was given up, and went on with it when it was back
        if fault.who.startswith(("scheduler", "broker")) and fault.at_s - SETTLED_S <= before.began_s <= fault.until_s + NEAR_S:
            return True
        if fault.kind in ("node-blocks-lost", "node-blocks-rotten", "node-disk-full") and fault.at_s <= again.began_s:
            return True
    return False


def _ends_waiting(told: Told) -> bool:
    """Tell whether this may have ended the last run that waited for some work."""
    return told.state in ("cancel asked", "cancelled", "failed")


def p7_status_is_true(facts: Facts) -> list[str]:
    """What was told as the end stays the end, and nothing ends before it was accepted."""
    found = []
    ends: dict[tuple[str, str], str] = {}
    for told in facts.told:
        pair = (told.tenant, told.run)
        if told.state in ENDS:
            if ends.setdefault(pair, told.state) != told.state:
                found.append(f"P7: {told.run} of {told.tenant} was told to be {ends[pair]}, then {told.state}")
            if told.state == "succeeded" and told.body.get("lacking"):
                found.append(f"P7: {told.run} of {told.tenant} succeeded, but nobody can give {told.body['lacking']}")
            if told.body.get("still_running"):
                found.append(
                    f"P7: {told.run} of {told.tenant} was told to be {told.state} while {told.body['still_running']} ran"
                )
        elif told.state in ("running", "accepted") and pair in ends:
            found.append(f"P7: {told.run} of {told.tenant} was told to be {told.state} after it was {ends[pair]}")
    return found
