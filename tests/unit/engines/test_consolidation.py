"""Rows of a batch that ask for the same are computed once, across operators, and the cost is shared out. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flowmesh_cas.errors import ExecutionError
from flowmesh_node.operators import engine
from flowmesh_node.operators.base import Batch, Failed, Item, Model, Produced, value
from flowmesh_node.operators.causal import Answers, CausalOperator, Work, neighbours


class _Doubling(CausalOperator[None, int, int]):
    """Doubles numbers, two at a time, a second each time."""

    noun = "doubles"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def prepare(self, item: Item, loaded: engine.Loaded) -> Work[None, int]:
        if "bad" in item.params:
            raise ExecutionError("not a number")
        return Work(None, [], list(item.params["numbers"]))

    def answers(self, loaded: engine.Loaded, requests: Iterable[int]) -> Iterator[Answers[int, int]]:
        self.asked = list(requests)
        for first in range(0, len(self.asked), 2):
            part = self.asked[first : first + 2]
            yield Answers({number: 2 * number for number in part}, 1.0)

    def produced(self, work: Work[None, int], answers: Mapping[int, int], loaded: engine.Loaded) -> Produced:
        return Produced({"out": [value([answers[number] for number in work.requests])]}, rows=len(work.requests))


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = cast(engine.Loaded, SimpleNamespace(use_adapter=lambda adapter: None))
    monkeypatch.setattr(engine, "load", lambda model, dtype: fake)


def _run(*numbers: list[int] | str) -> tuple[list[int], dict[int, Produced | Failed]]:
    """Return what was asked of the engine, and the results in the order in which they came."""
    params: list[dict[str, Any]] = [{"bad": 1} if isinstance(each, str) else {"numbers": each} for each in numbers]
    items = [Item(str(place), "x", each) for place, each in enumerate(params)]
    settled: dict[int, Produced | Failed] = {}
    operator = _Doubling()
    operator.run(Batch("x", 1, items, {"model": Model("m", "d", "")}), settled.__setitem__, lambda line: None)
    return operator.asked, settled


def _values(settled: Mapping[int, Produced | Failed]) -> dict[int, bytes | None]:
    return {place: result.outputs["out"][0].data for place, result in settled.items() if isinstance(result, Produced)}


def test_equal_requests_of_all_items_are_computed_once() -> None:
    asked, settled = _run([1, 2, 1], [2, 3], [3, 1])
    assert asked == [1, 2, 3]
    assert _values(settled) == {0: b"[2,4,2]", 1: b"[4,6]", 2: b"[6,2]"}


def test_shared_rows_add_up_to_what_was_saved_and_seconds_to_what_was_spent() -> None:
    asked, settled = _run([1, 2, 1], [2, 3], [3, 1], [4])
    results = [result for _, result in sorted(settled.items()) if isinstance(result, Produced)]
    assert [result.rows_shared for result in results] == [1, 1, 2, 0]
    assert sum(result.rows - result.rows_shared for result in results) == len(asked)
    spent_us = sum(result.exec_us for result in results)
    assert 2_000_000 - len(results) <= spent_us < 3_000_000, "two groups of a second, and a moment to prepare them"


def test_an_item_is_settled_as_soon_as_its_last_row_is_there() -> None:
    _, settled = _run([1, 2, 3], [], [2], [4])
    assert list(settled) == [1, 2, 0, 3]


def test_an_item_that_cannot_be_prepared_fails_alone() -> None:
    asked, settled = _run([1], "bad", [1])
    assert asked == [1]
    assert isinstance(settled[1], Failed)
    assert settled[1].error == "not a number"
    assert _values(settled) == {0: b"[2]", 2: b"[2]"}


def test_requests_of_one_prompt_come_next_to_each_other_in_order_of_arrival() -> None:
    requests = [((7,), 0), ((8, 1), 0), ((7,), 1), ((9,), 0), ((8, 1), 1)]
    assert neighbours(requests, lambda request: request[0]) == [((7,), 0), ((7,), 1), ((8, 1), 0), ((8, 1), 1), ((9,), 0)]
