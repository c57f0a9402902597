"""Three brokers in one cluster: what is lost with one of them, and who goes on where."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from flowmesh_cas.errors import TransientError, UsageError
from flowmesh_deploy.broker import Broker, Cluster
from flowmesh_deploy.control import register_tenants
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_deploy.keyring import Keyring
from flowmesh_deploy.layout import Layout, prepare, read_json, write_json
from flowmesh_deploy.ports import choose_port
from flowmesh_mesh import isolation
from flowmesh_mesh.bus import Bus, NoAnswerError, UnknownOutcomeError
from flowmesh_mesh.client import Mesh, connect
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.streams import StreamConfig

DEADLINE_S = 60.0


class Three:
    """Three brokers that form a cluster, with the keys of a mesh."""

    def __init__(self, folder: Path) -> None:
        self.keyring = Keyring.open(folder / "keys" / "keyring.json", "three")
        self.stack = AsyncExitStack()
        addresses = [f"127.0.0.1:{choose_port()}" for _ in range(3)]
        self.brokers = []
        for number, address in enumerate(addresses, 1):
            security = self.keyring.broker_config(folder / f"accounts-{number}")
            cluster = Cluster("three", "secret", address, tuple(addresses))
            self.brokers.append(Broker(folder / f"b{number}", security=security, name=f"b{number}", cluster=cluster))

    @property
    def urls(self) -> list[str]:
        return [broker.url for broker in self.brokers]

    async def connect(self, urls: list[str] | None = None, **options: Any) -> Bus:
        credentials = self.keyring.scheduler()
        bus = await Bus.connect(urls or self.urls, credentials, name="test", inbox=credentials.inbox, **options)
        self.stack.push_async_callback(bus.close)
        return bus

    def member(self, folder: Path, name: str, secret: str) -> Broker:
        """Return one more broker that knows the others."""
        routes = tuple(broker.cluster.listen for broker in self.brokers if broker.cluster)
        cluster = Cluster("three", secret, f"127.0.0.1:{choose_port()}", routes)
        return Broker(folder / name, security=self.keyring.broker_config(folder / f"accounts-{name}"), name=name, cluster=cluster)

    def under(self, bus: Bus) -> Broker:
        """Return the broker to which a bus is connected."""
        return next(broker for broker in self.brokers if broker.url.endswith(broker_of(bus)))

    async def joined(self) -> None:
        """Wait until every broker has a link to every other."""
        await until(
            "links", lambda: all(broker.log.read_text().count("Route connection created") >= 2 for broker in self.brokers)
        )

    def signal(self, broker: Broker, number: int) -> None:
        assert broker.child is not None
        broker.child.send_signal(number)


def broker_of(bus: Bus) -> str:
    return str(bus.connection.connected_url.netloc)


@pytest.fixture
def three_processes(tmp_path: Path) -> Iterator[Three]:
    made = Three(tmp_path)
    try:
        for broker in made.brokers:
            broker.start()
        yield made
    finally:
        for broker in made.brokers:
            broker.ask_to_stop()
        for broker in made.brokers:
            broker.stop(1.0)


@pytest_asyncio.fixture
async def three(three_processes: Three) -> AsyncIterator[Three]:
    async with three_processes.stack:
        yield three_processes


async def until(what: str, check: Callable[[], Any], deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not check():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def until_heard(bus: Bus, subject: str) -> None:
    """Wait until the broker of ``bus`` knows of a listener at another one."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await bus.request(subject, b"", timeout_s=0.1)
            except NoAnswerError:
                await asyncio.sleep(0.01)
            except UnknownOutcomeError:
                return


