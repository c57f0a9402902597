"""Into how many shards an operator is best cut."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.unit.scheduler.desk import Desk

from flowmesh_mesh.messages import Device
from flowmesh_mesh.sharding import Choice, Wish
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.sharding import Task, choose, shard_count

SETTINGS = Settings()
MODEL = "sha256:" + "ab" * 32
GPU = (Device("cuda", "NVIDIA GeForce RTX 4090", memory_bytes=24 * 2**30),)
TYPES = ("llm.generate", "data.map", "data.split", "data.concat")


def task(rows: int, row_s: float, shard_s: float = 0.1, cut_s: float = 0.05, places: int = 1) -> Task:
    return Task(rows, row_s, shard_s, cut_s, places)


def generation(rows: int, **fields: Any) -> Wish:
    known = {"params": {"max_new_tokens": 64, "samples": 1}, "models": {"model": "hf:a/b@c"}, "size_bytes": 400 * max(rows, 0)}
    return Wish(type="llm.generate", rows=rows, **{**known, **fields})


def ask(desk: Desk, wish: Wish) -> Choice:
    """Return what a desk answers; nothing about it may change."""
    before = (len(desk.state.costs._lines), desk.state.costs.version)
    found = choose(desk.state, desk.state.costs.beside({MODEL: 3_000_000_000}), wish, {"model": MODEL} if wish.models else {})
    assert before == (len(desk.state.costs._lines), desk.state.costs.version)
    return found


def farm(*names: str, **fields: Any) -> Desk:
    desk = Desk()
    desk.join(*names, types=TYPES, **fields)
    return desk


# --- the rules


def test_a_shard_takes_no_longer_than_what_a_lost_node_may_cost() -> None:
    found = task(10_000, 0.3)
    assert found.seconds(shard_count(found, SETTINGS)) <= SETTINGS.shard_s
    assert found.seconds(shard_count(found, SETTINGS) // 2) > SETTINGS.shard_s, "no more shards than it takes"


def test_dear_shards_are_longer_rather_than_more_overhead() -> None:
    found = task(10_000, 0.3, shard_s=10.0)
    count = shard_count(found, SETTINGS)
    assert count > 1
    assert found.overhead(count) <= SETTINGS.shard_overhead < found.overhead(2 * count)
    assert found.seconds(count) > SETTINGS.shard_s


def test_all_places_get_something_where_there_is_enough_for_them() -> None:
    assert shard_count(task(1_000, 0.05, places=8), SETTINGS) == 8
    assert shard_count(task(1_000, 0.0005, places=8), SETTINGS) == 1


def test_places_that_no_power_of_two_fits_get_more_shards_so_that_none_waits_long_for_the_others() -> None:
    assert shard_count(task(10_000, 0.02, places=3), SETTINGS) == 8
    assert shard_count(task(10_000, 0.02, places=6), SETTINGS) == 16
    assert shard_count(task(10_000, 0.02, places=5), SETTINGS) == 8


def test_where_a_power_of_two_would_cost_too_much_there_are_as_many_shards_as_places() -> None:
    assert shard_count(task(10_000, 0.001, places=3), SETTINGS) == 3
    assert shard_count(task(3_109, 2.0, shard_s=3.0, places=41), SETTINGS) == 82, "or twice as many"


def test_there_are_never_more_shards_than_rows() -> None:
    assert shard_count(task(3, 1_000.0), SETTINGS) == 2
    assert shard_count(task(3, 1_000.0, places=3), SETTINGS) == 3
    assert shard_count(task(1, 1_000.0, places=3), SETTINGS) == 1
    assert shard_count(task(0, 0.0, places=3), SETTINGS) == 1


def test_there_are_never_more_shards_than_a_document_may_have() -> None:
    assert shard_count(task(10**9, 100.0), SETTINGS) == 65_536


def test_small_changes_of_costs_give_the_same_number() -> None:
    assert len({shard_count(task(10_000, 0.2 * factor), SETTINGS) for factor in (1.0, 1.1, 1.25, 1.5)}) == 1


def test_the_length_of_shards_and_their_overhead_are_settings() -> None:
    found = task(10_000, 0.3)
    assert shard_count(found, msgspec.structs.replace(SETTINGS, shard_s=6.0)) == 512
    assert shard_count(found, msgspec.structs.replace(SETTINGS, shard_s=6.0, shard_overhead=0.01)) == 256


# --- on a mesh


def test_generation_on_a_device_is_cut_by_its_costs() -> None:
    found = ask(farm("n1", devices=GPU), generation(20_000))
    assert found.shards > 1
    assert found.shard_s <= SETTINGS.shard_s
    assert found.overhead <= SETTINGS.shard_overhead
    assert (found.rows, found.places, found.samples) == (20_000, 1, 0)


def test_the_same_rows_on_many_nodes_get_a_shard_for_each_of_them() -> None:
    names = [f"n{i}" for i in range(16)]
    assert ask(farm(*names, devices=GPU), generation(20_000)).shards >= 16


def test_a_table_that_is_split_as_slowly_as_it_is_mapped_is_not_cut() -> None:
    found = ask(farm("n1", "n2"), Wish(type="data.map", rows=1_000_000, size_bytes=400_000_000))
    assert found.shards == 1
    assert "5 % overhead" in found.note


def test_unknown_rows_are_one_shard_and_a_word_about_it() -> None:
    found = ask(farm("n1", devices=GPU), generation(-1))
    assert found.shards == 1
    assert "rows: N" in found.note


def test_what_was_measured_counts_more_than_the_prior() -> None:
    desk = farm("n1", devices=GPU)
    before = ask(desk, generation(20_000))
    (klass,) = [klass for klass in desk.state.fleet.classes.values() if klass.nodes]
    for _ in range(30):
        line = desk.state.costs.line(("llm.generate", MODEL), klass.device)
        expected_s = line.seconds(64, 80_000)
        desk.state.costs.note_batch(("llm.generate", MODEL), klass.device, "n1", 64, 80_000, 20.0, 0, 0, 0, expected_s)
    after = ask(desk, generation(20_000))
    assert (before.samples, after.samples) == (0, 30)
    whole_s = after.shards * after.shard_s
    assert whole_s == pytest.approx(20.0 * (20_000 * 164) / 80_000, rel=0.3), "one row has 100 tokens and 64 new ones"


def test_a_node_that_is_far_slower_is_not_counted_on() -> None:
    desk = farm("n1", "n2", devices=GPU)
    desk.join("slow", types=TYPES)
    assert ask(desk, generation(20_000)).places == 2


def test_nodes_that_cannot_run_it_are_not_counted() -> None:
    desk = farm("n1", devices=GPU)
    desk.join("other", types=("flow.noop",), devices=GPU)
    assert ask(desk, generation(20_000)).places == 1


def test_without_an_able_node_a_prior_decides_and_is_told_as_such() -> None:
    found = ask(Desk(), generation(20_000))
    assert found.shards > 1
    assert found.places == 0
    assert "no node can run it now" in found.note


def test_the_same_question_gets_the_same_answer() -> None:
    first = ask(farm("n1", "n2", "n3", devices=GPU), generation(5_000))
    assert ask(farm("n3", "n1", "n2", devices=GPU), generation(5_000)) == first
