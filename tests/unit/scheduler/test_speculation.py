"""Second attempts beside stragglers: when, where, at what price, and what becomes of the slower one."""

from __future__ import annotations

from typing import Any

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, TRAIN, Resources, gpu, operator, workflow

from flowmesh_mesh.manifest import Metered
from flowmesh_mesh.messages import Abort, Assignment
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings

WEALTHY = Settings(speculation_share=0.5)
"""Copies that can be afforded as soon as the mesh has run for some seconds."""


def call(name: str, **fields: Any) -> Any:
    """Return an operator that runs alone in its batch."""
    return operator(name, type="python.call", params={"function": name}, **fields)


def desk(*nodes: str, settings: Settings = WEALTHY, learned_s: float = 1.0, **fields: Any) -> Desk:
    """Return a mesh that has learned what a call takes, and whose nodes have been paid for a minute."""
    made = Desk(settings=settings)
    made.join(*(nodes or ("n1", "n2")), **fields)
    made.submit(workflow([call(f"l{i}") for i in range(8)], {}), "learning")
    while made.assigned:
        assignment = next(iter(made.assigned.values()))
        made.succeed(assignment, metered=Metered(exec_us=int(learned_s * SECOND)))
    made.wait(60, beating=made.state.nodes)  # type: ignore[arg-type]
    made.commands.clear()
    return made


def alive(made: Desk) -> list[str]:
    return [n.name for n in made.state.nodes.values() if n.state != "gone"]


def wait(made: Desk, seconds: float) -> list[c.Command]:
    return made.wait(seconds, beating=alive(made))


def attempts(made: Desk) -> list[Assignment]:
    return list(made.assigned.values())


def straggle(made: Desk, *operators: Any, seconds: float = 20) -> tuple[Assignment, Assignment]:
    """Submit an operator, let it run far too long; return its first attempt and its copy."""
    made.submit(workflow(list(operators) or [call("o")], {}))
    wait(made, seconds)
    first, copy = attempts(made)
    return first, copy


def test_an_assignment_that_is_late_gets_a_second_attempt_on_another_node() -> None:
    made = desk()
    first, copy = straggle(made)
    assert copy.node != first.node
    assert [(i.key, i.attempt) for i in (*first.items, *copy.items)] == [(first.items[0].key, 1), (first.items[0].key, 2)]
    assert made.state.totals["speculated"] == 1


def test_an_assignment_that_runs_as_predicted_gets_none() -> None:
    made = desk()
    made.submit(workflow([call("o")], {}))
    wait(made, 1.5)
    assert len(made.assigned) == 1
    assert not made.state.copies.running


def test_less_than_a_second_beyond_the_prediction_is_never_late() -> None:
    made = desk(learned_s=0.01)
    made.submit(workflow([call("o")], {}))
    wait(made, 0.5)
    assert len(made.assigned) == 1, "it is fifty times as long as predicted, and half a second"
    wait(made, 4)
    assert len(made.assigned) == 2


def test_work_of_which_nothing_like_it_was_ever_measured_gets_more_time() -> None:
    made = Desk(settings=WEALTHY)
    made.join("n1", "n2")
    wait(made, 60)
    made.submit(workflow([call("o")], {}))
    wait(made, 28)
    assert len(made.assigned) == 1
    wait(made, 5)
    assert len(made.assigned) == 2


def test_an_assignment_that_waits_on_its_node_is_not_late() -> None:
    made = desk("n1", learned_s=1.0)
    made.submit(workflow([call(f"o{i}") for i in range(2)], {}))
    assert len(made.assigned) == 2
    held = [made.state.assignments[a.id] for a in attempts(made)]
    assert [bool(o.begun_us) for o in held] == [True, False]
    made.join("n2")
    wait(made, 30)
    copied = [a.items[0].name for a in attempts(made) if a.node == "n2"]
    assert copied == ["o0"], "the second has not begun"
    made.succeed(next(a for a in attempts(made) if a.id == held[0].id))
    assert held[1].begun_us == made.now_us


def test_what_waits_does_not_begin_because_something_else_that_waited_was_taken_away() -> None:
    made = desk("n1", settings=Settings(speculation_share=0.5, depth_limit={**WEALTHY.depth_limit, "user": 3}))
    made.submit(workflow([call("o0")], {}), "r0")
    made.submit(workflow([call("o1")], {}), "r1")
    made.submit(workflow([call("o2")], {}), "r2")
    held = [made.state.assignments[a.id] for a in attempts(made)]
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    assert [bool(o.begun_us) for o in held] == [True, False, False]


