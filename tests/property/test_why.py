"""Explanations of choices, against the utility itself: terms, flips, and how they are said."""

from __future__ import annotations

import math

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flowmesh_scheduler.core.utility import Factors, score, terms
from flowmesh_scheduler.core.why import OF_BATCH, OF_NODE, Flip, flip, in_words, told

SECONDS = st.one_of(st.just(0.0), st.floats(1e-4, 1e5))
DOLLARS = st.one_of(st.just(0.0), st.floats(1e-9, 1e3))
RATES = st.one_of(st.just(0.0), st.floats(1e-9, 1e-1))

FACTORS = st.builds(
    Factors,
    value_usd=DOLLARS,
    delay_usd_per_s=RATES,
    price_usd_per_s=RATES,
    wait_s=SECONDS,
    load_s=SECONDS,
    load_share=st.floats(0, 1),
    fetch_s=SECONDS,
    exec_s=SECONDS,
    egress_usd=DOLLARS,
    watts=st.floats(0, 1000),
    energy_usd_per_j=st.floats(0, 1e-6),
    hazard_per_s=st.floats(0, 1e-2),
    redo_usd=DOLLARS,
    opportunity_usd_per_s=RATES,
)
PLAIN = Factors(1e-3, 1e-5, 2e-4, 0.0, 0.0, 1.0, 0.0, 1.0)


def put(factors: Factors, name: str, value: float) -> Factors:
    return factors._replace(**{name: value})


@given(FACTORS)
def test_the_terms_sum_to_the_score(factors: Factors) -> None:
    parts = terms(factors)
    assert math.isclose(sum(parts.values()), score(factors), rel_tol=1e-9, abs_tol=1e-12 * max(map(abs, parts.values())))


@settings(max_examples=300)
@given(FACTORS, FACTORS)
@example(PLAIN, PLAIN)
@example(PLAIN, put(PLAIN, "price_usd_per_s", 3e-4))
def test_the_stated_flip_turns_the_choice_and_the_number_before_it_does_not(chosen: Factors, other: Factors) -> None:
    assume(score(other) <= score(chosen))
    for each in flip(chosen, other):
        assert each.now == getattr(other, each.field)
        assert score(put(other, each.field, each.needed)) > score(chosen)
        short = math.nextafter(each.needed, each.now)
        assert score(put(other, each.field, short)) <= score(chosen)


@settings(max_examples=300)
@given(FACTORS, FACTORS)
def test_what_is_said_of_a_flip_turns_the_choice_too(chosen: Factors, other: Factors) -> None:
    assume(score(other) <= score(chosen))
    for each in flip(chosen, other):
        times = told(Flip(each.field, 0.0, 1.0))
        said = told(each) / times
        assert said <= each.needed * (1 + 1e-12) if each.needed < each.now else said >= each.needed * (1 - 1e-12)
        assert math.isclose(said, each.needed, rel_tol=0.011)


@given(FACTORS, FACTORS)
def test_a_choice_that_no_factor_can_turn_has_no_flip_and_one_that_some_can_has(chosen: Factors, other: Factors) -> None:
    assume(score(other) <= score(chosen))
    found = {each.field for each in flip(chosen, other)}
    assert "value_usd" in found  # dear enough, any batch wins
    for name in ("price_usd_per_s", "load_s", "fetch_s", "exec_s", "wait_s"):
        assert (score(put(other, name, 0.0)) > score(chosen)) == (name in found)


@given(FACTORS, FACTORS)
def test_the_smallest_change_comes_first(chosen: Factors, other: Factors) -> None:
    found = flip(chosen, other)
    assert [each.far for each in found] == sorted(each.far for each in found)


@given(FACTORS, FACTORS)
def test_factors_that_both_share_are_never_flipped(chosen: Factors, other: Factors) -> None:
    assert not (OF_NODE | OF_BATCH) & {each.field for each in flip(chosen, other, OF_NODE | OF_BATCH)}


def test_a_dearer_node_would_win_below_the_other_ones_price() -> None:
    cheap, dear = put(PLAIN, "price_usd_per_s", 0.3 / 3600), put(PLAIN, "price_usd_per_s", 0.5 / 3600)
    found = {each.field: each for each in flip(cheap, dear)}
    assert math.isclose(found["price_usd_per_s"].needed * 3600, 0.3, rel_tol=1e-9)
    text = in_words("node-2", found["price_usd_per_s"])
    assert text == "node-2 would win if its price fell to 0.299 $/h (is 0.5)"


def test_an_alternative_that_scored_higher_needs_no_flip() -> None:
    assert flip(PLAIN, put(PLAIN, "value_usd", 1.0)) == []
