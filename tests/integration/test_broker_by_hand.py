"""`flowmesh broker` as people use it on three machines: here three folders and three processes on loopback."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.errors import TransientError, UsageError
from flowmesh_deploy import membership
from flowmesh_deploy.layout import Layout, prepare, read_json
from flowmesh_deploy.ports import choose_port
from flowmesh_deploy.process import spawn, started_ticks
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.client import connect
from flowmesh_mesh.context import load_context
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.streams import StreamConfig

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
DEADLINE_S = 60.0


def flowmesh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)


def ports(count: int) -> list[int]:
    taken: set[int] = set()
    while len(taken) < count:
        taken.add(choose_port(taken))
    return list(taken)


def addresses(count: int) -> list[str]:
    found = ports(2 * count)
    return [f"127.0.0.1:{found[2 * index]}:{found[2 * index + 1]}" for index in range(count)]


class Processes:
    """Commands that run in the background and end with the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        self.running[name] = spawn(command, self._folder / f"{name}.log")

    def text(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def wait_for(self, name: str, words: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while words not in self.text(name):
            assert self.running[name].poll() is None, self.text(name)
            assert time.monotonic() < deadline, self.text(name)
            time.sleep(0.01)

    def stop(self) -> None:
        for child in reversed(self.running.values()):
            if child.poll() is None:
                child.terminate()
        for child in self.running.values():
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path / "logs")
    yield made
    made.stop()


def three_brokers(tmp_path: Path, processes: Processes, *arguments: str) -> dict[str, Any]:
    """Make and run three brokers as the output of `init` says; return its document."""
    first = tmp_path / "one"
    done = flowmesh("broker", "init", *addresses(3), "--dir", str(first), "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    folders = {"broker": first}
    for name, file in found["joins"].items():
        folders[name] = tmp_path / name
        assert flowmesh("broker", "join", file, "--dir", str(folders[name])).returncode == 0
    for name, folder in folders.items():
        processes.start(name, COMMAND, "broker", "run", "--dir", str(folder))
    for name in folders:
        processes.wait_for(name, "listens at")
    return found


async def make_stream(bus: Bus) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await bus.ensure_stream(StreamConfig("KEPT", ["kept.>"], num_replicas=3))
                return
            except TransientError:
                await asyncio.sleep(0.1)


async def write(bus: Bus, acknowledged: dict[str, int], waits: list[float]) -> None:
    """Write without end; note what was acknowledged, and how long each had to wait for that."""
    for number in itertools.count():
        subject, began = f"kept.{number}", time.monotonic()
        while True:
            try:
                acknowledged[subject] = await bus.store(subject, b"x", message_id=subject, timeout_s=1.0)
                break
            except TransientError:
                await asyncio.sleep(0.05)
        waits.append(time.monotonic() - began)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def server_of(run: subprocess.Popen[bytes]) -> int:
    """Return the pid of the broker that a `broker run` has started."""
    return int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0])


async def test_three_brokers_by_hand_keep_what_they_acknowledged_when_one_is_killed(tmp_path: Path, processes: Processes) -> None:
    found = three_brokers(tmp_path, processes)
    credentials = Credentials.load(tmp_path / "one" / "credentials" / "scheduler.creds")
    bus = await Bus.connect(found["urls"], credentials, name="test", inbox=credentials.inbox)
    try:
        await make_stream(bus)
        acknowledged: dict[str, int] = {}
        waits: list[float] = []
        writing = asyncio.create_task(write(bus, acknowledged, waits))
        await until(lambda: len(acknowledged) > 50)
        run = next(child for name, child in processes.running.items() if _port(found, name) == bus.connection.connected_url.port)
        os.kill(server_of(run), signal.SIGKILL)
        count = len(acknowledged)
        await until(lambda: len(acknowledged) > count + 50)
        writing.cancel()
        assert max(waits) < 24.0, "an election takes four to nine seconds; as much again for a busy machine"
        info = await bus.stream_info("KEPT", subjects="kept.>")
        assert info is not None
        assert set(acknowledged) <= set(info.state.subjects), "nothing acknowledged is lost"
        assert set(info.state.subjects.values()) == {1}, "nothing is stored twice"
        assert run.wait(15) == 5, "a broker that ends by itself is an error"
    finally:
        await bus.close()


