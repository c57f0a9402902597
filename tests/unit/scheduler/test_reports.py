"""Reports that come late, twice, in parts, from the wrong hand, or with results that are none."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import TRAIN, chain, content, fan, node_record, operator, result_of, workflow

from flowmesh_mesh.manifest import ResultManifest, encode_record, record_cid
from flowmesh_mesh.messages import Abort, Commit
from flowmesh_scheduler.core import commands as c


def desk(*nodes: str, **fields: Any) -> Desk:
    made = Desk(**fields)
    made.join(*(nodes or ("n1", "n2")))
    return made


def test_a_late_success_of_a_lost_node_is_accepted_once() -> None:
    made = desk()
    made.submit(chain(1))
    late = made.only()
    made.lose(late.node)
    second = made.only()
    made.beat(late.node, [late.id])
    assert made.only() is second, "what runs elsewhere was given back"
    commands = made.succeed(late)
    assert [m for m in made.told(commands, second.node) if isinstance(m, Abort)]
    assert made.end().reason == "succeeded"
    assert [r.receipt.assignment for r in made.records()] == [late.id]
    made.succeed(second)
    made.succeed(late)
    assert len(made.ledger) == 1


def test_a_late_success_is_taken_while_nobody_else_runs_it() -> None:
    made = desk("n1")
    made.submit(chain(1))
    late = made.only()
    made.lose("n1")
    made.succeed(late)
    made.beat("n1", [late.id])
    made.work_off()
    assert made.end().reason == "succeeded"
    assert [r.receipt.assignment for r in made.records()] == [late.id]


def test_a_node_keeps_a_late_success_until_the_ledger_shows_it() -> None:
    made = desk("n1", commits=False)
    made.submit(chain(1))
    late = made.only()
    made.lose("n1")
    commands = [*made.succeed(late), *made.succeed(late), *made.beat("n1", [late.id])]
    assert not made.told(commands, "n1"), "the node was told to drop what is not in the ledger yet"
    closing = made.told(made.commit(), "n1")
    assert [(m.assignment, m.closed, len(m.results)) for m in closing if isinstance(m, Commit)] == [(late.id, True, 1)]


def test_a_node_that_was_silent_goes_on_with_what_nobody_else_runs() -> None:
    made = desk("n1")
    made.submit(workflow([operator("t", **TRAIN)]))
    running = made.only()
    for _ in range(4):
        made.lose("n1")
        commands = made.beat("n1", [running.id])
        assert not made.told(commands, "n1")
        assert made.states() == {"t": "assigned"}
    assert made.vertex("t").attempt == 1
    made.succeed(running)
    assert made.end().reason == "succeeded"


def test_an_agent_that_started_again_is_not_believed_to_go_on() -> None:
    made = desk("n1", "n2")
    made.submit(workflow([operator("t", **TRAIN)]))
    old = made.only()
    made.join_as(node_record(old.node, started_at_us=2))
    made.beat(old.node, [old.id])
    assert made.only().id != old.id


def test_what_an_earlier_life_held_is_not_given_back() -> None:
    made = desk("n1")
    made.submit(workflow([operator("t", **TRAIN)]))
    old = made.only()
    made.join_as(node_record("n1", started_at_us=2, state="draining"))
    made.beat("n1", [old.id], state="draining")
    assert made.states() == {"t": "ready"}
    assert not made.assigned


def test_a_commit_that_is_told_twice_counts_once() -> None:
    made = desk("n1", commits=False)
    made.submit(chain(1))
    made.succeed(made.only(), "first")
    event = made.commit_event()
    made.apply(event, event)
    made.forget(content("first"))
    made.submit(chain(1), "r2")
    made.apply(event)
    made.succeed(made.only(), "second")
    made.apply(event)
    assert made.states("r2") == {"o0": "assigned"}
    made.commit()
    assert made.end("r2").reason == "succeeded"


def test_a_node_is_told_to_drop_what_somebody_else_has_finished() -> None:
    made = desk()
    made.submit(chain(1))
    slow = made.only()
    made.lose(slow.node)
    made.succeed(made.only())
    commands = made.beat(slow.node, [slow.id])
    assert [(m.assignment, m.closed) for m in made.told(commands, slow.node) if isinstance(m, Commit)] == [(slow.id, True)]


def test_a_late_failure_changes_nothing() -> None:
    made = desk()
    made.submit(chain(1))
    late = made.only()
    made.lose(late.node)
    second = made.only()
    made.fail(late, "user-error")
    assert made.only() is second
    made.succeed(second)
    assert made.end().reason == "succeeded"


def test_a_report_that_comes_twice_is_answered_and_changes_nothing() -> None:
    made = desk("n1")
    made.submit(chain(1))
    first = made.only()
    made.succeed(first)
    commands = made.succeed(first)
    assert [type(x) for x in commands] == [c.Tell]
    (message,) = made.told(commands, "n1")
    assert isinstance(message, Commit)
    assert [result[1] for result in message.results] == [0]
    assert made.state.totals["executed"] == 1


def test_a_part_that_comes_twice_does_not_free_the_slot() -> None:
    made = desk("n1")
    made.submit(workflow([operator(f"o{i}", type="data.sql", params={"query": str(i)}) for i in range(40)], {}))
    assignment = next(iter(made.assigned.values()))
    part = [made.outcome(item, assignment.type) for item in assignment.items[: len(assignment.items) // 2]]
    before = len(made.assigned)
    made.report(assignment, part, last=False)
    made.report(assignment, part, last=False)
    assert len(made.assigned) == before
    assert made.state.nodes["n1"].busy == {"data": 2}


def test_a_report_for_another_attempt_or_generation_is_refused() -> None:
    made = desk("n1")
    made.submit(chain(1))
    assignment = made.only()
    item = assignment.items[0]
    good = made.outcome(item, "flow.noop")
    for changed in ({"attempt": 2}, {"generation": 1}, {"key": b"\7" * 32}):
        made.report(assignment, [replace(good, **changed)], last=False)
    assert not made.ledger
    made.report(assignment, [good])
    assert made.end().reason == "succeeded"


def test_a_report_of_a_node_that_was_not_given_the_work_is_refused() -> None:
    made = desk("n1", "n2")
    made.submit(chain(1))
    assignment = made.only()
    thief = next(n for n in ("n1", "n2") if n != assignment.node)
    made.report(assignment, [made.outcome(assignment.items[0], "flow.noop", "forged")], node=thief)
    assert not made.ledger
    made.lose(assignment.node)
    made.report(assignment, [made.outcome(assignment.items[0], "flow.noop", "forged")], node=thief)
    assert not made.ledger


def test_a_report_that_contradicts_itself_counts_once() -> None:
    made = desk("n1")
    made.submit(chain(1))
    assignment = made.only()
    item = assignment.items[0]
    made.report(assignment, [made.outcome(item, "flow.noop", reason="crashed"), made.outcome(item, "flow.noop")])
    made.wait(2, beating=["n1"])
    made.work_off()
    assert made.end().reason == "succeeded"
    assert len(made.ledger) == 1


def test_parts_may_come_in_any_order() -> None:
    made = desk("n1")
    made.submit(fan(6))
    assignment = made.only()
    outcomes = [made.outcome(item, "flow.noop") for item in assignment.items]
    made.report(assignment, outcomes[3:], last=True)
    made.report(assignment, outcomes[:3], last=False)
    assert made.end().reason == "succeeded"
    assert not made.assigned


def test_the_slot_of_an_answered_assignment_is_used_before_it_is_committed() -> None:
    made = desk("n1", commits=False)
    made.submit(workflow([operator("a", **TRAIN), operator("b", type="train.sft", params={"seed": 2})], {}))
    made.succeed(made.named("a"))
    assert made.is_assigned("b")


@pytest.mark.parametrize("fault", ["another result", "no result", "no CID"])
def test_a_result_that_does_not_name_its_outputs_is_a_failure_of_the_node(fault: str) -> None:
    made = desk("n1")
    made.submit(chain(1))
    good = made.outcome(made.only().items[0], "flow.noop", "x")
    junk = replace(content("x"), cid=b"junk")
    bad = {
        "another result": replace(good, result=result_of("flow.noop", "y")[1]),
        "no result": replace(good, result=b""),
        "no CID": replace(good, outputs={"out": [junk]}, result=record_cid(encode_record(ResultManifest({"out": [junk]})))),
    }[fault]
    made.report(made.only(), [bad])
    assert not made.ledger
    made.wait(1, beating=["n1"])
    made.work_off()
    assert made.end().reason == "succeeded"


def test_a_result_that_is_not_that_of_its_outputs_is_refused_beside_a_sound_one() -> None:
    made = desk("n1")
    made.submit(workflow([operator(f"o{i}", params={"tag": str(i)}) for i in range(3)], {}))
    given = made.only()
    first, second, third = (made.outcome(item, "flow.noop", "same") for item in given.items)
    other = made.outcome(given.items[1], "flow.noop", "other")
    made.report(given, [first, replace(second, outputs=other.outputs), third])
    assert [value == "done" for value in made.states().values()] == [True, False, True]
