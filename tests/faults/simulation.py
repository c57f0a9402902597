"""One seed: a world, a workload, a plan of faults, time to heal, and the verdict of the checkers."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import checkers, faults
from tests.faults.history import History
from tests.faults.loop import BEGIN_S, VirtualLoop
from tests.faults.workload import Author, Order, prepare, write_source
from tests.faults.world import TENANTS, World, simulated, watched

CALM_SHARE = 0.75
"""After this share of the time no fault begins any more, and all that are there are ended."""

HEAL_S = 240.0
"""How long every accepted run may take to its end once nothing disturbs it any more; the longest operator takes 40 s."""


@dataclass(slots=True)
class Report:
    """What came of one seed."""

    seed: int
    minutes: float
    problems: list[str]
    digest: str
    cpu_s: float
    orders: int
    executions: int
    writes: int
    epochs: int
    faults: dict[str, int] = field(default_factory=dict)
    history: History | None = None


def simulate(seed: int, minutes: float = 10.0, kinds: tuple[str, ...] | None = None) -> Report:
    """Run one seed and check it."""
    began_s = time.process_time()
    with simulated(seed) as (loop, folder):
        world = World(seed, folder, loop, is_replicated=seed % 5 == 4)
        orders = _orders(seed, minutes, folder)
        rng = random.Random(f"{seed} shape")
        world.add(2 if rng.random() < 0.7 else 3, rng.randint(2, 4), orders)
        with watched(world):
            loop.run_until_complete(_run(world, loop, minutes, kinds))
        problems = checkers.check(world, orders)
        _note_unfinished(world)
        if loop.failures:
            problems += [f"not caught: {each}" for each in loop.failures[:5]]
        problems += world.failures
        epochs = sum(".epoch." in write.subject for write in world.history.writes)
        counts: dict[str, int] = {}
        for fault in world.history.faults:
            counts[fault.kind] = counts.get(fault.kind, 0) + 1
        return Report(
            seed,
            minutes,
            problems,
            world.history.digest,
            time.process_time() - began_s,
            len(orders),
            len(world.bench.executions),
            len(world.history.writes),
            epochs,
            counts,
            world.history,
        )


def _note_unfinished(world: World) -> None:
    """Write down what the leader thinks of runs that have not ended, for whoever looks into it."""
    leader = world.leader
    if leader is None or leader.service is None or leader.service.leader is None:
        world.history.note("nobody leads")
        return
    state = leader.service.leader.state
    for pair, run in state.runs.items():
        for vertex in run.vertices:
            if run.end is None and vertex.outputs is None:
                work = vertex.work
                held = f"{work.state.name} {sorted(work.issued)} {work.assignment}" if work is not None else "no work"
                world.history.note(f"left: {pair[1]} {vertex.operator.name} {vertex.state.name}: {held}")
    for node in state.nodes.values():
        world.history.note(f"left: {node.name} {node.state} holds {sorted(node.assignments)}")


def _orders(seed: int, minutes: float, folder: Path) -> list[Order]:
    rng = random.Random(f"{seed} workload")
    write_source(folder / "documents")
    orders = Author(rng).orders(TENANTS, max(6, round(minutes * rng.uniform(2.0, 8.0))), minutes * 60 * CALM_SHARE)
    for order in orders:
        prepare(order, folder / "documents")
    return orders


async def _run(world: World, loop: VirtualLoop, minutes: float, kinds: tuple[str, ...] | None) -> None:
    for machine in world.machines:
        world.later(world.rng.uniform(0.0, 1.0), machine.boot)
    world.check_cores()
    plan = faults.Plan(world, random.Random(f"{world.seed} faults"), minutes * 60 * CALM_SHARE, kinds)
    plan.schedule()
    await asyncio.sleep(minutes * 60 * CALM_SHARE)
    plan.end()
    world.heal()
    end_s = BEGIN_S + minutes * 60 * CALM_SHARE + HEAL_S
    calm_s = BEGIN_S + minutes * 60
    while loop.time() < end_s and (loop.time() < calm_s or not checkers.is_settled(world)):  # noqa: ASYNC110
        await asyncio.sleep(1.0)