def test_the_first_result_wins_and_the_other_node_is_told_to_stop() -> None:
    made = desk()
    first, copy = straggle(made)
    commands = made.succeed(copy)
    assert [m.keys for m in made.told(commands, first.node) if isinstance(m, Abort)] == [(first.items[0].key,)]
    assert made.end().reason == "succeeded"
    assert made.records()[-1].attempt == 2
    assert made.state.totals["speculation_won"] == 1
    assert not made.assigned


def test_the_original_may_win_as_well() -> None:
    made = desk()
    first, copy = straggle(made)
    commands = made.succeed(first)
    assert any(isinstance(m, Abort) for m in made.told(commands, copy.node))
    assert made.end().reason == "succeeded"
    assert (made.state.totals["speculated"], made.state.totals["speculation_won"]) == (1, 0)
    assert made.vertex("o").node == first.node


def test_the_slower_result_is_ignored_when_it_comes_after_all() -> None:
    made = desk()
    first, copy = straggle(made)
    made.succeed(copy, "same")
    made.assigned[first.id] = first
    made.succeed(first, "other")
    assert len([r for r in made.records() if r.attempt == 2]) == 1
    assert len(made.ledger) == 9
    assert not made.state.assignments


def test_what_has_effects_is_never_copied() -> None:
    made = desk()
    made.submit(workflow([call("o", determinism="effect")], {}))
    wait(made, 60)
    assert len(made.assigned) == 1


def test_only_what_is_still_open_of_a_batch_is_copied() -> None:
    made = desk()
    made.submit(workflow([operator(f"o{i}", nonce=i) for i in range(4)], {}))
    first = made.only()
    made.report(first, [made.outcome(item, "flow.noop") for item in first.items[:3]], last=False)
    wait(made, 35)
    _, copy = attempts(made)
    assert [item.name for item in copy.items] == ["o3"]


def test_an_operator_is_copied_once_and_not_again() -> None:
    made = desk("n1", "n2", "n3")
    _, copy = straggle(made)
    made.fail(copy, "crashed")
    wait(made, 200)
    assert [a.node for a in attempts(made)] != [copy.node]
    assert len(made.assigned) == 1
    assert made.state.totals["speculated"] == 1


def test_without_a_free_node_nothing_is_copied() -> None:
    made = desk("n1")
    made.submit(workflow([call("o")], {}))
    wait(made, 60)
    assert len(made.assigned) == 1


def test_a_node_that_avoids_or_cannot_run_the_work_is_no_place_for_a_copy() -> None:
    made = desk("n1")
    made.join("n2", types=("flow.noop",))
    made.submit(workflow([call("o")], {}))
    wait(made, 60)
    assert len(made.assigned) == 1


def test_a_crash_of_the_copy_leaves_the_original_running_and_costs_no_attempt() -> None:
    made = desk()
    first, copy = straggle(made)
    made.fail(copy, "crashed")
    assert [a.id for a in attempts(made)] == [first.id]
    assert next(iter(made.state.works.values())).failures == 0
    made.succeed(first)
    assert made.end().reason == "succeeded"


def test_a_crash_of_the_original_leaves_the_copy_running() -> None:
    made = desk()
    first, copy = straggle(made)
    made.fail(first, "crashed")
    assert [a.id for a in attempts(made)] == [copy.id]
    made.succeed(copy)
    assert made.end().reason == "succeeded"


def test_an_error_of_the_author_ends_both() -> None:
    made = desk()
    first, copy = straggle(made)
    commands = made.fail(copy, "user-error")
    assert any(isinstance(m, Abort) for m in made.told(commands, first.node))
    assert made.end().reason == "user-error"


def test_the_loss_of_either_node_leaves_the_other_attempt_running() -> None:
    for loses_copy in (False, True):
        made = desk()
        first, copy = straggle(made)
        lost, kept = (copy, first) if loses_copy else (first, copy)
        made.lose(lost.node)
        assert [a.id for a in attempts(made)] == [kept.id]
        made.succeed(kept)
        assert made.end().reason == "succeeded"


def test_cancelling_the_run_stops_both() -> None:
    made = desk()
    first, copy = straggle(made)
    commands = made.apply(e.CancelRequested("ta", "r1", "alice"))
    for node in (first.node, copy.node):
        assert any(isinstance(m, Abort) for m in made.told(commands, node))
    assert made.end().counts == {"cancelled": 1}


