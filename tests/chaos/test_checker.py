"""The checker against planted violations: a good history has none, and each kind, put into it, is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos.checker import DIED, DOUBLED, LOST, STALE, WRONG, check
from chaos.history import (
    Begun,
    CancelAsked,
    Died,
    Entry,
    Executed,
    Fault,
    History,
    Issued,
    LedgerAcceptance,
    LedgerCancellation,
    LedgerEnd,
    Reported,
    Stored,
    Submitted,
    Told,
    Verified,
    Wiped,
)
from chaos.recorder import begun_of, complaints_of

TENANT = "A"


def stored(seq: int, subject: str, kind: str, *, fence: int = 0, epoch: int = 0, stream: str = "LEDGER") -> Stored:
    return Stored(seq, stream, seq, subject, kind, fence, epoch)


def good() -> list[Entry]:
    """Two epochs; a run that succeeds, one with an effect that was tried twice, one that fails as it should, one cancelled."""
    return [
        stored(10, "led.epoch.100", "epoch", epoch=100),
        stored(10, "asg.epoch.100", "epoch", epoch=100, stream="ASSIGN"),
        Submitted(1, TENANT, "one", "single"),
        stored(11, "led.accepted.A.one", "accepted", fence=10),
        Told(11, "one", "accepted"),
        Submitted(1, TENANT, "two", "effect", token="t", operator="effect-t"),
        stored(12, "led.accepted.A.two", "accepted", fence=10),
        Told(13, "two", "accepted"),
        stored(11, "asg.node.n1.a1", "assignment", fence=10, epoch=100, stream="ASSIGN"),
        Issued(1, "a1", 100, "n1", "effect-t", "k2", 0, 1),
        Begun("n1", "a1", 100, 100),
        Executed(3, "t", 1),
        Fault(4, 5, "node-kill", "n1"),
        stored(13, "led.epoch.101", "epoch", epoch=101),
        stored(13, "asg.epoch.101", "epoch", epoch=101, stream="ASSIGN"),
        stored(14, "asg.node.n2.a2", "assignment", fence=13, epoch=101, stream="ASSIGN"),
        Issued(1, "a2", 101, "n2", "effect-t", "k2", 0, 2),
        Begun("n2", "a2", 101, 101),
        Executed(6, "t", 2),
        stored(14, "led.result.k1.0", "result", fence=13),
        stored(15, "led.ended.A.one", "ended", fence=13),
        stored(16, "led.result.k2.0", "result", fence=13),
        Submitted(1, TENANT, "three", "failing", "failed", "user-error"),
        Told(2, "three", "accepted"),
        Submitted(1, TENANT, "four", "cancelled"),
        Told(2, "four", "accepted"),
        CancelAsked(7, "four"),
        Submitted(8, TENANT, "five", "single"),
        Told(9, "five", "unknown"),
        *[LedgerAcceptance(TENANT, run, seq) for seq, run in enumerate(("one", "two", "three", "four"), 11)],
        LedgerCancellation(TENANT, "four", 20),
        LedgerEnd(TENANT, "one", 15, "succeeded", "mesh"),
        LedgerEnd(TENANT, "two", 17, "succeeded", "mesh"),
        LedgerEnd(TENANT, "three", 18, "user-error", "n2"),
        LedgerEnd(TENANT, "four", 21, "cancelled", "chaos"),
        Told(30, "one", "succeeded", "succeeded", "mesh"),
        Verified(31, "one", True),
        Verified(31, "two", True),
        Reported("two", "effect-t", "done", "", 2, "k2"),
        Reported("three", "failing", "failed", "user-error", 1),
    ]


def test_a_good_history_has_no_violations_and_counts_what_nobody_knows() -> None:
    verdict = check(History(good()))
    assert verdict.violations == []
    assert (verdict.counts["accepted"], verdict.counts["unknown"], verdict.counts["epochs"]) == (4, 1, 2)
    assert verdict.counts["fault node-kill"] == 1


def test_a_history_reads_back_as_it_was_written(tmp_path: Path) -> None:
    History(good()).write(tmp_path / "history.jsonl")
    assert History.read(tmp_path / "history.jsonl").entries == good()


Plant = Callable[[list[Entry]], list[Entry]]


def without(*dropped: Entry) -> Plant:
    return lambda entries: [entry for entry in entries if entry not in dropped]


def plus(*added: Entry) -> Plant:
    return lambda entries: [*entries, *added]


def instead(old: Entry, new: Entry) -> Plant:
    return lambda entries: [new if entry == old else entry for entry in entries]


_END_ONE = LedgerEnd(TENANT, "one", 15, "succeeded", "mesh")
_END_TWO = LedgerEnd(TENANT, "two", 17, "succeeded", "mesh")
_END_THREE = LedgerEnd(TENANT, "three", 18, "user-error", "n2")
_END_FOUR = LedgerEnd(TENANT, "four", 21, "cancelled", "chaos")

PLANTED: dict[str, tuple[str, str, Plant]] = {
    "an accepted run never ends": (LOST, "two", without(_END_TWO)),
    "the ledger forgot what a client was told is accepted": (
        LOST,
        "one",
        without(LedgerAcceptance(TENANT, "one", 11), _END_ONE, Told(30, "one", "succeeded", "succeeded", "mesh")),
    ),
    "a client told of an acceptance before the ledger had it": (
        LOST,
        "one",
        instead(
            stored(11, "led.accepted.A.one", "accepted", fence=10),
            Stored(40, "LEDGER", 40, "led.accepted.A.one", "accepted", 13),
        ),
    ),
    "a run whose acceptance the client never heard of does not end": (LOST, "five", plus(LedgerAcceptance(TENANT, "five", 22))),
    "an end without a reason": (LOST, "three", instead(_END_THREE, LedgerEnd(TENANT, "three", 18, "", "n2"))),
    "an end without an actor": (LOST, "three", instead(_END_THREE, LedgerEnd(TENANT, "three", 18, "user-error", ""))),
    "two results under one key and generation": (
        DOUBLED,
        "led.result.k1.0",
        plus(stored(22, "led.result.k1.0", "result", fence=13)),
    ),
    "two ends of one run": (DOUBLED, "led.ended.A.one", plus(stored(23, "led.ended.A.one", "ended", fence=13))),
    "an effect more often than attempts were issued": (DOUBLED, "two", plus(Executed(9, "t", 3))),
    "an effect of nobody's": (DOUBLED, "other", plus(Executed(9, "other", 3))),
    "a ledger write of a deposed leader": (STALE, "LEDGER 24", plus(stored(24, "led.ended.A.x", "ended", fence=10))),
    "an assignment of a deposed leader by its fence": (
        STALE,
        "ASSIGN 24",
        plus(stored(24, "asg.node.n1.a9", "assignment", fence=10, epoch=101, stream="ASSIGN")),
    ),
    "an assignment of a deposed leader by its epoch": (
        STALE,
        "ASSIGN 25",
        plus(stored(25, "asg.node.n1.a9", "assignment", fence=-1, epoch=100, stream="ASSIGN")),
    ),
    "a write that names no epoch record": (STALE, "LEDGER 27", plus(stored(27, "led.ended.A.y", "ended"))),
    "an epoch that goes backwards": (STALE, "LEDGER 26", plus(stored(26, "led.epoch.99", "epoch", epoch=99))),
    "a node that begins old work after it saw a newer epoch": (STALE, "a7", plus(Begun("n2", "a7", 100, 100))),
    "a node that begins what is below the epoch it names itself": (STALE, "a8", plus(Begun("n3", "a8", 100, 101))),
    "a success whose result is wrong": (WRONG, "one", plus(Verified(32, "one", False, "value of last is 1, not 2"))),
    "a success whose result nobody can have": (WRONG, "two", without(Verified(31, "two", True))),
    "a failure where success was due and nothing explains it": (
        WRONG,
        "two",
        instead(_END_TWO, LedgerEnd(TENANT, "two", 17, "internal", "n1")),
    ),
    "a success where failure was due": (WRONG, "three", instead(_END_THREE, LedgerEnd(TENANT, "three", 18, "succeeded", "mesh"))),
    "a failure for another reason than its own": (
        WRONG,
        "three",
        lambda entries: [
            entry
            for entry in instead(_END_THREE, LedgerEnd(TENANT, "three", 18, "timeout", "n2"))(entries)
            if not isinstance(entry, Reported)
        ],
    ),
    "a run cancelled by nobody": (WRONG, "four", without(CancelAsked(7, "four"))),
    "a success after the ledger held the cancellation": (
        WRONG,
        "four",
        lambda entries: [
            *instead(_END_FOUR, LedgerEnd(TENANT, "four", 21, "succeeded", "mesh"))(entries),
            Verified(33, "four", True),
        ],
    ),
    "a client told another end than the ledger has": (WRONG, "three", plus(Told(33, "three", "succeeded", "succeeded", "mesh"))),
    "a client told that an accepted run is rejected": (WRONG, "one", plus(Told(33, "one", "rejected"))),
    "a client told of an end that the ledger does not know": (
        WRONG,
        "five",
        plus(Told(33, "five", "succeeded", "succeeded", "m")),
    ),
    "a process that ends by itself": (DIED, "scheduler-1", plus(Died(9, "scheduler-1", 1))),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name: str) -> None:
    kind, subject, plant = PLANTED[name]
    found = check(History(plant(good()))).of(kind)
    assert subject in {violation.subject for violation in found}


def test_every_kind_of_violation_is_planted() -> None:
    assert {kind for kind, _, _ in PLANTED.values()} == {LOST, DOUBLED, STALE, WRONG, DIED}


def test_a_node_that_was_lost_explains_a_failure() -> None:
    entries = instead(_END_TWO, LedgerEnd(TENANT, "two", 17, "node-lost", "mesh"))(good())
    assert check(History(entries)).violations == []
    undisturbed = [entry for entry in entries if not isinstance(entry, Fault)]
    assert [violation.subject for violation in check(History(undisturbed)).of(WRONG)] == ["two"]


def test_a_run_that_succeeded_before_it_was_cancelled_is_in_order() -> None:
    entries = instead(_END_FOUR, LedgerEnd(TENANT, "four", 19, "succeeded", "mesh"))(good())
    assert check(History([*entries, Verified(33, "four", True)])).violations == []


def test_after_a_wipe_a_subject_may_be_stored_once_more() -> None:
    again = Stored(50, "LEDGER", 50, "led.ended.A.one", "ended", 45)
    entries = [*good(), Wiped(40), Stored(45, "LEDGER", 45, "led.epoch.102", "epoch", 0, 102), again]
    assert check(History(entries)).violations == []


def test_a_result_that_could_not_be_had_at_first_may_be_verified_later() -> None:
    entries = [
        *without(Verified(31, "two", True))(good()),
        Verified(31, "two", False, "cannot be had"),
        Verified(40, "two", True),
    ]
    assert check(History(entries)).violations == []


def test_a_wrong_value_is_never_made_good() -> None:
    entries = [*good(), Verified(31, "two", False, "value of token is 1, not 2"), Verified(40, "two", True)]
    assert [violation.subject for violation in check(History(entries)).of(WRONG)] == ["two"]


def test_tracebacks_in_logs_are_counted_by_their_last_line() -> None:
    log = """2026-11-20 13:00:35 ERROR leader task failed
Traceback (most recent call last):
  File "a.py", line 1, in f
    raise ValueError("x")

ValueError: x
2026-11-20 13:00:36 INFO took a-1 of epoch 7, highest 7
Traceback (most recent call last):
  File "b.py", line 2, in g
KeyError: 'y'
"""
    assert [each.text for each in complaints_of("s", log)] == ["ValueError: x", "KeyError: 'y'"]
    assert begun_of("n", log) == [Begun("n", "a-1", 7, 7)]
    assert check(History([*good(), *complaints_of("s", log)])).counts["complaint ValueError: x"] == 1
