"""Content of ports: what is put reads back, and nothing is taken for what its reference does not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_cas import unixfs
from flowmesh_cas.cid import sha256
from flowmesh_cas.errors import IntegrityError, NotFoundError, UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_cas.wrappers import StagedStore
from flowmesh_mesh import content
from flowmesh_mesh.manifest import Ref
from flowmesh_node.operators import base

plain = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20)
rows = st.lists(st.dictionaries(st.text(max_size=8), plain | st.lists(plain, max_size=3), max_size=4), max_size=6)


@given(rows)
def test_a_table_reads_back(table: list[dict[str, Any]]) -> None:
    store = MemoryStore()
    ref = content.put_rows(store, table)
    assert content.read_rows(store, ref) == table
    assert (ref.kind, ref.rows) == ("rows", len(table))


@given(rows)
def test_a_table_is_the_same_bytes_as_operators_write(table: list[dict[str, Any]]) -> None:
    data, count = content.encode_rows(table)
    assert (data, count) == (base.encode_rows(table), len(table))
    store = MemoryStore()
    assert content.put_table_bytes(store, data, count) == content.put_rows(store, table)


def test_line_separators_inside_text_do_not_end_a_record() -> None:
    store = MemoryStore()
    table = [{"text": "a\u2028b\x85c\x0bd\re\nf"}]
    assert content.read_rows(store, content.put_rows(store, table)) == table


@pytest.mark.parametrize("value", [None, 0, 1.5, "text", [1, {"a": []}], {"k": "v"}])
def test_a_value_reads_back(value: Any) -> None:
    store = MemoryStore()
    ref = content.put_value(store, value)
    assert content.read_value(store, ref) == value
    assert (ref.digest, ref.size) == (sha256(msgspec.json.encode(value)), len(msgspec.json.encode(value)))


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError):
        content.put_value(MemoryStore(), object())
    with pytest.raises(UsageError):
        content.put_rows(MemoryStore(), [{"a": {1j: 2}}])


def test_a_file_and_a_folder_come_back(tmp_path: Path) -> None:
    store = MemoryStore()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data").write_bytes(b"bytes" * 1000)
    file = content.put_file(store, tmp_path / "in" / "data")
    assert file == content.put_file_bytes(store, b"bytes" * 1000)
    assert content.read_bytes(store, file) == b"bytes" * 1000
    content.export(store, file, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"bytes" * 1000
    folder = content.put_folder(store, tmp_path / "in")
    content.export(store, folder, tmp_path / "folder")
    assert (tmp_path / "folder" / "data").read_bytes() == b"bytes" * 1000
    with pytest.raises(UsageError, match="folder"):
        content.read_bytes(store, folder)


def test_the_digest_does_not_depend_on_how_a_file_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 50
    whole = content.put_file_bytes(MemoryStore(), data)
    monkeypatch.setattr(unixfs, "CHUNK_BYTES", 1000)
    cut = content.put_file_bytes(MemoryStore(), data)
    assert cut.cid != whole.cid
    assert (cut.digest, cut.size) == (whole.digest, whole.size)


@pytest.mark.parametrize("change", [{"digest": bytes(32)}, {"size": 4}, {"size": 6}])
@pytest.mark.parametrize("kind", ["file", "rows", "value"])
def test_content_that_is_not_what_its_reference_says_is_refused(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    store = MemoryStore()
    ref: Ref = msgspec.structs.replace(content.put_file_bytes(store, b"12345"), kind=kind, **change)
    with pytest.raises(IntegrityError):
        content.read_bytes(store, ref)
    with pytest.raises(IntegrityError):
        content.export(store, ref, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_no_table_or_value_are_refused() -> None:
    store = MemoryStore()
    ref = content.put_file_bytes(store, b'{"a":1}\n[2]\n')
    with pytest.raises(IntegrityError, match="line 2"):
        content.read_rows(store, ref)
    with pytest.raises(IntegrityError, match="not JSON"):
        content.read_value(store, content.put_file_bytes(store, b"{"))


def test_many_results_are_stored_by_one_write() -> None:
    inner = MemoryStore()
    staged = StagedStore(inner)
    refs = [content.put_value(staged, number) for number in range(100)]
    assert content.read_value(staged, refs[7]) == 7
    with pytest.raises(NotFoundError):
        content.read_value(inner, refs[7])
    staged.flush()
    assert [content.read_value(inner, ref) for ref in refs] == list(range(100))
    assert not staged.staged
