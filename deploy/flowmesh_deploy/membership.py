"""Brokers by hand: a folder for each broker of a cluster, on as many machines, and everything that others need to use it.

The first machine makes the keys and keeps them. What leaves it is a join file per broker (the secret of the cluster and signed,
public claims), and folders and files for schedulers, nodes and clients, each with credentials of its own. No seed of operator,
account or role is in any of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_deploy.broker import Broker, Cluster
from flowmesh_deploy.keyring import BrokerClaims, Keyring, check_tenant_name
from flowmesh_deploy.layout import BROKERS, DEFAULT_TENANTS, Layout, process_names, write_json
from flowmesh_mesh.credentials import write_secret
from flowmesh_mesh.names import check_name
from flowmesh_mesh.roles import check_node_name

FILE = "broker.json"
PORT = 4222
CLUSTER_PORT = 6222

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>\d+))?(?::(?P<cluster>\d+))?")


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a broker is reached: by everybody on ``port``, by the other brokers on ``cluster_port``."""

    host: str
    port: int = PORT
    cluster_port: int = CLUSTER_PORT

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def route(self) -> str:
        return f"{self.host}:{self.cluster_port}"


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One broker: contents of its join file, and of ``broker.json`` in its folder."""

    mesh: str
    name: str
    """Unique in the cluster and kept for ever: the streams know their copies by it."""
    members: dict[str, Address]
    secret: str
    claims: BrokerClaims
    listen: str = ""
    """Address to listen on; empty: the host of its own address."""
    store: str = ""
    """Folder of its streams; empty: inside its own folder."""
    version: int = 1

    @property
    def address(self) -> Address:
        return self.members[self.name]

    @property
    def urls(self) -> list[str]:
        """The addresses of all brokers of the mesh, for those who connect."""
        return [address.url for address in self.members.values()]


def parse_address(text: str) -> Address:
    """Return the address that ``HOST[:PORT[:CLUSTER_PORT]]`` means; raise UsageError when it means none."""
    found = _ADDRESS.fullmatch(text)
    ports = [
        int(found[name]) if found and found[name] else default for name, default in (("port", PORT), ("cluster", CLUSTER_PORT))
    ]
    if found is None or not all(0 < port < 65536 for port in ports) or ports[0] == ports[1]:
        raise UsageError(
            f"{text!r} is not the address of a broker",
            hint="Write HOST, HOST:PORT or HOST:PORT:CLUSTER_PORT; an IPv6 address stands in brackets.",
        )
    return Address(found["host"], *ports)


def init(
    folder: Path,
    addresses: Sequence[Address],
    *,
    mesh: str,
    tenants: Sequence[str] = DEFAULT_TENANTS,
    nodes: Sequence[str] = (),
    schedulers: int = 1,
    listen: str = "",
    store: str = "",
) -> Member:
    """Make the keys of a mesh whose brokers stand at ``addresses``, the first of them here, and all that is handed out.

    Everything is checked before anything is written. Raise UsageError when the folder is a mesh already.
    """
    if len(addresses) not in BROKERS:
        raise UsageError(
            f"{len(addresses)} brokers are not possible", hint="Give one address, or three: of three any one may fail."
        )
    if len({address.url for address in addresses} | {address.route for address in addresses}) != 2 * len(addresses):
        raise UsageError("two brokers cannot have the same address", hint="Give each a host or ports of its own.")
    check_name(mesh, "mesh")
    for tenant in tenants:
        check_tenant_name(tenant)
    for node in nodes:
        check_node_name(node)
    layout = Layout(folder)
    if (layout.folder / FILE).exists() or layout.desired.exists():
        raise UsageError(f"{layout.folder} is the folder of a mesh already", hint="Name another with --dir.")
    _make_folder(layout.folder)
    keyring = Keyring.open(layout.keys, mesh)
    keyring.add_tenants(list(tenants))
    names = process_names("broker", len(addresses))
    write_secret(layout.cluster_key, os.urandom(32).hex())
    first = Member(
        mesh,
        names[0],
        dict(zip(names, addresses, strict=True)),
        layout.cluster_key.read_text(),
        keyring.claims(),
        listen=listen,
        store=store,
    )
    _save(first, layout.folder)
    invite(layout.folder)
    _write_clients(layout, keyring, first)
    for number in range(1, schedulers + 1):
        _write_scheduler(layout, keyring, first, f"scheduler-{number}")
    for node in nodes:
        write_node(layout.folder, node)
    return first


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}", hint="Name another with --dir.") from error


def _write(path: Path, document: object) -> None:
    write_secret(path, msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")


def _save(member: Member, folder: Path) -> None:
    _write(folder / FILE, member)


def join_file(folder: Path, broker: str) -> Path:
    """Return where the join file of a broker lies on the machine that made the keys."""
    return folder / f"{broker}.join"


def _open_keys(folder: Path) -> tuple[Member, Keyring]:
    """Return the member and the keys of the machine that made them; raise NotFoundError elsewhere."""
    member, layout = load(folder), Layout(folder)
    if not layout.keys.exists():
        raise NotFoundError(f"{folder} has no keys", hint="Do this on the machine where `flowmesh broker init` was run.")
    return member, Keyring.open(layout.keys, member.mesh)


def invite(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Write the join files of the other brokers (or of those named) anew; return where they lie."""
    member, keyring = _open_keys(folder)
    others = [name for name in member.members if name != member.name]
    for name in names:
        if name not in others:
            raise NotFoundError(f"{name!r} is no other broker of this mesh", hint=f"Known: {', '.join(others) or 'none'}.")
    paths = [join_file(folder, name) for name in names or others]
    for path in paths:
        fresh = msgspec.structs.replace(member, name=path.stem, claims=keyring.claims(), listen="", store="")
        _write(path, fresh)
    return paths


