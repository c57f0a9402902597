"""The core against a dumb oracle, in random worlds full of misfortune. One failing seed is repeated by its number alone."""

from __future__ import annotations

import os
import random

import msgspec
import pytest
from tests.hash_seeds import told_under
from tests.unit.scheduler.oracle import judge
from tests.unit.scheduler.workload import random_requests, random_workflow
from tests.unit.scheduler.world import SETTINGS, Faults, Request, World

from flowmesh_mesh.manifest import ResultRecord, decode_record, record_cid
from flowmesh_scheduler.core.settings import Settings

SEEDS = int(os.environ.get("FLOWMESH_SEEDS", "60"))
"""Worlds per kind; more of them with FLOWMESH_SEEDS=500."""

CALM = Faults(lost=0, twice=0, kill=0, cut=0, forget=0, leader=0, leader_cut=0, until_us=2_000_000)
KINDS = {
    "calm": CALM,
    "unreliable messages": Faults(lost=0.15, twice=0.2, delay_s=0.5, kill=0, cut=0, forget=0, leader=0, leader_cut=0),
    "dying nodes": Faults(kill=0.3, cut=0, forget=0, leader=0, leader_cut=0),
    "cut cables": Faults(kill=0, cut=0.4, forget=0, leader=0, leader_cut=0),
    "forgetful disks": Faults(kill=0, cut=0, forget=0.6, leader=0, leader_cut=0),
    "many leaders": Faults(kill=0, cut=0, forget=0, leader=0.4, leader_cut=0.2),
    "everything": Faults(lost=0.05, twice=0.1, delay_s=0.2, kill=0.1, cut=0.1, forget=0.2, leader=0.1, leader_cut=0.1),
}


def play(kind: str, seed: int, *, records: bool = False) -> tuple[World, list[Request]]:
    """Play one world to its end."""
    draw = random.Random(f"{kind} {seed}")
    world = World(draw.randrange(1 << 30), KINDS[kind], nodes=draw.randint(1, 4))
    world.records = records
    requests = random_requests(draw)
    if kind == "calm":
        for node in list(world.nodes.values())[1:]:
            node.lacks_model = draw.random() < 0.5
    for request in requests:
        world.submit(request, at_s=draw.random() * 10)
        if draw.random() < 0.1:
            world.cancel(request, draw.random() * 15)
    world.run_until_calm()
    return world, requests


def compare(world: World, request: Request) -> None:
    """Assert that a run ended as the oracle says."""
    pair = (request.tenant, request.run)
    end, verdict = world.ended[pair], judge(request.manifest)
    if end.reason == "cancelled":
        assert request.is_cancelled
        return
    expected = {word: verdict.states.count(word) for word in set(verdict.states)}
    assert end.counts == expected
    assert (end.reason == "succeeded") == verdict.succeeds
    assert world.state is not None
    for name, output in request.manifest.outputs.items():
        known = verdict.outputs[output.op]
        if known is not None:
            assert [ref.digest for ref in end.outputs[name]] == [ref.digest for ref in known[output.port]]
        if verdict.succeeds:
            record = decode_record(_block(world, end.records[name]), ResultRecord)
            assert record.outputs[output.port] == end.outputs[name]
    view = world.views.get(pair, {})
    run = world.state.runs.get(pair)
    if run is not None:
        assert all(run.vertices[index].state.value == word for index, word in view.items())


def _block(world: World, record: bytes) -> bytes:
    return next(block for block in world.results.values() if record_cid(block) == record)


@pytest.mark.parametrize("kind", KINDS)
def test_every_accepted_run_ends_as_the_oracle_says(kind: str) -> None:
    for seed in range(SEEDS):
        try:
            world, requests = play(kind, seed)
            for request in requests:
                compare(world, request)
        except AssertionError as error:
            raise AssertionError(f"kind {kind!r}, seed {seed}: {error}") from error


UNFOLDED = msgspec.structs.replace(SETTINGS, fold_hops=0, speculation_share=0.0)


