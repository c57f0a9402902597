"""The folder of an embedded mesh: what lies where, and how it is made and brought up to date.

Processes have names: ``broker``, ``broker-2``, ``scheduler``, ``scheduler-2``, and those of the nodes. The first broker and the
first scheduler live where they lived before there could be several.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import UsageError

if TYPE_CHECKING:
    from flowmesh_deploy.keyring import Keyring

DEFAULT_TENANTS = ("team-a", "team-b")
NODES_MAX = 256
SCHEDULERS_MAX = 9
BROKERS = (1, 3)
"""How many brokers a mesh may have: two would both have to be up, more than three only cost."""

Urls = Mapping[str, Sequence[str]]
"""Name of a process -> the addresses under which it, and nobody else, looks for the brokers."""


def process_names(kind: str, count: int) -> list[str]:
    """Return the names of ``count`` processes of a kind: ``broker``, ``broker-2``."""
    return [kind if number == 1 else f"{kind}-{number}" for number in range(1, count + 1)]


def kind_of(process: str) -> str:
    """Return what a process is, by its name: ``broker``, ``scheduler`` or ``node``."""
    kind, _, number = process.partition("-")
    return kind if kind in ("broker", "scheduler") and (not number or number.isdigit()) else "node"


class Layout:
    """Paths of one mesh's folder. ``desired`` is written by `up` and read by the supervisor, ``state`` the other way round."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.desired = self.folder / "mesh.json"
        self.state = self.folder / "supervisor.json"
        self.lock = self.folder / "supervisor.lock"
        self.context = self.folder / "context.json"
        self.scheduler = self.folder / "scheduler.json"
        self.keys = self.folder / "keys" / "keyring.json"
        self.credentials = self.folder / "credentials"
        self.inspector = self.credentials / "inspector.creds"
        self.security = self.folder / "broker" / "security.conf"
        self.broker = self.folder / "broker"
        self.nodes = self.folder / "nodes"
        self.store = self.folder / "store"
        self.logs = self.folder / "logs"
        self.events = self.folder / "events"
        self.secret = self.folder / "private.key"
        self.cluster_key = self.folder / "keys" / "cluster.key"

    def join_file(self, node: str) -> Path:
        return self.nodes / f"{node}.join"

    def broker_folder(self, process: str) -> Path:
        """Return the folder of a broker by the name of its process."""
        return self.broker if process == "broker" else self.folder / "brokers" / process

    def scheduler_folder(self, process: str) -> Path:
        """Return the folder of a scheduler by the name of its process; ``scheduler.json`` lies in it."""
        return self.folder if process == "scheduler" else self.folder / "schedulers" / process

    def scheduler_file(self, process: str) -> Path:
        return self.scheduler_folder(process) / self.scheduler.name

    def brokers(self) -> list[str]:
        """Return the names of the broker processes."""
        return process_names("broker", int(read_json(self.desired).get("brokers", 1)))

    def schedulers(self) -> list[str]:
        """Return the names of the scheduler processes that are wished for."""
        return process_names("scheduler", int(read_json(self.desired).get("schedulers", 1)))

    def url_files(self) -> dict[str, Path]:
        """Return the files that name the brokers' addresses, by the process that reads them; ``client`` is the context."""
        joins = {path.stem: path for path in sorted(self.nodes.glob("*.join"))}
        return {"client": self.context, **{name: self.scheduler_file(name) for name in self.schedulers()}, **joins}


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty when there is no such file or it is being written for the first time."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file of mode 0600, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
    temporary.replace(path)


def sync_of(layout: Layout) -> str:
    """Return when the brokers sync what they acknowledge: ``always`` unless mesh.json says otherwise (docs/brokers.md)."""
    return str(read_json(layout.desired).get("sync", "always"))


def publish_urls(layout: Layout, urls: Sequence[str]) -> None:
    """Write the brokers' addresses into every file that names them, where they changed; a process with its own keeps those."""
    own: Urls = read_json(layout.desired).get("urls", {})
    for process, path in layout.url_files().items():
        document, wanted = read_json(path), list(own.get(process, urls))
        if document and document.get("urls") != wanted:
            write_json(path, {**document, "urls": wanted})


def node_names(count: int) -> list[str]:
    """Return the names of ``count`` nodes."""
    return [f"node-{number}" for number in range(1, count + 1)]


