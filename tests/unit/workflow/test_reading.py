"""Reading YAML and JSON: the types of JSON, and the place of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_mesh.document import DocumentError, Problem, load_document, load_text


def problems_of(text: str, file: str = "flow.yaml") -> list[Problem]:
    with pytest.raises(DocumentError) as caught:
        load_text(text, file)
    return caught.value.problems


def test_yaml_is_read_with_the_types_of_json() -> None:
    data, _ = load_text("a: [1, 0x10, 0o17, -2, 1.5, 1e3, true, null, ~, on, yes, 2024-01-31, '7', 1_000]\n1: x\non: y\n")
    assert data == {
        "a": [1, 16, 15, -2, 1.5, 1000.0, True, None, None, "on", "yes", "2024-01-31", "7", "1_000"],
        "1": "x",
        "on": "y",
    }


def test_places_are_those_of_keys_and_values() -> None:
    _, positions = load_text("a:\n  b: [x,\n    y]\nc: {d: 1}\n", "flow.yaml")
    assert positions.locate(("a", "b", 1)) == (3, 5)
    assert positions.locate(("a", "b"), key=True) == (2, 3)
    assert positions.locate(("c", "d")) == (4, 8)
    assert positions.locate(("c", "nowhere", "deeper")) == (4, 4)


def test_anchors_and_merges_are_expanded() -> None:
    data, positions = load_text("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\nc: *x\n")
    assert data == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}, "c": {"p": 1, "q": 2}}
    assert positions.locate(("b", "p")) == (1, 11)


def test_json_and_yaml_of_one_text_agree() -> None:
    text = '{"a": [1, 2.5, true, null, "x"], "b": {"c": "\\u00e9"}}'
    assert load_text(text, "w.json")[0] == load_text(text, "w.yaml")[0]


@pytest.mark.parametrize(
    ("text", "line", "column", "part"),
    [
        ("a: [1,\nb: 2\n", 3, 1, "begun on line 1"),
        ("a: b: c\n", 1, 5, "not YAML"),
        ("a: 1\nb: 2\na: 3\n", 3, 1, "stands twice (first on line 1)"),
        ("a: !!python/object:os.system x\n", 1, 4, "tag"),
        ("a: &x [*x]\n", 1, 8, "inside of what it names"),
        ("a: *nothing\n", 1, 4, "names nothing"),
        ("a: 1\n---\nb: 2\n", 2, 1, "second document"),
        ("? [a, b]\n: 1\n", 1, 3, "key must be text"),
        ("a: \x00b\n", 1, 1, "not YAML"),
        ("a: {<<: 3}\n", 1, 9, "merges mappings only"),
    ],
)
def test_broken_yaml_is_told_with_its_place(text: str, line: int, column: int, part: str) -> None:
    found = problems_of(text)[0]
    assert part in found.message
    assert (found.file, found.line, found.column) == ("flow.yaml", line, column)
    assert found.hint


def test_all_duplicate_keys_are_told_at_once() -> None:
    assert [found.line for found in problems_of("a: 1\na: 2\nb: {c: 1, c: 2}\n")] == [2, 3]


def test_a_bomb_of_aliases_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "aliases stand for more" in problems_of("\n".join(lines))[0].message


def test_a_bomb_of_merges_is_refused() -> None:
    base = "a: &a {" + ", ".join(f"k{n}: {n}" for n in range(1000)) + "}\n"
    assert "stand for more" in problems_of(base + "".join(f"m{n}: {{<<: *a}}\n" for n in range(1100)))[0].message


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "{a: " * 5000, "- " * 50_000 + "x"])
def test_deep_nesting_is_refused(text: str) -> None:
    found = problems_of(text)[0]
    assert "nested more than" in found.message or "not YAML" in found.message


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": [1, 2}', '{"a": 1, "a": 2}', "", '{"a": ' + "9" * 5000 + "}"])
def test_broken_json_is_told(text: str) -> None:
    found = problems_of(text, "w.json")[0]
    assert found.file == "w.json"
    assert found.message


def test_json_syntax_is_told_with_its_line() -> None:
    found = problems_of('{\n  "a": 1,\n  b: 2}', "w.json")[0]
    assert (found.line, found.column) == (3, 3)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no workflow file"):
        load_document(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="cannot read"):
        load_document(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: x\ndoc: caf\xe9\n")
    with pytest.raises(UsageError, match=r"latin\.yaml:2 is not UTF-8"):
        load_document(tmp_path / "latin.yaml")


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")
    assert load_document(tmp_path / "w.yaml")[0] == {"name": "x"}
