"""Nodes that vanish, inputs that are gone, reports that come late, twice, or from the wrong hand."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, Source, chain, content, fan, node_record, operator, result_of, workflow

from flowmesh_mesh.manifest import ResultManifest, encode_record, record_cid
from flowmesh_mesh.messages import Abort, Commit, Outcome
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings

TRAIN: dict[str, Any] = {"type": "train.sft", "params": {"seed": 1}}


def desk(*nodes: str, **fields: Any) -> Desk:
    made = Desk(**fields)
    made.join(*(nodes or ("n1", "n2")))
    return made


def told(made: Desk, commands: list[c.Command], node: str) -> list[Commit | Abort]:
    return [x.message for x in made.of(commands, c.Tell) if x.node == node]


# --- nodes


def test_work_of_a_killed_node_runs_elsewhere() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    commands = made.lose(first.node)
    assert [x.assignment for x in made.of(commands, c.Release)] == [first.id]
    assert made.only().node != first.node
    assert made.only().items[0].attempt == 2
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_a_lost_node_is_avoided_after_it_has_come_back() -> None:
    made = desk("n1")
    made.submit(chain(1))
    made.lose("n1")
    made.join("n2", "n1", started_at_us=2)
    assert made.only().node == "n2"


def test_the_only_node_is_used_again_although_it_was_lost_before() -> None:
    made = desk("n1")
    made.submit(chain(1))
    made.lose("n1")
    assert not made.assigned
    made.join("n1", started_at_us=2)
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_cheap_work_of_a_suspected_node_runs_elsewhere_soon_and_dear_work_after_its_lease() -> None:
    made = desk()
    made.submit(workflow([operator("cheap", nonce=1), operator("dear", **TRAIN)]))
    suspect = made.named("dear").node
    if made.named("cheap").node != suspect:
        made.succeed(made.named("cheap"))
        made.submit(chain(1, 5), "r2")
    other = next(n for n in ("n1", "n2") if n != suspect)
    made.apply(e.NodeDisconnected(suspect))
    made.wait(0.5, beating=[other])
    assert all(a.node == other for a in made.assigned.values() if a.type == "flow.noop")
    assert made.named("dear").node == suspect
    made.wait(5, beating=[other])
    assert made.named("dear").node == other


def test_a_beat_ends_the_suspicion() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    made.apply(e.NodeDisconnected(first.node))
    made.beat(first.node)
    made.wait(1, beating=["n1", "n2"])
    assert made.only() is first


def test_an_operator_that_takes_three_nodes_with_it_is_poison() -> None:
    made = desk("n1", "n2", "n3", "n4")
    made.submit(chain(1))
    for _ in range(3):
        made.lose(made.only().node)
    assert made.end().reason == "poison"
    assert not made.assigned


def test_an_operator_that_kills_its_node_and_its_inputs_with_it_is_poison() -> None:
    """The killed node held the input, which is computed again: the count of lost nodes must outlive that."""
    made = desk("n1", "n2", "n3", "n4", "n5")
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    for _ in range(3):
        killer = made.named("o1")
        made.forget(content("x"))
        made.lose(killer.node)
        if not made.assigned:
            break
        made.succeed(made.named("o0"), "x")
    assert made.end().reason == "poison"


def test_an_agent_that_crashes_and_starts_again_counts_as_a_lost_node() -> None:
    made = desk("n1")
    made.submit(chain(1))
    for start in (2, 3, 4):
        made.join_as(node_record("n1", started_at_us=start))
    assert made.end().reason == "poison"


def test_a_node_that_leaves_in_good_order_is_not_held_against_the_operator() -> None:
    made = desk("n1")
    made.submit(chain(1))
    for start in (2, 3, 4, 5):
        made.join_as(node_record("n1", started_at_us=start - 1, state="left"))
        made.join_as(node_record("n1", started_at_us=start))
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_the_last_beat_of_a_node_that_has_left_does_not_bring_it_back() -> None:
    made = desk(keeps=False)
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    holder = made.vertex("o0").node
    made.join_as(node_record(holder, state="left"))
    made.beat(holder, [], state="left")
    assert made.state.holders(content("x").cid) == []


def test_the_record_of_an_earlier_life_does_not_displace_a_node() -> None:
    made = Desk()
    made.join_as(node_record("n1", started_at_us=7))
    made.submit(chain(1))
    made.join_as(node_record("n1", started_at_us=3, state="left"))
    made.join_as(node_record("n1", started_at_us=3))
    assert made.state.nodes["n1"].record.started_at_us == 7
    assert made.only().items[0].attempt == 1


def test_a_draining_node_keeps_what_it_has_and_gets_nothing_new() -> None:
    made = desk("n1")
    made.submit(chain(2))
    made.beat("n1", state="draining")
    made.succeed(made.only())
    assert not made.assigned
    made.join("n2")
    assert made.only().node == "n2"


def test_an_assignment_that_its_node_has_forgotten_runs_again_after_a_lease() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    for _ in range(30):
        made.now_us += SECOND // 2
        made.beat(first.node, [])
        made.beat(next(n for n in ("n1", "n2") if n != first.node))
    assert made.only().node != first.node


def test_a_node_is_told_to_drop_an_assignment_that_is_not_known() -> None:
    made = desk("n1")
    commands = made.beat("n1", ["64-77", "64-78"])
    assert [(m.assignment, m.closed) for m in told(made, commands, "n1") if isinstance(m, Commit)] == [
        ("64-77", True),
        ("64-78", True),
    ]


def test_nothing_is_lost_or_begun_while_the_leader_is_cut_off() -> None:
    made = desk()
    made.submit(chain(2))
    made.apply(e.NodeDisconnected(made.only().node), e.CutOff())
    made.wait(20)
    first = made.only()
    assert first.items[0].attempt == 1
    made.succeed(first)
    assert not made.assigned
    made.apply(e.Restored())
    made.wait(0.2)
    assert made.is_assigned("o1")


def test_suspicion_starts_anew_when_the_leader_is_back() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    made.apply(e.NodeDisconnected(first.node), e.CutOff())
    made.wait(3)
    made.apply(e.Restored())
    made.now_us += SECOND // 10
    made.apply(e.Tick())
    assert made.only() is first


# --- reports


def test_a_late_success_of_a_lost_node_is_accepted_once() -> None:
    made = desk()
    made.submit(chain(1))
    late = made.only()
    made.lose(late.node)
    second = made.only()
    made.beat(late.node, [late.id])
    assert made.only() is second, "what runs elsewhere was given back"
    commands = made.succeed(late)
    assert [m for m in told(made, commands, second.node) if isinstance(m, Abort)]
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
    assert not told(made, commands, "n1"), "the node was told to drop what is not in the ledger yet"
    closing = told(made, made.commit(), "n1")
    assert [(m.assignment, m.closed, len(m.results)) for m in closing if isinstance(m, Commit)] == [(late.id, True, 1)]


def test_a_node_that_was_silent_goes_on_with_what_nobody_else_runs() -> None:
    made = desk("n1")
    made.submit(workflow([operator("t", **TRAIN)]))
    running = made.only()
    for _ in range(4):
        made.lose("n1")
        commands = made.beat("n1", [running.id])
        assert not told(made, commands, "n1")
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


def test_a_node_is_told_to_drop_what_somebody_else_has_finished() -> None:
    made = desk()
    made.submit(chain(1))
    slow = made.only()
    made.lose(slow.node)
    made.succeed(made.only())
    commands = made.beat(slow.node, [slow.id])
    assert [(m.assignment, m.closed) for m in told(made, commands, slow.node) if isinstance(m, Commit)] == [(slow.id, True)]


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
    (message,) = told(made, commands, "n1")
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


# --- inputs


def lose_input(made: Desk, consumer: str, *labels: str) -> None:
    """Let a consumer report inputs that nobody holds any more."""
    made.forget(*(content(label) for label in labels))
    made.answer(consumer, reason="input-missing", missing=tuple(content(label).cid for label in labels))


def test_a_lost_input_is_made_again_by_its_producer() -> None:
    made = desk("n1")
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    lose_input(made, "o1", "x")
    assert made.states() == {"o0": "assigned", "o1": "waiting"}
    assert made.only().items[0].generation == 1
    made.succeed(made.only(), "x")
    made.succeed(made.named("o1"))
    assert made.end().reason == "succeeded"
    assert len(made.ledger) == 2, "an equal result was published again"


def test_an_input_that_is_still_held_elsewhere_is_not_made_again() -> None:
    made = desk("n1", "n2")
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    made.held[content("x").cid] = {"n2"}
    made.fail(made.named("o1"), "input-missing", missing=(content("x").cid,))
    item = made.named("o1").items[0]
    assert [located.holders for refs in item.inputs.values() for located in refs] == [("n2",)]


def test_inputs_lost_over_several_levels_are_made_again_from_the_first() -> None:
    made = desk("n1")
    made.submit(chain(4))
    for name in ("o0", "o1", "o2"):
        made.succeed(made.named(name), f"x {name}")
    made.forget(content("x o0"), content("x o1"), content("x o2"))
    for name in ("o3", "o2", "o1"):
        made.run(made.named(name))
    assert made.states() == {"o0": "assigned", "o1": "waiting", "o2": "waiting", "o3": "waiting"}
    for name in ("o0", "o1", "o2"):
        made.succeed(made.named(name), f"x {name}")
    made.work_off()
    assert made.end().reason == "succeeded"
    assert len(made.ledger) == 4


def test_two_consumers_of_a_lost_input_wait_for_one_producer() -> None:
    made = desk("n1", locates=False)
    made.submit(workflow([operator("p", nonce=1), operator("c", nonce=2, after=[0]), operator("d", nonce=3, after=[0])], {}))
    made.succeed(made.only(), "x")
    lose_input(made, "c", "x")
    lose_input(made, "d", "x")
    root = content("x").cid
    made.apply(e.Located({root: []}))
    assert made.states() == {"p": "ready", "c": "waiting", "d": "waiting"}
    made.apply(e.Located({root: []}))
    made.succeed(made.only(), "x")
    made.work_off()
    assert made.end().reason == "succeeded"


def test_a_producer_waits_for_its_own_lost_inputs() -> None:
    """g feeds p and d, p feeds c; what g and p made is lost at once, and d notices first."""
    made = desk("n1")
    flow = [operator("g", nonce=1), operator("p", nonce=2, after=[0]), operator("d", nonce=3, after=[0])]
    made.submit(workflow([*flow, operator("c", after=[1])], {"d": 2, "c": 3}))
    made.answer("g", "g")
    made.answer("p", "p")
    lose_input(made, "d", "g")
    lose_input(made, "c", "p")
    assert made.states() == {"g": "assigned", "p": "waiting", "d": "waiting", "c": "waiting"}
    made.answer("g", "g")
    made.answer("p", "p")
    made.work_off()
    assert made.end().reason == "succeeded"
    assert len(made.ledger) == 4


def test_only_the_run_whose_content_is_gone_fails() -> None:
    """Two tenants wait for one operator; one has its input from an operator that can run again, the other had given it."""
    made = desk("n1")
    given = content("x")
    made.submit(workflow([operator("p", nonce=1), operator("c", nonce=2, after=[0])]), "r1", "ta")
    made.succeed(made.only(), "x")
    made.submit(workflow([operator("c", nonce=2, after=[given])]), "r2", "tb")
    assert made.vertex("c").work is made.vertex("c", "r2", "tb").work
    lose_input(made, "c", "x")
    assert made.end("r2", "tb").reason == "input-missing"
    assert made.states() == {"p": "assigned", "c": "waiting"}
    made.succeed(made.only(), "x")
    made.work_off()
    assert made.end("r1", "ta").reason == "succeeded"


def test_a_given_input_that_nobody_holds_ends_the_run_with_that_reason() -> None:
    made = desk("n1")
    made.submit(workflow([operator("o", nonce=1, after=[content("given")]), operator("after", after=[0])]))
    lose_input(made, "o", "given")
    assert made.end().reason == "input-missing"
    assert made.states() == {"o": "failed", "after": "skipped"}


def test_code_that_nobody_holds_ends_the_run_with_that_reason() -> None:
    made = desk("n1")
    made.submit(workflow([operator("o", type="python.call", params={"function": "f"}, code=content("code"))]))
    lose_input(made, "o", "code")
    assert made.end().reason == "input-missing"


def test_one_of_several_inputs_is_made_again_alone() -> None:
    made = desk("n1")
    made.submit(workflow([operator("p", nonce=1), operator("q", nonce=2), operator("c", after=[0, 1])]))
    assignment = made.only()
    made.report(assignment, [made.outcome(i, "flow.noop", f"x {i.name}") for i in assignment.items])
    lose_input(made, "c", "x q")
    assert made.states() == {"p": "done", "q": "assigned", "c": "waiting"}
    made.succeed(made.only(), "x q")
    made.work_off()
    assert made.end().reason == "succeeded"


def test_a_lost_part_of_a_split_is_made_again_with_the_others() -> None:
    made = desk("n1")
    flow = [
        operator("s", type="data.split", params={"parts": 2}, after=[content("table")]),
        *(operator(f"c{i}", nonce=i, after=[Source(op=0, port="parts", item=i)]) for i in range(2)),
    ]
    made.submit(workflow(flow, {"a": 1, "b": 2}))
    outputs, result = result_of("data.split", "x", 2)
    made.report(made.only(), [Outcome(made.only().items[0].key, 0, 1, "succeeded", result, outputs)])
    made.answer("c0")
    lose_input(made, "c1", "x#1")
    again = made.only()
    assert [(item.name, item.generation) for item in again.items] == [("s", 1)]
    made.report(again, [Outcome(again.items[0].key, 1, again.items[0].attempt, "succeeded", result, outputs)])
    made.work_off()
    assert made.end().reason == "succeeded"


def test_an_input_that_is_lost_while_its_record_is_being_written_is_made_again() -> None:
    made = desk("n1", commits=False)
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    lose_input(made, "o1", "x")
    made.commit()
    made.succeed(made.named("o0"), "x")
    made.commit()
    made.succeed(made.named("o1"))
    made.commit()
    assert made.end().reason == "succeeded"


def test_a_consumer_whose_producer_has_failed_on_its_second_run_is_skipped() -> None:
    """c lost the input, its producer ran again and failed; d notices the loss only then."""
    made = desk("n1")
    made.submit(workflow([operator("p", nonce=1), operator("c", nonce=2, after=[0]), operator("d", nonce=3, after=[0])], {}))
    made.succeed(made.only(), "x")
    lose_input(made, "c", "x")
    made.answer("p", reason="user-error")
    assert made.states() == {"p": "failed", "c": "skipped", "d": "assigned"}
    lose_input(made, "d", "x")
    assert made.states() == {"p": "failed", "c": "skipped", "d": "skipped"}
    assert made.end().reason == "user-error"


def test_a_node_that_never_has_what_it_reports_does_not_keep_the_mesh_busy_for_ever() -> None:
    made = desk("n1")
    made.submit(chain(2))
    for _ in range(200):
        if not made.assigned:
            break
        if made.is_assigned("o0"):
            made.succeed(made.named("o0"), "x")
        else:
            lose_input(made, "o1", "x")
    assert made.end().reason == "input-missing"


def test_a_result_that_was_lost_is_made_by_another_node() -> None:
    made = desk("n1", "n2")
    made.submit(chain(2))
    first = made.only()
    made.succeed(first, "x")
    lose_input(made, "o1", "x")
    assert made.named("o0").node != first.node


def test_an_output_that_the_hub_cannot_fetch_is_made_again() -> None:
    made = desk("n1", keeps=False)
    made.submit(chain(1))
    commands = made.succeed(made.only(), "x")
    assert [dict(k.roots) for k in made.of(commands, c.Keep)] == [{content("x").cid: ["n1"]}]
    made.forget(content("x"))
    made.apply(e.Kept("ta", "r1", [content("x").cid]))
    assert made.states() == {"o0": "assigned"}
    made.succeed(made.only(), "x")
    made.apply(e.Kept("ta", "r1"))
    assert made.end().reason == "succeeded"


def test_an_output_that_can_never_be_fetched_ends_the_run() -> None:
    made = desk("n1", keeps=False)
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    for _ in range(100):
        if ("ta", "r1") in made.ended:
            break
        made.apply(e.Kept("ta", "r1", [content("x").cid]))
        if made.assigned:
            made.succeed(made.only(), "x")
    assert made.end().reason == "input-missing"


def test_what_the_hub_has_fetched_is_held_by_the_hub() -> None:
    made = desk("n1")
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    assert "hub" in made.state.holders(content("x").cid)


def test_the_limit_on_lost_nodes_is_a_setting() -> None:
    made = Desk(Settings(nodes_lost_limit=1))
    made.join("n1", "n2")
    made.submit(chain(1))
    made.lose(made.only().node)
    assert made.end().reason == "poison"


def test_what_is_being_asked_about_is_not_taken_for_lost() -> None:
    """c waits to hear of x while d's node misses the given content: nobody has said yet that nobody holds that."""
    made = desk("n1", locates=False)
    given = content("given")
    flow = [operator("p", nonce=1), operator("c", nonce=2, after=[0, given]), operator("d", nonce=3, after=[given])]
    made.submit(workflow(flow, {}))
    made.answer("p", "x")
    made.answer("c", reason="input-missing", missing=(content("x").cid,))
    made.answer("d", reason="input-missing", missing=(given.cid,))
    made.apply(e.Located({content("x").cid: ["n1"]}))
    assert made.states() == {"p": "done", "c": "ready", "d": "ready"}
    made.apply(e.Located({given.cid: ["hub"]}))
    made.work_off()
    assert made.end().reason == "succeeded"