def prepare(
    layout: Layout,
    *,
    nodes: int | None,
    tenants: list[str],
    name: str = "",
    is_up: bool = False,
    is_recorded: bool | None = None,
    brokers: int | None = None,
    schedulers: int | None = None,
    urls: Urls | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[Keyring, list[str]]:
    """Make or extend the folder: keys, credentials, join files, context; return the keys and the names of new tenants.

    ``nodes`` None keeps the nodes of last time (one at first); a mesh that ``is_up`` only gains nodes. ``is_recorded`` tells
    whether the schedulers keep event logs; None leaves that as it is. ``brokers`` is settled when the mesh is made;
    ``schedulers`` None keeps those of last time. ``urls`` and ``environment`` give single processes addresses and variables of
    their own (None: as last time). What exists is kept: state survives. Names are checked before anything is written.
    """
    from flowmesh_deploy.keyring import Keyring, check_tenant_name
    from flowmesh_mesh.names import check_name

    if nodes is not None and not 0 <= nodes <= NODES_MAX:
        raise UsageError(f"{nodes} nodes are not possible", hint=f"Give a number from 0 to {NODES_MAX}.")
    for tenant in tenants:
        check_tenant_name(tenant)
    if name:
        check_name(name, "mesh")
    desired = read_json(layout.desired)
    if not desired and (layout.folder / "broker.json").exists():
        raise UsageError(
            f"{layout.folder} is the folder of a broker of its own",
            hint="Run it with `flowmesh broker run`, or name another folder with --dir.",
        )
    counts = _counts(desired, brokers, schedulers, is_up=is_up)
    _make_folder(layout)
    mesh = str(desired.get("mesh") or name or _mesh_name(layout.folder))
    keyring = Keyring.open(layout.keys, mesh)
    fresh = keyring.add_tenants(tenants or ([] if keyring.tenants else list(DEFAULT_TENANTS)))
    before = list(desired.get("nodes", [])) if is_up or nodes is None else []
    wanted = list(dict.fromkeys([*before, *node_names(nodes if nodes is not None else 0 if desired else 1)]))
    own = {
        "urls": {process: list(found) for process, found in urls.items()} if urls is not None else desired.get("urls", {}),
        "environment": environment if environment is not None else desired.get("environment", {}),
    }
    wishes = {"version": 1, "mesh": mesh, "nodes": wanted, **counts, **{key: value for key, value in own.items() if value}}
    kept = ("sync", "held") if is_up else ("sync",)
    wishes.update({key: desired[key] for key in kept if desired.get(key)})
    write_json(layout.desired, wishes)
    _write_secrets(layout)
    _write_credentials(layout, keyring, wanted)
    if is_recorded is not None:
        _write_changed(layout.scheduler, {"record": layout.events.name if is_recorded else ""})
    _write_schedulers(layout)
    layout.security.write_text(keyring.broker_config(layout.broker / "accounts"))
    for process in layout.brokers()[1:]:
        folder = layout.broker_folder(process)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / layout.security.name).write_text(keyring.broker_config(folder / "accounts"))
    publish_urls(layout, _known_urls(layout))
    return keyring, fresh


def _counts(desired: Mapping[str, Any], brokers: int | None, schedulers: int | None, *, is_up: bool) -> dict[str, int]:
    """Return how many brokers and schedulers there shall be; raise UsageError for what cannot be."""
    had = int(desired.get("brokers", 1)) if desired else None
    if brokers is not None and brokers not in BROKERS:
        raise UsageError(
            f"{brokers} brokers are not possible",
            hint="Give 1, or 3: of three any one may fail, two would fail when either does.",
        )
    if brokers is not None and had is not None and brokers != had:
        raise UsageError(
            f"this mesh has {had} broker{'s' if had > 1 else ''}, and their number cannot change",
            hint=f"Begin a mesh of {brokers} in another folder: `flowmesh up --dir NEW --brokers {brokers}`. "
            "Results are not carried over; workflows can be submitted there again.",
        )
    if schedulers is not None and not 1 <= schedulers <= SCHEDULERS_MAX:
        raise UsageError(f"{schedulers} schedulers are not possible", hint=f"Give a number from 1 to {SCHEDULERS_MAX}.")
    before = int(desired.get("schedulers", 1))
    wanted = schedulers if schedulers is not None else before
    return {"brokers": brokers or had or 1, "schedulers": max(before, wanted) if is_up else wanted}


def _known_urls(layout: Layout) -> list[str]:
    """Return the addresses of the brokers as far as they are known; those of a cluster are chosen here at first."""
    from flowmesh_deploy.ports import keep_port, read_port

    brokers = layout.brokers()
    if len(brokers) == 1:
        port = read_port(layout.broker / "port")
        return [f"nats://127.0.0.1:{port}"] if port != -1 else list(read_json(layout.context).get("urls", []))
    taken = {port for name in brokers if (port := read_port(layout.broker_folder(name) / "port")) != -1}
    return [f"nats://127.0.0.1:{keep_port(layout.broker_folder(name) / 'port', taken)}" for name in brokers]


