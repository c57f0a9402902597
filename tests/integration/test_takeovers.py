"""Several schedulers on one broker, all real: one is killed, stopped, restarted; the others go on, and nothing runs twice."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.client.run import Run
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.messages import Beat, encode

DEADLINE_S = 40.0


def document(count: int, sleep_s: float, first: int = 0) -> dict[str, Any]:
    operators = {
        f"op{i}": {"type": "flow.delay", "with": {"nonce": first + i, "item_s": sleep_s, "batch_s": 0.001}} for i in range(count)
    }
    return {"apiVersion": "flowmesh/v1", "name": "test", "operators": operators}


@pytest_asyncio.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[EmbeddedMesh]:
    async with embedded_mesh(tmp_path / "mesh", nodes=2, schedulers=3) as found:
        yield found


@pytest_asyncio.fixture
async def client(mesh: EmbeddedMesh) -> AsyncIterator[Mesh]:
    async with connect(context=mesh) as found:
        yield found


async def status(client: Mesh) -> dict[str, Any]:
    """Return the status of the mesh as soon as a leader tells it."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return await client.status()
            except Exception:
                await asyncio.sleep(0.02)


async def other_leader(client: Mesh, than: str) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await status(client)
            if found["leader"]["id"] != than:
                return found
            await asyncio.sleep(0.02)


async def ready(client: Mesh, standbys: int = 2) -> dict[str, Any]:
    """Return the status once so many stand by."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await status(client)
            if sum(row["role"] == "standby" for row in found["schedulers"]) == standbys:
                return found
            await asyncio.sleep(0.05)


async def assigned(run: Run, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while sum(row["state"] == "assigned" for row in await run.operators()) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def process_of(mesh: EmbeddedMesh, leader: str) -> str:
    """Return the name of the process of a scheduler."""
    for name in mesh.layout.schedulers():
        if (mesh.layout.scheduler_folder(name) / "scheduler.json").exists() and leader == scheduler_name(mesh, name):
            return name
    raise AssertionError(f"no process is {leader}")


def scheduler_name(mesh: EmbeddedMesh, process: str) -> str:
    return str(json.loads(mesh.layout.scheduler_file(process).read_text())["name"])


async def finish(run: Run) -> list[dict[str, Any]]:
    results = await run.result(timeout_s=DEADLINE_S)
    assert results.state == "succeeded", results.detail
    return await run.operators()


async def test_the_place_of_a_killed_leader_is_taken_and_what_runs_runs_on(mesh: EmbeddedMesh, client: Mesh) -> None:
    before = await ready(client)
    run = await client.submit(document(4, 2.0))
    await assigned(run, 2)
    mesh.signal(process_of(mesh, before["leader"]["id"]), signal.SIGKILL)
    after = await other_leader(client, before["leader"]["id"])
    assert after["leader"]["epoch"] > before["leader"]["epoch"]
    assert after["takeover"]["from"] == before["leader"]["id"]
    assert after["takeover"]["why"] == "its connection ended"
    assert after["takeover"]["runs"] == 1
    rows = await finish(run)
    assert {row["attempt"] for row in rows} == {1}


async def test_a_stopped_leader_is_replaced_and_its_later_writes_are_refused(mesh: EmbeddedMesh, client: Mesh) -> None:
    before = await ready(client)
    run = await client.submit(document(4, 2.0))
    await assigned(run, 2)
    zombie = process_of(mesh, before["leader"]["id"])
    mesh.signal(zombie, signal.SIGSTOP)
    try:
        after = await other_leader(client, before["leader"]["id"])
        assert after["takeover"]["why"] in ("it was silent, and its lease ran out", "its lease ran out")
    finally:
        mesh.signal(zombie, signal.SIGCONT)
    last = await ready(client)
    assert last["leader"] == after["leader"] | {"cut_off": False}
    rows = await finish(run)
    assert {row["attempt"] for row in rows} == {1}


async def test_schedulers_restarted_one_after_the_other_lose_nothing(mesh: EmbeddedMesh, client: Mesh) -> None:
    await ready(client)
    run = await client.submit(document(4, 2.0))
    await assigned(run, 2)
    for process in mesh.layout.schedulers():
        pid = mesh.signal(process, signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            while mesh_pid(mesh, process) in (0, pid):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await ready(client)
    rows = await finish(run)
    assert {row["attempt"] for row in rows} == {1}


async def test_a_store_wiped_under_a_stopped_leader_begins_anew_under_another(mesh: EmbeddedMesh, client: Mesh) -> None:
    before = await ready(client)
    zombie = process_of(mesh, before["leader"]["id"])
    await finish(await client.submit(document(2, 0.1)))
    mesh.signal(zombie, signal.SIGSTOP)
    try:
        mesh.kill("broker", is_held=True)
        shutil.rmtree(mesh.layout.folder / "broker" / "jetstream")
        await mesh.start("broker")
        after = await other_leader(client, before["leader"]["id"])
        assert after["leader"]["epoch"] > before["leader"]["epoch"]
        await finish(await client.submit(document(2, 0.1, first=10)))
    finally:
        mesh.signal(zombie, signal.SIGCONT)
    last = await ready(client)
    assert last["leader"]["epoch"] == after["leader"]["epoch"]
    await finish(await client.submit(document(2, 0.1, first=20)))


async def test_a_leader_of_whom_a_node_has_seen_a_later_one_leads_again_above_that(mesh: EmbeddedMesh, client: Mesh) -> None:
    before = await ready(client)
    credentials = Credentials.load(mesh.layout.credentials / "scheduler.creds")
    bus = await Bus.connect(mesh.urls, credentials, name="test", inbox=credentials.inbox)
    seen = before["leader"]["epoch"] + 1_000_000_000
    await bus.publish(subjects.node_beat("node-1"), encode(Beat("node-1", now_us(), seen)))
    await bus.flush()
    async with asyncio.timeout(DEADLINE_S):
        while (found := await status(client))["leader"]["epoch"] <= seen:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert found["leader"]["id"] == before["leader"]["id"]
    await finish(await client.submit(document(2, 0.1)))
    await bus.close()


def mesh_pid(mesh: EmbeddedMesh, process: str) -> int:
    try:
        pid = int(mesh.process(process)["pid"])
        os.kill(pid, 0)
    except Exception:
        return 0
    return pid
