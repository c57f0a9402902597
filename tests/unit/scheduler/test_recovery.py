"""A new leader: the state rebuilt from ledger, manifests and outstanding assignments."""

from __future__ import annotations

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import chain, content, fan, operator, workflow

from flowmesh_mesh.messages import Commit
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.recovery import evaluate


def desk() -> Desk:
    made = Desk()
    made.join("n1")
    return made


def test_an_outstanding_assignment_goes_on_where_it_is() -> None:
    made = desk()
    made.submit(chain(2))
    running = made.only()
    after = made.successor("n1")
    assert after.only() is running
    assert after.states() == {"o0": "assigned", "o1": "waiting"}
    commands = after.succeed(running)
    closed = [x.message for x in after.of(commands, c.Tell) if isinstance(x.message, Commit)]
    assert [(m.assignment, m.closed, m.epoch) for m in closed] == [(running.id, True, after.epoch)]
    after.work_off()
    assert after.end().reason == "succeeded"
    assert after.vertex("o0").attempt == 1


def test_an_assignment_on_a_node_that_is_not_known_is_released_and_runs_elsewhere() -> None:
    made = desk()
    made.submit(chain(1))
    old = made.only()
    made.join("n2")
    after = made.successor("n2")
    assert [x.assignment for x in after.of(after.commands, c.Release)] == [old.id]
    assert after.only().node == "n2"
    after.succeed(after.only())
    assert after.end().reason == "succeeded"


def test_an_assignment_that_nobody_waits_for_is_released() -> None:
    made = desk()
    made.submit(chain(1))
    old = dict(made.assigned)
    made.succeed(made.only())
    made.assigned = old
    after = made.successor("n1")
    assert not after.assigned
    assert after.of(after.commands, c.Release)


def test_results_of_the_ledger_are_not_computed_again() -> None:
    made = desk()
    made.submit(chain(3))
    made.succeed(made.only(), "x")
    after = made.successor("n1")
    assert after.states() == {"o0": "done", "o1": "assigned", "o2": "waiting"}
    after.work_off()
    assert after.end().reason == "succeeded"
    assert len(after.ledger) == 3


def test_every_live_run_goes_on() -> None:
    made = Desk()
    for number in range(4):
        made.submit(chain(2, 10 * number), f"r{number}", "ta" if number % 2 else "tb")
    made.join("n1")
    after = made.successor()
    after.join("n1")
    after.work_off()
    assert sorted(run for _, run in after.ended) == ["r0", "r1", "r2", "r3"]
    assert {end.reason for end in after.ended.values()} == {"succeeded"}


def test_a_cancelled_run_ends_and_the_others_go_on() -> None:
    made = desk()
    made.ends = False
    made.submit(chain(2), "r1")
    made.submit(chain(2, 5), "r2")
    made.submit(chain(2, 9), "r3")
    found = made.recovered()
    runs = [e.RecoveredRun(r.acceptance, r.manifest, "alice" if r.acceptance.run == "r2" else "") for r in found.runs]
    after = Desk(epoch=200)
    after.manifests = dict(made.manifests)
    after.join("n1")
    after.apply(e.Recovered(found.results, runs, found.ended, []))
    assert (after.end("r2").reason, after.end("r2").actor) == ("cancelled", "alice")
    after.work_off()
    assert after.end("r1").reason == after.end("r3").reason == "succeeded"


def test_a_run_that_was_done_but_not_ended_ends() -> None:
    made = desk()
    made.keeps = False
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    assert not made.ended
    after = made.successor("n1", keeps=False)
    assert after.states() == {"o0": "done"}
    assert after.of(after.commands, c.Keep)


def test_a_run_that_has_ended_is_not_accepted_again() -> None:
    made = desk()
    made.submit(chain(1))
    made.work_off()
    after = made.successor("n1")
    assert not after.apply(e.Submitted("ta", "r1", chain(1), b"\0" * 36))


def test_the_latest_generation_of_a_result_counts() -> None:
    made = desk()
    made.submit(workflow([operator("o", nonce=1)]))
    made.succeed(made.only(), "first")
    made.forget(content("first"))
    made.submit(workflow([operator("o", nonce=1)]), "r2")
    made.succeed(made.only(), "second")
    after = made.successor("n1")
    after.submit(workflow([operator("o", nonce=1)]), "r3")
    assert after.end("r3").outputs == {"out": [content("second")]}


