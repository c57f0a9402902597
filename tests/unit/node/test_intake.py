"""Assignments that a node hears of before they are stored: begun once, acknowledged when the stored copy comes."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from flowmesh_mesh.bus import Delivery as Message
from flowmesh_mesh.messages import Assignment, Commit, Item, encode
from flowmesh_node.held import Held, Reply
from flowmesh_node.intake import Intake


class Epochs:
    """Epochs in memory."""

    is_written = True

    def __init__(self) -> None:
        self.highest = 0

    def is_stale(self, epoch: int) -> bool:
        return epoch < self.highest

    def see(self, epoch: int) -> bool:
        grew, self.highest = epoch > self.highest, max(epoch, self.highest)
        return grew

    async def write(self) -> None:
        return None


class Delivery:
    """Sends nothing; remembers what was settled."""

    def __init__(self) -> None:
        self.settled: list[str] = []

    def is_complete(self, assignment: str) -> bool:
        return assignment == "answered"

    def settle(self, assignment: str) -> None:
        self.settled.append(assignment)


class Inline:
    """Counts what it is asked to run."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run_known(self, held: Held, reply: Reply) -> bool:
        self.ran.append(held.assignment.id)
        return True


class Inputs:
    """Everything is here."""

    def lacks(self, wanted: object) -> dict[bytes, Any]:
        return {}


class Stored:
    """A stored copy of an assignment that notes its acknowledgement."""

    def __init__(self, assignment: Assignment) -> None:
        self.data = encode(assignment)
        self.is_acked = self.is_refused = False

    def post_ack(self) -> None:
        self.is_acked = True

    async def term(self) -> None:
        self.is_refused = True


@pytest.fixture
def intake() -> Intake:
    parts = (Epochs(), Delivery(), Inline(), Inputs(), None, lambda: None)
    return Intake("n", ("flow.noop",), *cast(Any, parts))


def assignment(epoch: int = 5, name: str = "a", life: int = 0) -> Assignment:
    return Assignment(epoch, name, "n", "flow.noop", 1, "flow.noop@1", (Item(b"k" * 32, 0, 1, {"nonce": 1}, {}),), life=life)


def receive(intake: Intake, copy: Stored) -> None:
    intake.receive(cast(Message, copy))


def ran(intake: Intake) -> list[str]:
    return cast(Inline, intake.inline).ran


async def test_an_assignment_that_is_heard_and_then_delivered_runs_once(intake: Intake) -> None:
    copy = Stored(assignment())
    intake.hear(assignment())
    receive(intake, copy)
    assert ran(intake) == ["a"]
    assert not copy.is_acked
    intake.commit(Commit(5, "a"))
    assert copy.is_acked


async def test_a_stored_copy_that_comes_after_the_close_is_acknowledged_and_not_run(intake: Intake) -> None:
    copy = Stored(assignment())
    intake.hear(assignment())
    intake.commit(Commit(5, "a"))
    receive(intake, copy)
    assert ran(intake) == ["a"]
    assert copy.is_acked


async def test_an_assignment_of_a_deposed_leader_is_not_begun(intake: Intake) -> None:
    intake.hear(assignment(epoch=7, name="new"))
    intake.hear(assignment(epoch=6, name="old"))
    assert ran(intake) == ["new"]


async def test_what_was_given_to_an_earlier_start_of_the_node_is_refused(intake: Intake) -> None:
    intake.life = 2
    copy = Stored(assignment(name="old", life=1))
    receive(intake, copy)
    intake.hear(assignment(name="heard", life=1))
    intake.hear(assignment(name="new", life=2))
    await asyncio.sleep(0)
    assert ran(intake) == ["new"]
    assert copy.is_refused


async def test_what_an_earlier_start_has_answered_is_held_until_the_leader_settles_it(intake: Intake) -> None:
    intake.life = 2
    receive(intake, Stored(assignment(name="answered", life=1)))
    assert intake.held["answered"].state == "answered"
    assert ran(intake) == []


async def test_a_node_tells_what_waits_from_what_runs(intake: Intake) -> None:
    for place, state in enumerate(("accepted", "fetching", "queued", "running", "answered")):
        intake.held[state] = Held(assignment(name=str(place)), None, state)
    assert (intake.busy, intake.queued) == (4, 3)


async def test_a_node_that_drains_begins_nothing(intake: Intake) -> None:
    intake.is_draining = True
    intake.hear(assignment())
    assert ran(intake) == []
