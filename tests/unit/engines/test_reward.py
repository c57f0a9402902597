"""Rewards by rules, and rows that go wrong, without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import Rule
from flowmesh_node.operators import reward
from flowmesh_node.operators.base import Batch, Failed, Input, Item, Produced, Row, decode_rows, encode_rows


def item(rows: list[Row], **params: Any) -> Item:
    data = encode_rows(rows)
    return Item("00", "scored", params, {"rows": [Input("rows", "", len(data), len(rows), data)]})


def run(*items: Item) -> list[Produced | Failed]:
    settled: dict[int, Produced | Failed] = {}
    reward.Reward().run(Batch("reward.score", 1, list(items)), settled.__setitem__, lambda line: None)
    return [settled[index] for index in range(len(items))]


def rewards(result: Produced | Failed, column: str = "reward") -> list[float]:
    assert isinstance(result, Produced), result
    return [row[column] for row in decode_rows(result.outputs["rows"][0].data or b"")]


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        (Rule(kind="length", target=4), "one two three four", 0.0),
        (Rule(kind="length", target=4), "one two", -0.5),
        (Rule(kind="length", target=4), "one two three four five", -0.25),
        (Rule(kind="length", target=2), "a b c d e f g h i", -1.0),
        (Rule(kind="length", target=4), "", -1.0),
        (Rule(kind="contains", pattern="Paris"), "It is Paris.", 1.0),
        (Rule(kind="contains", pattern="Paris"), "It is paris.", 0.0),
        (Rule(kind="matches", pattern=r"^\d+$"), "12", 1.0),
        (Rule(kind="matches", pattern=r"^\d+$"), "12a", 0.0),
        (Rule(kind="ends", pattern=".!?"), "Really?  \n", 1.0),
        (Rule(kind="ends", pattern=".!?"), "not at all", 0.0),
        (Rule(kind="ends", pattern=".!?"), "", 0.0),
        (Rule(kind="repeats"), "a b c a b c", -0.25),
        (Rule(kind="repeats"), "a b", 0.0),
        (Rule(kind="repeats"), "x x x x x", -2 / 3),
    ],
)
def test_rules_measure(rule: Rule, text: str, expected: float) -> None:
    assert reward.measure(rule)(text) == pytest.approx(expected)


def test_a_reward_is_the_weighted_sum_and_rows_keep_their_columns() -> None:
    rules = [{"kind": "length", "target": 3, "weight": 2.0}, {"kind": "ends", "pattern": ".", "weight": 0.5}]
    (result,) = run(item([{"id": 1, "completion": "one two three."}, {"id": 2, "completion": "one"}], rules=rules, column="r"))
    assert rewards(result, "r") == pytest.approx([0.5, -4 / 3])
    assert isinstance(result, Produced)
    assert [list(row) for row in decode_rows(result.outputs["rows"][0].data or b"")] == [["id", "completion", "r"]] * 2


def test_a_bad_item_fails_alone_and_says_why() -> None:
    rules = [{"kind": "ends", "pattern": "."}]
    good, absent, senseless, expression, spelling = run(
        item([{"completion": "Yes."}], rules=rules),
        item([{"completion": "Yes."}, {"answer": "Yes."}], rules=rules),
        item([{"completion": "Yes."}], rules=[{"kind": "length"}]),
        item([{"completion": "Yes."}], rules=[{"kind": "matches", "pattern": "(("}]),
        item([{"completion": "Yes."}], rules=rules, completion="{{ completion"),
    )
    assert rewards(good) == [1.0]
    told = [result.error for result in (absent, senseless, expression, spelling) if isinstance(result, Failed)]
    assert len(told) == 4
    assert "row 1" in told[0]
    assert "'completion' is undefined" in told[0]
    assert "target" in told[1]
    assert "regular expression" in told[2]
    assert "bad template" in told[3]


def test_no_rows_are_no_rows() -> None:
    (result,) = run(item([], rules=[{"kind": "repeats"}]))
    assert rewards(result) == []


def test_a_pattern_is_needed_where_it_means_something() -> None:
    with pytest.raises(ExecutionError, match="pattern"):
        reward.measure(Rule(kind="contains"))


def test_rules_run_where_torch_cannot_be_imported() -> None:
    source = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; sys.modules['numpy'] = None\n"
        "from flowmesh_node.operators.reward import Reward\n"
        "from flowmesh_node.operators.base import *\n"
        "rows = encode_rows([{'completion': 'Yes.'}])\n"
        "item = Item('00', 'x', {'rules': [{'kind': 'ends', 'pattern': '.'}]}, {'rows': [Input('rows', '', 1, 1, rows)]})\n"
        "batch = Batch('reward.score', 1, [item])\n"
        "operator = Reward(); operator.load(batch); operator.run(batch, lambda i, r: print(r.outputs['rows'][0].data), print)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert '"reward":1.0' in done.stdout
