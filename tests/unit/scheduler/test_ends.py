"""How runs end: success, failure, cancellation, deadline; and that they do."""

from __future__ import annotations

from typing import Any

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import chain, content, fan, manifest_cid, operator, workflow

from flowmesh_mesh.messages import Abort
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings


def desk(**fields: Any) -> Desk:
    made = Desk(**fields)
    made.join("n1")
    return made


def test_a_run_succeeds_once_the_hub_holds_its_outputs() -> None:
    made = desk(keeps=False)
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    assert made.states() == {"o0": "done"}
    assert not made.ended
    made.apply(e.Kept("ta", "r1"))
    end = made.end()
    assert (end.reason, end.actor, end.outputs) == ("succeeded", "scheduler", {"out": [content("x")]})
    assert end.records == {"out": made.vertex("o0").record}


def test_a_run_without_outputs_succeeds_when_everything_is_done() -> None:
    made = desk(keeps=False)
    made.submit(workflow([operator("a", nonce=1), operator("b", after=[0])], {}))
    made.work_off()
    assert made.end().reason == "succeeded"
    assert made.end().outputs == {}


def test_a_run_of_nothing_succeeds_at_once() -> None:
    made = Desk()
    made.submit(workflow([], {}))
    assert made.end().reason == "succeeded"


def test_a_run_is_accepted_once() -> None:
    made = desk()
    flow = chain(1)
    made.submit(flow)
    again = e.Submitted("ta", "r1", flow, manifest_cid(flow))
    assert not made.apply(again)
    made.work_off()
    assert not made.apply(again)
    assert len(made.of(made.commands, c.Accept)) == 1


def test_work_that_may_run_in_vain_is_assigned_at_once_and_work_with_effects_after_the_acceptance() -> None:
    made = desk()
    made.submit(chain(1))
    kinds = [type(command) for command in made.commands]
    assert kinds.index(c.Assign) < kinds.index(c.Accept)
    made = desk()
    made.submit(workflow([operator("mail", type="python.call", params={"function": "f", "effect": True})]))
    kinds = [type(command) for command in made.commands]
    assert kinds.index(c.Accept) < kinds.index(c.Assign)


def test_cancelling_ends_a_run_and_stops_what_it_alone_waits_for() -> None:
    made = desk()
    made.submit(chain(2))
    assignment = made.only()
    commands = made.apply(e.CancelRequested("ta", "r1", "alice"))
    assert made.end().reason == "cancelled"
    assert made.end().actor == "alice"
    assert [x.state for x in made.of(commands, c.EndRun)] == ["cancelled"]
    assert [x.cancellation.actor for x in made.of(commands, c.RecordCancel)] == ["alice"]
    aborts = [x.message for x in made.of(commands, c.Tell) if isinstance(x.message, Abort)]
    assert [(a.assignment, a.keys) for a in aborts] == [(assignment.id, (assignment.items[0].key,))]
    assert made.states() == {"o0": "cancelled", "o1": "cancelled"}


def test_cancelling_leaves_work_that_somebody_else_waits_for() -> None:
    made = desk()
    made.submit(chain(1), "r1", "ta")
    made.submit(chain(1), "r2", "tb")
    commands = made.apply(e.CancelRequested("ta", "r1", "alice"))
    assert not made.of(commands, c.Tell)
    made.succeed(made.only())
    assert made.end("r1", "ta").reason == "cancelled"
    assert made.end("r2", "tb").reason == "succeeded"
    assert not made.vertex("o0", "r2", "tb").shared or made.vertex("o0", "r2", "tb").run.saved_us == 1000


def test_a_result_that_comes_after_the_cancellation_is_not_published() -> None:
    made = desk()
    made.submit(chain(1))
    assignment = made.only()
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    made.succeed(assignment)
    assert not made.ledger


def test_a_result_that_is_being_committed_when_the_run_is_cancelled_stands() -> None:
    made = desk(commits=False)
    made.submit(chain(2))
    made.succeed(made.only())
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    assert not made.ended
    made.commit()
    assert made.end().counts == {"done": 1, "cancelled": 1}
    assert made.end().reason == "cancelled"


