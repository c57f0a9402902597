"""``shards: auto``: what is known of the rows beforehand, and that a settled number is as good as a written one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.client import submission
from flowmesh_mesh.compiler import Compiled, Draft, check_document, compile_document
from flowmesh_mesh.problems import DocumentError
from flowmesh_mesh.sharding import Choice, Settled, Wish
from flowmesh_mesh.workflow import Workflow

from .conftest import Refuse, operators

ROWS = {"rows": {"rows": [{"a": number} for number in range(10)]}}


def auto(source: Any = "table.rows", **fields: Any) -> dict[str, Any]:
    return {"type": "data.map", "inputs": {"rows": source}, "shards": "auto", **fields}


def load(*names: str, **params: Any) -> dict[str, Any]:
    return {"type": "data.load", "inputs": {"file": [{"path": name} for name in names]}, "with": params}


def draft(folder: Path, **entries: Any) -> Draft:
    made = Draft(operators(**entries), base=folder, store=MemoryStore())
    made.compile({})
    return made


def asked(folder: Path, **entries: Any) -> Wish:
    """Return what is asked of the operator ``a``."""
    return draft(folder, **entries).wishes()["a"]


def test_a_settled_number_gives_the_manifest_of_a_written_one(folder: Path) -> None:
    (folder / "t.jsonl").write_text('{"a": 1}\n' * 20)
    flow = {"table": load("t.jsonl"), "other": auto(shards=2)}
    written = compile_document(operators(**flow, a=auto(shards=4)), base=folder, store=MemoryStore())
    made = draft(folder, **flow, a=auto())
    assert made.compile({"a": 4}).cid == written.cid
    assert made.compile({"a": 8}).cid != written.cid
    again = made.compile({"a": 4})
    assert (again.cid, again.roots) == (written.cid, written.roots), "a draft may be compiled as often as one likes"
    one = compile_document(operators(**flow, a=auto(shards=1)), base=folder, store=MemoryStore())
    assert made.compile({}).cid == one.cid


def test_a_hint_of_rows_is_no_part_of_the_manifest(folder: Path) -> None:
    made = [draft(folder, a=auto(ROWS["rows"], **more)).compile({"a": 2}) for more in ({}, {"rows": 99})]
    assert made[0].cid == made[1].cid


def test_a_document_is_valid_before_its_numbers_are_settled(folder: Path) -> None:
    found = check_document(operators(b=auto(ROWS["rows"]), a=auto("b")), base=folder)
    assert (found.operators, found.auto) == (2, ["a", "b"])


def test_what_comes_over_the_wire_must_have_numbers(refused: Refuse) -> None:
    (problem,) = refused(operators(a=auto(ROWS["rows"])), base=None)
    assert problem.path == "operators.a.shards"
    assert "settled by the client" in problem.message
    assert "Write a number" in problem.hint


def test_numbers_may_be_given_to_the_compiler(folder: Path) -> None:
    document = operators(a=auto(ROWS["rows"]))
    given = compile_document(document, base=folder, store=MemoryStore(), shards={"a": 2})
    assert len(given.manifest.operators) == 4


def test_a_parameter_may_say_auto(folder: Path) -> None:
    document = {**operators(a=auto(ROWS["rows"], shards="${params.n}")), "params": {"n": {"type": "str", "default": "auto"}}}
    assert Draft(document, base=folder, store=MemoryStore()).auto == ["a"]


@pytest.mark.parametrize(
    ("fields", "path", "message", "hint"),
    [
        ({"shards": "automatic"}, "operators.a.shards", "'auto'", "whole number"),
        ({"type": "data.concat"}, "operators.a.shards", "cannot be cut", "llm.generate"),
        ({"rows": 0}, "operators.a.rows", "at least 1", "how many rows"),
        ({"rows": "many"}, "operators.a.rows", "a number of rows", "under 'inputs:'"),
        ({"rows": True}, "operators.a.rows", "a number of rows", ""),
    ],
)
def test_what_is_wrong_is_told(refused: Refuse, fields: dict[str, Any], path: str, message: str, hint: str) -> None:
    problems = [found for found in refused(operators(a={**auto(ROWS["rows"]), **fields})) if found.path == path]
    assert len(problems) == 1
    assert message in problems[0].message
    assert hint in problems[0].hint


def test_a_number_of_rows_without_shards_is_refused(refused: Refuse) -> None:
    (problem,) = refused(operators(a={"type": "data.map", "inputs": ROWS, "rows": 5}))
    assert "hint for 'shards: auto'" in problem.message


def test_too_many_shards_in_all_are_refused(folder: Path) -> None:
    entries = {f"a{number}": auto(ROWS["rows"]) for number in range(11)}
    made = draft(folder, **entries)
    with pytest.raises(DocumentError, match="more than 1000000 operators"):
        made.compile(dict.fromkeys(entries, 100_000))


def test_a_name_that_the_shards_would_take_is_told_once_the_number_is_known(folder: Path) -> None:
    made = draft(folder, a=auto(ROWS["rows"]), a_split={"type": "flow.noop"})
    with pytest.raises(DocumentError, match="'a-split', which is taken"):
        made.compile({"a": 2})


# --- how many rows


def test_rows_that_stand_in_the_document_are_counted(folder: Path) -> None:
    found = asked(folder, a=auto(ROWS["rows"]))
    assert (found.type, found.rows) == ("data.map", 10)
    assert found.size_bytes > 0


def test_rows_of_files_are_counted(folder: Path) -> None:
    (folder / "t.jsonl").write_text("".join(json.dumps({"a": n}) + "\n" for n in range(7)) + "\n" + '{"a": 8}')
    (folder / "t.csv").write_text('a,b\n1,"two\nlines, one row"\n2,x\n\n')
    assert asked(folder, table=load("t.jsonl"), a=auto()).rows == 8
    assert asked(folder, table=load("t.csv"), a=auto()).rows == 2
    assert asked(folder, table=load("t.jsonl", "t.jsonl"), a=auto()).rows == 16
    assert asked(folder, table=load("t.jsonl", limit=5), a=auto()).rows == 5
    assert asked(folder, table=load("t.jsonl"), a=auto()).size_bytes == (folder / "t.jsonl").stat().st_size


def test_rows_are_followed_through_operators_that_keep_them(folder: Path) -> None:
    model = {"model": "wheel:m==1", "prompt": "p"}
    found = draft(
        folder,
        table={"type": "data.map", "inputs": ROWS, "shards": 3},
        both={"type": "data.concat", "inputs": {"rows": ["table", ROWS["rows"]]}},
        answers={
            "type": "llm.generate",
            "inputs": {"rows": "both"},
            "with": {**model, "samples": 4, "temperature": 0.5},
            "shards": "auto",
        },
        cut={"type": "data.split", "inputs": {"rows": "answers"}, "with": {"parts": 8}},
        a=auto("cut.parts[1]"),
    ).wishes()
    assert {name: wish.rows for name, wish in found.items()} == {"answers": 20, "a": 10}
    assert found["answers"].models == {"model": "wheel:m==1"}
    assert found["answers"].params["samples"] == 4
    assert "prompt" not in found["answers"].params, "texts are nobody's business"


def test_rows_that_nobody_knows_beforehand_may_be_hinted(folder: Path) -> None:
    query = {"type": "data.sql", "inputs": {"t": ROWS["rows"]}, "with": {"query": "SELECT * FROM t"}}
    assert asked(folder, table=query, a=auto()).rows == -1
    found = draft(folder, table=query, a=auto(rows=500), b=auto("a")).wishes()
    assert {name: wish.rows for name, wish in found.items()} == {"a": 500, "b": 500}


def test_what_is_counted_goes_before_the_hint(folder: Path) -> None:
    assert asked(folder, a=auto(ROWS["rows"], rows=500)).rows == 10


def test_a_file_that_is_not_text_is_not_counted(folder: Path) -> None:
    (folder / "t.parquet").write_bytes(b"PAR1")
    assert asked(folder, table=load("t.parquet"), a=auto()).rows == -1


def test_a_model_that_comes_with_the_workflow_is_named_by_its_content_and_size(folder: Path) -> None:
    generate = {"type": "llm.generate", "inputs": ROWS, "with": {"model": "model"}, "shards": "auto"}
    made = draft(folder, a=generate)
    wish = made.wishes()["a"]
    (reference,) = wish.models.values()
    assert reference.startswith("cid:")
    assert wish.model_bytes[reference] > 0
    assert made.compile({}).manifest.operators[0].models == wish.models


def test_equal_operators_are_asked_for_once(folder: Path) -> None:
    found = draft(folder, a=auto(ROWS["rows"], foreach={"range": 50}, **{"with": {"columns": {"x": "no ${item}"}}})).wishes()
    assert len(found) == 50
    assert len({id(wish) for wish in found.values()}) == 1


def test_a_long_chain_is_followed_to_its_end(folder: Path) -> None:
    chain = {f"n{number}": {"type": "data.map", "inputs": {"rows": f"n{number - 1}"}} for number in range(1, 2000)}
    assert asked(folder, n0={"type": "data.map", "inputs": ROWS}, **chain, a=auto("n1999")).rows == 10


# --- client and builder


def test_the_builder_tells_a_number_of_rows_from_the_port() -> None:
    flow = Workflow("w")
    table = flow.add("table", "data.sql", t=[{"a": 1}], query="SELECT * FROM t")
    flow.add("a", "data.map", rows=table.rows, shards="auto")
    flow.add("b", "data.map", inputs={"rows": table.rows}, shards="auto", rows=500)
    entries = flow.to_document()["operators"]
    assert entries["a"] == {"type": "data.map", "shards": "auto", "inputs": {"rows": "table.rows"}}
    assert (entries["b"]["rows"], entries["b"]["inputs"]) == (500, {"rows": "table.rows"})


class Asked:
    """Answers questions for shards with a number of its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.questions: list[list[dict[str, Any]]] = []

    async def __call__(self, bus: Any, what: str, args: dict[str, Any]) -> dict[str, Any]:
        assert what == "shards"
        self.questions.append(args["operators"])
        return {"choices": [{"shards": self.number, "rows": each["rows"]} for each in args["operators"]]}


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked(4)
    monkeypatch.setattr(submission, "ask", made)
    return made