def test_in_a_calm_world_every_key_is_computed_once() -> None:
    """Without folding, whose nodes do not know of a hop whether somebody else is at it, and without copies of stragglers."""
    for seed in range(SEEDS):
        draw = random.Random(seed)
        world = World(seed, CALM, settings=UNFOLDED)
        for request in random_requests(draw, is_kind=True, count=4):
            world.submit(request, at_s=draw.random())
        world.run_until_calm()
        assert world.executions == len(world.results), f"seed {seed}"
        assert {generation for _, generation in world.results} == {0}


def test_folded_or_not_a_calm_world_makes_the_same_results_of_the_same_keys() -> None:
    folded = 0
    for seed in range(SEEDS):
        made = []
        for settings in (SETTINGS, UNFOLDED):
            world = World(seed, CALM, settings=settings)
            for request in random_requests(random.Random(seed), is_kind=True, count=4):
                world.submit(request)
            world.run_until_calm()
            records = {slot: decode_record(block, ResultRecord) for slot, block in world.results.items()}
            made.append({slot: (record.result, record.operator) for slot, record in records.items()})
            folded += max(0, len(world.results) - len(world.given)) if settings is SETTINGS else 0
        assert made[0] == made[1], f"seed {seed}"
    assert folded, "nothing was folded"


def test_a_node_that_lies_cannot_keep_a_run_from_its_end_nor_answer_for_another() -> None:
    for seed in range(SEEDS):
        draw = random.Random(f"saboteur {seed}")
        world = World(seed, Faults(kill=0.05, cut=0.05, forget=0.05), nodes=3, settings=Settings(nodes_lost_limit=1000))
        world.nodes["n1"].is_saboteur = True
        requests = random_requests(draw, is_kind=True)
        for request in requests:
            world.submit(request, at_s=draw.random() * 5)
        try:
            world.run_until_calm(limit_s=2000)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        reasons = {end.reason for end in world.ended.values()}
        assert reasons <= {"succeeded", "internal", "input-missing"}, f"seed {seed}: {reasons}"
        receipts = [decode_record(block, ResultRecord).receipt for block in world.results.values()]
        assert all(world.given[receipt.assignment] == receipt.node for receipt in receipts), f"seed {seed}"


def test_the_same_seed_gives_the_same_commands() -> None:
    for kind in KINDS:
        first, second = (play(kind, 1, records=True)[0] for _ in range(2))
        assert first.digest.hexdigest() == second.digest.hexdigest(), kind


def test_the_order_of_sets_does_not_show_in_commands() -> None:
    """The same worlds under several seeds of the hash function."""
    code = (
        "from tests.property.test_scheduler import *\n"
        "for kind in KINDS:\n for seed in range(3): print(kind, seed, play(kind, seed, records=True)[0].digest.hexdigest())"
    )
    told = told_under(("1", "2", "3"), code, timeout_s=100)
    assert told[0] == told[1] == told[2]
    assert len(told[0]) == 3 * len(KINDS)


def test_a_deadline_ends_a_run_or_the_run_ends_before() -> None:
    for seed in range(SEEDS):
        draw = random.Random(seed)
        world = World(seed, KINDS["everything"])
        flows = [random_workflow(draw, "flow", is_kind=False, deadline_s=draw.choice((5.0, 20.0))) for _ in range(3)]
        requests = [Request("ta", f"r{number}", flow) for number, flow in enumerate(flows)]
        for request in requests:
            world.submit(request)
        world.run_until_calm()
        for request in requests:
            end = world.ended["ta", request.run]
            has_deadline = any(o.deadline_s for o in request.manifest.operators)
            if has_deadline and end.reason == "timeout" and end.actor == "scheduler":
                continue
            compare(world, request)


def test_attempts_of_random_worlds_go_on_from_checkpoints() -> None:
    worlds = [play(kind, seed)[0] for kind in ("dying nodes", "everything") for seed in range(3)]
    assert sum(world.checkpoints.resumed for world in worlds) > 0
