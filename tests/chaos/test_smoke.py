"""Chaos itself, in small: faults that hit, a history that holds them, a mesh that gets over them, and nothing left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from chaos.faults import KINDS, Planned, plan
from chaos.history import Fault, History
from chaos.network import Mode, Network
from chaos.processes import Shape
from chaos.seed import run_seed

FAULTS = [
    Planned(1.0, 0.5, "scheduler-kill", 1),
    Planned(2.5, 2.0, "node-kill", 2),
    Planned(3.0, 1.0, "hole", 3),
    Planned(5.0, 0.5, "corrupt", 4),
]


@pytest.mark.timeout(240)
async def test_a_small_mesh_gets_over_a_few_faults_and_nothing_is_lost_doubled_stale_or_wrong(tmp_path: Path) -> None:
    outcome = await run_seed(1, 7.0, tmp_path / "seed", Shape(1, 2, 2), FAULTS)
    assert outcome.verdict.violations == [], outcome.verdict.violations
    counts = outcome.verdict.counts
    assert counts["accepted"] >= 5
    assert counts["verified"] >= 1
    assert counts["epochs"] >= 2, "the leader was killed, and nobody took over"
    assert counts["begun"] >= 1, "no node said what it took up: the check of stale work looks at nothing"
    seen = {fault.kind for fault in History.read(tmp_path / "seed" / "history.jsonl").of(Fault)}
    assert seen == {"scheduler-kill", "node-kill", "hole", "corrupt"}


def test_a_seed_always_plans_the_same_faults_and_all_kinds_come_up() -> None:
    assert plan(7, 180.0) == plan(7, 180.0)
    assert plan(7, 180.0) != plan(8, 180.0)
    planned = [fault for seed in range(20) for fault in plan(seed, 180.0)]
    assert {fault.kind for fault in planned} == set(KINDS)
    assert all(fault.at_s + fault.lasts_s <= 180.0 + 1e-3 for fault in planned)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


@pytest.mark.parametrize("mode", [Mode.HOLE, Mode.HALF_IN, Mode.HALF_OUT])
async def test_what_a_closed_link_holds_arrives_when_it_opens(mode: Mode) -> None:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    network = Network()
    try:
        port = await network.listen("node", "broker", server.sockets[0].getsockname()[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"one")
        assert await asyncio.wait_for(reader.readexactly(3), 5.0) == b"one"
        (link,) = network.of("node")
        link.turn(mode)
        writer.write(b"two")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(3), 0.3)
        link.turn(Mode.OPEN)
        assert await asyncio.wait_for(reader.readexactly(3), 5.0) == b"two"
        writer.close()
    finally:
        await network.close()
        server.close()


@pytest.mark.parametrize("mode", [Mode.CUT, Mode.SWALLOW])
async def test_a_connection_does_not_outlive_a_cut_or_what_was_dropped(mode: Mode) -> None:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    network = Network()
    try:
        port = await network.listen("node", "broker", server.sockets[0].getsockname()[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"one")
        assert await asyncio.wait_for(reader.readexactly(3), 5.0) == b"one"
        (link,) = network.of("node")
        link.turn(mode)
        writer.write(b"two")
        await asyncio.sleep(0.1)
        link.turn(Mode.OPEN)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(3), 5.0)
        fresh_reader, fresh_writer = await asyncio.open_connection("127.0.0.1", port)
        fresh_writer.write(b"new")
        assert await asyncio.wait_for(fresh_reader.readexactly(3), 5.0) == b"new"
        fresh_writer.close()
        writer.close()
    finally:
        await network.close()
        server.close()