def join(path: Path, folder: Path, *, listen: str = "", store: str = "") -> Member:
    """Make the folder of one broker from its join file. Joining again with a newer file of the same broker renews it."""
    joined = _read(path, "join file")
    _make_folder(folder)
    if (folder / FILE).exists():
        there = load(folder)
        if (there.mesh, there.name, there.secret) != (joined.mesh, joined.name, joined.secret):
            raise UsageError(
                f"{folder} is the folder of {there.name} of mesh {there.mesh}", hint="Name another folder with --dir."
            )
        listen, store = listen or there.listen, store or there.store
    member = msgspec.structs.replace(joined, listen=listen, store=store)
    _save(member, folder)
    return member


def load(folder: Path) -> Member:
    """Return the broker whose folder this is; raise NotFoundError when it is none."""
    return _read(folder / FILE, "broker file")


def _read(path: Path, what: str) -> Member:
    try:
        member = msgspec.json.decode(path.read_bytes(), type=Member)
    except OSError as error:
        raise NotFoundError(
            f"cannot read the {what} {path}: {error.strerror}", hint="`flowmesh broker init` and `flowmesh broker join` make it."
        ) from error
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} is not a {what}: {error}", hint="Use the file as it was given out, unchanged.") from error
    if member.version != 1 or member.name not in member.members:
        raise UsageError(f"{path} is a {what} of another release", hint="Use the release that wrote it.")
    return member


def broker(member: Member, folder: Path) -> Broker:
    """Return the broker of a folder, not started yet."""
    host = (member.listen or member.address.host).strip("[]")
    cluster = None
    if len(member.members) > 1:
        inside = f"[{host}]" if ":" in host else host
        listen, own = f"{inside}:{member.address.cluster_port}", member.address.route
        routes = tuple(address.route for address in member.members.values())
        cluster = Cluster(member.mesh, member.secret, listen, routes, advertise=own)
    return Broker(
        folder,
        security=member.claims.config(folder.absolute() / "accounts"),
        name=f"{member.mesh}-{member.name}" if cluster is None else member.name,
        cluster=cluster,
        host=host,
        port=member.address.port,
        store=Path(member.store) if member.store else None,
    )


# --- what schedulers, nodes and clients get


def _write_clients(layout: Layout, keyring: Keyring, member: Member) -> None:
    tenants = {}
    for tenant, account in keyring.tenants.items():
        path = layout.credentials / "tenants" / f"{tenant}.creds"
        keyring.client(tenant).save(path)
        tenants[tenant] = {"account": account, "credentials": str(path.relative_to(layout.folder))}
    keyring.inspector().save(layout.inspector)
    keyring.scheduler().save(layout.credentials / "scheduler.creds")
    write_json(
        layout.context,
        {
            "version": 1,
            "mesh": member.mesh,
            "urls": member.urls,
            "dir": str(layout.folder),
            "tenants": tenants,
            "default_tenant": next(iter(tenants)),
        },
    )


def _write_scheduler(layout: Layout, keyring: Keyring, member: Member, name: str) -> None:
    """Write the folder of one scheduler: whole in itself, to be copied to its machine."""
    folder = layout.folder / "schedulers" / name
    keyring.scheduler().save(folder / "scheduler.creds")
    keyring.watcher().save(folder / "watcher.creds")
    if not layout.secret.exists():
        write_secret(layout.secret, os.urandom(32).hex())
    write_secret(folder / layout.secret.name, layout.secret.read_text())
    write_json(
        folder / layout.scheduler.name,
        {
            "urls": member.urls,
            "credentials": "scheduler.creds",
            "watcher": "watcher.creds",
            "store": layout.store.name,
            "name": name,
            "secret": layout.secret.name,
            "replicas": len(member.members),
            "mesh": member.mesh,
            "tenants": keyring.tenants,
            "share": "private",
            "tenants_may_cordon": False,
        },
    )


def write_node(folder: Path, node: str) -> Path:
    """Write the join file of a node, with credentials of its own; return where it lies."""
    member, keyring = _open_keys(folder)
    check_node_name(node)
    path = Layout(folder).join_file(node)
    if not path.exists():
        write_json(path, {"urls": member.urls, "credentials": keyring.node(node).text(), "node": node, "mesh": member.mesh})
    return path
