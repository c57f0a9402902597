"""What the loss of a node costs an operator of a million rows: that node's shards, counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from tests.faults.checkers import is_settled
from tests.faults.loop import BEGIN_S
from tests.faults.workload import Order, prepare, write_source
from tests.faults.world import World, simulated, watched

ROWS = 1_000_000
SHARDS = 100


def document() -> dict[str, Any]:
    return {
        "apiVersion": "flowmesh/v1",
        "name": "shards",
        "operators": {
            "table": {"type": "data.load", "inputs": {"file": {"path": "rows.jsonl"}}},
            "all": {
                "type": "data.map",
                "inputs": {"rows": "table.rows"},
                "with": {"columns": {"m": "{{ n }}!"}},
                "shards": SHARDS,
            },
        },
    }


def _is_amid(world: World) -> bool:
    """Tell whether half of the shards are done, and the node that will be lost is at work on one."""
    shards = [each for each in world.bench.executions if each.type == "data.map"]
    is_at_work = any(each.node == world.nodes[0].name and each.how == "running" for each in shards)
    return is_at_work and sum(each.how == "settled" for each in shards) >= SHARDS // 2


async def _run(world: World) -> None:
    for machine in world.machines:
        machine.boot()
    while not _is_amid(world) and world.loop.time() < BEGIN_S + 300.0:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    world.nodes[0].kill(is_wanted=False)
    while not is_settled(world) and world.loop.time() < BEGIN_S + 900.0:  # noqa: ASYNC110
        await asyncio.sleep(1.0)


def test_a_lost_node_costs_an_operator_of_a_million_rows_that_nodes_shards_alone() -> None:
    with simulated(7) as (loop, folder):
        documents = folder / "documents"
        write_source(documents)
        (documents / "rows.jsonl").write_text('{"n":1}\n' * ROWS)
        order = Order("team-a", "run-1", 2.0, document())
        prepare(order, documents)
        assert sum(operator.type == "data.map" for operator in order.manifest.operators) == SHARDS
        world = World(7, folder, loop)
        world.speculates = False
        world.add(2, 4, [order])
        with watched(world):
            loop.run_until_complete(_run(world))
        (end,) = [told for told in world.history.told if told.state not in ("accepted", "running")]
        assert end.state == "succeeded", end.body
        assert end.body["outputs"] == order.digests
        shards = [each for each in world.bench.executions if each.type == "data.map"]
        assert not world.failures
    killed = world.nodes[0].name
    times = Counter(each.key for each in shards)
    assert len(times) == SHARDS
    of_the_lost = {each.key for each in shards if each.node == killed}
    in_flight = {each.key for each in shards if each.node == killed and each.how == "running"}
    repeated = {key for key, count in times.items() if count > 1}
    assert in_flight
    assert len(of_the_lost) >= len(in_flight) + 5, "it had done some already"
    assert in_flight <= repeated <= of_the_lost, (len(in_flight), len(repeated), len(of_the_lost))
    assert len(shards) - SHARDS == len(repeated)
    assert len(repeated) < SHARDS / 2
