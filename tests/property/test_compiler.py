"""The compiler against documents that nobody would write, and against a dumb oracle of order."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.instructions import count_bytecode

from flowmesh_cas.errors import UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.compiler import compile_document
from flowmesh_mesh.document import DocumentError, load_text
from flowmesh_mesh.manifest import Manifest, decode_record
from flowmesh_mesh.workflow import Workflow

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["${params.n}", "${item}", "a.out"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
DOCUMENT: dict[str, Any] = {
    "apiVersion": "flowmesh/v1",
    "name": "w",
    "params": {"n": {"type": "int", "default": 3}},
    "operators": {
        "a": {"type": "flow.noop", "foreach": {"range": 2}, "with": {"nonce": "${item}"}},
        "r": {"type": "data.concat", "inputs": {"rows": {"rows": [{"x": 1}]}}},
        "m": {"type": "data.map", "inputs": {"rows": ["r.rows"]}, "with": {"columns": {"y": "{{ x }}"}}, "shards": 2},
        "s": {"type": "reward.score", "inputs": {"rows": "m"}, "with": {"rules": [{"kind": "length", "target": 2}]}},
        "f": {
            "type": "python.call",
            "function": "f",
            "source": "def f(x, **p): ...",
            "inputs": {"x": "s"},
            "with": {"args": {"k": [1]}},
        },
        "g": {
            "type": "llm.generate",
            "inputs": {"rows": "s"},
            "with": {"model": "wheel:x==1"},
            "resources": {"gpus": 1, "vram": "1GiB"},
            "retry": {"attempts": 2, "backoff": "1s"},
            "timeout": "5m",
        },
    },
    "outputs": {"out": "f.out"},
}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every part of a document."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [place for key, part in parts for place in places(part, (*at, key))]


PLACES = places(DOCUMENT)


def changed(place: tuple[Any, ...], how: str, value: Any) -> Any:
    document = copy.deepcopy(DOCUMENT)
    inner: Any = document
    for step in place[:-1]:
        inner = inner[step]
    if how == "remove":
        del inner[place[-1]]
    elif how == "rename" and isinstance(inner, dict):
        inner[str(value)[:20]] = inner.pop(place[-1])
    else:
        inner[place[-1]] = value
    return document


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PLACES), st.sampled_from(["replace", "remove", "rename"]), JSON)
def test_a_broken_document_gives_problems_or_a_manifest_never_a_crash(place: tuple[Any, ...], how: str, value: Any) -> None:
    document = changed(place, how, value)
    try:
        compiled = compile_document(document, base=None, store=MemoryStore())
    except DocumentError as error:
        problems = error.problems
    else:
        assert decode_record(compiled.block, Manifest) == compiled.manifest
        return
    assert problems
    assert all(problem.message for problem in problems)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:{}[],&*-<>#|'\"\n \t!?%$0x.", max_size=60))
def test_any_text_is_read_or_refused_with_a_place(text: str) -> None:
    try:
        load_text(text, "w.yaml")
    except DocumentError as error:
        problems = error.problems
    else:
        return
    assert problems
    assert all(problem.message and problem.file == "w.yaml" for problem in problems)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_yaml_reads_json_as_json_does(value: Any) -> None:
    text = json.dumps(value)
    if "NaN" in text or "Infinity" in text or "\\ud" in text or '"<<"' in text:
        return
    assert load_text(text, "w.yaml")[0] == load_text(text, "w.json")[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 25), st.data())
def test_any_acyclic_graph_is_ordered_and_the_order_of_keys_does_not_matter(size: int, data: st.DataObject) -> None:
    names = data.draw(st.permutations([f"n{number}" for number in range(size)]))
    entries: dict[str, Any] = {}
    for number, name in enumerate(names):
        before = data.draw(st.lists(st.sampled_from(names[:number]), max_size=4)) if number else []
        entries[name] = {"type": "flow.noop", "with": {"nonce": number}}
        if before:
            entries[name]["inputs"] = {"after": before}
    document = {"apiVersion": "flowmesh/v1", "name": "w", "operators": entries}
    compiled = compile_document(document, base=None, store=MemoryStore())
    found = [operator.name for operator in compiled.manifest.operators]
    assert sorted(found) == sorted(names)
    for number, operator in enumerate(compiled.manifest.operators):
        sources = [found[source.op] for source in operator.inputs.get("after", [])]
        assert all(found.index(source) < number for source in sources)
        assert sources == entries[operator.name].get("inputs", {}).get("after", [])
    shuffled = {**document, "operators": {name: entries[name] for name in data.draw(st.permutations(names))}}
    assert compile_document(shuffled, base=None, store=MemoryStore()).cid == compiled.cid


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.data())
def test_every_cycle_is_found(size: int, data: st.DataObject) -> None:
    names = [f"n{number}" for number in range(size)]
    first = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - first))
    entries: dict[str, Any] = {
        name: {"type": "flow.noop", "inputs": {"after": names[:number]}} for number, name in enumerate(names)
    }
    for entry in entries.values():
        if not entry["inputs"]["after"]:
            del entry["inputs"]
    entries[names[first]]["inputs"] = {"after": names[first + length - 1]}
    with pytest.raises(DocumentError, match="wait for each other"):
        compile_document({"apiVersion": "flowmesh/v1", "name": "w", "operators": entries}, base=None, store=MemoryStore())


def foreach(count: int) -> dict[str, Any]:
    entry = {"type": "flow.noop", "foreach": {"range": count}, "with": {"nonce": "${item}"}}
    return {"apiVersion": "flowmesh/v1", "name": "w", "operators": {"each": entry}}


def chain(count: int) -> Workflow:
    wf = Workflow("w")
    last: Any = []
    for number in range(count):
        last = wf.add(f"o{number}", "flow.noop", nonce=number, **({"after": last} if number else {}))
    return wf


@pytest.mark.parametrize("build", [foreach, chain])
def test_twice_the_operators_take_about_twice_the_instructions_to_compile(build: Any) -> None:
    def instructions(count: int) -> int:
        data = build(count)
        return count_bytecode(lambda: compile_document(data, base=None, store=MemoryStore()), "flowmesh_mesh")

    instructions(10)  # what is remembered between documents is filled
    assert instructions(1_000) <= 2.2 * instructions(500)


def test_a_file_that_vanishes_after_the_check_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowmesh_mesh import content

    (tmp_path / "x.csv").write_text("a\n1\n")
    real = content.put_file

    def vanish(store: Any, path: Path) -> Any:
        path.unlink()
        return real(store, path)

    monkeypatch.setattr(content, "put_file", vanish)
    document = {
        "apiVersion": "flowmesh/v1",
        "name": "w",
        "operators": {"a": {"type": "data.load", "inputs": {"file": {"path": "x.csv"}}}},
    }
    with pytest.raises(UsageError, match="cannot be stored"):
        compile_document(document, base=tmp_path, store=MemoryStore())