def _port(found: dict[str, Any], name: str) -> int:
    return int(found["urls"][["broker", "broker-2", "broker-3"].index(name)].rpartition(":")[2])


async def test_a_mesh_works_on_brokers_by_hand(tmp_path: Path, processes: Processes) -> None:
    three_brokers(tmp_path, processes, "--nodes", "far", "--schedulers", "2", "--tenants", "team-a")
    one = tmp_path / "one"
    for number in (1, 2):
        processes.start(f"s{number}", COMMAND, "scheduler", "--dir", str(one / "schedulers" / f"scheduler-{number}"))
    node = str(Path(COMMAND).with_name("flowmesh-node"))
    processes.start("far", node, "join", str(one / "nodes" / "far.join"), "--dir", str(tmp_path / "far"))
    processes.wait_for("far", "joined flowmesh as far")
    async with asyncio.timeout(DEADLINE_S), connect(load_context(one / "context.json")) as mesh:
        document = {
            "apiVersion": "flowmesh/v1",
            "name": "one",
            "operators": {"a": {"type": "flow.noop", "with": {"nonce": 1}}},
            "outputs": {"out": "a.out"},
        }
        while True:
            try:
                run = await mesh.submit(document)
                break
            except TransientError:  # nobody leads yet
                await asyncio.sleep(0.1)
        assert (await run.result()).state == "succeeded"
    async with asyncio.timeout(DEADLINE_S):
        while True:
            document = json.loads((await asyncio.to_thread(flowmesh, "doctor", "--dir", str(one), "--json")).stdout)
            if "3 of 3 brokers answer and are healthy" in {row["finding"] for row in document["findings"]}:
                break  # on a busy machine one of them may not have answered in time
    assert {row["check"] for row in document["findings"] if row["severity"] == "fail"} == set()
    joined = await asyncio.to_thread(flowmesh, "doctor", "--dir", str(tmp_path / "broker-2"), "--json")
    assert joined.returncode == 0
    assert {row["check"] for row in json.loads(joined.stdout)["findings"]} == {"sync", "stores", "disks", "secrets", "expiry"}


def test_a_broker_runs_once_and_ends_when_told(tmp_path: Path, processes: Processes) -> None:
    folder = tmp_path / "one"
    assert flowmesh("broker", "init", addresses(1)[0], "--dir", str(folder)).returncode == 0
    processes.start("run", COMMAND, "broker", "run", "--dir", str(folder))
    processes.wait_for("run", "listens at")
    server = server_of(processes.running["run"])
    again = flowmesh("broker", "run", "--dir", str(folder))
    assert again.returncode == 2
    assert "another broker runs" in again.stderr
    processes.running["run"].send_signal(signal.SIGHUP)
    processes.running["run"].send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert processes.running["run"].poll() is None, "what is passed on to the broker does not end it"
    processes.running["run"].terminate()
    assert processes.running["run"].wait(20) == 0
    assert started_ticks(server) == 0