def test_a_vertex_whose_last_source_comes_while_another_is_lost_goes_on_waiting() -> None:
    """One answer tells both: what q made is held, what p made is not; c needs both, d only p's."""
    made = desk("n1")
    made.submit(workflow([operator("q", nonce=5)]), "r0")
    made.work_off()
    q = made.vertex("q", "r0").outputs
    assert q is not None
    made.locates = False
    flow = [operator("p", nonce=1), operator("q", nonce=5), operator("d", nonce=2, after=[0]), operator("c", after=[0, 1])]
    made.submit(workflow(flow, {}))
    made.answer("p", "x")
    made.answer("d", reason="input-missing", missing=(content("x").cid,))
    made.apply(e.Located({q["out"][0].cid: ["hub"], content("x").cid: []}))
    assert made.states() == {"p": "ready", "q": "done", "d": "waiting", "c": "waiting"}
    made.apply(e.Located({content("x").cid: []}))
    made.work_off()
    assert made.end().reason == "succeeded"


def test_an_input_that_cannot_be_fetched_is_sought_again_after_pauses_that_grow() -> None:
    made = desk("n1")
    made.submit(chain(2))
    made.answer("o0", "x")
    pauses = []
    for _ in range(5):
        made.answer("o1", reason="input-missing", missing=(content("x").cid,))
        begun_us = made.now_us
        while not made.assigned:
            made.wait(0.1, beating=["n1"])
        pauses.append((made.now_us - begun_us) / SECOND)
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert 3 < sum(pauses) < 30
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_a_poisonous_operator_is_found_out_although_its_input_never_comes_out_the_same() -> None:
    made = desk("n1", "n2", "n3", "n4", "n5")
    made.submit(chain(2))
    for number in range(3):
        if not made.is_assigned("o0"):
            break
        made.answer("o0", f"x{number}")
        killer = made.named("o1")
        made.forget(content(f"x{number}"))
        made.lose(killer.node)
    assert made.end().reason == "poison"


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
