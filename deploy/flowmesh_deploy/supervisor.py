"""The process behind `flowmesh up`: starts broker, scheduler and nodes, watches them, stops them.

A broker or scheduler that ends is started again after a growing wait. A node that ends is recorded as gone and stays so until
`flowmesh up --nodes N` asks for it again: the mesh must live with nodes that vanish. Everything dies with this process.

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
from flowmesh_deploy.broker import Broker
from flowmesh_deploy.layout import Layout, publish_url, read_json, write_json
from flowmesh_deploy.process import identity, spawn

RESTART_MAX_S = 5.0
STABLE_S = 30.0
"""A process that ran for longer is restarted without a wait again."""

STOP_NODE_S = 12.0
"""Longer than a node waits for what it runs."""

STOP_SCHEDULER_S = 5.0

_STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_WATCHED = {*_STOP, signal.SIGUSR1, signal.SIGCHLD}


class _Role:
    """One supervised program."""

    def __init__(self, name: str, command: list[str], *, is_restarted: bool) -> None:
        self.name = name
        self.command = command
        self.is_restarted = is_restarted
        self.child: subprocess.Popen[bytes] | None = None
        self.state = "stopped"
        self.status: int | None = None
        self.started_at = 0.0
        self.failures = 0
        self.restart_at = 0.0
        self.record: dict[str, int] = {}

    def describe(self) -> dict[str, Any]:
        return {"state": self.state, "status": self.status, "failures": self.failures, **self.record}


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
        self.url = ""
        self.is_stopping = False
        security = layout.security.read_text()
        self.broker = Broker(layout.broker, security=security, log=layout.logs / "broker.log")
        self._broker = _Role("broker", [], is_restarted=True)
        self._scheduler = _Role(
            "scheduler", [sys.executable, "-P", "-m", "flowmesh_scheduler", "--dir", str(layout.folder)], is_restarted=True
        )
        self._scheduler_config = 0
        self._nodes: dict[str, _Role] = {}

    @property
    def _roles(self) -> list[_Role]:
        return [self._broker, self._scheduler, *self._nodes.values()]

    def run(self) -> None:
        """Start everything and watch it until a signal says stop."""
        try:
            self._save()  # from now on `flowmesh down` finds this process
            self._start_broker()
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

    def _start_broker(self) -> None:
        self._broker.started_at = time.monotonic()
        url = self.broker.start()
        assert self.broker.child is not None
        self._running(self._broker, self.broker.child)
        if url != self.url:
            self.url = url
            publish_url(self.layout, url)
            self._move([role for role in self._roles[1:] if role.child is not None])

    def _start_programs(self) -> None:
        """Start the scheduler and the nodes that are wished for and do not run."""
        self._scheduler_config = self.layout.scheduler.stat().st_mtime_ns
        if self._scheduler.child is None:
            self._start(self._scheduler)
        for name in read_json(self.layout.desired).get("nodes", []):
            role = self._nodes.setdefault(name, _Role(name, _node_command(self.layout, name), is_restarted=False))
            if role.child is None:
                self._start(role)

    def _move(self, roles: list[_Role]) -> None:
        """Start anew what knows the broker's old address only."""
        self._stop_all(roles, STOP_NODE_S)
        for role in roles:
            self._start(role)

    def _start(self, role: _Role) -> None:
        role.started_at = time.monotonic()
        self._running(role, spawn(role.command, self.layout.logs / f"{role.name}.log"))

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
        if self.layout.scheduler.stat().st_mtime_ns != self._scheduler_config and self._scheduler.child is not None:
            self._scheduler.child.terminate()  # it is started again and reads its file anew
        self._start_programs()

    def _reap(self) -> None:
        for role in self._roles:
            if role.child is None or role.child.poll() is None:
                continue
            role.status, role.child = role.child.returncode, None
            lasted_s = time.monotonic() - role.started_at
            role.failures = 0 if lasted_s > STABLE_S or role.status == 0 else role.failures + 1
            if role.is_restarted:
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
                if role is self._broker:
                    self._start_broker()
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
                "url": self.url,
                "supervisor": identity(os.getpid()),
                "processes": {role.name: role.describe() for role in self._roles},
            },
        )

    # --- stopping

    def stop(self) -> None:
        """End nodes first, then the scheduler, then the broker; force what takes too long."""
        if self.phase != "failed":
            self.phase = "stopping"
        self._save()
        self._stop_all(list(self._nodes.values()), STOP_NODE_S)
        self._stop_all([self._scheduler], STOP_SCHEDULER_S)
        self.broker.stop()
        self._broker.state, self._broker.record = "stopped", {}
        if self.phase != "failed":
            self.phase = "down"
        self._save()

    def _stop_all(self, roles: list[_Role], budget_s: float) -> None:
        running = [role for role in roles if role.child is not None]
        for role in running:
            assert role.child is not None
            role.child.terminate()
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
