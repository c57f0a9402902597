"""The context file: how a command finds the mesh that ``flowmesh up`` started, and which credentials it has there."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from flowmesh_cas.errors import NotFoundError, UsageError

CONTEXT_VERSION = 1
FOLDER = ".flowmesh"
FILE = "context.json"
VARIABLE = "FLOWMESH_CONTEXT"


class TenantEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tenant whose credentials are at hand."""

    account: str
    """Public key of the tenant's account."""
    credentials: str
    """Path of the credentials file; a relative one counts from the folder of the context file."""


class Context(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client needs to reach a mesh."""

    mesh: str
    urls: list[str]
    dir: str
    tenants: dict[str, TenantEntry]
    default_tenant: str
    version: int = CONTEXT_VERSION
    path: str = ""
    """Where the file was found; not part of the file."""

    def tenant(self, name: str = "") -> TenantEntry:
        """Return the entry of ``name`` (default: the default tenant) with an absolute path; raise NotFoundError."""
        wanted = name or self.default_tenant
        entry = self.tenants.get(wanted)
        if entry is None:
            known = ", ".join(sorted(self.tenants)) or "none"
            raise NotFoundError(f"no credentials of tenant {wanted!r}", hint=f"Known here: {known}.")
        return TenantEntry(entry.account, str(Path(self.path).parent / entry.credentials))


def load_context(path: str | os.PathLike[str]) -> Context:
    """Read a context file, or the one in a folder; raise NotFoundError or UsageError."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE
    try:
        context = msgspec.json.decode(file.read_bytes(), type=Context)
    except OSError as error:
        raise NotFoundError(
            f"cannot read the context {file}: {error.strerror}", hint="Start a mesh with `flowmesh up`."
        ) from error
    except msgspec.DecodeError as error:
        raise UsageError(f"{file} is not a context file: {error}", hint="Let `flowmesh up` write it again.") from error
    if context.version != CONTEXT_VERSION:
        raise UsageError(
            f"{file} has version {context.version}, this program reads {CONTEXT_VERSION}", hint="Use the program that wrote it."
        )
    return msgspec.structs.replace(context, path=str(file.absolute()))


def find_context(path: str | os.PathLike[str] | None = None) -> Context:
    """Return the context of ``path``, else of $FLOWMESH_CONTEXT, else of the nearest ``.flowmesh`` above, else of the home.

    Raise NotFoundError when there is none.
    """
    if path:
        return load_context(path)
    if os.environ.get(VARIABLE):
        return load_context(os.environ[VARIABLE])
    here = Path.cwd()
    for folder in (here, *here.parents, Path.home()):
        candidate = folder / FOLDER / FILE
        if candidate.is_file():
            return load_context(candidate)
    raise NotFoundError(
        "no mesh found", hint="Start one with `flowmesh up`, or name its context with --context or $FLOWMESH_CONTEXT."
    )


def save_context(context: Context, path: str | os.PathLike[str]) -> None:
    """Write a context file, whole or not at all."""
    fields = msgspec.to_builtins(context)
    fields.pop("path")
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n")
    temporary.replace(target)
