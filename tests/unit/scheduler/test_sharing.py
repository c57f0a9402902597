"""One execution per operator key, whoever asks: in flight, when done, and when the result is lost."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import chain, content, operator, result_of, workflow

from flowmesh_mesh.manifest import ResultManifest, encode_record, record_cid
from flowmesh_mesh.messages import Commit
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e

TWO = {"ta": "r1", "tb": "r2"}


def desk(**fields: Any) -> Desk:
    made = Desk(**fields)
    made.join("n1")
    return made


def lost_result(made: Desk, label: str = "first") -> None:
    """Let a run of one operator succeed and its output be lost."""
    made.submit(workflow([operator("o", nonce=1)]))
    made.succeed(made.only(), label)
    made.forget(content(label))


def test_an_operator_that_two_tenants_ask_for_runs_once() -> None:
    made = desk()
    made.submit(chain(1), "r1", "ta")
    made.submit(chain(1), "r2", "tb")
    made.succeed(made.only())
    assert [len(a.items) for a in (x.assignment for x in made.of(made.commands, c.Assign))] == [1]
    assert made.end("r1", "ta").reason == made.end("r2", "tb").reason == "succeeded"
    assert (made.vertex("o0").shared, made.vertex("o0", "r2", "tb").shared) == (False, True)
    assert made.end("r2", "tb").saved_us == 1000


def test_equal_operators_of_one_run_run_once() -> None:
    made = desk()
    made.submit(workflow([operator("a", nonce=1), operator("b", nonce=1), operator("c", after=[0, 1])]))
    assert len(made.only().items) == 1
    made.work_off()
    assert made.end().counts == {"done": 3}
    assert made.state.totals["executed"] == 2


def test_whoever_asks_while_the_result_is_being_committed_is_done_with_it() -> None:
    made = desk(commits=False)
    made.submit(chain(2))
    made.succeed(made.only())
    made.submit(chain(2), "r2", "tb")
    assert made.is_assigned("o1")
    assert made.states("r2", "tb") == {"o0": "ready", "o1": "assigned"}
    made.commit()
    assert made.states("r2", "tb") == {"o0": "done", "o1": "assigned"}


def test_a_result_is_served_only_after_holders_have_confirmed() -> None:
    made = desk(locates=False)
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    commands = made.apply(e.Submitted("tb", "r2", chain(1), b"\0" * 36))
    assert [dict(x.roots) for x in made.of(commands, c.Locate)] == [{content("x").cid: [HUB, "n1"]}]
    assert made.states("r2", "tb") == {"o0": "ready"}
    made.apply(e.Located({content("x").cid: ["n1"]}))
    assert made.end("r2", "tb").reason == "succeeded"
    assert made.end("r2", "tb").saved_us == 1000
    assert len(made.ledger) == 1


def test_a_run_that_asks_for_a_result_being_located_waits_for_the_same_answer() -> None:
    made = desk(locates=False)
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    made.submit(chain(1), "r2", "tb")
    commands = made.apply(e.Submitted("tb", "r3", chain(1), b"\0" * 36))
    assert not made.of(commands, c.Locate)
    made.apply(e.Located({content("x").cid: [HUB]}))
    assert made.end("r2", "tb").reason == made.end("r3", "tb").reason == "succeeded"


def test_a_lost_result_that_comes_out_different_opens_the_next_generation() -> None:
    made = desk()
    lost_result(made)
    made.submit(workflow([operator("o", nonce=1)]), "r2", "tb")
    assert made.only().items[0].generation == 1
    made.succeed(made.only(), "second")
    assert {(r.generation, r.result) for r in made.records()} == {
        (0, result_of("flow.noop", "first")[1]),
        (1, result_of("flow.noop", "second")[1]),
    }
    assert made.end("r2", "tb").outputs == {"out": [content("second")]}


def test_a_lost_result_that_comes_out_equal_keeps_its_record() -> None:
    made = desk()
    lost_result(made)
    record = made.vertex("o").record
    made.submit(workflow([operator("o", nonce=1)]), "r2", "tb")
    assignment = made.only()
    commands = made.succeed(assignment, "first")
    assert len(made.ledger) == 1
    assert made.vertex("o", "r2", "tb").record == record
    assert made.end("r2", "tb").reason == "succeeded"
    closing = [x.message for x in made.of(commands, c.Tell) if isinstance(x.message, Commit)]
    assert [(m.closed, m.results[0][1]) for m in closing] == [(True, 0)]


def test_a_generation_that_failed_is_not_opened_below_the_ledger_by_the_next_run() -> None:
    made = desk()
    lost_result(made)
    made.submit(workflow([operator("o", nonce=1)]), "r2", "tb")
    made.fail(made.only(), "user-error")
    assert made.end("r2", "tb").reason == "user-error"
    made.submit(workflow([operator("o", nonce=1)]), "r3", "tb")
    assert made.only().items[0].generation == 1
    made.succeed(made.only(), "second")
    assert made.end("r3", "tb").reason == "succeeded"


def test_a_generation_whose_run_was_cancelled_is_not_opened_below_the_ledger_by_the_next_run() -> None:
    made = desk()
    lost_result(made)
    made.submit(workflow([operator("o", nonce=1)]), "r2", "tb")
    made.apply(e.CancelRequested("tb", "r2", "bob"))
    assert made.end("r2", "tb").reason == "cancelled"
    made.submit(workflow([operator("o", nonce=1)]), "r3", "tb")
    made.work_off()
    assert sorted(generation for _, generation in made.ledger) == [0, 1]


def test_the_next_generation_is_found_by_the_run_that_notices_the_loss_later() -> None:
    """Two runs have lost the same result; the later one takes what the other has made, and does not open a third generation."""
    made = desk()
    for run, nonce in (("r1", 2), ("r2", 3)):
        flow = [operator("p", nonce=1), operator(f"c{nonce}", nonce=nonce, after=[0])]
        made.submit(workflow(flow), run)
        if run == "r1":
            made.answer("p", "first")
    made.forget(content("first"))
    lost = (content("first").cid,)
    made.answer("c2", reason="input-missing", missing=lost)
    made.answer("p", "second")
    made.answer("c3", reason="input-missing", missing=lost)
    assert not [a for a in made.assigned.values() if a.items[0].name == "p"]
    made.work_off()
    assert made.end("r1").reason == made.end("r2").reason == "succeeded"
    key = made.vertex("p").key
    assert sorted(generation for k, generation in made.ledger if k == key) == [0, 1]


def test_a_result_of_nothing_is_served_without_asking_anybody() -> None:
    made = desk(locates=False)
    made.submit(workflow([operator("o", nonce=1)], {}))
    item = made.only().items[0]
    nothing = record_cid(encode_record(ResultManifest({})))
    made.report(made.only(), [replace(made.outcome(item, "flow.noop"), outputs={}, result=nothing)])
    made.submit(workflow([operator("o", nonce=1)], {}), "r2", "tb")
    assert made.end("r2", "tb").reason == "succeeded"


def test_private_operators_of_two_tenants_do_not_share() -> None:
    made = desk()
    for tenant, run in TWO.items():
        made.submit(chain(1), run, tenant, share="private")
    assert made.vertex("o0").key != made.vertex("o0", "r2", "tb").key
    assert sum(len(a.items) for a in made.assigned.values()) == 2


def test_private_operators_of_one_tenant_share() -> None:
    made = desk()
    made.submit(chain(1), "r1", "ta", share="private")
    made.submit(chain(1), "r2", "ta", share="private")
    assert len(made.only().items) == 1


def test_what_follows_a_private_operator_is_private() -> None:
    made = desk()
    flow = [operator("a", nonce=1, share="private"), operator("b", after=[0]), operator("c", nonce=3)]
    for tenant, run in TWO.items():
        made.submit(workflow(flow), run, tenant)
    for assignment in list(made.assigned.values()):
        made.report(assignment, [made.outcome(i, "flow.noop", "the same") for i in assignment.items])
    keys = [{name: made.vertex(name, run, tenant).key for name in "abc"} for tenant, run in TWO.items()]
    assert keys[0]["a"] != keys[1]["a"]
    assert keys[0]["b"] != keys[1]["b"]
    assert keys[0]["c"] == keys[1]["c"]


def test_operators_with_effects_never_share() -> None:
    made = desk()
    flow = workflow([operator("mail", type="python.call", params={"function": "f", "effect": True})])
    made.submit(flow, "r1", "ta")
    made.submit(flow, "r2", "ta")
    keys = {made.vertex("mail", run).key for run in ("r1", "r2")}
    assert len(keys) == 2
    made.work_off()
    made.submit(flow, "r3", "ta")
    assert made.is_assigned("mail")


def test_the_key_of_an_effect_is_the_same_after_a_retry() -> None:
    made = desk()
    made.submit(workflow([operator("mail", type="python.call", params={"function": "f", "effect": True})]))
    key = made.only().items[0].key
    made.fail(made.only(), "crashed")
    made.wait(2, beating=["n1"])
    assert made.only().items[0].key == key


def test_pure_operators_share_whatever_tenant_and_run_they_come_from() -> None:
    made = desk()
    made.submit(chain(3), "r1", "ta")
    made.work_off()
    made.submit(chain(3), "r2", "tb")
    assert made.end("r2", "tb").counts == {"done": 3}
    assert made.state.totals | {"executed": 3, "shared": 3, "saved_us": 3000, "repeated": 0} == made.state.totals


def test_what_a_run_has_saved_is_not_counted_again_when_its_results_are_lost() -> None:
    made = desk()
    made.submit(workflow([operator("p", nonce=1)]), "r0")
    made.succeed(made.only(), "p")
    made.submit(workflow([operator("p", nonce=1), operator("c", after=[0])]))
    made.forget(content("p"))
    made.answer("c", reason="input-missing", missing=(content("p").cid,))
    made.answer("p", "p")
    made.work_off()
    assert made.end().saved_us == 0
    assert made.state.totals["saved_us"] == 0


def test_an_attempt_runs_as_long_as_its_most_patient_waiter_allows() -> None:
    made = Desk()
    made.submit(workflow([operator("o", nonce=1, timeout_s=5.0)]), "r1", "ta")
    made.submit(workflow([operator("o", nonce=1, timeout_s=9.0)]), "r2", "tb")
    made.join("n1")
    assert made.only().timeout_s == 9.0


def test_a_waiter_of_higher_priority_moves_the_work_forward() -> None:
    made = Desk()
    made.submit(workflow([operator("slow", type="train.sft", params={"seed": 1})]), "r1", "tb")
    made.submit(workflow([operator("other", type="train.sft", params={"seed": 2})]), "r2", "tb")
    made.submit(workflow([operator("urgent", type="train.sft", params={"seed": 2}, priority=5)]), "r3", "tb")
    made.join("n1")
    assert made.only().items[0].params == {"seed": 2}
