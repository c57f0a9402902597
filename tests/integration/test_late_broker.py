"""A scheduler that is started before its broker."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_mesh.client import connect

DEADLINE_S = 60.0


async def test_a_scheduler_that_finds_no_broker_waits_for_one(tmp_path: Path) -> None:
    async with embedded_mesh(tmp_path / "mesh", nodes=0, tenants=["team-a"]) as mesh:
        mesh.kill("broker", is_held=True)
        before = mesh.signal("scheduler", signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            while mesh.process("scheduler")["pid"] == before:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            pid = mesh.process("scheduler")["pid"]
            await asyncio.sleep(11.0)  # longer than any one attempt
            await mesh.start("broker")
            async with connect(mesh) as client:
                assert (await client.status())["leader"]["epoch"] > 0
        assert mesh.process("scheduler")["pid"] == pid
