"""The mesh under chaos: brokers, schedulers and nodes as real processes of the product, each with addresses of its own.

What starts them is the product's own: folders and keys of ``flowmesh_deploy.layout``, brokers of ``flowmesh_deploy.broker``.
Only the supervisor is left out: here the faults decide who runs, and every process must have its own way to the brokers
(:mod:`chaos.network`), its own clock and its own disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from chaos.network import HOST, Network
from flowmesh_cas.errors import FlowmeshError
from flowmesh_deploy.broker import Broker
from flowmesh_deploy.layout import Layout, prepare, read_json, write_json
from flowmesh_deploy.process import spawn
from flowmesh_mesh import clock
from flowmesh_mesh.context import Context, load_context
from flowmesh_mesh.credentials import write_secret

TENANTS = ("team-a", "team-b")
STOP_S = 5.0
BROKER_START_S = 20.0

_CLUSTER = """\
cluster {{
  name: "chaos"
  listen: "{host}:{port}"
  advertise: "{host}:9"
  no_advertise: true
  routes: [{routes}]
}}
"""
"""Brokers must find each other through our links alone: the address that they tell others leads nowhere."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many of each there are, whether connections go through links of ours, and what the scheduler is told beside."""

    brokers: int = 3
    schedulers: int = 3
    nodes: int = 5
    has_links: bool = True
    scheduler: dict[str, Any] | None = None


def free_port() -> int:
    """Return a port that nobody listens on now, outside the range from which outgoing connections take theirs."""
    while True:
        port = random.SystemRandom().randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


