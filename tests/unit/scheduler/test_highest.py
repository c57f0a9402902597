"""The highest epoch that a scheduler remembers."""

from __future__ import annotations

from pathlib import Path

from flowmesh_scheduler.standbys import Highest


def test_what_was_written_is_read_again_and_only_grows(tmp_path: Path) -> None:
    highest = Highest(tmp_path / "highest")
    assert highest.note(7, 3)
    assert not highest.note(5, 2)
    highest.write()
    assert (Highest.load(tmp_path / "highest").epoch, Highest.load(tmp_path / "highest").sequence) == (7, 3)


def test_a_disk_that_takes_nothing_costs_the_memory_and_nothing_else(tmp_path: Path) -> None:
    highest = Highest(tmp_path / "missing" / "highest")
    highest.note(7)
    highest.write()
    assert Highest.load(tmp_path / "missing" / "highest").epoch == 0


def test_without_a_path_nothing_is_written() -> None:
    Highest().write()
