"""The process behind `flowmesh up`: starts brokers, schedulers and nodes, watches them, stops them.

A broker or scheduler that ends is started again after a growing wait, unless it is held. A node that ends is recorded as gone
and stays so until `flowmesh up --nodes N` asks for it again: the mesh must live with nodes that vanish. Everything dies with this
process.

Signals: TERM, INT and HUP stop the mesh; USR1 makes it read the wishes again.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import FlowmeshError
from flowmesh_deploy.broker import PORT_S, Broker, Cluster
from flowmesh_deploy.layout import Layout, publish_urls, read_json, sync_of, write_json
from flowmesh_deploy.ports import choose_port, is_free, keep_port
from flowmesh_deploy.process import identity, spawn

RESTART_MAX_S = 5.0
STABLE_S = 30.0
"""A process that ran for longer is restarted without a wait again."""

STOP_NODE_S = 12.0
"""Longer than a node waits for what it runs."""

STOP_SCHEDULER_S = 5.0

STOP_BROKER_S = 5.0
"""The broker syncs each consumer when it stops (10 ms each); what takes longer is killed, which loses nothing."""

_STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_WATCHED = {*_STOP, signal.SIGUSR1, signal.SIGCHLD}


class _Role:
    """One supervised program."""

    def __init__(self, name: str, kind: str, command: list[str]) -> None:
        self.name = name
        self.kind = kind
        self.command = command
        self.is_restarted = kind != "node"
        self.child: subprocess.Popen[bytes] | None = None
        self.state = "stopped"
        self.status: int | None = None
        self.started_at = 0.0
        self.failures = 0
        self.restart_at = 0.0
        self.record: dict[str, int] = {}

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "state": self.state, "status": self.status, "failures": self.failures, **self.record}


def _scheduler_command(layout: Layout, process: str) -> list[str]:
    return [sys.executable, "-P", "-m", "flowmesh_scheduler", "--dir", str(layout.scheduler_folder(process))]


def _node_command(layout: Layout, node: str) -> list[str]:
    script = Path(sys.executable).with_name("flowmesh-node")
    start = [str(script)] if script.exists() else [sys.executable, "-c", "from flowmesh_node.cli import main; main()"]
    return [*start, "join", str(layout.join_file(node)), "--dir", str(layout.nodes / node)]


class Supervisor:
    """One mesh under supervision."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.phase = "starting"
        self.error = ""
        self.urls: list[str] = []
        self.is_stopping = False
        self._brokers = {name: _Role(name, "broker", []) for name in layout.brokers()}
        self._servers = {name: self._server(name) for name in self._brokers}
        self._schedulers: dict[str, _Role] = {}
        self._scheduler_files: dict[str, int] = {}
        """When the configuration that a scheduler has read was written."""
        self._nodes: dict[str, _Role] = {}

    def _server(self, name: str) -> Broker:
        folder = self.layout.broker_folder(name)
        security = (folder / self.layout.security.name).read_text()
        own = name if len(self._brokers) > 1 else "flowmesh"
        return Broker(folder, security=security, log=self.layout.logs / f"{name}.log", name=own, sync=sync_of(self.layout))

    @property
    def _roles(self) -> list[_Role]:
        return [*self._brokers.values(), *self._schedulers.values(), *self._nodes.values()]

    def run(self) -> None:
        """Start everything and watch it until a signal says stop."""
        try:
            self._save()  # from now on `flowmesh down` finds this process
            for role in self._brokers.values():
                self._start_broker(role)
                self._save()
            self._start_programs()
            self.phase = "up"
            while not self.is_stopping:
                self._save()
                self._wait()
                self._reap()
                self._restart_due()
        except (FlowmeshError, OSError) as error:
            self.phase, self.error = "failed", str(error)
            print(error, flush=True)
        finally:
            self.stop()

    # --- starting

    def _start_broker(self, role: _Role) -> None:
        role.started_at = time.monotonic()
        server = self._servers[role.name]
        if len(self._brokers) > 1:
            server.cluster = self._membership(role.name)
        server.start()
        assert server.child is not None
        self._running(role, server.child)
        self._publish()

    def _membership(self, name: str) -> Cluster:
        """Return what makes a broker a member. A port among brokers that somebody else has taken is given up for another."""
        taken = {server.port for server in self._servers.values()}
        files = {other: self.layout.broker_folder(other) / "cluster_port" for other in self._brokers}
        ports = {other: keep_port(path, taken) for other, path in files.items()}
        deadline = time.monotonic() + PORT_S
        while not is_free(ports[name]):
            if time.monotonic() > deadline:
                ports[name] = choose_port(taken)
                files[name].write_text(str(ports[name]))
                break
            time.sleep(0.01)
        addresses = {other: f"127.0.0.1:{port}" for other, port in ports.items()}
        secret = self.layout.cluster_key.read_text().strip()
        mesh = str(read_json(self.layout.desired).get("mesh", ""))
        return Cluster(mesh, secret, addresses[name], tuple(addresses.values()))

    def _publish(self) -> None:
        """Let everybody know the brokers' addresses. Who knows only the one that is no longer right is started anew."""
        urls = [server.url for server in self._servers.values() if server.url]
        if urls == self.urls or len(urls) < len(self._brokers):
            return
        self.urls = urls
        publish_urls(self.layout, urls)
        for name in self._scheduler_files:
            self._scheduler_files[name] = self._written_at(name)
        if len(urls) == 1:
            self._move([role for role in self._roles if role.kind != "broker" and role.child is not None])

    def _start_programs(self) -> None:
        """Start the schedulers and the nodes that are wished for and do not run."""
        held = self._held()
        for name in self.layout.schedulers():
            role = self._schedulers.setdefault(name, _Role(name, "scheduler", _scheduler_command(self.layout, name)))
            if role.child is None and name not in held:
                self._start(role)
        for name in read_json(self.layout.desired).get("nodes", []):
            role = self._nodes.setdefault(name, _Role(name, "node", _node_command(self.layout, name)))
            if role.child is None:
                self._start(role)

    def _held(self) -> list[str]:
        """Return the processes that are not to be started again when they end."""
        return list(read_json(self.layout.desired).get("held", []))

    def _written_at(self, scheduler: str) -> int:
        try:
            return self.layout.scheduler_file(scheduler).stat().st_mtime_ns
        except OSError:
            return 0

    def _move(self, roles: list[_Role]) -> None:
        """Start anew what knows the broker's old address only."""
        self._stop_all(roles, STOP_NODE_S)
        for role in roles:
            self._start(role)

    def _start(self, role: _Role) -> None:
        if role.kind == "scheduler":
            self._scheduler_files[role.name] = self._written_at(role.name)
        role.started_at = time.monotonic()
        environment = read_json(self.layout.desired).get("environment", {}).get(role.name)
        self._running(role, spawn(role.command, self.layout.logs / f"{role.name}.log", env=environment))

    def _running(self, role: _Role, child: subprocess.Popen[bytes]) -> None:
        role.child, role.state, role.status, role.restart_at = child, "running", None, 0.0
        role.record = identity(child.pid)

    # --- watching

    def _wait(self) -> None:
        """Sleep until a child ends, a signal comes or a restart is due."""
        due = [role.restart_at for role in self._roles if role.restart_at]
        timeout_s = max(0.0, min(due) - time.monotonic()) if due else 3600.0
        received = signal.sigtimedwait(_WATCHED, timeout_s)
        if received is None:
            return
        if received.si_signo in _STOP:
            self.is_stopping = True
        elif received.si_signo == signal.SIGUSR1:
            self._reload()

    def _reload(self) -> None:
        for name, role in self._schedulers.items():
            if role.child is not None and self._written_at(name) != self._scheduler_files[name]:
                role.child.terminate()  # it is started again and reads its file anew
        held = self._held()
        for role in self._brokers.values():
            if role.child is None and role.name not in held and not role.restart_at:
                role.restart_at = time.monotonic()
        self._start_programs()

    def _reap(self) -> None:
        held = self._held()
        for role in self._roles:
            if role.child is None or role.child.poll() is None:
                continue
            role.status, role.child = role.child.returncode, None
            lasted_s = time.monotonic() - role.started_at
            role.failures = 0 if lasted_s > STABLE_S or role.status == 0 else role.failures + 1
            if role.is_restarted and role.name not in held:
                role.state = "restarting"
                wait_s = min(RESTART_MAX_S, 0.1 * 2 ** (role.failures - 1)) if role.failures > 1 else 0.0
                role.restart_at = time.monotonic() + wait_s
            else:
                role.state = "gone"
            print(f"{role.name} ended with status {role.status}", flush=True)

    def _restart_due(self) -> None:
        now = time.monotonic()
        for role in self._roles:
            if not role.restart_at or role.restart_at > now or self.is_stopping:
                continue
            try:
                if role.kind == "broker":
                    self._start_broker(role)
                else:
                    self._start(role)
            except FlowmeshError as error:
                print(error.message, flush=True)
                role.failures += 1
                role.restart_at = now + min(RESTART_MAX_S, 0.1 * 2**role.failures)

    def _save(self) -> None:
        write_json(
            self.layout.state,
            {
                "version": 1,
                "phase": self.phase,
                "error": self.error,
                "urls": self.urls,
                "supervisor": identity(os.getpid()),
                "processes": {role.name: role.describe() for role in self._roles},
            },
        )

    # --- stopping

    def stop(self) -> None:
        """End nodes first, then the schedulers, then the brokers; force what takes too long."""
        if self.phase != "failed":
            self.phase = "stopping"
        self._save()
        self._stop_all(list(self._nodes.values()), STOP_NODE_S)
        self._stop_all(list(self._schedulers.values()), STOP_SCHEDULER_S)
        self._stop_brokers()
        if self.phase != "failed":
            self.phase = "down"
        self._save()

    def _stop_brokers(self) -> None:
        for server in self._servers.values():
            server.ask_to_stop()
        deadline = time.monotonic() + STOP_BROKER_S
        for name, server in self._servers.items():
            server.stop(max(0.0, deadline - time.monotonic()))
            role = self._brokers[name]
            role.child, role.state, role.record = None, "stopped", {}

    def _stop_all(self, roles: list[_Role], budget_s: float) -> None:
        running = [role for role in roles if role.child is not None]
        for role in running:
            assert role.child is not None
            role.child.terminate()
            role.child.send_signal(signal.SIGCONT)  # one that was stopped does not hear before
        deadline = time.monotonic() + budget_s
        for role in running:
            assert role.child is not None
            try:
                role.status = role.child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                role.child.kill()
                role.status = role.child.wait()
            role.child, role.state, role.record = None, "stopped", {}


def take_lock(layout: Layout) -> int | None:
    """Return the descriptor that makes this process the mesh's supervisor, None when there is another."""
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def main(folder: str) -> int:
    """Run the supervisor of ``folder``; return 3 when it is supervised already."""
    layout = Layout(folder)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    if take_lock(layout) is None:
        return 3
    supervisor = Supervisor(layout)
    supervisor.run()
    return 1 if supervisor.phase == "failed" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
