"""What a scheduler process is told when it starts."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flowmesh_cas.errors import UsageError
from flowmesh_scheduler.core.settings import Settings

FILE_NAME = "scheduler.json"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Contents of ``scheduler.json``. Paths are relative to its folder."""

    urls: list[str]
    credentials: str
    """Credentials of the role scheduler."""

    store: str
    """Folder of the hub's blocks."""

    name: str = ""
    """Name of this scheduler, unique in the mesh and beginning with ``scheduler-``; empty: one is made up at each start."""

    secret: str = "private.key"
    """File with the mesh's secret, from which the keys of private work and the seals of acceptances are made. All schedulers of a
    mesh must have the same; a scheduler that finds none makes one."""

    replicas: int = 1
    """Copies of every stream: 1, or 3 where three brokers form a cluster."""

    mesh: str
    tenants: dict[str, str]
    """Tenant name -> public key of its account."""

    share: str = "mesh"
    """Whether results are shared between tenants unless a workflow says otherwise: mesh or private."""

    watcher: str = ""
    """Credentials that may only listen to the broker's connection events; empty: heartbeats alone tell of lost nodes."""

    record: str = ""
    """Folder of event logs, one for each epoch of this scheduler (`flowmesh replay`); empty: none are written."""

    record_max_bytes: int = 1 << 30
    """Most bytes of that folder. A log ends at half of it; the oldest go when another begins."""

    operators: list[str] = []
    """Names of tenants who may do what concerns every tenant: cordon nodes, lift quarantines."""

    tenants_may_cordon: bool = False
    """Every tenant may do that: right where they are one person, as on a mesh that `flowmesh up` starts."""

    keepers: int = 2
    """How many others than the leader keep each accepted run that lasts (docs/recovery.md): schedulers that stand by first, then
    nodes. 0: nobody does."""

    journal_max_bytes: int = 1 << 30
    """Most bytes of the journal, from which a ledger is restored that was lost; beyond it only the ends of old runs stay."""

    settings: Settings = msgspec.field(default_factory=Settings)


def load_config(folder: Path) -> Config:
    """Read the configuration in ``folder``; raise UsageError naming what is wrong with it."""
    path = folder / FILE_NAME
    try:
        return _with_account_keys(msgspec.json.decode(path.read_bytes(), type=Config), path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="`flowmesh up` writes it.") from error
    except msgspec.DecodeError as error:
        raise UsageError(f"{path}: {error}", hint="Compare it with docs/scheduler.md.") from error


def _with_account_keys(config: Config, path: Path) -> Config:
    """Return the configuration with the tenants of its settings by the keys of their accounts: so the core knows them."""
    named = config.settings.tenants
    unknown = [name for name in named if name not in config.tenants]
    if unknown:
        known = ", ".join(sorted(config.tenants)) or "none"
        raise UsageError(
            f"{path}: settings.tenants names {', '.join(unknown)}, who is no tenant of this mesh", hint=f"Known: {known}."
        )
    tenants = {config.tenants[name]: limits for name, limits in named.items()}
    return msgspec.structs.replace(config, settings=msgspec.structs.replace(config.settings, tenants=tenants))