async def make_stream(bus: Bus, name: str, replicas: int = 3) -> None:
    """Create a stream as soon as the cluster lets us."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await bus.ensure_stream(StreamConfig(name, [f"{name.lower()}.>"], num_replicas=replicas))
                return
            except TransientError:
                await asyncio.sleep(0.1)


# --- connections


async def test_a_killed_broker_is_left_at_once_and_what_was_in_flight_fails_at_once(three: Three) -> None:
    bus = await three.connect()
    await (await three.connect()).subscribe("q.never", lambda _: None)
    await until_heard(bus, "q.never")
    asking = asyncio.create_task(bus.request("q.never", b"", timeout_s=30.0))
    await asyncio.sleep(0.2)
    lost = three.under(bus)
    began = time.monotonic()
    three.signal(lost, signal.SIGKILL)
    with pytest.raises(UnknownOutcomeError, match="connection was lost"):
        await asking
    await until("another broker", lambda: bus.connected)
    assert time.monotonic() - began < 5.0
    assert three.under(bus) is not lost
    await bus.flush()


async def test_a_dead_broker_is_not_tried_again_while_another_is_left(three: Three) -> None:
    bus = await three.connect()
    tried: list[str] = []
    choose = bus.connection._next_server

    def noting(servers: list[Any], info: dict[str, Any]) -> tuple[Any, float]:
        server, wait_s = choose(servers, info)
        tried.append(server.uri.netloc)
        return server, wait_s

    bus.connection._reconnect_to_server_handler = noting
    dead = three.under(bus)
    three.signal(dead, signal.SIGKILL)
    await until("another broker", lambda: tried and bus.connected)
    three.signal(three.under(bus), signal.SIGKILL)
    count = len(tried)
    await until("the third broker", lambda: len(tried) > count and bus.connected)
    assert len(tried) == 2
    assert dead.url.rpartition("/")[2] not in tried


async def test_a_frozen_broker_is_left_without_help(three: Three) -> None:
    bus = await three.connect()
    frozen = three.under(bus)
    three.signal(frozen, signal.SIGSTOP)
    try:
        await until("another broker", lambda: bus.connected and three.under(bus) is not frozen, 15.0)
    finally:
        three.signal(frozen, signal.SIGCONT)


async def test_an_attempt_to_connect_ends_when_it_is_told_to() -> None:
    dead = [f"nats://127.0.0.1:{choose_port()}" for _ in range(3)]

    async def attempt() -> None:
        async with asyncio.timeout(0.3):
            await Bus.connect(dead, None, name="test", inbox="_INBOX", deadline_s=600.0)

    attempts = asyncio.gather(*(attempt() for _ in range(60)), return_exceptions=True)
    found = await asyncio.wait_for(attempts, 30.0)
    assert all(isinstance(error, TimeoutError) for error in found)


async def test_a_connection_without_a_broker_can_be_closed(three: Three) -> None:
    buses = [await three.connect() for _ in range(20)]
    for broker in three.brokers:
        three.signal(broker, signal.SIGKILL)
    await until("the loss", lambda: not any(bus.connected for bus in buses))
    await asyncio.sleep(0.3)
    await asyncio.wait_for(asyncio.gather(*(bus.close() for bus in buses)), 30.0)
    left = [bus.connection._reconnection_task for bus in buses]
    assert all(task is None or task.done() for task in left)


async def test_brokers_tell_no_addresses_that_were_not_listed(three: Three) -> None:
    bus = await three.connect(three.urls[:1])
    await three.joined()
    assert [server.netloc for server in bus.connection.servers] == [three.urls[0].rpartition("/")[2]]
    assert not bus.connection.discovered_servers


async def test_who_does_not_know_the_secret_is_no_member(three: Three, tmp_path: Path) -> None:
    bus = await three.connect()
    stranger = three.member(tmp_path, "x", "wrong")
    stranger.start()
    try:
        await until("refusals", lambda: "Authorization" in stranger.log.read_text() + three.brokers[0].log.read_text())
        credentials = three.keyring.scheduler()
        outside = await Bus.connect(stranger.url, credentials, name="outside", inbox=credentials.inbox)
        heard: list[object] = []
        await outside.subscribe("said.>", heard.append)
        await outside.flush()
        await bus.publish("said.here", b"")
        await bus.flush()
        await asyncio.sleep(0.3)
        assert not heard
        await outside.close()
    finally:
        stranger.stop(1.0)


async def test_a_broker_that_is_cut_off_from_the_others_is_left_although_its_link_holds(
    three: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "ALONE_S", 1.0)
    lonely = three.member(tmp_path, "b4", "another")
    lonely.start()
    try:
        bus = await three.connect([*three.urls, lonely.url])
        await make_stream(bus, "KEPT")
        while not broker_of(bus).endswith(f":{lonely.port}"):
            await bus.connection.force_reconnect()
            await until("a connection", lambda: bus.connected)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    await bus.store("kept.x", b"x", message_id="x", timeout_s=0.5)
                    break
                except TransientError:
                    await asyncio.sleep(0.1)
        assert not broker_of(bus).endswith(f":{lonely.port}")
    finally:
        lonely.stop(1.0)


async def test_a_new_tenant_is_let_in_by_every_broker(three: Three, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    write_json(layout.state, {"urls": three.urls})
    await three.joined()
    three.keyring.add_tenants(["late"])
    await register_tenants(layout, three.keyring, ["late"])
    for url in three.urls:
        credentials = three.keyring.client("late")
        await (await Bus.connect(url, credentials, name="late", inbox=credentials.inbox)).close()


# --- a whole mesh


def noop(nonce: int, sleep_s: float = 0.0) -> dict[str, Any]:
    return {"type": "flow.noop", "with": {"nonce": nonce, "sleep_s": sleep_s}}


async def finish(client: Mesh, operators: dict[str, Any]) -> None:
    document = {
        "apiVersion": "flowmesh/v1",
        "name": "w",
        "operators": operators,
        "outputs": {"o": f"{next(iter(operators))}.out"},
    }
    run = await client.submit(document)
    assert (await run.result(timeout_s=DEADLINE_S)).state == "succeeded"


def connected_to(pid: int) -> set[int]:
    """Return the ports to which a process has connections."""
    return {link.raddr.port for link in psutil.Process(pid).net_connections("tcp") if link.raddr and link.status == "ESTABLISHED"}


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


async def node_on(mesh: EmbeddedMesh, port: int) -> str:
    """Return a node that is connected to the broker at ``port``; start more until there is one."""
    for number in itertools.count():
        for name in mesh.node_names():
            if port in connected_to(mesh.process(name)["pid"]):
                return name
        await mesh.start_node(f"more-{number}")
    raise AssertionError


async def test_client_node_and_scheduler_go_on_when_their_broker_is_killed(tmp_path: Path) -> None:
    async with (
        embedded_mesh(tmp_path / "m", nodes=2, brokers=3, schedulers=2, tenants=["team-a"]) as mesh,
        connect(mesh) as client,
    ):
        await finish(client, {"a": noop(1)})
        bus = client._bus
        assert bus is not None
        leaders = {name: connected_to(mesh.process(name)["pid"]) for name in mesh.process_names("scheduler")}
        lost = next(name for name in mesh.process_names("broker") if port_of(mesh.broker_url(name)) in leaders["scheduler"])
        port = port_of(mesh.broker_url(lost))
        node = await node_on(mesh, port)
        while not broker_of(bus).endswith(f":{port}"):
            await bus.connection.force_reconnect()
            await until("a connection", lambda: bus.connected)
        others = {
            name: mesh.process(name)["pid"] for kind in ("broker", "scheduler", "node") for name in mesh.process_names(kind)
        }
        others.pop(lost)
        mesh.kill(lost, is_held=True)
        await finish(client, {f"n{index}": noop(index, 0.05) for index in range(20)})
        assert {name: mesh.process(name)["pid"] for name in others} == others
        assert connected_to(others[node]), "it is connected elsewhere"
        assert await mesh.start(lost) > 0
        assert {name: mesh.process(name)["pid"] for name in others} == others, "nobody is moved by a broker that comes back"
        await finish(client, {"z": noop(99)})


async def test_each_process_can_be_hurt_by_name(tmp_path: Path) -> None:
    clock = tmp_path / "offset"
    environment = {"scheduler-2": {"FLOWMESH_CLOCK_OFFSET_FILE": str(clock)}}
    async with embedded_mesh(
        tmp_path / "m", nodes=1, brokers=3, schedulers=3, tenants=["team-a"], environment=environment
    ) as mesh:
        assert mesh.process_names("broker") == ["broker", "broker-2", "broker-3"]
        assert mesh.process_names("scheduler") == ["scheduler", "scheduler-2", "scheduler-3"]
        given = psutil.Process(mesh.process("scheduler-2")["pid"]).environ()
        assert given["FLOWMESH_CLOCK_OFFSET_FILE"] == str(clock)
        old = mesh.kill("scheduler-3", is_held=True)
        await until("its end", lambda: read_json(mesh.layout.state)["processes"]["scheduler-3"]["state"] == "gone")
        assert await mesh.start("scheduler-3") != old
        before = mesh.process("broker-2")["pid"]
        assert await mesh.restart("broker-2") != before
        pid = mesh.stop_process("scheduler-2")
        await until("the stop", lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        mesh.continue_process("scheduler-2")
        mesh.stop_process("broker-3")
        mesh.stop_process("node-1")
        records = [mesh.process(name) for kind in ("broker", "scheduler", "node") for name in mesh.process_names(kind)]
    assert not [record for record in records if psutil.pid_exists(record["pid"])], "frozen processes end with their mesh, too"


# --- the folder


def test_a_mesh_of_three_has_three_of_everything_and_one_secret(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "m")
    prepare(layout, nodes=1, tenants=["team-a"], brokers=3, schedulers=3)
    context = read_json(layout.context)
    assert len(set(context["urls"])) == 3
    files = [read_json(layout.scheduler_file(name)) for name in layout.schedulers()]
    assert [file["name"] for file in files] == ["scheduler-1", "scheduler-2", "scheduler-3"]
    assert {file["replicas"] for file in files} == {3}
    assert all(file["urls"] == context["urls"] for file in [*files, read_json(layout.join_file("node-1"))])
    secrets = {
        (layout.scheduler_folder(name) / file["secret"]).resolve() for name, file in zip(layout.schedulers(), files, strict=True)
    }
    assert secrets == {layout.secret.resolve()}
    assert layout.secret.stat().st_mode & 0o777 == 0o600
    prepare(layout, nodes=None, tenants=[])
    assert read_json(layout.desired)["brokers"] == 3
    assert read_json(layout.context)["urls"] == context["urls"]
    Credentials.load(layout.scheduler_folder("scheduler-3") / files[2]["credentials"])


def test_the_folder_of_an_earlier_release_gets_what_it_lacks(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "m")
    prepare(layout, nodes=1, tenants=["team-a"])
    known = read_json(layout.desired)
    write_json(layout.desired, {name: known[name] for name in ("version", "mesh", "nodes")})
    found = read_json(layout.scheduler)
    write_json(layout.scheduler, {name: value for name, value in found.items() if name not in ("name", "secret", "replicas")})
    keys = read_json(layout.keys)
    del keys["roles"]["inspector"]
    write_json(layout.keys, keys)
    layout.inspector.unlink()
    layout.secret.write_text("ab" * 32)
    prepare(layout, nodes=None, tenants=[])
    assert read_json(layout.desired) == known
    assert read_json(layout.scheduler) == found
    assert layout.secret.read_text() == "ab" * 32, "the secret that the scheduler has made stays"
    assert Credentials.load(layout.inspector).name == "inspector"
    assert {name: seed for name, seed in read_json(layout.keys)["roles"].items() if name in keys["roles"]} == keys["roles"]


def test_settings_of_the_first_scheduler_are_those_of_all(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "m")
    prepare(layout, nodes=1, tenants=["team-a"], schedulers=2)
    first = read_json(layout.scheduler)
    layout.scheduler.write_text(json.dumps({**first, "operators": ["team-a"]}))
    prepare(layout, nodes=None, tenants=[])
    assert read_json(layout.scheduler_file("scheduler-2"))["operators"] == ["team-a"]


def test_the_number_of_brokers_is_settled_when_a_mesh_is_made(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "m")
    prepare(layout, nodes=1, tenants=["team-a"])
    with pytest.raises(UsageError, match="cannot change") as raised:
        prepare(layout, nodes=None, tenants=[], brokers=3)
    assert "--dir NEW --brokers 3" in str(raised.value.hint)
    with pytest.raises(UsageError, match="2 brokers are not possible"):
        prepare(Layout(tmp_path / "n"), nodes=1, tenants=[], brokers=2)
    assert not os.path.exists(tmp_path / "n")


def test_a_process_keeps_the_addresses_that_only_it_was_told(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "m")
    own = {"node-1": ["nats://127.0.0.1:1"], "scheduler-2": ["nats://127.0.0.1:2"], "client": ["nats://127.0.0.1:3"]}
    prepare(layout, nodes=2, tenants=["team-a"], brokers=3, schedulers=2, urls=own)
    prepare(layout, nodes=None, tenants=[])
    assert read_json(layout.join_file("node-1"))["urls"] == own["node-1"]
    assert read_json(layout.scheduler_file("scheduler-2"))["urls"] == own["scheduler-2"]
    assert read_json(layout.context)["urls"] == own["client"]
    assert len(read_json(layout.join_file("node-2"))["urls"]) == 3
    assert len(read_json(layout.scheduler)["urls"]) == 3