def test_an_output_lost_during_the_commit_of_a_cancelled_run_is_not_made_again() -> None:
    made = desk(commits=False)
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    made.forget(content("x"))
    made.fail(made.named("o1"), "input-missing", missing=(content("x").cid,))
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    made.commit()
    assert made.end().reason == "cancelled"
    assert not made.assigned


def test_a_run_is_cancelled_once_and_not_after_its_end() -> None:
    made = desk()
    made.submit(chain(1))
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    assert not made.apply(e.CancelRequested("ta", "r1", "bob"))
    assert not made.apply(e.CancelRequested("ta", "unknown", "bob"))
    made.submit(chain(1, 7), "r2")
    made.work_off()
    assert not made.apply(e.CancelRequested("ta", "r2", "bob"))


def test_cancelled_work_can_be_asked_for_again() -> None:
    made = desk()
    made.submit(chain(1))
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    made.submit(chain(1), "r2")
    made.work_off()
    assert made.end("r2").reason == "succeeded"


def test_the_deadline_ends_a_run() -> None:
    made = desk()
    made.submit(workflow([operator("o", nonce=1, deadline_s=3.0), operator("p", after=[0])]))
    made.wait(3, beating=["n1"])
    assert not made.ended
    made.wait(0.5, beating=["n1"])
    assert (made.end().reason, made.end().actor) == ("timeout", "scheduler")
    assert made.states() == {"o": "cancelled", "p": "cancelled"}
    assert made.of(made.commands, c.EndRun)[0].state == "failed"


def test_the_deadline_does_not_touch_a_run_whose_outputs_are_being_kept() -> None:
    made = desk(keeps=False)
    made.submit(workflow([operator("o", nonce=1, deadline_s=3.0)]))
    made.work_off()
    made.wait(5, beating=["n1"])
    made.apply(e.Kept("ta", "r1"))
    assert made.end().reason == "succeeded"


def test_the_first_reason_is_the_reason_of_the_run() -> None:
    made = desk()
    made.submit(fan(2))
    assignment = made.only()
    made.report(assignment, [made.outcome(assignment.items[0], "flow.noop", reason="user-error")], last=False)
    made.report(assignment, [made.outcome(assignment.items[1], "flow.noop", reason="model-missing")])
    assert made.end().reason == "user-error"


def test_a_chain_of_five_thousand_runs_and_is_served_without_recursion() -> None:
    made = Desk(checks_every=997)
    made.join("n1")
    flow = chain(5000)
    made.submit(flow)
    made.work_off()
    assert made.end().reason == "succeeded"
    made.submit(flow, "r2", "tb")
    assert made.end("r2", "tb").reason == "succeeded"
    successor = made.successor("n1", checks_every=997)
    successor.submit(flow, "r3", "tb")
    assert successor.end("r3", "tb").reason == "succeeded"


def test_a_failure_at_the_head_of_a_long_chain_skips_all_of_it() -> None:
    made = desk()
    made.submit(chain(5000))
    made.fail(made.only(), "user-error")
    assert made.end().counts == {"failed": 1, "skipped": 4999}


def test_a_bounded_number_of_ended_runs_stays_in_memory() -> None:
    made = Desk(Settings(run_history=3))
    made.join("n1")
    for number in range(6):
        made.submit(chain(1, number), f"r{number}")
        made.work_off()
    assert [run for _, run in made.state.runs] == ["r3", "r4", "r5"]
    assert len(made.state.ended) == 6


def test_looking_at_a_run_again_changes_nothing() -> None:
    made = desk()
    made.submit(chain(1))
    assert not made.apply(e.ReadySeen("ta", "r1"), e.ReadySeen("ta", "unknown"))


def test_changes_are_told_in_order_with_the_counts_of_their_run() -> None:
    made = desk()
    made.submit(chain(2))
    made.work_off()
    changes = made.of(made.commands, c.Change)
    assert [(index, word) for change in changes for index, word, *_ in change.changes] == [
        (0, "assigned"),
        (1, "assigned"),
        (0, "done"),
        (1, "done"),
    ]
    assert dict(changes[-1].counts) == {"done": 2}
