"""What a client remembers of its submissions: until it saw the end, bounded, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flowmesh_cas.cid import DAG_CBOR, RAW, cid_of, encode_dag_cbor
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.client import journal
from flowmesh_mesh.client.journal import Journal
from flowmesh_mesh.messages import Submit, encode

LEAF = b"rows that were put before"
ROOT_BLOCK = encode_dag_cbor({"rows": cid_of(RAW, LEAF)})
ROOT = cid_of(DAG_CBOR, ROOT_BLOCK)


def payload(run: str) -> bytes:
    return encode(Submit(run, ROOT))


def keep(found: Journal, run: str, store: MemoryStore | None = None) -> None:
    found.expect(run)
    found.keep(run, payload(run), store)


def test_a_submission_is_remembered_with_what_was_put_before_it(tmp_path: Path) -> None:
    store = MemoryStore()
    store.put_many(((ROOT, ROOT_BLOCK), (cid_of(RAW, LEAF), LEAF)))
    keep(Journal(tmp_path, "mesh", "TENANT"), "run-one", store)
    found = Journal(tmp_path, "mesh", "TENANT").find("run-o")
    assert found is not None
    assert found.payload == payload("run-one")
    assert set(found.blocks) == {(DAG_CBOR, ROOT_BLOCK), (RAW, LEAF)}
    assert Journal(tmp_path, "mesh", "OTHER").find("run-one") is None


def test_a_beginning_that_two_runs_have_names_neither(tmp_path: Path) -> None:
    found = Journal(tmp_path, "mesh", "TENANT")
    keep(found, "run-one")
    keep(found, "run-two")
    assert found.find("run") is None


def test_a_run_whose_end_was_seen_is_forgotten_even_while_it_is_being_written(tmp_path: Path) -> None:
    found = Journal(tmp_path, "mesh", "TENANT")
    keep(found, "a")
    found.drop("a")
    found.expect("b")
    found.drop("b")  # it ended before the thread came to write it
    found.keep("b", payload("b"), None)
    assert list(found.entries()) == []


def test_too_many_and_too_old_submissions_are_forgotten_oldest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "ENTRIES_MAX", 3)
    found = Journal(tmp_path, "mesh", "TENANT")
    for number in range(5):
        keep(found, f"run-{number}")
        path = found.folder / f"run-{number}{journal.SUFFIX}"
        os.utime(path, (path.stat().st_mtime - 100 + number,) * 2)
    keep(found, "ancient")
    os.utime(found.folder / f"ancient{journal.SUFFIX}", (0, 0))
    found.prune()
    assert [entry.run for entry in found.entries()] == ["run-2", "run-3", "run-4"]


def test_a_folder_that_cannot_be_written_stops_no_submission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keep(Journal(tmp_path / "file", "mesh", "TENANT"), "run-one")


def test_contents_that_are_too_large_are_remembered_by_their_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BLOCKS_MAX_BYTES", 10)
    store = MemoryStore()
    store.put_many(((ROOT, ROOT_BLOCK), (cid_of(RAW, LEAF), LEAF)))
    found = Journal(tmp_path, "mesh", "TENANT")
    keep(found, "run-one", store)
    entry = found.find("run-one")
    assert entry is not None
    assert entry.blocks == ()
