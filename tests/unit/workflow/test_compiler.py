"""What a valid document becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from flowmesh_cas.cid import cid_parse
from flowmesh_cas.dag import missing
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.compiler import Compiled, check_file, compile_document, compile_file
from flowmesh_mesh.content import read_bytes, read_rows, read_value
from flowmesh_mesh.manifest import Manifest, Operator, Resources, Retry, Source, decode_record, record_cid

from .conftest import Compile, operators


def named(compiled: Compiled) -> dict[str, Operator]:
    return {operator.name: operator for operator in compiled.manifest.operators}


def order(compiled: Compiled) -> list[str]:
    return [operator.name for operator in compiled.manifest.operators]


def noop(**more: Any) -> dict[str, Any]:
    return {"type": "flow.noop", **more}


def test_the_manifest_is_what_its_block_and_cid_say(compiled: Compile, workflow: dict[str, Any]) -> None:
    result = compiled(workflow)
    assert decode_record(result.block, Manifest) == result.manifest
    assert record_cid(result.block) == result.cid
    for operator in result.manifest.operators:
        assert json.loads(json.dumps(operator.params)) == operator.params
        assert list(operator.params) == sorted(operator.params, key=lambda key: (len(key), key))
        msgspec.convert(operator.params, CATALOG[operator.type].params)


def test_settings_of_an_operator_reach_the_manifest(compiled: Compile, workflow: dict[str, Any]) -> None:
    answers = named(compiled(workflow))["answers"]
    assert answers.resources == Resources(gpus=1, vram_bytes=8 * 2**30, memory_bytes=2 * 2**30, cpus=1.0)
    assert answers.retry == Retry(5, 1.0)
    assert (answers.timeout_s, answers.priority, answers.determinism) == (300.0, 1, "seeded")
    assert answers.params["samples"] == 4
    assert answers.params["top_p"] == 1.0  # defaults are written out


def test_content_is_in_the_store_with_everything_under_the_manifest(folder: Path, workflow: dict[str, Any]) -> None:
    store = MemoryStore()
    result = compile_document(workflow, base=folder, params=None, store=store)
    assert store.has(result.cid)
    assert missing(store, result.cid) == []
    assert {ref.kind for ref in result.roots} == {"file", "folder"}
    code = next(operator.code for operator in result.manifest.operators if operator.code is not None)
    assert read_bytes(store, code) == (folder / "code.py").read_bytes()


def test_nothing_is_stored_when_something_is_wrong(folder: Path, workflow: dict[str, Any]) -> None:
    store = MemoryStore()
    workflow["operators"]["adapter"]["with"]["steps"] = 0
    with pytest.raises(Exception, match="steps"):
        compile_document(workflow, base=folder, store=store)
    assert list(store.cids()) == []


def test_one_workflow_has_one_cid_by_yaml_json_and_any_order_of_keys(folder: Path, workflow: dict[str, Any]) -> None:
    (folder / "w.json").write_text(json.dumps(workflow))
    (folder / "sorted.json").write_text(json.dumps(workflow, sort_keys=True))
    (folder / "w.yaml").write_text(yaml.safe_dump(workflow, sort_keys=False))
    cids = {compile_file(folder / name, store=MemoryStore()).cid for name in ("w.json", "sorted.json", "w.yaml")}
    assert cids == {compile_document(workflow, base=folder, store=MemoryStore()).cid}


def test_a_parameter_that_changes_the_meaning_changes_the_cid(compiled: Compile, workflow: dict[str, Any]) -> None:
    assert compiled(workflow).cid == compiled(workflow, params={"n": "4"}).cid
    assert compiled(workflow).cid != compiled(workflow, params={"n": 5}).cid


def test_where_a_file_lies_does_not_change_the_cid(compiled: Compile, folder: Path, workflow: dict[str, Any]) -> None:
    before = compiled(workflow).cid
    (folder / "elsewhere").mkdir()
    (folder / "prompts.jsonl").rename(folder / "elsewhere" / "p.jsonl")
    assert compiled(workflow, params={"file": str(folder / "elsewhere" / "p.jsonl")}).cid == before


def test_the_format_of_a_file_is_decided_by_its_name(compiled: Compile, workflow: dict[str, Any]) -> None:
    assert named(compiled(workflow))["prompts"].params["format"] == "jsonl"


def test_a_local_model_travels_by_its_cid(compiled: Compile, workflow: dict[str, Any]) -> None:
    result = compiled(workflow)
    adapter = named(result)["adapter"]
    reference = adapter.models["model"]
    assert reference.startswith("cid:")
    assert adapter.params["model"] == reference
    assert result.manifest.models == [cid_parse(reference.removeprefix("cid:"))]


def test_sources_come_before_their_users(compiled: Compile, workflow: dict[str, Any]) -> None:
    workflow["operators"] = dict(reversed(workflow["operators"].items()))
    result = compiled(workflow)
    for number, operator in enumerate(result.manifest.operators):
        for sources in operator.inputs.values():
            assert all(source.op < number for source in sources)


def test_shards_become_a_split_the_shards_and_a_concat(compiled: Compile) -> None:
    document = operators(
        source={"type": "data.load", "inputs": {"file": {"path": "prompts.jsonl"}}},
        out={
            "type": "data.map",
            "inputs": {"rows": "source"},
            "with": {"columns": {"x": "{{ prompt }}"}},
            "shards": 3,
            "priority": 7,
            "resources": {"cpus": 2},
        },
        last={"type": "data.concat", "inputs": {"rows": "out.rows"}},
    )
    result = compiled(document)
    assert order(result) == ["source", "out-split", "out-0", "out-1", "out-2", "out", "last"]
    found = named(result)
    assert found["out-split"].params == {"parts": 3}
    assert [found[f"out-{n}"].inputs["rows"] for n in range(3)] == [[Source(op=1, port="parts", item=n)] for n in range(3)]
    assert found["out"].type == "data.concat"
    assert found["out"].inputs["rows"] == [Source(op=2 + n, port="rows") for n in range(3)]
    assert found["last"].inputs["rows"] == [Source(op=5, port="rows")]
    assert {operator.priority for name, operator in found.items() if name.startswith("out")} == {7}
    assert found["out-1"].resources.cpus == 2
    assert found["out-split"].resources == Resources()


def test_one_part_of_a_split_can_be_chosen(compiled: Compile) -> None:
    document = operators(
        cut={"type": "data.split", "inputs": {"rows": {"rows": [{"a": 1}]}}, "with": {"parts": 3}},
        each={"type": "data.concat", "foreach": {"range": 2}, "inputs": {"rows": "cut.parts[${index}]"}},
        all={"type": "data.concat", "inputs": {"rows": "cut"}},
    )
    found = named(compiled(document))
    assert [found[name].inputs["rows"][0].item for name in ("each-0", "each-1", "all")] == [0, 1, -1]


def test_one_shard_is_no_shard(compiled: Compile) -> None:
    document = operators(out={"type": "data.map", "inputs": {"rows": {"rows": [{"a": 1}]}}, "shards": 1})
    assert order(compiled(document)) == ["out"]


def test_foreach_makes_one_operator_per_item_and_references_get_them_in_order(compiled: Compile) -> None:
    document = operators(
        each=noop(foreach={"item": [30, 10, 20]}, **{"with": {"nonce": "${item}"}}),
        second=noop(inputs={"after": "each-1.out"}),
        all=noop(inputs={"after": "each.out"}),
    )
    result = compiled(document)
    assert [named(result)[f"each-{n}"].params["nonce"] for n in range(3)] == [30, 10, 20]
    names = order(result)
    assert [names[source.op] for source in named(result)["all"].inputs["after"]] == ["each-0", "each-1", "each-2"]
    assert [names[source.op] for source in named(result)["second"].inputs["after"]] == ["each-1"]


@pytest.mark.parametrize(
    "foreach",
    [[1, 2], {"item": [1, 2]}, "${params.list}", {"item": "${params.list}"}],
    ids=["list", "item", "param", "item-param"],
)
def test_foreach_goes_over_lists_of_any_form(compiled: Compile, foreach: Any) -> None:
    document = operators(each=noop(foreach=foreach, **{"with": {"nonce": "${item}"}}))
    document["params"] = {"list": {"type": "list", "default": [1, 2]}}
    assert [operator.params["nonce"] for operator in compiled(document).manifest.operators] == [1, 2]


def test_foreach_knows_ranges_indexes_and_parts_of_items(compiled: Compile) -> None:
    ranged = operators(
        first=noop(foreach={"range": 3}, **{"with": {"nonce": "${index}"}}),
        then=noop(foreach={"range": "${params.n}"}, inputs={"after": "first-${index}.out"}),
        parts=noop(foreach=[{"n": 4, "p": -2}], **{"with": {"nonce": "${item.n}"}}, priority="${item.p}"),
    )
    ranged["params"] = {"n": {"type": "int", "default": 3}}
    result = compiled(ranged)
    found, names = named(result), order(result)
    assert [names[found[f"then-{n}"].inputs["after"][0].op] for n in range(3)] == ["first-0", "first-1", "first-2"]
    assert (found["parts-0"].params["nonce"], found["parts-0"].priority) == (4, -2)


def test_foreach_and_shards_go_together(compiled: Compile) -> None:
    document = operators(
        each={"type": "data.map", "foreach": {"range": 2}, "shards": 2, "inputs": {"rows": {"rows": [{"a": 1}]}}},
        out={"type": "data.concat", "inputs": {"rows": "each"}},
    )
    result = compiled(document)
    names = order(result)
    assert len(names) == 2 * 4 + 1
    assert [names[source.op] for source in named(result)["out"].inputs["rows"]] == ["each-0", "each-1"]


def test_a_whole_reference_keeps_its_type_and_inside_of_text_becomes_text(compiled: Compile) -> None:
    document = operators(out={"type": "data.map", "inputs": {"rows": {"value": 0}}})
    document["params"] = {
        "n": {"type": "int", "default": 3},
        "f": {"type": "float", "default": 2},
        "b": {"type": "bool", "default": True},
        "l": {"type": "list", "default": [1, {"a": None}]},
    }
    text = "${params.n} ${params.b} ${params.l} $${params.n} ${params.f}"
    document["operators"]["out"] = {
        "type": "python.call",
        "function": "f",
        "source": "def f(**given):\n    return '${params.n}'\n",
        "with": {"args": {"whole": "${params.l}", "text": text, "f": "${params.f}", "deep": [{"x": "${params.n}"}]}},
    }
    args = compiled(document).manifest.operators[0].params["args"]
    assert args == {
        "whole": [1, {"a": None}],
        "text": '3 true [1,{"a":null}] ${params.n} 2.0',
        "f": 2.0,
        "deep": [{"x": 3}],
    }


def test_the_value_of_a_parameter_is_not_substituted_again(compiled: Compile) -> None:
    document = operators(out={"type": "data.map", "inputs": {"rows": {"rows": [{"a": "${params.s}"}]}}})
    document["params"] = {"s": {"type": "str", "default": "${params.s} ${item}"}}
    store = MemoryStore()
    result = compile_document(document, base=None, store=store)
    assert read_rows(store, result.roots[0]) == [{"a": "${params.s} ${item}"}]


def test_inputs_have_five_forms(folder: Path) -> None:
    store = MemoryStore()
    document = operators(
        out={
            "type": "python.call",
            "function": "code.py:f",
            "inputs": {
                "file": {"path": "prompts.jsonl"},
                "folder": {"path": "model"},
                "rows": {"rows": [{"b": 1, "a": 2}]},
                "value": {"value": {"x": [1]}},
                "several": [{"value": 1}, {"value": 2}],
            },
        }
    )
    (folder / "code.py").write_text("def f(**ports): ...\n")
    first = compile_document(document, base=folder, store=store)
    inputs = first.manifest.operators[0].inputs
    refs = {port: [source.ref for source in sources] for port, sources in inputs.items()}
    kinds = {port: [ref.kind for ref in found if ref] for port, found in refs.items()}
    assert kinds == {
        "file": ["file"],
        "rows": ["rows"],
        "value": ["value"],
        "folder": ["folder"],
        "several": ["value", "value"],
    }
    rows, value = refs["rows"][0], refs["value"][0]
    assert rows is not None
    assert read_rows(store, rows) == [{"b": 1, "a": 2}]
    assert value is not None
    assert read_value(store, value) == {"x": [1]}
    by_cid = {
        "cid": "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy",
        "kind": "file",
        "digest": "ab" * 32,
        "size": 7,
    }
    document = operators(out={"type": "data.load", "inputs": {"file": by_cid}, "with": {"format": "csv"}})
    second = compile_document(document, base=None, store=store)
    assert second.roots == []  # the mesh holds it, not the author
    ref = second.manifest.operators[0].inputs["file"][0].ref
    assert ref is not None
    assert (ref.size, ref.digest.hex()) == (7, "ab" * 32)


def test_outputs_are_the_ports_that_nobody_consumes(compiled: Compile, workflow: dict[str, Any]) -> None:
    del workflow["outputs"]
    workflow["operators"]["again"] = {"type": "data.concat", "inputs": {"rows": ["scored", "prompts.rows"]}}
    outputs = compiled(workflow).manifest.outputs
    assert sorted(outputs) == ["adapter.adapter", "adapter.metrics", "again"]


def test_an_output_of_a_foreach_is_one_per_item(compiled: Compile) -> None:
    document = operators(each=noop(foreach={"range": 2}))
    document["outputs"] = {"done": "each.out"}
    assert sorted(compiled(document).manifest.outputs) == ["done-0", "done-1"]


def test_settings_of_the_workflow_hold_where_an_operator_says_nothing(compiled: Compile) -> None:
    document = operators(a=noop(), b=noop(priority=2, share="private", deadline_s=5, **{"with": {"nonce": 1}}))
    document |= {"share": "mesh", "priority": 1, "deadline_s": 600}
    found = named(compiled(document))
    assert (found["a"].share, found["a"].priority, found["a"].deadline_s) == ("mesh", 1, 600.0)
    assert (found["b"].share, found["b"].priority, found["b"].deadline_s) == ("private", 2, 5.0)


def test_everything_downstream_of_a_private_operator_is_private(compiled: Compile) -> None:
    document = operators(
        z=noop(share="private"), y=noop(inputs={"after": "z"}), x=noop(inputs={"after": "y"}), free=noop(**{"with": {"nonce": 1}})
    )
    found = named(compiled(document))
    assert {name: operator.share for name, operator in found.items()} == {
        "z": "private",
        "y": "private",
        "x": "private",
        "free": "",
    }


def test_paths_given_as_parameters_stand_from_the_current_folder(
    compiled: Compile, tmp_path: Path, workflow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "here")
    source = named(compiled(workflow, params={"file": "mine.jsonl"}))["prompts"].inputs["file"][0]
    assert source.ref is not None
    assert source.ref.size == 3


def test_call_pins_the_python_version_and_the_code(compiled: Compile, folder: Path, workflow: dict[str, Any]) -> None:
    first = named(compiled(workflow))["kept"]
    assert first.params["function"] == "keep"
    assert first.params["python"].startswith("3.")
    (folder / "code.py").write_text("def keep(rows, best=1):\n    return rows[best:]\n")
    second = named(compiled(workflow))["kept"]
    assert first.code is not None
    assert second.code is not None
    assert first.code.digest != second.code.digest


def test_effects_are_never_pure(compiled: Compile, workflow: dict[str, Any]) -> None:
    workflow["operators"]["kept"]["with"]["effect"] = True
    assert named(compiled(workflow))["kept"].determinism == "effect"


def test_a_document_from_the_wire_needs_no_files(compiled: Compile) -> None:
    document = operators(
        rows={"type": "data.concat", "inputs": {"rows": {"rows": [{"a": 1}]}}},
        f={"type": "python.call", "function": "f", "source": "def f(rows): return 1", "inputs": {"rows": "rows"}},
        g={"type": "llm.generate", "inputs": {"rows": "rows"}, "with": {"model": "hf:org/name@main"}},
    )
    assert len(compiled(document, base=None).manifest.operators) == 3


def test_checking_reads_no_content_and_tells_what_would_come(folder: Path, workflow: dict[str, Any]) -> None:
    (folder / "w.json").write_text(json.dumps(workflow))
    checked = check_file(folder / "w.json")
    assert (checked.name, checked.operators, checked.outputs) == ("my-flow", 5, ["adapter", "kept"])


def test_a_manifest_larger_than_a_block_is_refused(compiled: Compile) -> None:
    with pytest.raises(Exception, match="compiled workflow has"):
        compiled(operators(each=noop(foreach={"range": 20_000}, **{"with": {"nonce": "${item}"}})))
