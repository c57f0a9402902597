"""`flowmesh up` and `flowmesh down` as people use them: real processes, killed, interrupted, started twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh_deploy.control import is_up, stop
from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_deploy.layout import Layout, read_json, write_json
from flowmesh_deploy.process import identity, is_running
from flowmesh_mesh.client import Mesh, connect
from flowmesh_mesh.context import load_context

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
WORKFLOW = {
    "apiVersion": "flowmesh/v1",
    "name": "one",
    "operators": {"a": {"type": "flow.noop", "with": {"nonce": 1}}},
    "outputs": {"out": "a.out"},
}


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    """The folder of a mesh that is stopped at the end, whatever the test did."""
    made = Layout(tmp_path / "mesh")
    yield made
    stop(made)


def flowmesh(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=90, cwd=cwd, env={**os.environ, **(env or {})}, check=False
    )


def up(layout: Layout, *arguments: str) -> dict[str, Any]:
    """Run `flowmesh up --json` and return its document."""
    done = flowmesh("up", "--dir", str(layout.folder), "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def processes(layout: Layout) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read_json(layout.state)["processes"]
    return found


def running(layout: Layout) -> list[str]:
    return [name for name, record in processes(layout).items() if is_running(record)]


def until(what: str, check: Callable[[], bool], deadline_s: float = 60.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


async def _run_one(layout: Layout, nonce: int) -> str:
    """Run one operator; return the state of the run."""
    async with connect(load_context(layout.context)) as mesh:
        return await _state_of(mesh, nonce)


async def _state_of(mesh: Mesh, nonce: int) -> str:
    document = {**WORKFLOW, "operators": {"a": {"type": "flow.noop", "with": {"nonce": nonce}}}}
    run = await mesh.submit(document)
    await run.result()
    return str((await run.status())["state"])


# --- the ordinary life


async def test_a_mesh_comes_up_works_goes_down_and_remembers(layout: Layout) -> None:
    first = up(layout, "--nodes", "2", "--tenants", "team-a,team-b,team-c")
    assert first == {
        "mesh": "mesh",
        "was_up": False,
        "context": str(layout.context),
        "urls": first["urls"],
        "nodes": ["node-1", "node-2"],
        "tenants": ["team-a", "team-b", "team-c"],
    }
    assert await _run_one(layout, 1) == "succeeded"
    pids = {name: record["pid"] for name, record in processes(layout).items()}

    again = up(layout)
    assert again == {**first, "was_up": True}
    assert {name: record["pid"] for name, record in processes(layout).items()} == pids

    before = list(processes(layout).values())
    down = flowmesh("down", "--dir", str(layout.folder), "--json")
    assert (down.returncode, json.loads(down.stdout)["stopped"]) == (0, True)
    assert not [record for record in before if is_running(record)]
    assert not is_up(layout)
    again_down = flowmesh("down", "--dir", str(layout.folder))
    assert (again_down.returncode, again_down.stdout) == (0, "the mesh was not up\n")

    third = up(layout)
    assert third == first, "nodes, tenants, address and keys are those of before"
    async with connect(load_context(layout.context)) as mesh:
        assert [row["state"] for row in await mesh.runs()] == ["succeeded"]


def test_more_nodes_and_tenants_join_a_mesh_that_is_up(layout: Layout) -> None:
    up(layout, "--nodes", "1", "--tenants", "team-a")
    node = processes(layout)["node-1"]["pid"]
    found = up(layout, "--nodes", "3", "--tenants", "team-a,late")
    assert (found["was_up"], found["nodes"], found["tenants"]) == (True, ["node-1", "node-2", "node-3"], ["team-a", "late"])
    assert processes(layout)["node-1"]["pid"] == node
    status = flowmesh("status", "--json", "--context", str(layout.context), "--tenant", "late")
    assert status.returncode == 0, status.stderr
    assert len(json.loads(status.stdout)["nodes"]) == 3
    assert up(layout, "--nodes", "1")["nodes"] == ["node-1", "node-2", "node-3"], "a mesh that is up loses no nodes"


def test_without_nodes_a_mesh_is_up_all_the_same(layout: Layout) -> None:
    assert up(layout, "--nodes", "0")["nodes"] == []


def test_what_to_type_next_works_where_it_is_typed(tmp_path: Path) -> None:
    layout = Layout(tmp_path / ".flowmesh")
    try:
        done = flowmesh("up", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for command in ("flowmesh submit", "flowmesh status", "flowmesh watch", "flowmesh down"):
            assert f"  {command}" in done.stdout
        inner = tmp_path / "a" / "b"
        inner.mkdir(parents=True)
        assert flowmesh("status", "--json", cwd=inner).returncode == 0
        assert flowmesh("down", cwd=tmp_path).stdout == "the mesh is down\n"
    finally:
        stop(layout)


def test_secrets_are_for_the_owner_only(layout: Layout) -> None:
    up(layout)
    secrets = [layout.keys, *layout.credentials.rglob("*.creds"), *layout.nodes.glob("*.join"), layout.broker / "broker.conf"]
    assert len(secrets) >= 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert stat.S_IMODE(layout.folder.stat().st_mode) == 0o700
    for log in layout.logs.glob("*.log"):
        assert "SUA" not in log.read_text(errors="replace")


# --- processes that end


async def test_a_killed_node_stays_gone_until_it_is_asked_for(layout: Layout) -> None:
    up(layout, "--nodes", "2")
    os.kill(processes(layout)["node-2"]["pid"], signal.SIGKILL)
    until("the record of the loss", lambda: processes(layout)["node-2"]["state"] == "gone")
    assert up(layout)["was_up"]
    assert "node-2" not in running(layout)
    assert await _run_one(layout, 1) == "succeeded"
    assert up(layout, "--nodes", "2")["nodes"] == ["node-1", "node-2"]
    assert "node-2" in running(layout)


@pytest.mark.parametrize("name", ["broker", "scheduler"])
async def test_a_killed_broker_or_scheduler_is_started_again(layout: Layout, name: str) -> None:
    url = up(layout)["urls"]
    old = processes(layout)[name]["pid"]
    os.kill(old, signal.SIGKILL)
    until("a new process", lambda: name in running(layout) and processes(layout)[name]["pid"] != old)
    assert up(layout)["urls"] == url
    assert await _run_one(layout, 1) == "succeeded"


def test_nothing_outlives_a_killed_supervisor(layout: Layout) -> None:
    up(layout)
    records = list(processes(layout).values())
    os.kill(read_json(layout.state)["supervisor"]["pid"], signal.SIGKILL)
    until("the end of the children", lambda: not any(is_running(record) for record in records))
    assert not is_up(layout)
    assert not up(layout)["was_up"]


def test_a_recycled_process_number_is_never_signalled(layout: Layout) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        began = identity(bystander.pid)["started_ticks"]
        stranger = {"pid": bystander.pid, "started_ticks": began - 1, "state": "running", "status": None, "failures": 0}
        layout.folder.mkdir()
        write_json(layout.desired, {"version": 1, "mesh": "mesh", "nodes": []})
        write_json(layout.state, {"phase": "up", "supervisor": stranger, "processes": {"broker": stranger, "node-1": stranger}})
        assert flowmesh("down", "--dir", str(layout.folder)).stdout == "the mesh was not up\n"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_node_that_cannot_start_is_told_with_its_last_words(layout: Layout) -> None:
    up(layout)
    flowmesh("down", "--dir", str(layout.folder))
    layout.join_file("node-1").write_text("{}")
    done = flowmesh("up", "--dir", str(layout.folder), "--timeout", "20")
    assert done.returncode == 5
    assert "node-1 ended" in done.stderr
    assert not is_up(layout), "a failed start leaves nothing behind"


# --- interruptions


def _start(layout: Layout, *arguments: str) -> subprocess.Popen[str]:
    command = [COMMAND, "up", "--dir", str(layout.folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["keys", "supervisor", "broker"])
def test_an_interrupted_start_leaves_nothing_running(layout: Layout, number: int, moment: str) -> None:
    starting = _start(layout)
    begun: dict[str, Callable[[], bool]] = {
        "keys": layout.keys.exists,
        "supervisor": lambda: bool(read_json(layout.state)),
        "broker": lambda: bool(read_json(layout.state).get("processes", {}).get("broker", {}).get("pid")),
    }
    until(moment, begun[moment])
    starting.send_signal(number)
    starting.communicate(timeout=60)
    assert starting.returncode in (0, 130), "ready before the signal came, or interrupted"
    if starting.returncode == 130:
        assert not is_up(layout)
        assert not [record for record in read_json(layout.state).get("processes", {}).values() if is_running(record)]
    assert not up(layout)["was_up"] or starting.returncode == 0


def test_an_interruption_while_the_supervisor_is_begun_ends_it_too(layout: Layout) -> None:
    begin = """
