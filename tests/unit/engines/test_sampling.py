"""Draws of one row: reproducible, and distributed as they should be."""

from __future__ import annotations

import math

import pytest

numpy = pytest.importorskip("numpy")

from flowmesh_node.operators import sampling  # noqa: E402

LOGITS = numpy.log(numpy.array([0.5, 0.25, 0.15, 0.1], dtype=numpy.float32))


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert sampling.draw(numpy.array([0.0, 2.0, 2.0], dtype=numpy.float32), 0, 1.0, 0.9) == 1


def test_draws_follow_the_probabilities() -> None:
    name = sampling.stream(3, [1, 2, 3], 0)
    drawn = [sampling.draw(LOGITS, 1.0, 1.0, sampling.uniform(name, step)) for step in range(4000)]
    shares = [drawn.count(token) / len(drawn) for token in range(4)]
    assert shares == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)


def test_temperature_sharpens() -> None:
    name = sampling.stream(3, [1], 0)
    drawn = [sampling.draw(LOGITS, 0.25, 1.0, sampling.uniform(name, step)) for step in range(1000)]
    assert drawn.count(0) / len(drawn) == pytest.approx(0.5**4 / (0.5**4 + 0.25**4 + 0.15**4 + 0.1**4), abs=0.03)


@pytest.mark.parametrize(("top_p", "allowed"), [(0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_holds_the_fewest_tokens_that_reach_top_p(top_p: float, allowed: set[int]) -> None:
    name = sampling.stream(3, [1], 0)
    assert {sampling.draw(LOGITS, 1.0, top_p, sampling.uniform(name, step)) for step in range(500)} == allowed


def test_a_wide_nucleus_is_the_same_as_a_full_sort() -> None:
    generator = numpy.random.default_rng(1)
    weights = numpy.exp(generator.normal(size=5000))
    order = numpy.argsort(-weights, kind="stable")
    total = numpy.cumsum(weights[order])
    expected = order[: int(numpy.searchsorted(total, 0.9 * weights.sum())) + 1]
    assert numpy.array_equal(sampling._nucleus(weights, 0.9), expected)


def test_equal_weights_are_cut_by_number() -> None:
    assert list(sampling._nucleus(numpy.ones(1000), 0.5)) == list(range(500))


def test_streams_differ_by_seed_prompt_and_sample() -> None:
    streams = {sampling.stream(seed, prompt, sample) for seed in (0, 1) for prompt in ([1, 2], [2, 1]) for sample in (0, 1)}
    assert len(streams) == 8


def test_uniform_numbers_are_in_their_interval_and_stay_what_they_are() -> None:
    name = sampling.stream(7, [5, 6], 2)
    numbers = [sampling.uniform(name, step) for step in range(1000)]
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / 1000 == pytest.approx(0.5, abs=0.03)
    # Written down: results that were published must come out again.
    assert numbers[0] == 0.6592894242289347
    assert sampling.stream(0, [0], 0).hex()[:16] == "c1d213df8ed991c1"


def test_log_probabilities_sum_to_one() -> None:
    logits = numpy.array([3.0, -1.0, 0.5], dtype=numpy.float32)
    assert sum(math.exp(sampling.log_softmax_at(logits, token)) for token in range(3)) == pytest.approx(1.0, abs=1e-12)
