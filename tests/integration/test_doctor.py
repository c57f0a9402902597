"""`flowmesh doctor` on real meshes: one without faults, and the same one with several."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from flowmesh_cas.errors import TransientError
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_deploy.layout import Layout, prepare, read_json, write_json
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.credentials import Credentials

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
DEADLINE_S = 60.0


def doctor(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run `flowmesh doctor --json`; return its exit code and document."""
    done = subprocess.run([COMMAND, "doctor", "--json", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def ills(document: dict[str, Any]) -> dict[str, str]:
    """Return check -> severity of what is not well; that this suite works among temporary files is no fault of the mesh."""
    return {row["check"]: row["severity"] for row in document["findings"] if row["severity"] != "ok" and row["check"] != "stores"}


async def until(layout: Layout, wanted: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Ask until what is not well is ``wanted``: beats come every second, and copies catch up."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        code, document = await asyncio.to_thread(doctor, "--dir", str(layout.folder))
        if ills(document) == wanted or time.monotonic() > deadline:
            return code, document


async def _spoil_streams(mesh: EmbeddedMesh) -> None:
    """Change one stream and take copies from another, behind the scheduler's back."""
    credentials = Credentials.load(mesh.layout.credentials / "scheduler.creds")
    bus = await Bus.connect(mesh.urls, credentials, name="spoiler", inbox=subjects.inbox_prefix("scheduler"))
    try:
        await bus.ensure_stream(msgspec.structs.replace(streams.health(3), max_msgs_per_subject=7))
        while True:
            try:
                await bus.ensure_stream(streams.costs(1))
                return
            except TransientError:
                await asyncio.sleep(0.1)
    finally:
        await bus.close()


async def test_a_mesh_without_faults_is_well_and_each_planted_fault_is_found(tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    async with embedded_mesh(
        tmp_path / "m",
        nodes=1,
        brokers=3,
        schedulers=2,
        tenants=["team-a"],
        environment={"node-1": {"FLOWMESH_CLOCK_OFFSET_FILE": str(offset)}},
    ) as mesh:
        code, document = await until(mesh.layout, {})
        assert ills(document) == {}, document
        assert code == 0
        assert {row["check"] for row in document["findings"]} >= {
            "sync",
            "brokers",
            "streams",
            "replicas",
            "peers",
            "leader",
            "clocks",
        }

        offset.write_text("7")
        mesh.layout.secret.chmod(0o644)
        mesh.kill("broker-3", is_held=True)
        leader, standby = ("scheduler", "scheduler-2") if await _leads(mesh, "scheduler-1") else ("scheduler-2", "scheduler")
        mesh.kill(standby, is_held=True)
        wanted = {"brokers": "warn", "clocks": "warn", "leader": "warn", "peers": "warn", "secrets": "fail"}
        code, document = await until(mesh.layout, wanted)
        assert ills(document) == wanted, document
        assert code == 1
        assert all(row["why"] and row["mend"] for row in document["findings"] if row["severity"] != "ok")

        mesh.kill(leader, is_held=True)  # it would mend its streams
        await _spoil_streams(mesh)
        wanted = {**wanted, "leader": "fail", "replicas": "fail", "streams": "fail"}
        code, document = await until(mesh.layout, wanted)
        assert ills(document) == wanted, document


async def _leads(mesh: EmbeddedMesh, name: str) -> bool:
    _, document = await asyncio.to_thread(doctor, "--context", mesh.path)
    return any(row["check"] == "leader" and row["finding"].startswith(f"{name} leads") for row in document["findings"])


async def test_who_has_only_a_context_is_told_what_the_leader_knows(tmp_path: Path) -> None:
    async with embedded_mesh(tmp_path / "m", nodes=0, tenants=["team-a"]) as mesh:
        lonely = tmp_path / "elsewhere"
        tenants = {
            name: {"account": each.account, "credentials": mesh.tenant(name).credentials} for name, each in mesh.tenants.items()
        }
        context = {"version": 1, "mesh": "m", "urls": mesh.urls, "dir": "nowhere", "tenants": tenants, "default_tenant": "team-a"}
        write_json(lonely / "context.json", context)
        code, document = await asyncio.to_thread(doctor, "--context", str(lonely))
        assert (code, ills(document)) == (0, {"nodes": "warn"})
        assert not {"sync", "streams", "secrets"} & {row["check"] for row in document["findings"]}


def test_a_mesh_that_is_down_is_not_well(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "m")
    prepare(layout, nodes=1, tenants=["team-a"], brokers=3)
    code, document = doctor("--dir", str(layout.folder))
    assert code == 1
    assert ills(document)["leader"] == "fail"
    assert ills(document)["streams"] == "warn", "nobody knows"


def test_no_mesh_is_another_error(tmp_path: Path) -> None:
    done = subprocess.run([COMMAND, "doctor", "--dir", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4
    assert "flowmesh up" in done.stderr


def test_a_single_broker_that_does_not_sync_is_not_started(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "m")
    prepare(layout, nodes=0, tenants=["team-a"])
    write_json(layout.desired, {**read_json(layout.desired), "sync": "2m"})
    done = subprocess.run(
        [COMMAND, "up", "--dir", str(layout.folder)], capture_output=True, text=True, timeout=60, check=False, env={**os.environ}
    )
    assert done.returncode == 2
    assert "acknowledge before they sync" in done.stderr
    assert not layout.state.exists()
