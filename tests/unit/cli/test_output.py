"""What the command line prints: numbers for people, text without control characters, runs as they go."""

from __future__ import annotations

from typing import Any

import pytest

from flowmesh_mesh.cli.output import clean, counts_text, moment, size, span
from flowmesh_mesh.cli.progress import Progress
from flowmesh_mesh.messages import RunEvent


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024, "1.5 MiB"), (5 * 2**40, "5.0 TiB"), (-1, ""), (None, "")],
)
def test_sizes_are_shown_in_binary_units(size_bytes: Any, text: str) -> None:
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    ("span_us", "text"),
    [(400, "0.4 ms"), (12_000_000, "12.0 s"), (200_000_000, "3 min 20 s"), (7_260_000_000, "2 h 1 min"), (-1, ""), (None, "")],
)
def test_spans_are_shown_in_the_unit_that_fits(span_us: Any, text: str) -> None:
    assert span(span_us) == text


def test_a_moment_that_has_not_come_is_empty() -> None:
    assert moment(0) == moment(None) == ""
    assert moment(1_700_000_000_000_000).startswith("2023-11-1")


def test_control_characters_of_others_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[2Jb\x07\x9bc\td") == "a�[2Jb��c\td"


def test_counts_follow_the_life_of_an_operator() -> None:
    assert counts_text({"failed": 1, "waiting": 2, "done": 3, "ready": 0, "odd": 4}) == "3 done, 2 waiting, 1 failed, 4 odd"


def _event(kind: str, **body: Any) -> RunEvent:
    return RunEvent("r1", 1, 1, kind, body)


def test_changes_of_operators_are_told_by_name() -> None:
    progress = Progress("r1")
    progress.name_operators([{"index": 0, "name": "load", "type": "data.load", "state": "waiting"}])
    changes = [[0, "assigned", "n1", None, False], [0, "done", "n1", "succeeded", True], [7, "failed", None, "oom", False]]
    lines = progress.apply(_event("operators", changes=changes, counts={"done": 1}))
    assert lines == ["load assigned on n1", "load done on n1, shared", "#7 failed (oom)"]
    assert progress.counts == {"done": 1}
    assert progress.state == "accepted"


def test_a_state_after_a_gap_replaces_what_was_missed() -> None:
    progress = Progress("r1")
    row = {"index": 0, "name": "a", "type": "flow.noop", "state": "done", "node": "n2", "reason": "succeeded", "shared": True}
    lines = progress.apply(_event("state", name="w", state="accepted", operators=[row], counts={"done": 1}))
    assert lines == ["a done on n2, shared"]
    assert (progress.rows[0].state, progress.rows[0].node, progress.rows[0].is_shared) == ("done", "n2", True)


def test_the_end_says_who_cancelled_and_why_it_failed() -> None:
    progress = Progress("r1")
    assert progress.apply(_event("ended", state="failed", detail="a: boom\x1b[0m")) == ["run r1 failed: a: boom�[0m"]
    assert progress.state == "failed"
    assert Progress("r1").apply(_event("ended", state="cancelled", actor="team-a")) == ["run r1 cancelled by team-a"]


def test_changes_that_no_event_told_are_told_at_the_end() -> None:
    progress = Progress("r1")
    progress.name_operators([{"index": n, "name": name} for n, name in enumerate("ab")])
    progress.apply(_event("operators", changes=[[0, "done", "n1", "succeeded", False]], counts={}))
    assert not progress.is_settled
    rows = [{"index": n, "name": name, "state": "done", "node": "n2"} for n, name in enumerate("ab")]
    assert progress.settle(rows) == ["b done on n2"]
    assert progress.is_settled


def test_log_lines_bear_the_name_of_their_operator() -> None:
    assert Progress("r1").apply(_event("log", index=0, name="a", lines=["x", "y"])) == ["a | x", "a | y"]


def test_a_run_of_many_operators_is_drawn_in_bounded_space() -> None:
    from rich.console import Console

    from flowmesh_mesh.cli.progress import render

    progress = Progress("r1", name="big")
    progress.settle([{"index": n, "name": f"op{n}", "type": "flow.noop", "state": "done"} for n in range(5000)])
    progress.apply(_event("operators", changes=[[4321, "failed", "n1", "oom", False]], counts={"done": 4999, "failed": 1}))
    screen = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(render(progress, 10))
    text = screen.export_text()
    assert len(text.splitlines()) < 16
    assert "op4321" in text
    assert "4990 more" in text
