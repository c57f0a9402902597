"""What lies on this machine: stores, disks, secrets, and how the brokers were configured. Asks nobody."""

from __future__ import annotations

import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import FlowmeshError
from flowmesh_deploy.doctor.facts import Facts, Place, Secret, Server
from flowmesh_deploy.layout import Layout, read_json
from flowmesh_mesh.credentials import Credentials, claims

_SYNC = re.compile(r"^\s*sync_interval:\s*(\S+)", re.MULTILINE)


def look(facts: Facts, layout: Layout) -> None:
    """Note what lies in the folder of a mesh or of a broker: stores, secrets, what was meant."""
    facts.folder = layout.folder
    member = read_json(layout.folder / "broker.json")
    if member:
        facts.brokers = len(member.get("members", {}))
        facts.schedulers = len(list((layout.folder / "schedulers").glob("*/scheduler.json"))) or 1
        facts.replicas = facts.brokers
    else:
        facts.brokers, facts.schedulers = len(layout.brokers()), len(layout.schedulers())
        facts.replicas = int(read_json(layout.scheduler).get("replicas", facts.brokers))
    facts.places = [place for what, path in _kept(layout, member) if (place := place_of(what, path)) is not None]
    facts.secrets = [_secret(path) for path in _secrets(layout)]


def _kept(layout: Layout, member: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    if member:
        yield "the broker's store", Path(member.get("store") or layout.folder / "jetstream")
        return
    for name in layout.brokers():
        yield f"the store of {name}", layout.broker_folder(name)
    for name in layout.schedulers():
        yield f"the blocks of {name}", layout.scheduler_folder(name) / layout.store.name
    yield "the folder of the nodes", layout.nodes


def _secrets(layout: Layout) -> Iterator[Path]:
    patterns = (
        "keys/*",
        "private.key",
        "broker.json",
        "*.join",
        "credentials/**/*.creds",
        "nodes/*.join",
        "broker/broker.conf",
        "brokers/*/broker.conf",
        "broker.conf",
        "schedulers/*/*.creds",
        "schedulers/*/*.key",
    )
    for pattern in patterns:
        yield from (path for path in sorted(layout.folder.glob(pattern)) if path.is_file())


def _secret(path: Path) -> Secret:
    return Secret(path, stat.S_IMODE(path.stat().st_mode), _expires_at(path))


def _expires_at(path: Path) -> int:
    """Return when the credentials in a file end, in seconds since 1970; 0: never, or there are none in it."""
    try:
        if path.suffix == ".creds":
            jwt = Credentials.load(path).jwt
        elif path.suffix == ".join" and "credentials" in (joined := read_json(path)):
            jwt = Credentials.parse(joined["credentials"]).jwt
        else:
            return 0
        return int(claims(jwt).get("exp", 0))
    except (FlowmeshError, OSError, ValueError):
        return 0


def place_of(what: str, path: Path) -> Place | None:
    """Return what is known of the disk under a folder; None when there is no such folder."""
    while not path.exists():
        if path == path.parent:
            return None
        path = path.parent
    usage = shutil.disk_usage(path)
    return Place(what, path.resolve(), _filesystem(path.resolve()), usage.free, usage.total)


def _filesystem(path: Path) -> str:
    """Return the type of the file system on which a folder lies; empty when the system does not say."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    best, found = -1, ""
    for line in mounts:
        fields = line.split(" ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), fields[2]
    return found


def configured(layout: Layout) -> list[Server]:
    """Return the brokers as their configuration files say, for those that were not asked."""
    found = []
    member = read_json(layout.folder / "broker.json")
    folders = {member["name"]: layout.folder} if member else {name: layout.broker_folder(name) for name in layout.brokers()}
    for name, folder in folders.items():
        try:
            written = _SYNC.search((folder / "broker.conf").read_text())
        except OSError:
            continue
        found.append(Server(name, written is not None and written[1].strip('"') == "always", is_asked=False))
    return found
