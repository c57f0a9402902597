"""Trust and second attempts on a real mesh: cordons that outlive their leader, who may order them, an overtaken straggler."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.errors import UsageError
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
DEADLINE_S = 90.0


def workflow(operators: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "flowmesh/v1", "name": "test", "operators": operators}


async def finish(client: Mesh, operators: dict[str, Any]) -> list[dict[str, Any]]:
    """Run operators to success; return their rows."""
    run = await client.submit(workflow(operators))
    results = await run.result(timeout_s=DEADLINE_S)
    assert results.state == "succeeded", results.detail
    return await run.operators()


async def nodes_of_noops(client: Mesh, first: int) -> set[str]:
    rows = await finish(client, {f"o{n}": {"type": "flow.noop", "with": {"nonce": first + n}} for n in range(300)})
    return {row["node"] for row in rows}


async def new_leader(mesh: EmbeddedMesh, client: Mesh) -> None:
    """End the scheduler and wait for the one that the supervisor starts after it."""
    epoch = (await client.status())["leader"]["epoch"]
    mesh.signal("scheduler", signal.SIGTERM)
    async with asyncio.timeout(DEADLINE_S):
        while (await client.status())["leader"]["epoch"] == epoch:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def configure(mesh: EmbeddedMesh, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(mesh.layout.scheduler.read_text())
    change(document)
    mesh.layout.scheduler.write_text(json.dumps(document))


async def flowmesh(mesh: EmbeddedMesh, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLOWMESH_CONTEXT": str(mesh.layout.context), "FLOWMESH_TENANT": "team-a"}
    run = lambda: subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=30, env=environment)  # noqa: E731
    return await asyncio.to_thread(run)


async def test_a_cordoned_node_gets_no_work_whoever_leads_until_somebody_ends_that(tmp_path: Path) -> None:
    async with (
        embedded_mesh(tmp_path / "mesh", nodes=2, tenants=["team-a"]) as mesh,
        connect(context=mesh, tenant="team-a") as client,
    ):
        first, second = sorted(row["node"] for row in await client.nodes())
        done = await flowmesh(mesh, "cordon", first, "--reason", "its fan is loud")
        assert done.returncode == 0, done.stderr
        assert f"flowmesh uncordon {first}" in done.stdout
        assert await nodes_of_noops(client, 0) == {second}

        await new_leader(mesh, client)
        told = (await flowmesh(mesh, "nodes")).stdout
        assert f"{first} is cordoned by team-a" in told
        assert "its fan is loud" in told
        assert await nodes_of_noops(client, 1000) == {second}

        done = await flowmesh(mesh, "cordon", "n77")
        assert (done.returncode, "no node 'n77'" in done.stderr) == (4, True)
        done = await flowmesh(mesh, "uncordon", first, "--json")
        assert json.loads(done.stdout)["health"]["state"] == "ok"
        assert await nodes_of_noops(client, 2000) == {first, second}
        assert (await flowmesh(mesh, "uncordon", first)).stdout == f"node {first} was not cordoned\n"


async def test_where_tenants_are_many_only_operators_of_the_mesh_may_cordon(tmp_path: Path) -> None:
    async with (
        embedded_mesh(tmp_path / "mesh", nodes=1, tenants=["team-a", "team-b"]) as mesh,
        connect(context=mesh, tenant="team-a") as team_a,
        connect(context=mesh, tenant="team-b") as team_b,
    ):
        configure(mesh, lambda document: document.update(tenants_may_cordon=False, operators=["team-b"]))
        await new_leader(mesh, team_a)
        node = (await team_a.nodes())[0]["node"]
        with pytest.raises(UsageError, match="team-a may not do what concerns every tenant") as refused:
            await team_a.cordon(node)
        assert '"operators"' in refused.value.hint
        with pytest.raises(UsageError, match="may not"):
            await team_a.unquarantine("00" * 32)
        assert (await team_a.nodes())[0]["health"]["state"] == "ok"
        assert (await team_b.cordon(node))["nodes_left"] == 0
        assert (await team_a.nodes())[0]["health"]["by"] == "team-b"


STRAGGLER = """\
import pathlib, time

def lag(n: int, mark: str) -> int:
    path = pathlib.Path(mark)
    if mark and not path.exists():
        path.write_text("the first attempt was here")
        time.sleep(600)
    return n
"""


async def test_a_second_attempt_overtakes_a_call_that_hangs(tmp_path: Path) -> None:
    async with (
        embedded_mesh(tmp_path / "mesh", nodes=2, tenants=["team-a"]) as mesh,
        connect(context=mesh, tenant="team-a") as client,
    ):
        configure(mesh, lambda document: document.update(settings={"speculation_share": 0.9}))
        await new_leader(mesh, client)
        (tmp_path / "lags.py").write_text(STRAGGLER)

        def call(n: int, mark: str) -> dict[str, Any]:
            return {"type": "python.call", "function": f"{tmp_path / 'lags.py'}:lag", "with": {"args": {"n": n, "mark": mark}}}

        for number in range(4):
            await finish(client, {f"o{n}": call(10 * number + n, "") for n in range(2)})
        (row,) = await finish(client, {"late": call(99, str(tmp_path / "mark"))})
        assert row["attempt"] == 2
        totals = (await client.status())["totals"]
        assert (totals["speculated"], totals["speculation_won"]) == (1, 1)
        assert totals["speculation_usd"] > 0
