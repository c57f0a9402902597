"""Nodes that die, drop, are drained or taken away: what that costs, on real processes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from bench.proxy import Proxy
from bench.recovery import broker_away
from tests.integration.node_leader import one_node

from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.run import Run
from flowmesh_mesh.messages import Reason
from flowmesh_node import control

DEADLINE_S = 60.0


def document(operators: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "flowmesh/v1", "name": "test", "operators": operators}


def delay(nonce: int, seconds: float) -> dict[str, Any]:
    return {"type": "flow.delay", "with": {"nonce": nonce, "batch_s": seconds, "item_s": 0.0}}


async def row_of(run: Run) -> dict[str, Any]:
    return (await run.operators())[0]


async def until_at_work(run: Run, attempt: int = 1) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        while (row := await row_of(run))["state"] != "assigned" or row["attempt"] != attempt:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return row


async def test_dear_work_of_a_killed_node_moves_before_its_lease_ends_and_says_why(tmp_path: Path) -> None:
    async with embedded_mesh(tmp_path / "mesh", nodes=2) as mesh, connect(context=mesh) as client:
        run = await client.submit(document({"dear": delay(1, 30)}))
        first = await until_at_work(run)
        began_s = time.monotonic()
        mesh.kill_node(first["node"])
        second = await until_at_work(run, attempt=2)
        assert time.monotonic() - began_s < 4.0, "the lease of the node had to end first"
        assert second["node"] != first["node"]
        (end,) = second["attempts"]
        assert (end["attempt"], end["node"], end["reason"], end["actor"]) == (1, first["node"], "node-lost", first["node"])
        ended = await run.cancel("somebody")
        assert (ended.state, ended.detail) == ("cancelled", "cancelled by somebody")
        row = await row_of(run)
        assert (row["state"], row["actor"]) == ("cancelled", "somebody")
        assert row["ended_at_us"] > row["started_at_us"] > 0


async def test_what_an_operator_printed_is_read_after_its_node_has_vanished(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "import os, time\n\n\ndef speak(flag):\n    print('first words', flush=True)\n"
        "    if not os.path.exists(flag):\n        open(flag, 'w').close()\n        time.sleep(60)\n    return 1\n"
    )
    (tmp_path / "w.json").write_bytes(
        msgspec.json.encode(
            document(
                {"a": {"type": "python.call", "function": "code.py:speak", "with": {"args": {"flag": str(tmp_path / "flag")}}}}
            )
        )
    )
    async with embedded_mesh(tmp_path / "mesh", nodes=2) as mesh, connect(context=mesh) as client:
        run = await client.submit(tmp_path / "w.json")
        first = await until_at_work(run)
        async with asyncio.timeout(DEADLINE_S):
            while not [line async for line in run.logs("a")]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        mesh.kill_node(first["node"])
        assert (await run.result(DEADLINE_S)).state == "succeeded"
        lines = [line async for _, line in run.logs("a")]
        assert lines[0] == lines[2] == "first words"
        assert lines[1] == f"[attempt 1 on {first['node']} ended here: node-lost]"


async def test_a_connection_that_drops_for_a_second_restarts_no_long_operator(tmp_path: Path) -> None:
    async with embedded_mesh(tmp_path / "mesh", nodes=2) as mesh, connect(context=mesh) as client:
        joined = json.loads(mesh.layout.join_file("node-1").read_text())
        for name in ("node-1", "node-2"):
            mesh.kill_node(name)
        address = urlsplit(joined["urls"][0])
        proxy = Proxy(str(address.hostname), int(address.port or 0))
        await proxy.start()
        path = tmp_path / "join.json"
        path.write_bytes(msgspec.json.encode({**joined, "urls": [proxy.url]}))
        command = [sys.executable, "-m", "flowmesh_node", "join", str(path), "--dir", str(tmp_path / "n")]
        node = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        try:
            run = await client.submit(document({"long": delay(1, 3)}))
            await until_at_work(run)
            proxy.drop()
            await asyncio.sleep(1.0)
            proxy.mend()
            assert (await run.result(DEADLINE_S)).state == "succeeded"
            row = await row_of(run)
            assert (row["attempt"], row["attempts"]) == (1, [])
        finally:
            node.kill()
            await node.wait()
            await proxy.close()


async def test_a_broker_that_is_away_for_longer_than_any_lease_restarts_no_operator(tmp_path: Path) -> None:
    async with embedded_mesh(tmp_path / "mesh", nodes=2) as mesh, connect(context=mesh) as client:
        operators = {f"n{n}": delay(n, 3) for n in range(2)} | {"w": {**delay(9, 0.1), "inputs": {"after": "n0.out"}}}
        operators |= {f"s{n}": {"type": "flow.noop", "with": {"nonce": n, "sleep_s": 4.0}} for n in range(4)}
        run = await client.submit(document(operators))
        await until_at_work(run)
        await broker_away(mesh, 7.0)
        assert (await run.result(DEADLINE_S)).state == "succeeded"
        assert {row["attempt"] for row in await run.operators()} == {1}
        assert not any(row["attempts"] for row in await run.operators())


def _command(folder: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "flowmesh_node", *words, "--dir", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


async def test_a_drained_node_gives_back_what_has_not_begun_and_can_be_used_again(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (leader, node):
        params = {"nonce": 1, "batch_s": 4.0, "item_s": 0.0}
        running = await leader.assign("n1", "flow.delay", [leader.item(params)])
        await leader.until(lambda: leader.beats["n1"].running == 1)
        waiting = await leader.assign("n1", "flow.delay", [leader.item({**params, "nonce": 2})])
        await leader.until(lambda: leader.beats["n1"].queued == 1)
        assert (await asyncio.to_thread(control.ask, node.folder, {"what": "drain"}))["state"] == "draining"
        await leader.until(lambda: waiting in leader.outcomes)
        assert [each.reason for each in leader.outcomes[waiting]] == [Reason.PREEMPTED]
        await asyncio.wait_for(leader.closed[running].wait(), DEADLINE_S)
        assert [each.reason for each in leader.outcomes[running]] == [Reason.SUCCEEDED]
        assert leader.nodes["n1"].state == "draining"
        await asyncio.to_thread(_command, node.folder, "uncordon")
        await leader.until(lambda: leader.nodes["n1"].state == "active")
        (outcome,) = await leader.run("n1", "flow.delay", [leader.item({**params, "batch_s": 0.1})])
        assert outcome.reason == Reason.SUCCEEDED


async def test_a_node_with_a_notice_says_when_it_goes_and_goes_in_time(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    async with one_node(tmp_path, "--notice-file", str(notice)) as (leader, node):
        params = {"nonce": 1, "batch_s": 60.0, "item_s": 0.0}
        await leader.assign("n1", "flow.delay", [leader.item(params)])
        await leader.until(lambda: leader.beats["n1"].running == 1)
        waiting = await leader.assign("n1", "flow.delay", [leader.item({**params, "nonce": 2})])
        await leader.until(lambda: leader.beats["n1"].queued == 1)
        notice.write_text("7")
        told_us = time.time_ns() // 1000
        await leader.until(lambda: leader.nodes["n1"].leaving_at_us > 0)
        assert leader.nodes["n1"].leaving_at_us < told_us + 10_000_000
        await leader.until(lambda: waiting in leader.outcomes)
        await asyncio.wait_for(node.process.wait(), 20)
        assert leader.nodes["n1"].state == "left"


async def test_a_second_signal_ends_a_draining_node_at_once(tmp_path: Path) -> None:
    async with one_node(tmp_path, "--drain-s", "60") as (leader, node):
        await leader.assign("n1", "flow.delay", [leader.item({"nonce": 1, "batch_s": 60.0, "item_s": 0.0})])
        await leader.until(lambda: leader.beats["n1"].running == 1)
        node.process.send_signal(signal.SIGTERM)
        await leader.until(lambda: leader.nodes["n1"].state == "draining")
        node.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(node.process.wait(), 20)
        assert leader.nodes["n1"].state == "left"