def test_a_new_leader_lets_the_original_go_on_and_still_takes_the_result_of_the_copy() -> None:
    made = desk()
    first, copy = straggle(made)
    after = made.successor(*made.state.nodes)
    assert list(after.assigned) == [first.id]
    after.report(copy, [after.outcome(item, copy.type) for item in copy.items])
    assert after.end().reason == "succeeded"


# --- money


def test_copies_cost_no_more_than_their_share_of_what_the_nodes_cost() -> None:
    made = desk(settings=Settings(speculation_share=0.01))
    made.submit(workflow([call("o")], {}))
    wait(made, 20)
    assert made.state.totals["speculated"] == 0, "160 node-seconds allow for 1.6 seconds of a copy"
    wait(made, 400)
    assert made.state.totals["speculated"] == 1
    assert made.state.copies.spent_usd() <= 0.01 * made.state.copies.rent_usd()


def test_without_a_share_there_are_no_copies_and_nothing_is_watched() -> None:
    made = desk(settings=Settings(speculation_share=0.0))
    made.submit(workflow([call("o")], {}))
    wait(made, 60)
    assert len(made.assigned) == 1
    assert not made.state.copies.due


def test_a_copy_that_becomes_too_dear_is_stopped_and_the_original_goes_on() -> None:
    made = desk(settings=Settings(speculation_share=0.1))
    first, copy = straggle(made, seconds=8)
    commands = wait(made, 60)
    stopped = [m.reason for m in made.told(commands, copy.node) if isinstance(m, Abort)]
    assert stopped == ["the copy has become too dear"]
    assert [a.id for a in attempts(made)] == [first.id]
    assert made.state.copies.spent_usd() <= 0.1 * made.state.copies.rent_usd()


def test_what_a_copy_did_not_use_is_given_back() -> None:
    made = desk()
    _, copy = straggle(made)
    begun_us = next(iter(made.state.copies.running.values())).begun_us
    made.succeed(copy)
    wait(made, 0.5)
    used_s = (made.now_us - begun_us) / SECOND
    assert abs(made.state.copies.total_usd - used_s * 0.5 / 3600) < 1e-9


def test_the_dearer_node_gets_no_copy_that_another_could_have() -> None:
    made = desk("n1")
    made.join("n2", price_per_hour=9.0)
    made.join("n3", price_per_hour=0.5)
    wait(made, 60)
    made.submit(workflow([call("o")], {}))
    first = made.only()
    assert first.node != "n2"
    wait(made, 20)
    assert {a.node for a in attempts(made)} == {"n1", "n3"}


# --- training


def test_training_is_copied_only_when_the_rest_is_expected_to_take_clearly_longer_than_the_copy() -> None:
    made = Desk(settings=WEALTHY)
    made.join("n1", "n2", devices=(gpu(),))
    lessons = [operator(f"l{i}", **{**TRAIN, "params": {"seed": 10 + i}}, resources=Resources(gpus=1)) for i in range(6)]
    made.submit(workflow(lessons, {}), "learning")
    while made.assigned:
        made.succeed(next(iter(made.assigned.values())), metered=Metered(exec_us=20 * SECOND))
    wait(made, 600)
    made.submit(workflow([operator("o", **TRAIN, resources=Resources(gpus=1))], {}))
    late_s = predicted_s = made.state.assignments[made.only().id].predicted_s
    while len(made.assigned) == 1 and late_s < 40 * predicted_s:
        wait(made, 1)
        late_s += 1
    elapsed_s = late_s - predicted_s
    assert len(made.assigned) == 2
    assert elapsed_s - predicted_s > 1.5 * predicted_s


# --- growth


def test_what_is_not_late_is_not_looked_at() -> None:
    made = Desk(settings=WEALTHY, checks_every=1 << 60)
    made.join(*(f"n{i}" for i in range(40)))
    made.submit(workflow([operator(f"o{i}", nonce=i) for i in range(3000)], {}))
    looked: list[str] = []

    class Watched(dict):  # type: ignore[type-arg]
        def get(self, key: str, default: Any = None) -> Any:
            looked.append(key)
            return super().get(key, default)

    watched = len(made.state.copies.due)
    assert watched > 10
    made.state.assignments = Watched(made.state.assignments)
    made.apply(e.Tick())
    assert not looked
