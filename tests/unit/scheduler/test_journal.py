"""The journal of the ledger: what is written comes back, torn ends and damage cost their frames alone, ends outlive the bound."""

from __future__ import annotations

from pathlib import Path

from flowmesh_scheduler.journal import Entry, Journal, is_noted


def opened(folder: Path, max_bytes: int = 1 << 20) -> Journal:
    journal = Journal(folder, max_bytes=max_bytes)
    journal.open()
    return journal


async def test_what_was_noted_comes_back_in_order_with_its_highest_sequence(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for sequence in (5, 6, 9):
        journal.note(f"led.result.k{sequence}.0", sequence, b"record")
        await journal.flush()
    journal.close()
    again = opened(tmp_path)
    assert [entry.sequence for entry in again.entries()] == [5, 6, 9]
    assert again.last_seq == 9


async def test_a_torn_end_costs_only_what_was_torn(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.note("led.ended.t.a", 1, b"first")
    journal.note("led.ended.t.b", 2, b"second")
    await journal.flush()
    journal.close()
    (segment,) = journal.segments()
    segment.write_bytes(segment.read_bytes()[:-3])
    again = opened(tmp_path)
    assert [entry.subject for entry in again.entries()] == ["led.ended.t.a"]
    again.note("led.ended.t.c", 3, b"third")
    await again.flush()
    assert [entry.subject for entry in opened(tmp_path).entries()] == ["led.ended.t.a", "led.ended.t.c"]


async def test_a_flipped_byte_is_no_entry(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.note("led.ended.t.a", 1, b"a record that says succeeded")
    await journal.flush()
    (segment,) = journal.segments()
    data = bytearray(segment.read_bytes())
    data[-4] ^= 1
    segment.write_bytes(bytes(data))
    assert list(opened(tmp_path).entries()) == []


async def test_beyond_the_bound_results_go_and_ends_stay(tmp_path: Path) -> None:
    journal = opened(tmp_path, max_bytes=8000)
    for number in range(300):
        kind = "ended" if number % 10 == 0 else "result"
        journal.note(f"led.{kind}.t.{number}", number + 1, b"x" * 100)
        if number % 10 == 9:
            await journal.flush()
    journal.close()
    again = opened(tmp_path, max_bytes=8000)
    kept = [entry.subject for entry in again.entries()]
    assert sum(subject.startswith("led.ended.") for subject in kept) == 30
    assert len(kept) < 150
    assert sum(path.stat().st_size for path in again.segments()) <= 8000
    assert again.last_seq == 300


async def test_pages_hold_everything_once(tmp_path: Path) -> None:
    journal = opened(tmp_path, max_bytes=8000)
    for number in range(50):
        journal.note(f"led.result.k{number}.0", number + 1, b"x" * 50)
        await journal.flush()
    found: list[Entry] = []
    cursor = 0
    while cursor >= 0:
        page, cursor = journal.page(cursor, 300)
        found += page
    assert [entry.sequence for entry in found] == list(range(1, 51))


def test_a_journal_remembers_runs_and_results_and_not_who_led() -> None:
    assert is_noted("led.accepted.t.r")
    assert is_noted("led.result.k.0")
    assert not is_noted("led.epoch.7")
    assert not is_noted("led.restored.7")
