"""A recorded mesh of real processes: why operators ran where they did, what workflows would take, and the log replayed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.identity import private_salt
from flowmesh_scheduler.recording import EventLog, logs_in
from flowmesh_scheduler.replay import replay

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
DEADLINE_S = 60.0


def document(operators: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "flowmesh/v1", "name": "told", "operators": operators}


def noop(nonce: int, after: str = "", **fields: Any) -> dict[str, Any]:
    params = {"nonce": nonce, **fields.pop("params", {})}
    return {"type": "flow.noop", "with": params, **({"inputs": {"after": f"{after}.out"}} if after else {}), **fields}


FLOW = document(
    {
        "first": noop(1, params={"sleep_s": 0.2}),
        "second": noop(2, "first"),
        "secret": noop(3, share="private"),
        "below": noop(4, "secret"),
    }
)


async def finish(client: Mesh, workflow: dict[str, Any], name: str) -> None:
    run = await client.submit(workflow, run=name)
    assert (await run.result(timeout_s=DEADLINE_S)).state == "succeeded"


async def told_of(team_a: Mesh, team_b: Mesh) -> None:
    """Ask about a run that is over and one that waits."""
    why = await team_a.why("r1", "first")
    assert why["state"] == "done"
    decision = why["decision"]
    assert decision["node"] == why["node"] == why["source"]["node"]
    assert sum(decision["terms_usd"].values()) == pytest.approx(decision["score_usd"])
    assert (await team_a.why(key=why["key"][:12]))["operator"] == "first"
    private = await team_a.why("r1", "secret")
    with pytest.raises(NotFoundError):
        await team_b.why(key=private["key"][:12])
    with pytest.raises(NotFoundError):
        await team_a.why("r1", "nobody")
    with pytest.raises(UsageError):
        await team_a.why(key="xyz")
    served = await team_b.why("r2", "first")
    assert served["shared"]
    assert "not run for this run" in served["text"]
    assert served["source"]["node"] == why["node"]
    waiting = await team_a.submit(document({"huge": noop(99, resources={"gpus": 64})}))
    huge = await team_a.why(waiting.id, "huge")
    assert huge["waiting"]["kind"] == "no-node"
    assert set(huge["waiting"]["nodes"]) == {"node-1", "node-2"}
    await waiting.cancel()


async def planned(team_a: Mesh, team_b: Mesh) -> None:
    """Ask what the workflow that has run would take; another tenant sees nothing of what is private."""
    mine, theirs = await team_a.plan(FLOW), await team_b.plan(FLOW)
    assert (mine["hits"], mine["to_run"]) == (4, 0)
    assert mine["saved_s"] >= 0.2
    assert (theirs["hits"], theirs["to_run"]) == (4, 0), "team-b has run it too"
    other = document({"secret": noop(3, share="private"), "first": noop(1, params={"sleep_s": 0.2}), "new": noop(5, "first")})
    async with asyncio.timeout(DEADLINE_S):
        found = await team_b.plan(document({"secret": noop(33, share="private")}))
    assert (found["hits"], found["to_run"]) == (0, 1)
    found = await team_a.plan(other)
    assert (found["hits"], found["to_run"]) == (2, 1)
    assert found["lacking"] == []
    assert found["usd"] > 0
    many = document({f"n{i}": noop(1000 + i) for i in range(6000)})
    found = await team_a.plan(many)
    assert found["to_run"] == 6000
    assert 0 < found["makespan_s"] < 60


async def private_before_shared(team_a: Mesh, team_b: Mesh) -> None:
    await finish(team_a, FLOW, "r1")
    theirs = await team_b.plan(FLOW)
    assert (theirs["hits"], theirs["to_run"]) == (2, 2), "what is private to team-a is no hit for team-b"
    await finish(team_b, FLOW, "r2")


def operators_in(folder: Path) -> int:
    """Return how many operators the logs so far give to nodes, as items and in chains that follow them."""
    made = [each.assignment for path in logs_in(folder) for each in replay(path).made]
    return sum(len(assignment.items) + sum(map(len, assignment.tails)) for assignment in made)


async def written(folder: Path, operators: int) -> None:
    """Wait until what the leader noted is in its log: that is written a few times a second."""
    async with asyncio.timeout(DEADLINE_S):
        while await asyncio.to_thread(operators_in, folder) < operators:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def lead_anew(mesh: EmbeddedMesh, client: Mesh) -> None:
    """Kill the leader and wait for the next."""
    before = (await client.status())["leader"]["epoch"]
    mesh.signal("scheduler", signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        while (await client.status())["leader"]["epoch"] == before:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def replayed_by_hand(folder: Path) -> Any:
    command = [COMMAND, "replay", str(folder), "--json", "--weight", "price_per_hour=2"]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def test_a_recorded_mesh_explains_itself_and_is_replayed_hash_for_hash(tmp_path: Path) -> None:
    folder = tmp_path / "mesh"
    async with embedded_mesh(folder, nodes=2, tenants=("team-a", "team-b"), is_recorded=True) as mesh:
        async with connect(mesh, "team-a") as team_a, connect(mesh, "team-b") as team_b:
            await private_before_shared(team_a, team_b)
            await told_of(team_a, team_b)
            await planned(team_a, team_b)
            mesh.kill_node("node-1")
            await finish(team_a, document({f"k{i}": noop(i, share="private", params={"sleep_s": 0.05}) for i in range(20)}), "r3")
            await written(folder / "events", 6 + 20)
            await lead_anew(mesh, team_a)
            forgotten = await team_a.why("r1", "first")
            assert forgotten["decision"] is None
            assert "nothing is recorded" in forgotten["text"]
            await finish(team_a, document({"last": noop(2000)}), "r4")
        keys = {tenant.account for tenant in mesh.tenants.values()}
    secret = bytes.fromhex((folder / "private.key").read_text())
    logs = logs_in(folder / "events")
    assert len(logs) == 2
    assert operators_in(folder / "events") >= 6 + 20 + 1
    for path in logs:
        told = replay(path)
        assert told.is_same, f"{path.name}: {told.divergence}"
        data = path.read_bytes()
        assert secret not in data
        assert not any(private_salt(secret, key) in data for key in keys)
    assert any(step.private for step in EventLog(logs[0]).steps())
    assert told.ended == "the process is stopping"
    document_of = await asyncio.to_thread(replayed_by_hand, folder / "events")
    assert document_of["digest"] == document_of["recorded_digest"] == told.digest.hex()
    assert document_of["compared"]["rounds"] >= 1