def test_a_broker_ends_with_the_command_that_runs_it(tmp_path: Path, processes: Processes) -> None:
    folder = tmp_path / "one"
    assert flowmesh("broker", "init", addresses(1)[0], "--dir", str(folder)).returncode == 0
    processes.start("run", COMMAND, "broker", "run", "--dir", str(folder))
    processes.wait_for("run", "listens at")
    server = server_of(processes.running["run"])
    processes.running["run"].kill()
    deadline = time.monotonic() + 10
    while started_ticks(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_join_file_holds_no_seed_and_is_for_the_owner_only(tmp_path: Path) -> None:
    three = [membership.parse_address(text) for text in addresses(3)]
    membership.init(tmp_path / "one", three, mesh="m")
    for name in ("broker-2", "broker-3"):
        path = membership.join_file(tmp_path / "one", name)
        assert path.stat().st_mode & 0o777 == 0o600
        assert not re.search(r"\bS[AOU][A-Z2-7]{50,}", path.read_text()), "no seed of an account, operator or user"
        member = membership.join(path, tmp_path / name)
        assert (member.name, member.address) == (name, three[int(name[-1]) - 1])
        assert (tmp_path / name / membership.FILE).stat().st_mode & 0o777 == 0o600
    assert re.search(r"\bS[AOU][A-Z2-7]{50,}", (tmp_path / "one" / "keys" / "keyring.json").read_text()), "seeds look like this"


def test_joining_again_renews_and_another_broker_is_refused(tmp_path: Path) -> None:
    membership.init(tmp_path / "one", [membership.parse_address(text) for text in addresses(3)], mesh="m")
    file = membership.join_file(tmp_path / "one", "broker-2")
    membership.join(file, tmp_path / "two", store=str(tmp_path / "data"))
    file.unlink()
    assert membership.invite(tmp_path / "one", ["broker-2"]) == [file]
    assert membership.join(file, tmp_path / "two").store == str(tmp_path / "data")
    with pytest.raises(UsageError, match="is the folder of broker-2"):
        membership.join(membership.join_file(tmp_path / "one", "broker-3"), tmp_path / "two")
    with pytest.raises(UsageError, match="has no keys"):
        membership.invite(tmp_path / "two")
    with pytest.raises(UsageError, match="is the folder of a mesh already"):
        membership.init(tmp_path / "one", [membership.parse_address("h")], mesh="m")
    with pytest.raises(UsageError, match="broker of its own"):
        prepare(Layout(tmp_path / "one"), nodes=1, tenants=[])


@pytest.mark.parametrize(
    ("text", "host", "port", "cluster"),
    [("h", "h", 4222, 6222), ("10.0.0.1:1", "10.0.0.1", 1, 6222), ("[::1]:1:2", "[::1]", 1, 2), ("a.b-c:80:81", "a.b-c", 80, 81)],
)
def test_addresses_are_read(text: str, host: str, port: int, cluster: int) -> None:
    found = membership.parse_address(text)
    assert (found.host, found.port, found.cluster_port) == (host, port, cluster)


@pytest.mark.parametrize("text", ["", "h:", "h:0", "h:70000", "h:1:2:3", "a b", "nats://h", "::1", "h:5:5", "h;x", 'h"x'])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not the address of a broker"):
        membership.parse_address(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "b"], "2 brokers are not possible"),
        (["a", "a", "b"], "the same address"),
        (["a", "--name", "x.y"], "name"),
        (["a", "--tenants", "mesh"], "reserved"),
        (["a", "--nodes", "hub"], "reserved"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = flowmesh("broker", "init", *arguments, "--dir", str(tmp_path / "one"))
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "one").exists()


def test_a_scheduler_folder_is_whole_in_itself(tmp_path: Path) -> None:
    member = membership.init(tmp_path / "one", [membership.parse_address(text) for text in addresses(3)], mesh="m", schedulers=2)
    folders = [tmp_path / "one" / "schedulers" / name for name in ("scheduler-1", "scheduler-2")]
    found = [read_json(folder / "scheduler.json") for folder in folders]
    assert [file["name"] for file in found] == ["scheduler-1", "scheduler-2"]
    assert all(file["urls"] == member.urls and file["replicas"] == 3 for file in found)
    assert len({(folder / file["secret"]).read_text() for folder, file in zip(folders, found, strict=True)}) == 1
    for folder, file in zip(folders, found, strict=True):
        assert {(folder / file[name]).parent for name in ("credentials", "watcher", "secret")} == {folder}
