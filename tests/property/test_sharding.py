"""Whatever an operator costs, the number of shards keeps to its rules."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flowmesh_mesh.vertices import SHARDS_MAX
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.sharding import Task, shard_count

SETTINGS = Settings()

tasks = st.builds(
    Task,
    rows=st.integers(0, 10**9),
    row_s=st.floats(1e-9, 1e4),
    shard_s=st.floats(0, 1e4),
    cut_s=st.floats(0, 1e4),
    places=st.integers(1, 300),
)


@given(tasks)
def test_the_number_is_within_its_bounds(task: Task) -> None:
    assert 1 <= shard_count(task, SETTINGS) <= max(1, min(task.rows, SHARDS_MAX))


@given(tasks)
def test_more_than_one_shard_never_costs_more_than_the_overhead_allowed(task: Task) -> None:
    count = shard_count(task, SETTINGS)
    assert count == 1 or task.overhead(count) <= SETTINGS.shard_overhead * (1 + 1e-9)


@given(tasks)
def test_shards_are_short_and_many_unless_that_would_cost_too_much_or_rows_are_too_few(task: Task) -> None:
    count = shard_count(task, SETTINGS)
    more = max(2 * count, 2 * task.places)
    is_bound = more > min(task.rows, SHARDS_MAX) or task.overhead(more) > SETTINGS.shard_overhead * (1 - 1e-9)
    assert is_bound or (task.seconds(count) <= SETTINGS.shard_s * (1 + 1e-9) and count >= task.places)


@given(tasks)
def test_every_place_gets_a_shard_where_that_costs_little(task: Task) -> None:
    is_cheap = task.places <= task.rows and task.overhead(task.places) <= SETTINGS.shard_overhead * (1 - 1e-9)
    assert not is_cheap or shard_count(task, SETTINGS) >= task.places


@given(tasks, st.integers(1, 10**9))
def test_more_rows_never_mean_fewer_shards(task: Task, more: int) -> None:
    assert shard_count(task._replace(rows=task.rows + more), SETTINGS) >= shard_count(task, SETTINGS)


@given(tasks)
def test_the_number_is_a_power_of_two_or_suits_the_places(task: Task) -> None:
    count = shard_count(task, SETTINGS)
    assert math.log2(count).is_integer() or count in (task.places, 2 * task.places)
