"""The folder of an embedded mesh: what lies where, and how it is made and brought up to date."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import UsageError

if TYPE_CHECKING:
    from flowmesh_deploy.keyring import Keyring

DEFAULT_TENANTS = ("team-a", "team-b")
NODES_MAX = 256


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
        self.security = self.folder / "broker" / "security.conf"
        self.broker = self.folder / "broker"
        self.nodes = self.folder / "nodes"
        self.store = self.folder / "store"
        self.logs = self.folder / "logs"
        self.events = self.folder / "events"

    def join_file(self, node: str) -> Path:
        return self.nodes / f"{node}.join"

    def url_files(self) -> list[Path]:
        """Return the files that name the broker's address."""
        return [self.scheduler, self.context, *sorted(self.nodes.glob("*.join"))]


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


def publish_url(layout: Layout, url: str) -> None:
    """Write the broker's address into every file that names it, where it changed."""
    for path in layout.url_files():
        document = read_json(path)
        if document and document.get("urls") != [url]:
            write_json(path, {**document, "urls": [url]})


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
) -> tuple[Keyring, list[str]]:
    """Make or extend the folder: keys, credentials, join files, context; return the keys and the names of new tenants.

    ``nodes`` None keeps the nodes of last time (one at first); a mesh that ``is_up`` only gains nodes. ``is_recorded`` tells
    whether the scheduler keeps event logs; None leaves that as it is. What exists is kept:
    state survives. Names are checked before anything is written.
    """
    from flowmesh_deploy.keyring import Keyring, check_tenant_name
    from flowmesh_mesh.names import check_name

    if nodes is not None and not 0 <= nodes <= NODES_MAX:
        raise UsageError(f"{nodes} nodes are not possible", hint=f"Give a number from 0 to {NODES_MAX}.")
    for tenant in tenants:
        check_tenant_name(tenant)
    if name:
        check_name(name, "mesh")
    _make_folder(layout)
    desired = read_json(layout.desired)
    mesh = str(desired.get("mesh") or name or _mesh_name(layout.folder))
    keyring = Keyring.open(layout.keys, mesh)
    fresh = keyring.add_tenants(tenants or ([] if keyring.tenants else list(DEFAULT_TENANTS)))
    before = list(desired.get("nodes", [])) if is_up or nodes is None else []
    wanted = list(dict.fromkeys([*before, *node_names(nodes if nodes is not None else 0 if desired else 1)]))
    _write_credentials(layout, keyring, wanted)
    if is_recorded is not None:
        _write_changed(layout.scheduler, {"record": layout.events.name if is_recorded else ""})
    layout.security.write_text(keyring.broker_config(layout.broker / "accounts"))
    write_json(layout.desired, {"version": 1, "mesh": mesh, "nodes": wanted})
    return keyring, fresh


def _make_folder(layout: Layout) -> None:
    try:
        for folder in (layout.folder, layout.credentials / "tenants", layout.nodes, layout.broker, layout.store, layout.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {layout.folder}: {error.strerror}", hint="Name another with --dir.") from error
    if not os.access(layout.folder, os.W_OK):
        raise UsageError(f"cannot write into {layout.folder}", hint="Name another folder with --dir.")


def _mesh_name(folder: Path) -> str:
    """Return a name for the mesh: that of the folder around it where that is a name, else ``flowmesh``."""
    from flowmesh_mesh.names import is_name

    around = folder.parent.name if folder.name == ".flowmesh" else folder.name
    return around if is_name(around) else "flowmesh"


def _write_credentials(layout: Layout, keyring: Keyring, nodes: list[str]) -> None:
    """Write what is missing: credentials of scheduler, watcher and tenants, a join file per node, scheduler and context files."""
    known = read_json(layout.context).get("urls", [])
    scheduler, watcher = layout.credentials / "scheduler.creds", layout.credentials / "watcher.creds"
    if not scheduler.exists():
        keyring.scheduler().save(scheduler)
    if not watcher.exists():
        keyring.watcher().save(watcher)
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
            "urls": known,
            "credentials": str(scheduler.relative_to(layout.folder)),
            "watcher": str(watcher.relative_to(layout.folder)),
            "store": layout.store.name,
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
    desired = read_json(layout.desired)
    wanted = list(dict.fromkeys([*desired["nodes"], name]))
    if not layout.join_file(name).exists():
        _write_credentials(layout, Keyring.open(layout.keys, desired["mesh"]), [name])
    write_json(layout.desired, {**desired, "nodes": wanted})


def remove_node(layout: Layout, name: str) -> None:
    """Wish for a node no longer; what it stored stays."""
    desired = read_json(layout.desired)
    write_json(layout.desired, {**desired, "nodes": [other for other in desired["nodes"] if other != name]})