class Process:
    """One process of the mesh: started, killed, paused and let go on by name."""

    def __init__(self, name: str, role: str, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.name = name
        self.role = role
        self._start = start
        self.child: subprocess.Popen[bytes] | None = None
        self.is_wanted = False
        self.is_paused = False

    @property
    def is_running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def start(self) -> None:
        """Start the process unless it runs."""
        self.is_wanted = True
        if not self.is_running:
            self.child, self.is_paused = self._start(), False

    def signal(self, number: int) -> None:
        """Send a signal to the process, if it runs."""
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)
            self.is_paused = number == signal.SIGSTOP or (self.is_paused and number != signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process and see it gone."""
        self.is_wanted = False
        self.signal(signal.SIGKILL)
        if self.child is not None:
            self.child.wait()

    def end(self) -> None:
        """Ask the process to end; it is not expected to live any longer."""
        self.is_wanted = False
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)


class ChaosMesh:
    """A mesh of ``shape`` on a folder. Use :meth:`prepare`, :meth:`start` and :meth:`stop`."""

    def __init__(self, folder: Path, shape: Shape, network: Network) -> None:
        self.folder = folder.absolute()
        self.shape = shape
        self.network = network
        self.layout = Layout(self.folder)
        self.processes: dict[str, Process] = {}
        self.ports: dict[str, int] = {}
        self._brokers: dict[str, Broker] = {}
        self._contexts: dict[str, Context] = {}

    # --- making it

    async def prepare(self) -> None:
        """Write every folder, and open every way to the brokers."""
        shape = self.shape
        keyring, _ = prepare(self.layout, nodes=shape.nodes, tenants=list(TENANTS))
        names = [f"broker-{number}" for number in range(1, shape.brokers + 1)]
        self.ports = {name: free_port() for name in names}
        await self._prepare_brokers(names, keyring)
        await self._prepare_schedulers(names)
        for node in read_json(self.layout.desired)["nodes"]:
            await self._prepare_node(node, names)
        for tenant in TENANTS:
            self._contexts[tenant] = await self._context(f"client-{tenant}", names)

    async def start(self) -> None:
        """Start everything; the mesh is up once its clients are served (:meth:`chaos.traffic.Traffic.ready`)."""
        for process in self.processes.values():
            process.start()
            await asyncio.sleep(0)

    async def _prepare_brokers(self, names: list[str], keyring: Any) -> None:
        routes = {name: free_port() for name in names}
        for name in names:
            folder = self.folder / "brokers" / name
            folder.mkdir(parents=True)
            (folder / "port").write_text(str(self.ports[name]))
            security = keyring.broker_config(folder / "accounts")
            if len(names) > 1:
                ways = [await self.network.listen(name, other, routes[other]) for other in names if other != name]
                listed = ", ".join(f'"nats-route://{HOST}:{port}"' for port in ways)
                security += _CLUSTER.format(host=HOST, port=routes[name], routes=listed)
            broker = Broker(folder, security=security, log=self._log(name), name=name)
            self._brokers[name] = broker
            self.processes[name] = Process(name, "broker", lambda broker=broker: _start_broker(broker))  # type: ignore[misc]

    async def _urls(self, source: str, brokers: list[str]) -> list[str]:
        if not self.shape.has_links:
            return [f"nats://{HOST}:{self.ports[broker]}" for broker in brokers]
        return [f"nats://{HOST}:{await self.network.listen(source, broker, self.ports[broker])}" for broker in brokers]

    async def _prepare_schedulers(self, brokers: list[str]) -> None:
        made = read_json(self.layout.scheduler)
        secret = self.layout.folder / "private.key"
        if not secret.exists():
            write_secret(secret, os.urandom(32).hex())
        for number in range(1, self.shape.schedulers + 1):
            name = f"scheduler-{number}"
            folder = self.folder / "schedulers" / name
            document = {
                **made,
                "urls": await self._urls(name, brokers),
                "name": name,
                "replicas": 3 if len(brokers) >= 3 else 1,
                "secret": str(secret),
                **{key: str(self.folder / made[key]) for key in ("credentials", "watcher")},
                **(self.shape.scheduler or {}),
            }
            write_json(folder / "scheduler.json", document)
            command = [sys.executable, "-P", "-m", "flowmesh_scheduler", "--dir", str(folder), "--verbose"]
            self._add(name, "scheduler", command)

    async def _prepare_node(self, node: str, brokers: list[str]) -> None:
        path = self.layout.join_file(node)
        write_json(path, {**read_json(path), "urls": await self._urls(node, brokers)})
        folder = self.node_folder(node)
        script = Path(sys.executable).with_name("flowmesh-node")
        self._add(node, "node", [str(script), "join", str(path), "--dir", str(folder), "--drain-s", "1"])

    def _add(self, name: str, role: str, command: list[str]) -> None:
        env = {clock.OFFSET_FILE: str(self.clock_file(name)), "FLOWMESH_LOG": "INFO", "PYTHONUNBUFFERED": "1"}
        self.processes[name] = Process(name, role, lambda: spawn(command, self._log(name), env=env))

    async def _context(self, source: str, brokers: list[str]) -> Context:
        return msgspec.structs.replace(load_context(self.layout.context), urls=await self._urls(source, brokers))

    # --- finding things

    def _log(self, name: str) -> Path:
        return self.layout.logs / f"{name}.log"

    def log_text(self, name: str) -> str:
        """Return what a process has written."""
        try:
            return self._log(name).read_text(errors="replace")
        except OSError:
            return ""

    def clock_file(self, name: str) -> Path:
        """Return the file in which a process's clock finds by how many seconds it is off."""
        return self.folder / "clocks" / name

    def node_folder(self, node: str) -> Path:
        return self.layout.nodes / node

    def scheduler_folder(self, name: str) -> Path:
        return self.folder / "schedulers" / name

    def disk(self, name: str) -> Path:
        """Return the folder of a node's or scheduler's blocks."""
        return (self.node_folder(name) if self.processes[name].role == "node" else self.scheduler_folder(name)) / "store"

    def context(self, tenant: str) -> Context:
        """Return how a tenant's client reaches the brokers."""
        return self._contexts[tenant]

    def direct_urls(self) -> list[str]:
        """Return the addresses of the brokers themselves, past all links."""
        return [f"nats://{HOST}:{port}" for port in self.ports.values()]

    def names(self, role: str) -> list[str]:
        """Return the processes of one role."""
        return [name for name, process in self.processes.items() if process.role == role]

    def running(self, role: str) -> list[str]:
        """Return the processes of one role that run and are not paused."""
        return [name for name in self.names(role) if self.processes[name].is_running and not self.processes[name].is_paused]

    # --- ending it

    def ended_alone(self) -> list[tuple[str, int]]:
        """Return (name, status) of processes that ended although they were wanted, and start them again as a supervisor would."""
        found = []
        for process in self.processes.values():
            if process.is_wanted and process.child is not None and process.child.poll() is not None:
                found.append((process.name, process.child.returncode))
                with contextlib.suppress(FlowmeshError):
                    process.start()
        return found

    def wipe(self, broker: str) -> None:
        """Remove everything that a broker (which does not run) has stored."""
        shutil.rmtree(self.folder / "brokers" / broker / "jetstream", ignore_errors=True)

    async def stop(self) -> None:
        """End everything: nodes, then schedulers, then brokers; force what takes too long."""
        for role in ("node", "scheduler", "broker"):
            processes = [self.processes[name] for name in self.names(role)]
            for process in processes:
                process.end()
            await asyncio.gather(*(asyncio.to_thread(_see_gone, process) for process in processes))
        for broker in self._brokers.values():
            broker.stop(0.1)


def _start_broker(broker: Broker) -> subprocess.Popen[bytes]:
    broker.start(BROKER_START_S)
    assert broker.child is not None
    return broker.child


def _see_gone(process: Process) -> None:
    if process.child is None:
        return
    try:
        process.child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