async def settled(document: dict[str, Any]) -> tuple[submission.Prepared, Compiled]:
    prepared = submission.prepare(document, None, MemoryStore())
    bus: Any = None
    return await submission.settle(bus, prepared), prepared.compiled


async def test_the_client_asks_the_mesh_and_compiles_with_its_answer(mesh: Asked) -> None:
    found, before = await settled(operators(a=auto(ROWS["rows"]), b=auto("a")))
    assert [each.operator for each in found.settled] == ["a", "b"]
    assert found.draft is None
    assert len(found.compiled.manifest.operators) == 2 * (4 + 2)
    assert len(before.manifest.operators) == 2
    assert found.store.has(found.compiled.cid)
    assert len(mesh.questions) == 1
    bus: Any = None
    assert await submission.settle(bus, found) is found


async def test_a_workflow_without_auto_asks_nothing(mesh: Asked) -> None:
    found, before = await settled(operators(a=auto(ROWS["rows"], shards=2)))
    assert found.compiled is before
    assert mesh.questions == []


async def test_many_different_operators_are_asked_for_in_several_questions(mesh: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "WISHES_MAX", 2)
    entries = {f"a{number}": auto(ROWS["rows"], resources={"cpus": number + 1}) for number in range(5)}
    found, _ = await settled(operators(**entries))
    assert [len(question) for question in mesh.questions] == [2, 2, 1]
    assert len(found.settled) == 5


def test_a_choice_is_told_in_words() -> None:
    choice = Choice(shards=32, rows=10_000, shard_s=54.3, overhead=0.012, places=3, samples=0)
    assert Settled("a", choice).text == (
        "a: 32 shards of 313 rows, 54.3 s each, 1.2 % overhead, 3 at a time, by a prior, never measured"
    )
    assert Settled("a", Choice(shards=1, note="because")).text == "a: 1 shard, because"
