"""Learned costs on a real mesh: shown by the command, and there still after the scheduler has started again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh

DEADLINE_S = 40.0
BATCHES = 25


async def _run(client: Mesh, nonce: int) -> None:
    document = {
        "apiVersion": "flowmesh/v1",
        "name": "delays",
        "operators": {
            f"o{n}": {"type": "flow.delay", "with": {"nonce": 100 * nonce + n, "batch_s": 0.05, "item_s": 0.005}}
            for n in range(4)
        },
    }
    run = await client.submit(document)
    results = await run.result(timeout_s=DEADLINE_S)
    assert results.state == "succeeded", results.detail


async def _delays(client: Mesh) -> dict[str, Any]:
    found = await client.costs()
    return next((row for row in found["rows"] if row["type"] == "flow.delay"), {"samples": 0})


async def test_costs_are_learned_shown_and_inherited_by_the_next_scheduler(tmp_path: Path) -> None:
    async with (
        embedded_mesh(tmp_path / "mesh", nodes=1, tenants=["team-a"]) as mesh,
        connect(context=mesh, tenant="team-a") as client,
    ):
        for nonce in range(BATCHES):
            await _run(client, nonce)
        before = await _delays(client)
        assert before["samples"] >= BATCHES
        assert 0.05 < before["measured_s"] < 0.15
        assert before["error_last"] < 0.25, "predicted against actual"

        command = str(Path(sys.executable).with_name("flowmesh"))
        environment = {**os.environ, "FLOWMESH_CONTEXT": str(mesh.layout.context), "FLOWMESH_TENANT": "team-a"}
        shown = await asyncio.to_thread(
            subprocess.run, [command, "costs"], capture_output=True, text=True, timeout=30, check=True, env=environment
        )
        assert "flow.delay" in shown.stdout
        document = await asyncio.to_thread(
            subprocess.run, [command, "costs", "--json"], capture_output=True, text=True, timeout=30, check=True, env=environment
        )
        assert any(row["type"] == "flow.delay" for row in json.loads(document.stdout)["rows"])

        epoch = (await client.status())["leader"]["epoch"]
        mesh.signal("scheduler", signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            while (await client.status())["leader"]["epoch"] == epoch:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await _delays(client) == before
