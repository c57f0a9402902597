"""Runs that come back after the take-over, runs that are given up, operators that were adrift."""

from __future__ import annotations

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import chain, manifest_cid

from flowmesh_mesh.manifest import Acceptance, Manifest
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.reinstating import adrift


def desk(*nodes: str) -> Desk:
    made = Desk()
    for node in nodes:
        made.join(node)
    return made


def back(manifest: Manifest, run: str = "back", cancelled_by: str = "") -> e.Reinstated:
    acceptance = Acceptance("ta", run, manifest_cid(manifest), 1, name=manifest.name)
    return e.Reinstated([e.RecoveredRun(acceptance, manifest, cancelled_by)])


def test_a_run_that_comes_back_is_planned_and_ends_like_any_other() -> None:
    made = desk("n1")
    made.apply(back(chain(2)))
    assert not made.of(made.commands, c.Accept)  # the ledger shows its acceptance already
    made.work_off()
    assert made.ended["ta", "back"].reason == "succeeded"


def test_a_run_that_is_known_or_has_ended_does_not_begin_anew() -> None:
    made = desk("n1")
    made.apply(back(chain(2)))
    first = made.state.runs["ta", "back"]
    assert made.apply(back(chain(2))) == []
    assert made.state.runs["ta", "back"] is first
    made.work_off()
    assert made.apply(back(chain(2))) == []


def test_results_that_the_ledger_has_are_not_computed_again_for_a_run_that_comes_back() -> None:
    made = desk("n1")
    made.submit(chain(3))
    made.work_off()
    count = len(made.ledger)
    commands = made.apply(back(chain(3)))
    assert not made.of(commands, c.Assign)
    assert made.ended["ta", "back"].reason == "succeeded"
    assert len(made.ledger) == count


def test_two_runs_that_come_back_together_both_begin() -> None:
    made = desk("n1")
    made.apply(e.Reinstated([*back(chain(1), "one").runs, *back(chain(2), "two").runs]))
    made.work_off()
    assert {run for (_, run), end in made.ended.items() if end.reason == "succeeded"} == {"one", "two"}


def test_a_run_that_was_cancelled_comes_back_cancelled() -> None:
    made = desk("n1")
    commands = made.apply(back(chain(2), cancelled_by="team-a"))
    assert not made.of(commands, c.Assign)
    assert (made.ended["ta", "back"].reason, made.ended["ta", "back"].actor) == ("cancelled", "team-a")


def test_a_run_that_is_given_up_ends_once_with_a_reason_and_what_is_gone() -> None:
    made = desk("n1")
    acceptance = Acceptance("ta", "gone", manifest_cid(chain(1)), 1)
    commands = made.apply(e.GivenUp(acceptance, "its manifest is gone"))
    (end,) = made.of(commands, c.EndRun)
    assert (end.state, end.end.reason, end.end.actor, end.end.detail) == (
        "failed",
        "input-missing",
        "audit",
        "its manifest is gone",
    )
    assert made.apply(e.GivenUp(acceptance, "again")) == []
    assert made.apply(back(chain(1), "gone")) == []


def test_an_operator_that_is_adrift_finds_its_way_again_and_others_stay() -> None:
    made = desk("n1")
    made.submit(chain(2))
    (run,) = made.state.runs.values()
    lost, running = run.vertices[1], made.only()
    lost.waits_for = 5
    assert adrift(made.state, lost)
    assert not adrift(made.state, run.vertices[0])
    made.apply(e.Replanned(run.tenant, run.id, [0, 1, 7]))
    assert not adrift(made.state, lost)
    assert made.only() is running
    made.work_off()
    assert made.end().reason == "succeeded"
