"""Functions taken from a running program: what they need goes with them, or they are refused."""

from __future__ import annotations

import functools
import json
import math
import statistics as st
from collections.abc import Callable
from json import dumps
from typing import Any

import pytest

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.capture import capture_function

FACTOR = 2.5
WORDS = {"good": [1, 2], "bad": None}
OPEN = object()


def helper(x: float) -> float:
    return math.floor(x * FACTOR)


def uses_much(rows: list[dict[str, Any]], at: str = dumps([1])) -> Any:
    """Use imports, constants and another function."""
    inner = [helper(row["x"]) for row in rows]

    def nested() -> Any:
        return WORDS["good"], json.loads(at)

    return [st.mean(inner), nested()]


def countdown(n: int) -> int:
    return n and countdown(n - 1)


def uses_open() -> Any:
    return OPEN


async def is_async() -> None: ...


@functools.cache
def is_decorated() -> None: ...


class Box:
    def method(self) -> None: ...


def run(source: str, name: str, *args: Any) -> Any:
    """Run captured source as a node does: by itself."""
    space: dict[str, Any] = {"__name__": "captured"}
    exec(compile(source, "captured", "exec"), space)
    return space[name](*args)


def test_a_function_takes_along_what_it_uses() -> None:
    rows = [{"x": 1.0}, {"x": 2.0}]
    assert run(capture_function(uses_much), "uses_much", rows) == uses_much(rows)


def test_a_function_may_call_itself() -> None:
    assert run(capture_function(countdown), "countdown", 3) == 0


def test_constants_around_a_function_are_pinned() -> None:
    def make(step: int) -> Callable[[int], int]:
        def add(x: int) -> int:
            return x + step

        return add

    assert run(capture_function(make(3)), "add", 4) == 7
    assert capture_function(make(3)) == capture_function(make(3))
    assert capture_function(make(3)) != capture_function(make(4))


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda rows: rows, "lambda"),
        (uses_open, "'OPEN', a object, which cannot be pinned down"),
        (is_async, "async"),
        (is_decorated, "not a plain function"),
        (Box().method, "not a plain function"),
        (len, "not a plain function"),
        (functools.partial(helper, 1), "not a plain function"),
    ],
)
def test_what_cannot_be_pinned_down_is_refused_with_a_way_out(function: Callable[..., Any], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        capture_function(function)
    assert part in caught.value.message
    assert caught.value.hint


def test_a_function_around_an_open_value_is_refused() -> None:
    things = [object()]

    def closes_over() -> Any:
        return things

    with pytest.raises(UsageError, match="'things', a list"):
        capture_function(closes_over)


def test_a_function_without_source_is_refused() -> None:
    space: dict[str, Any] = {}
    exec("def made(): return 1", space)
    with pytest.raises(UsageError, match="source of made cannot be found"):
        capture_function(space["made"])
