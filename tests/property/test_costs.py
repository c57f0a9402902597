"""Whatever is measured, learned costs stay finite, never below zero, never less for more work, and survive being kept."""

from __future__ import annotations

import math

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_scheduler.core.costs import Costs
from flowmesh_scheduler.core.devices import Figures

FIGURES = Figures("some", 100e12, 1000e9, 24 * 2**30, 300, 50)

kinds = st.sampled_from([("flow.delay", ""), ("llm.generate", "sha256:m"), ("python.call", "f@00"), ("flow.noop", "")])
batches = st.tuples(
    kinds,
    st.sampled_from(["d", "e"]),
    st.sampled_from(["n", "m"]),
    st.floats(0, 1e6),
    st.floats(1, 1e9),
    st.floats(0, 1e6),
    st.floats(0, 1e5),
    st.floats(0, 1e5),
    st.floats(0, 1e12),
)


@given(st.lists(batches, max_size=40), st.floats(0, 1e6), st.floats(1, 1e9), st.floats(0, 1e6), st.floats(0, 1e9))
def test_lines_are_finite_never_below_zero_and_grow_with_the_work(
    noted: list[tuple[tuple[str, str], str, str, float, float, float, float, float, float]],
    steps: float,
    units: float,
    more_steps: float,
    more_units: float,
) -> None:
    costs = Costs()
    costs.know_device("d", FIGURES)
    for batch in noted:
        costs.note_batch(*batch)
        for device in ("d", "e", "f"):
            line = costs.line(batch[0], device)
            assert all(math.isfinite(value) and value >= 0 for value in line)
            assert line.seconds(steps + more_steps, units + more_units) >= line.seconds(steps, units) >= 0
        assert 0 < costs.node_ratio(batch[2]) < math.inf
        assert 0 <= costs.fetch_s(batch[2], 1e6) < math.inf


@given(st.lists(batches, max_size=40), batches)
def test_what_is_kept_goes_on_as_if_nothing_had_happened(
    noted: list[tuple[tuple[str, str], str, str, float, float, float, float, float, float]],
    later: tuple[tuple[str, str], str, str, float, float, float, float, float, float],
) -> None:
    costs, other = Costs(), Costs()
    for each in (costs, other):
        each.know_device("d", FIGURES)
    for batch in noted:
        costs.note_batch(*batch)
    assert other.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(costs.dump()))) == 0
    assert other.dump() == costs.dump()
    for each in (costs, other):
        each.note_batch(*later)
    assert other.line(later[0], later[1]) == costs.line(later[0], later[1])