def test_inputs_that_were_lost_with_the_leader_are_made_again() -> None:
    made = desk()
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    made.fail(made.only(), "crashed")
    made.forget(content("x"))
    after = made.successor("n1")
    assert after.states() == {"o0": "assigned", "o1": "waiting"}
    after.succeed(after.only(), "x")
    after.work_off()
    assert after.end().reason == "succeeded"


def test_an_adopted_assignment_that_fails_runs_once_more_and_not_twice() -> None:
    made = desk()
    made.submit(fan(3))
    running = made.only()
    after = made.successor("n1")
    after.report(running, [after.outcome(item, "flow.noop", reason="crashed") for item in running.items])
    after.wait(3, beating=["n1"])
    again = after.only()
    assert len({item.key for item in again.items}) == len(again.items) == 3
    after.succeed(again)
    assert after.end().reason == "succeeded"


def test_an_attempt_after_the_take_over_has_a_number_of_its_own() -> None:
    made = desk()
    made.submit(chain(1))
    made.fail(made.only(), "crashed")
    made.wait(1, beating=["n1"])
    running = made.only()
    assert running.items[0].attempt == 2
    after = made.successor("n1")
    assert after.vertex("o0").attempt == 2
    after.fail(running, "crashed")
    after.wait(1, beating=["n1"])
    assert after.only().items[0].attempt == 3


def test_a_report_that_crosses_the_take_over_is_taken() -> None:
    made = desk()
    made.submit(fan(4))
    running = made.only()
    made.report(running, [made.outcome(item, "flow.noop") for item in running.items[:2]], last=False)
    after = made.successor("n1")
    assert after.states() == {"o0": "done", "o1": "done", "o2": "assigned", "o3": "assigned"}
    after.succeed(running)
    assert after.end().reason == "succeeded"
    assert not after.assigned


def test_a_run_can_be_looked_at_after_it_has_left_memory() -> None:
    made = desk()
    made.submit(chain(2))
    made.work_off()
    acceptance, manifest = made.manifests["ta", "r1"]
    run = evaluate(made.state, acceptance, manifest, made.end())
    assert run.counts["done"] == 2
    assert not made.state.runs["ta", "r1"].changes


def test_a_replayed_history_ends_as_the_leader_that_lived() -> None:
    """Whatever the moment of the take-over, the runs end alike."""
    flow = [operator("a", nonce=1), operator("b", nonce=2), operator("c", after=[0, 1]), operator("d", nonce=4, after=[2])]
    for crash_at in range(6):
        made = desk()
        made.submit(workflow(flow), "r1", "ta")
        made.submit(workflow(flow[:3]), "r2", "tb")
        for _ in range(crash_at):
            if made.assigned:
                assignment = next(iter(made.assigned.values()))
                made.report(assignment, [made.outcome(assignment.items[0], "flow.noop")], last=len(assignment.items) == 1)
        after = made.successor("n1")
        after.work_off()
        assert {run: end.reason for (_, run), end in after.ended.items()} == {"r1": "succeeded", "r2": "succeeded"}
        assert after.ended["ta", "r1"].counts == {"done": 4}


def test_an_assignment_of_an_earlier_life_of_its_agent_is_not_adopted_but_its_results_are_taken() -> None:
    """The agent has started again since: it may hold a part of the answer in its spool, and will never work on the rest."""
    made = desk()
    made.submit(fan(3))
    old = made.only()
    made.manifests = dict(made.manifests)
    after = Desk(epoch=200, now_us=made.now_us)
    after.manifests = dict(made.manifests)
    after.join("n1", started_at_us=2)
    after.apply(made.recovered())
    assert [x.assignment for x in after.of(after.commands, c.Release)] == [old.id]
    assert after.only().id != old.id
    after.report(old, [after.outcome(old.items[0], "flow.noop", "spooled")], last=False)
    assert [r.receipt.assignment for r in after.records()] == [old.id]
    after.beat("n1", [old.id, *after.assigned])
    after.work_off()
    assert after.end().reason == "succeeded"
