"""What people type: names, parameters, targets, contents; and what the tree of lineage looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh_cas.cid import RAW, cid_of, cid_text
from flowmesh_cas.errors import UsageError
from flowmesh_mesh.cli.contents import is_cid, lineage_lines, split_target
from flowmesh_mesh.cli.workflows import read_params

CID = cid_text(cid_of(RAW, b"x"))


def test_parameters_are_text_until_the_workflow_says_their_type(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("long\ntext")
    given = ["n=3", "empty=", "equation=a=b", f"file=@{tmp_path}/text"]
    assert read_params(given) == {"n": "3", "empty": "", "equation": "a=b", "file": "long\ntext"}
    assert read_params(None) == {}


@pytest.mark.parametrize("given", [["n"], ["=3"], ["a b=3"], ["n=1", "n=2"], ["n=@/no/such/file"]])
def test_parameters_of_another_form_are_refused(given: list[str]) -> None:
    with pytest.raises(UsageError) as found:
        read_params(given)
    assert found.value.hint


def test_a_target_is_a_run_or_a_part_of_it() -> None:
    assert split_target("abc") == ("abc", None)
    assert split_target("abc.op-1") == ("abc", "op-1")


@pytest.mark.parametrize("text", ["", ".x", "a.", "a.b.c", "a.*", "../etc", "a b", "x" * 300])
def test_targets_that_are_no_names_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        split_target(text)


def test_a_cid_is_known_by_its_form_and_a_damaged_one_is_not_taken_for_a_run() -> None:
    assert is_cid(CID)
    assert not is_cid("abc")
    with pytest.raises(UsageError, match="not a CID"):
        is_cid(CID[:-1] + "!")


def test_the_lineage_names_every_operator_input_and_model_and_repeats_nothing() -> None:
    def record(name: str, inputs: list[dict[str, str | None]], models: dict[str, str] | None = None) -> dict[str, object]:
        fields = {"record": f"rec-{name}", "name": name, "type": "t", "result": f"res-{name}", "node": "n1"}
        return {**fields, "inputs": inputs, "models": models or {}}

    source = {"port": "file", "cid": "in-1", "record": None}
    shared: dict[str, str | None] = {"port": "rows", "cid": "c", "record": "rec-load"}
    found = {
        "roots": ["rec-join"],
        "records": [
            record("load", [source]),
            record("left", [shared], {"model": "sha256:1"}),
            record("join", [shared, {"port": "l", "cid": "c", "record": "rec-left"}]),
        ],
        "inputs": ["in-1"],
        "models": {"wheel:m": "sha256:1"},
        "model_cids": {"wheel:m": "bafkmodel"},
    }
    assert lineage_lines(found) == [
        "join (t) res-join on n1",
        "  rows <- load (t) res-load on n1",
        "    file <- input in-1",
        "  l <- left (t) res-left on n1",
        "    model model: sha256:1",
        "    rows <- load (t) res-load on n1  (as above)",
        "",
        "3 records, 1 inputs given by the author, 1 models",
        "input in-1",
        "model bafkmodel (wheel:m, sha256:1)",
    ]


def test_the_lineage_of_a_long_chain_is_told() -> None:
    count = 5000
    records = [
        {
            "record": f"r{n}",
            "name": f"n{n}",
            "type": "t",
            "result": f"c{n}",
            "inputs": [{"port": "p", "cid": "c", "record": f"r{n - 1}"}] if n else [],
        }
        for n in range(count)
    ]
    lines = lineage_lines({"roots": [f"r{count - 1}"], "records": records, "inputs": [], "models": {}})
    assert len(lines) == count + 2