def _make_folder(layout: Layout) -> None:
    try:
        for folder in (layout.folder, layout.credentials / "tenants", layout.nodes, layout.broker, layout.store, layout.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {layout.folder}: {error.strerror}", hint="Name another with --dir.") from error
    if not os.access(layout.folder, os.W_OK):
        raise UsageError(f"cannot write into {layout.folder}", hint="Name another folder with --dir.")


def _write_secrets(layout: Layout) -> None:
    """Make once what all schedulers must share, and what brokers show one another."""
    from flowmesh_mesh.credentials import write_secret

    for path in (layout.secret, *([layout.cluster_key] if len(layout.brokers()) > 1 else [])):
        if not path.exists():
            write_secret(path, os.urandom(32).hex())


_OF_ONE_SCHEDULER = ("urls", "credentials", "watcher", "store", "name", "secret", "record")
"""Fields of scheduler.json that are not the same for all schedulers of a mesh."""


def _write_schedulers(layout: Layout) -> None:
    """Give the other schedulers folders of their own, with the settings of the first: those are what people change."""
    first = read_json(layout.scheduler)
    for process in layout.schedulers()[1:]:
        folder = layout.scheduler_folder(process)
        (folder / layout.store.name).mkdir(mode=0o700, parents=True, exist_ok=True)

        def seen(path: str, start: Path = folder) -> str:
            return os.path.relpath(layout.folder / path, start)

        own = {
            "urls": first["urls"],
            "credentials": seen(first["credentials"]),
            "watcher": seen(first["watcher"]) if first.get("watcher") else "",
            "store": layout.store.name,
            "name": process,
            "secret": seen(first["secret"]),
            "record": layout.events.name if first.get("record") else "",
        }
        shared = {key: value for key, value in first.items() if key not in _OF_ONE_SCHEDULER}
        if read_json(layout.scheduler_file(process)) != {**own, **shared}:
            write_json(layout.scheduler_file(process), {**own, **shared})


def _mesh_name(folder: Path) -> str:
    """Return a name for the mesh: that of the folder around it where that is a name, else ``flowmesh``."""
    from flowmesh_mesh.names import is_name

    around = folder.parent.name if folder.name == ".flowmesh" else folder.name
    return around if is_name(around) else "flowmesh"


def _write_credentials(layout: Layout, keyring: Keyring, nodes: list[str]) -> None:
    """Write what is missing: credentials of scheduler, watcher and tenants, a join file per node, scheduler and context files."""
    known = read_json(layout.context).get("urls", [])
    scheduler, watcher = layout.credentials / "scheduler.creds", layout.credentials / "watcher.creds"
    made = {scheduler: keyring.scheduler, watcher: keyring.watcher, layout.inspector: keyring.inspector}
    for path, make in made.items():
        if not path.exists():
            make().save(path)
    tenants = {}
    for tenant, account in keyring.tenants.items():
        path = layout.credentials / "tenants" / f"{tenant}.creds"
        if not path.exists():
            keyring.client(tenant).save(path)
        tenants[tenant] = {"account": account, "credentials": str(path.relative_to(layout.folder))}
    for node in nodes:
        if not layout.join_file(node).exists():
            joined = {"urls": known, "credentials": keyring.node(node).text(), "node": node, "mesh": keyring.mesh}
            write_json(layout.join_file(node), joined)
    _write_changed(
        layout.scheduler,
        {
            "urls": read_json(layout.scheduler).get("urls", known),
            "credentials": str(scheduler.relative_to(layout.folder)),
            "watcher": str(watcher.relative_to(layout.folder)),
            "store": layout.store.name,
            "name": "scheduler-1",
            "secret": layout.secret.name,
            "replicas": len(layout.brokers()),
            "mesh": keyring.mesh,
            "tenants": keyring.tenants,
            "share": "mesh",
            "tenants_may_cordon": read_json(layout.scheduler).get("tenants_may_cordon", True),
        },
    )
    _write_changed(
        layout.context,
        {
            "version": 1,
            "mesh": keyring.mesh,
            "urls": known,
            "dir": str(layout.folder),
            "tenants": tenants,
            "default_tenant": next(iter(tenants)),
        },
    )


def _write_changed(path: Path, document: dict[str, Any]) -> None:
    """Bring a file up to date; what people added to it, such as the scheduler's settings, stays."""
    found = read_json(path)
    if found != {**found, **document}:
        write_json(path, {**found, **document})


def add_node(layout: Layout, name: str) -> None:
    """Wish for one more node by name, and make its join file when there is none."""
    from flowmesh_deploy.keyring import Keyring
    from flowmesh_mesh.roles import check_node_name

    check_node_name(name)
    if kind_of(name) != "node":
        raise UsageError(f"a node of this mesh cannot be named {name!r}", hint="That is the name of another process.")
    desired = read_json(layout.desired)
    wanted = list(dict.fromkeys([*desired["nodes"], name]))
    if not layout.join_file(name).exists():
        _write_credentials(layout, Keyring.open(layout.keys, desired["mesh"]), [name])
        publish_urls(layout, _known_urls(layout))
    write_json(layout.desired, {**desired, "nodes": wanted})


def remove_node(layout: Layout, name: str) -> None:
    """Wish for a node no longer; what it stored stays."""
    desired = read_json(layout.desired)
    write_json(layout.desired, {**desired, "nodes": [other for other in desired["nodes"] if other != name]})


def hold(layout: Layout, process: str, is_held: bool) -> None:
    """Wish that a broker or scheduler that ends is not started again, or that it is."""
    desired = read_json(layout.desired)
    held = [other for other in desired.get("held", []) if other != process]
    write_json(layout.desired, {**desired, "held": [*held, process] if is_held else held})
