"""What seeds have found, each by itself."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.faults.checkers import is_settled
from tests.faults.loop import BEGIN_S
from tests.faults.simulation import simulate
from tests.faults.workload import Order, prepare, write_source
from tests.faults.world import World, simulated, watched

from flowmesh_mesh.bus import Delivery
from flowmesh_scheduler.requests import Requests


def call(nonce: int, at_s: float) -> Order:
    operators = {"c": {"type": "python.call", "function": "code.py:works", "with": {"args": {"nonce": nonce}}}}
    return Order("team-a", f"run-{nonce}", at_s, {"apiVersion": "flowmesh/v1", "name": "call", "operators": operators})


@pytest.mark.parametrize("how", ["lost", "rotten"])
def test_code_whose_blocks_a_node_has_lost_is_fetched_again(how: str) -> None:
    async def run(world: World) -> None:
        for machine in world.machines:
            machine.boot()
        await asyncio.sleep(20.0)
        store = world.nodes[0].store
        if how == "lost":
            store.delete_many(list(store.cids()))
        else:
            store.rotten.update(store.cids())
        while not is_settled(world) and world.loop.time() < BEGIN_S + 300.0:  # noqa: ASYNC110
            await asyncio.sleep(1.0)

    with simulated(1) as (loop, folder):
        write_source(folder / "documents")
        orders = [call(1, 5.0), call(2, 30.0)]
        for order in orders:
            prepare(order, folder / "documents")
        world = World(1, folder, loop)
        world.add(1, 1, orders)
        with watched(world):
            loop.run_until_complete(run(world))
        assert [told.state for told in world.history.told] == ["accepted", "succeeded"] * 2


@pytest.mark.parametrize(("is_cut_off", "is_held", "answers"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_a_leader_that_may_be_deposed_answers_nothing(is_cut_off: bool, is_held: bool, answers: int) -> None:
    spawned: list[Any] = []

    def spawn(work: Any) -> None:
        spawned.append(work)
        work.close()

    leader = SimpleNamespace(is_cut_off=is_cut_off, lease=SimpleNamespace(is_held=is_held), spawn=spawn)
    requests = Requests(cast("Any", leader))
    for heard in (requests._on_ask, requests._on_put):
        heard(cast("Delivery", SimpleNamespace(subject="fm.ask.T", data=b"")))
    assert len(spawned) == 2 * answers


def test_a_wall_clock_that_jumps_under_a_leader_makes_no_node_seem_silent() -> None:
    report = simulate(95, 10.0)
    assert report.faults["clock-jump"] > 0
    assert report.problems == []