import os, signal
from flowmesh_deploy import control
from flowmesh_mesh.cli import main
launch = control.launch
def interrupted(*arguments, **options):
    supervisor = launch(*arguments, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    return supervisor
control.launch = interrupted
main()
"""
    command = [sys.executable, "-c", begin, "up", "--dir", str(layout.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    assert not is_up(layout)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_mesh_in_the_foreground_ends_with_its_command(layout: Layout, number: int) -> None:
    starting = _start(layout, "--foreground")
    assert starting.stdout is not None
    assert "is up at" in starting.stdout.readline()
    records = [read_json(layout.state)["supervisor"], *processes(layout).values()]
    starting.send_signal(number)
    starting.communicate(timeout=60)
    until("the end of all", lambda: not any(is_running(record) for record in records))
    assert not is_up(layout)


def test_two_starts_at_once_make_one_mesh(layout: Layout) -> None:
    both = [_start(layout, "--json") for _ in range(2)]
    answers = [json.loads(starting.communicate(timeout=90)[0]) for starting in both]
    assert sorted(answer["was_up"] for answer in answers) == [False, True]
    assert answers[0]["urls"] == answers[1]["urls"]


def test_down_during_a_start_ends_it(layout: Layout) -> None:
    starting = _start(layout)
    until("the supervisor", lambda: is_up(layout))
    assert flowmesh("down", "--dir", str(layout.folder)).returncode == 0
    _, errors = starting.communicate(timeout=60)
    assert not is_up(layout)
    assert starting.returncode in (0, 5), errors


# --- bad input


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tenants", "team.a"],
        ["--tenants", "good,*"],
        ["--tenants", "a b"],
        ["--tenants", "x" * 300],
        ["--tenants", "mesh"],
        ["--name", "a.b"],
        ["--name", "x" * 300],
        ["--nodes", "257"],
    ],
)
def test_bad_names_and_numbers_are_refused_before_anything_is_made(tmp_path: Path, arguments: list[str]) -> None:
    layout = Layout(tmp_path / "mesh")
    done = flowmesh("up", "--dir", str(layout.folder), *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert not layout.keys.exists()
    assert not is_up(layout)


def test_a_file_where_the_folder_should_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = flowmesh("up", "--dir", str(tmp_path / "file"))
    assert done.returncode == 2
    assert "cannot make the folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_mesh_commands_say_how_to_get_one(tmp_path: Path) -> None:
    done = flowmesh("status", cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert done.returncode == 4
    assert "no mesh found" in done.stderr
    assert "flowmesh up" in done.stderr
    assert flowmesh("down", cwd=tmp_path).returncode == 4


def test_a_mesh_that_is_down_is_told_as_such(layout: Layout) -> None:
    up(layout)
    flowmesh("down", "--dir", str(layout.folder))
    done = flowmesh("status", "--context", str(layout.context))
    assert done.returncode == 5
    assert "flowmesh up" in done.stderr


def test_damaged_keys_stop_the_start(layout: Layout) -> None:
    layout.keys.parent.mkdir(parents=True)
    layout.keys.write_text("{")
    done = flowmesh("up", "--dir", str(layout.folder))
    assert done.returncode == 7
    assert "damaged" in done.stderr
    assert not is_up(layout)


def test_a_taken_port_leads_to_another_that_everybody_learns(layout: Layout) -> None:
    first = up(layout)
    flowmesh("down", "--dir", str(layout.folder))
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", int(first["urls"][0].rpartition(":")[2])))
        thief.listen()
        second = up(layout)
    assert second["urls"] != first["urls"]
    assert second["nodes"] == ["node-1"]
    assert load_context(layout.context).urls == second["urls"]


# --- embedded


async def test_a_node_of_an_embedded_mesh_is_killed_and_comes_back(tmp_path: Path) -> None:
    async with embedded_mesh(tmp_path / "mesh", nodes=2, tenants=["team-a"]) as context:
        async with connect(context) as mesh:
            assert await _state_of(mesh, 1) == "succeeded"
            record = context.process("node-1")
            old = context.kill_node("node-1")
            assert old == record["pid"]
            assert not is_running(record)
            assert await _state_of(mesh, 2) == "succeeded"
            assert await context.start_node("node-1") != old
            assert await context.start_node("extra") > 0
            assert sorted(context.node_names()) == ["extra", "node-1", "node-2"]
        records = list(processes(context.layout).values())
    assert not [record for record in records if is_running(record)]


async def _fail_in(folder: Path, records: list[dict[str, Any]]) -> None:
    async with embedded_mesh(folder, nodes=1) as context:
        records += processes(context.layout).values()
        raise ValueError("on purpose")


async def test_a_failing_block_stops_its_mesh(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    with pytest.raises(ValueError, match="on purpose"):
        await _fail_in(tmp_path / "mesh", records)
    assert records
    assert not [record for record in records if is_running(record)]
