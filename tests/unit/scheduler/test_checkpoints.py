"""Checkpoints in the core: whose are taken, who goes on from them, and when they are let go."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, TRAIN, content, operator, workflow

from flowmesh_mesh.messages import Checkpoint
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.checkpoints import IDLE_US, refusal


def desk(*nodes: str) -> Desk:
    made = Desk()
    made.join(*(nodes or ("n1", "n2")))
    made.submit(workflow([operator("train", **TRAIN)]))
    return made


def checkpoint(made: Desk, step: int = 10, **changed: Any) -> Checkpoint:
    """Return a checkpoint of the training that runs."""
    running = made.only()
    (item,) = running.items
    at = content(f"checkpoint {step} {item.attempt}", 1000)
    told = Checkpoint(running.node, running.id, running.epoch, item.key, item.generation, item.attempt, step, 100, at, 500)
    return replace(told, **changed)


def test_the_next_attempt_goes_on_from_the_last_checkpoint() -> None:
    made = desk()
    first = made.only()
    assert first.items[0].checkpoint is None
    for step in (10, 20):
        made.apply(e.Checkpointed(checkpoint(made, step)))
    last = checkpoint(made, 20)
    made.lose(first.node)
    given = made.only().items[0].checkpoint
    assert given is not None
    assert given.ref == last.at
    assert given.holders == (HUB,), "its node is gone"


def test_a_node_that_holds_it_is_named_beside_the_hub() -> None:
    made = desk("n1")
    made.apply(e.Checkpointed(checkpoint(made)))
    made.fail(made.only(), "crashed")
    made.wait(5, beating=["n1"])
    given = made.only().items[0].checkpoint
    assert given is not None
    assert given.holders == (HUB, "n1")


@pytest.mark.parametrize(
    "changed",
    [
        {"node": "n9"},
        {"assignment": "64-9"},
        {"attempt": 2},
        {"generation": 1},
        {"key": b"\x01" * 32},
        {"epoch": 101},
        {"epoch": 99},
        {"step": 0},
        {"step": 100},
    ],
    ids=lambda changed: str(*changed),
)
def test_a_checkpoint_of_anything_but_the_attempt_that_runs_is_refused(changed: dict[str, Any]) -> None:
    made = desk()
    assert refusal(made.state, checkpoint(made)) == ""
    assert refusal(made.state, checkpoint(made, **changed))


def test_an_attempt_that_was_taken_away_moves_no_pointer() -> None:
    made = desk()
    told = checkpoint(made)
    made.lose(made.only().node)
    assert refusal(made.state, told)


def test_a_pointer_never_goes_back() -> None:
    made = desk()
    made.apply(e.Checkpointed(checkpoint(made, 20)))
    assert refusal(made.state, checkpoint(made, 10))
    made.apply(e.Checkpointed(checkpoint(made, 10)))
    (known,) = made.state.checkpoints.values()
    assert known.made.step == 20


def test_what_remains_of_a_training_teaches_nothing_about_what_the_whole_costs() -> None:
    made = desk()
    made.apply(e.Checkpointed(checkpoint(made)))
    made.lose(made.only().node)
    before = made.state.costs.line(("train.sft", ""), "cpu")
    made.succeed(made.only())
    assert made.state.costs.line(("train.sft", ""), "cpu") == before


def test_a_checkpoint_goes_when_the_result_is_there() -> None:
    made = desk()
    told = checkpoint(made)
    made.apply(e.Checkpointed(told))
    made.succeed(made.only())
    commands = made.apply(e.Tick())
    assert made.of(commands, c.DropCheckpoint) == [c.DropCheckpoint(told.key)]
    assert not made.state.checkpoints
    assert told.at.cid not in made.state.places


def test_a_checkpoint_of_a_training_that_nobody_wants_goes_after_a_while() -> None:
    made = desk()
    told = checkpoint(made)
    made.apply(e.Checkpointed(told))
    made.apply(e.CancelRequested("ta", "r1", "somebody"))
    assert not made.of(made.apply(e.Tick()), c.DropCheckpoint)
    made.now_us += IDLE_US + SECOND
    assert made.of(made.apply(e.Tick()), c.DropCheckpoint) == [c.DropCheckpoint(told.key)]


def test_a_new_leader_goes_on_from_where_pointers_stand_and_counts_attempts_from_there() -> None:
    made = desk("n1")
    made.lose("n1")
    made.join("n2", "n3")
    assert made.only().items[0].attempt == 2
    told = checkpoint(made)
    made.assigned.clear()
    after = made.successor("n3", pointers=[told])
    (item,) = after.only().items
    assert item.checkpoint is not None
    assert item.checkpoint.ref == told.at
    assert item.attempt == 3
    assert refusal(after.state, checkpoint(after, 11)) == ""
