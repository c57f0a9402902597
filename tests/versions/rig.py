"""A mesh of real processes of chosen builds on a real broker: each can be killed, stopped and replaced by another build's."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.versions.builds import Build

from flowmesh_deploy.broker import Broker
from flowmesh_deploy.keyring import Keyring
from flowmesh_deploy.layout import write_json

TENANT = "team-a"
DEADLINE_S = 90.0


class ClientError(AssertionError):
    """A client ended badly; what it said, and the last words of everybody else."""


class Rig:
    """Broker, keys, and processes by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = folder / "context.json"
        self._keyring = Keyring.open(folder / "keys" / "keyring.json", "versions")
        self._keyring.add_tenants([TENANT])
        self.broker = Broker(folder / "broker", security=self._keyring.broker_config(folder / "accounts"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._clients = 0

    def start(self) -> None:
        """Start the broker, and write what its processes and clients read: only what both builds know."""
        url = self.broker.start()
        for name, credentials in (
            ("scheduler", self._keyring.scheduler()),
            ("watcher", self._keyring.watcher()),
            (TENANT, self._keyring.client(TENANT)),
        ):
            credentials.save(self.folder / f"{name}.creds")
        account = self._keyring.tenants[TENANT]
        write_json(
            self.folder / "scheduler.json",
            {
                "urls": [url],
                "credentials": "scheduler.creds",
                "watcher": "watcher.creds",
                "store": "store",
                "mesh": "versions",
                "tenants": {TENANT: account},
            },
        )
        tenants = {TENANT: {"account": account, "credentials": f"{TENANT}.creds"}}
        document = {"version": 1, "mesh": "versions", "urls": [url], "dir": str(self.folder), "tenants": tenants}
        write_json(self.context, {**document, "default_tenant": TENANT})

    def run(self, name: str, build: Build, command: Sequence[str]) -> None:
        """Start a process of a build under a name; its output goes to a file."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                list(command), env=build.environment(), cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )

    def scheduler(self, build: Build, name: str = "scheduler") -> None:
        """Start a scheduler."""
        self.run(name, build, build.python("-m", "flowmesh_scheduler", "--dir", str(self.folder)))

    def join_file(self, name: str) -> Path:
        """Return the join file of a node, made on first use."""
        path = self.folder / f"{name}.join"
        if not path.exists():
            document = {"urls": [self.broker.url], "credentials": self._keyring.node(name).text(), "node": name}
            write_json(path, {**document, "mesh": "versions"})
        return path

    def node(self, build: Build, name: str) -> None:
        """Start a node."""
        begin = "from flowmesh_node.cli import main; main()"
        self.run(
            name, build, build.python("-c", begin, "join", str(self.join_file(name)), "--dir", str(self.folder / "nodes" / name))
        )

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a process and wait for its end; return its status."""
        process = self._processes.pop(name)
        process.send_signal(number)
        return process.wait(DEADLINE_S)

    def wait(self, name: str) -> int:
        """Wait for the end of a process; return its status."""
        return self._processes.pop(name).wait(DEADLINE_S)

    def log(self, name: str) -> str:
        """Return what a process has said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def tenant(self, build: Build, what: str, *arguments: Any) -> Any:
        """Let a client of a build do something; return what it found."""
        self._clients += 1
        folder = self.folder / f"client-{self._clients}"
        folder.mkdir()
        script = Path(__file__).with_name("tenant.py")
        command = build.python(str(script), str(self.context), str(folder), what, json.dumps(arguments))
        done = subprocess.run(
            command, env=build.environment(), cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        if done.returncode:
            raise ClientError(f"client {build.name} {what}: {done.stderr[-2000:]}\n{self.words()}")
        return json.loads(done.stdout)

    async def until_active(self, build: Build, *names: str) -> dict[str, Any]:
        """Wait until a leader answers and counts these nodes as active; return its status."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with suppress(ClientError):  # on a busy machine a scheduler may take longer to start than a client is patient
                    status: dict[str, Any] = await asyncio.to_thread(self.tenant, build, "status")
                    if {row["node"] for row in status["nodes"] if row["state"] == "active"} >= set(names):
                        return status

    def words(self) -> str:
        """Return the last words of all processes."""
        return "\n".join(f"--- {path.stem}\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        """End everything."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait(10.0)
        self.broker.stop(budget_s=1.0)


@contextmanager
def rig(folder: Path) -> Iterator[Rig]:
    """A started rig without processes; all that it started ends with the block."""
    made = Rig(folder)
    made.start()
    try:
        yield made
    finally:
        made.stop()
