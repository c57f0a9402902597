"""Templates over rows: what they see, and what they must not do."""

from __future__ import annotations

import pytest

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import GenerateParams
from flowmesh_node.operators import text
from flowmesh_node.operators.base import Item


def test_a_template_sees_the_columns_and_the_row() -> None:
    assert text.template("{{ q }}/{{ row['a b'] }}\n")({"q": 1, "a b": "x"}) == "1/x\n"


@pytest.mark.parametrize(
    "source",
    [
        "{{ missing }}",
        "{{ q.__class__.__mro__ }}",
        "{{ q.append(1) }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_fails_says_which(source: str) -> None:
    with pytest.raises(ExecutionError, match="template"):
        text.template(source)({"q": []})


def test_a_template_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ExecutionError, match="bad template"):
        text.template("{{ open")


def test_markup_in_a_row_is_not_rendered_again() -> None:
    assert text.template("{{ q }}")({"q": "{{ secret }} <b>"}) == "{{ secret }} <b>"


def test_parameters_that_do_not_fit_are_told() -> None:
    with pytest.raises(ExecutionError, match="temperature"):
        text.params_of(Item("00", "x", {"model": "m", "temperature": -1.0}), GenerateParams)


def test_a_new_column_keeps_the_order_of_the_old_ones() -> None:
    assert list(text.add_column({"a": 1, "b": 2}, a=3, c=4)) == ["a", "b", "c"]
