"""What the core learns from reports: whole batches that went well, once, against what was expected of them."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import content, operator, workflow

from flowmesh_mesh.manifest import Metered
from flowmesh_mesh.messages import Assignment
from flowmesh_scheduler.core.settings import Settings

EXEC_US = 10_000
METERED = Metered(exec_us=EXEC_US, load_us=500_000, fetch_us=100_000, bytes_fetched=1_000_000)


def desk(count: int = 4, kind: str = "data.sql", **fields: Any) -> Desk:
    """Return a desk with one node and one batch of ``count`` operators on it."""
    floor = {"inline": 64, "data": count, "engine": 1, "train": 1, "user": 1}
    made = Desk(Settings(batch_floor=floor, quick_batch_s=1e9))
    made.join("n1")
    operators = [operator(f"o{n}", type=kind, params={"query": f"SELECT {n}"}, after=(content(f"c{n}"),)) for n in range(count)]
    made.submit(workflow(operators), **fields)
    return made


def rows(made: Desk) -> list[dict[str, Any]]:
    return made.state.costs.rows()


def report(made: Desk, assignment: Assignment, indices: range, *, last: bool) -> None:
    outcomes = [made.outcome(assignment.items[n], assignment.type, metered=METERED) for n in indices]
    made.report(assignment, outcomes, last=last)


def test_a_batch_is_one_sample_of_the_sum_of_its_items() -> None:
    made = desk()
    assignment = made.only()
    assert len(assignment.items) == 4
    made.succeed(assignment, metered=METERED)
    (row,) = rows(made)
    assert (row["type"], row["samples"]) == ("data.sql", 1)
    assert row["measured_s"] == pytest.approx(4 * EXEC_US / 1e6)
    assert made.state.costs.bandwidth("n1") == pytest.approx(4e6 / 0.398, rel=0.01)


def test_parts_of_a_report_and_parts_that_come_twice_are_one_sample() -> None:
    made = desk()
    assignment = made.only()
    report(made, assignment, range(2), last=False)
    report(made, assignment, range(2), last=False)
    assert rows(made) == []
    report(made, assignment, range(2, 4), last=True)
    report(made, assignment, range(4), last=True)
    (row,) = rows(made)
    assert (row["samples"], row["measured_s"]) == (1, pytest.approx(4 * EXEC_US / 1e6))


def test_a_batch_with_a_failure_is_not_learned_from() -> None:
    made = desk()
    assignment = made.only()
    outcomes = [made.outcome(item, assignment.type, metered=METERED) for item in assignment.items[1:]]
    made.report(assignment, [made.outcome(assignment.items[0], assignment.type, reason="user-error"), *outcomes])
    assert rows(made) == []


def test_a_batch_of_which_something_was_taken_away_is_not_learned_from() -> None:
    made = desk()
    assignment = made.only()
    report(made, assignment, range(1), last=False)
    made.apply(*_cancel())
    report(made, assignment, range(1, 4), last=True)
    assert rows(made) == []


def _cancel() -> list[Any]:
    from flowmesh_scheduler.core.events import CancelRequested

    return [CancelRequested("ta", "r1", "somebody")]


def test_what_was_expected_is_what_was_known_when_the_batch_was_given_out() -> None:
    made = desk()
    assignment = made.only()
    expected_s = made.state.assignments[assignment.id].expected_s
    assert expected_s > 0
    for _ in range(10):
        made.state.costs.note_batch(("data.sql", ""), made.state.assignments[assignment.id].device, "n1", 0, 4, 100.0, 0, 0, 0)
    made.succeed(assignment, metered=METERED)
    device = rows(made)[0]["device"]
    expected, measured = made.state.costs._fits[("data.sql", ""), device].recent[-1]
    assert expected == expected_s
    assert measured == pytest.approx(0.04)


def test_a_node_cannot_teach_times_below_zero() -> None:
    made = desk()
    made.succeed(made.only(), metered=Metered(exec_us=-(10**9), load_us=-1, fetch_us=-1, bytes_fetched=-(10**9)))
    (row,) = rows(made)
    assert row["measured_s"] >= 0
    assert min(row["fixed_s"], row["unit_s"]) >= 0
