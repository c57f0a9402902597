"""Each checker is shown a history that keeps its promise and ones that break it: it must see the difference."""

from __future__ import annotations

from typing import Any

import pytest
from tests.faults.checkers import (
    Facts,
    p1_no_run_is_lost,
    p2_one_result,
    p3_no_deposed_leader,
    p4_p5_no_work_is_repeated,
    p7_status_is_true,
)
from tests.faults.executors import Execution
from tests.faults.history import Begun, Fault, Told, Write
from tests.faults.workload import Order

from flowmesh_cas.cid import DAG_CBOR, cid_of
from flowmesh_mesh import subjects
from flowmesh_mesh.manifest import Receipt, ResultRecord, encode_record
from flowmesh_mesh.messages import Epoch, encode

DIGESTS = {"out": [b"d" * 32]}


def order(**more: Any) -> Order:
    return Order("team-a", "run-1", 5.0, {"name": "chain"}, digests=DIGESTS, **more)


def told(state: str, **body: Any) -> Told:
    return Told(10.0, "team-a", "run-1", state, body)


def result(content: bytes, *, life: int = 0, attempt: int = 1, writer: str = "scheduler-0") -> Write:
    receipt = Receipt("node-0", "U", 1, "a", b"r", b"s", 0, 1)
    record = ResultRecord(cid_of(DAG_CBOR, b"op"), 0, attempt, cid_of(DAG_CBOR, content), {}, receipt)
    return Write(10.0, life, subjects.LEDGER, "led.result.aa.0", 5, encode_record(record), writer)


def epoch(number: int, writer: str, *, life: int = 0) -> Write:
    return Write(1.0, life, subjects.LEDGER, f"led.epoch.{number}", number, encode(Epoch(number, writer, 1, 1)), writer)


def execution(node: str, began_s: float, ended_s: float, how: str = "settled") -> Execution:
    return Execution("ab" * 32, node, 1, began_s, "python.call", 5.0, ended_s, how)


GOOD = told("succeeded", outputs=DIGESTS, lacking="")


@pytest.mark.parametrize(
    ("orders", "events"),
    [
        ([order()], [told("accepted"), GOOD]),
        ([order(must_fail=True)], [told("failed", reason="user-error")]),
        ([order(cancel_after_s=1.0)], [told("cancelled", reason="cancelled")]),
        ([order(cancel_after_s=1.0)], [GOOD]),
    ],
)
def test_runs_that_end_as_they_must_are_well(orders: list[Order], events: list[Told]) -> None:
    assert p1_no_run_is_lost(Facts(orders, told=events)) == []


@pytest.mark.parametrize(
    ("run", "events", "text"),
    [
        (order(), [], "never accepted"),
        (order(), [told("accepted")], "accepted and never ended"),
        (order(), [told("succeeded", outputs={"out": [b"e" * 32]})], "other results"),
        (order(), [told("succeeded", outputs={})], "other results"),
        (order(), [told("failed", reason="user-error")], "ended as failed"),
        (order(), [told("failed", reason="crashed")], "ended as failed"),
        (order(), [told("cancelled", reason="cancelled")], "cancelled by nobody"),
        (order(), [told("rejected")], "ended as rejected"),
        (order(must_fail=True), [GOOD], "although it must fail"),
    ],
)
def test_a_lost_run_and_a_wrong_end_are_seen(run: Order, events: list[Told], text: str) -> None:
    (problem,) = p1_no_run_is_lost(Facts([run], told=events))
    assert text in problem


def test_one_result_of_a_key_is_well_and_so_is_the_same_again_after_a_loss_of_the_store() -> None:
    assert p2_one_result(Facts([], writes=[result(b"x"), result(b"x", life=1, attempt=2)])) == []


@pytest.mark.parametrize(
    ("writes", "text"),
    [([result(b"x"), result(b"x", attempt=2)], "twice in one life"), ([result(b"x"), result(b"y", life=1)], "two different")],
)
def test_two_results_of_a_key_are_seen(writes: list[Write], text: str) -> None:
    assert any(text in problem for problem in p2_one_result(Facts([], writes=writes)))


def test_leaders_one_after_the_other_are_well() -> None:
    one, two = "scheduler-0", "scheduler-1"
    writes = [epoch(5, one), result(b"x", writer=one), epoch(6, two), result(b"x", writer=two), epoch(7, one, life=1)]
    assert p3_no_deposed_leader(Facts([], writes=writes, begun=[Begun(1.0, "node-0", 6, 6, "a")])) == []


@pytest.mark.parametrize(
    ("writes", "text"),
    [
        ([epoch(5, "scheduler-0"), epoch(6, "scheduler-1"), result(b"x", writer="scheduler-0")], "while scheduler-1 led"),
        ([result(b"x")], "while nobody led"),
        ([epoch(5, "scheduler-0"), epoch(5, "scheduler-1", life=1)], "not above"),
        ([epoch(5, "scheduler-0"), result(b"x", life=1)], "while nobody led"),
    ],
)
def test_a_write_of_a_deposed_leader_and_an_epoch_that_goes_back_are_seen(writes: list[Write], text: str) -> None:
    assert any(text in problem for problem in p3_no_deposed_leader(Facts([], writes=writes)))


def test_work_begun_under_a_stale_epoch_is_seen() -> None:
    (problem,) = p3_no_deposed_leader(Facts([], begun=[Begun(1.0, "node-0", 5, 6, "a")]))
    assert "of epoch 5 after it had seen 6" in problem


@pytest.mark.parametrize(
    ("first", "faults"),
    [
        (execution("node-0", 20.0, 0.0, "running"), [Fault(22.0, "node-kill", "node-0", 23.0)]),
        (execution("node-0", 20.0, 25.0), [Fault(15.0, "node-cut", "node-0", 18.0)]),
        (execution("node-0", 20.0, 25.0, "crashed"), []),
        (execution("node-0", 20.0, 25.0), [Fault(20.2, "scheduler-kill", "scheduler-0", 21.0)]),
        (execution("node-0", 20.0, 25.0), [Fault(22.0, "broker-wipe", "broker", 21.0)]),
    ],
)
def test_work_repeated_for_a_reason_is_well(first: Execution, faults: list[Fault]) -> None:
    again = execution("node-1", 26.0, 31.0)
    assert p4_p5_no_work_is_repeated(Facts([], faults=faults, executions=[first, again])) == []


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [Fault(22.0, "node-kill", "node-1", 23.0)],
        [Fault(23.0, "scheduler-kill", "scheduler-0", 24.0)],
        [Fault(23.0, "broker-restart", "broker", 24.0)],
        [Fault(1.0, "node-kill", "node-0", 2.0)],
    ],
)
def test_work_repeated_although_its_node_was_well_is_seen(faults: list[Fault]) -> None:
    executions = [execution("node-0", 20.0, 25.0), execution("node-1", 26.0, 31.0)]
    assert len(p4_p5_no_work_is_repeated(Facts([], faults=faults, executions=executions))) == 1


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ([GOOD, told("failed")], "then failed"),
        ([GOOD, told("accepted")], "after it was succeeded"),
        ([told("succeeded", lacking="value abc")], "nobody can give"),
        ([told("failed", still_running=["c0"])], "while ['c0'] ran"),
    ],
)
def test_a_status_that_is_not_true_is_seen(events: list[Told], text: str) -> None:
    (problem,) = p7_status_is_true(Facts([], told=events))
    assert text in problem


def test_a_true_status_is_well() -> None:
    assert p7_status_is_true(Facts([], told=[told("accepted"), told("accepted"), GOOD, GOOD])) == []
