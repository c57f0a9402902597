"""How often a training writes a checkpoint."""

from __future__ import annotations

from math import sqrt

import pytest

from flowmesh_node.operators.cadence import BESIDE_MAX, FIRST_S, LEAST_S, OVERHEAD_MAX, Cadence


def test_the_interval_is_the_one_that_costs_least() -> None:
    cadence = Cadence(hazard_per_hour=2.0)
    cadence.note_stall(0.5)
    assert cadence.interval_s == pytest.approx(sqrt(2 * 0.5 * 1800))


def test_the_first_one_comes_before_anything_was_measured() -> None:
    assert Cadence().pause_s == FIRST_S


def test_a_node_that_is_lost_more_often_writes_more_often() -> None:
    rare, often = Cadence(hazard_per_hour=0.1, stall_s=0.3), Cadence(hazard_per_hour=10.0, stall_s=0.3)
    assert often.interval_s < rare.interval_s


def test_training_stands_still_for_a_small_share_of_the_time_however_often_nodes_are_lost() -> None:
    cadence = Cadence(hazard_per_hour=10_000.0, stall_s=3.0)
    assert cadence.stall_s / cadence.interval_s <= OVERHEAD_MAX


def test_a_slow_way_to_the_mesh_is_not_filled_with_checkpoints() -> None:
    cadence = Cadence(hazard_per_hour=1000.0, stall_s=0.001)
    cadence.note_kept(20.0)
    assert cadence.behind_s / cadence.interval_s <= BESIDE_MAX


def test_a_checkpoint_that_costs_nothing_is_still_not_written_all_the_time() -> None:
    assert Cadence(hazard_per_hour=1e6, stall_s=1e-6).interval_s == LEAST_S


def test_the_time_until_the_mesh_holds_it_is_taken_off_but_never_more_than_half() -> None:
    cadence = Cadence(fixed_s=2.0, behind_s=0.5)
    assert cadence.pause_s == 1.5
    cadence.behind_s = 30.0
    assert cadence.pause_s == 1.0


def test_a_way_that_has_become_slow_is_believed_at_once_and_forgotten_slowly() -> None:
    cadence = Cadence(behind_s=0.1)
    cadence.note_kept(0.5)
    assert cadence.behind_s == 0.5
    cadence.note_kept(0.1)
    assert 0.1 < cadence.behind_s < 0.5


def test_one_slow_stall_does_not_change_everything() -> None:
    cadence = Cadence(stall_s=0.1)
    cadence.note_stall(1.1)
    assert cadence.stall_s == pytest.approx(0.4)
