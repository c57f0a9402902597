"""What a node is told when it starts: read once, frozen, passed down."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.names import check_name


class JoinFile(msgspec.Struct, frozen=True):
    """What a node needs to join: where the mesh is, and the node's own credential."""

    urls: list[str]
    credentials: str
    node: str
    mesh: str = ""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of one node."""

    node: str
    mesh: str
    urls: tuple[str, ...]
    credentials: str
    folder: Path
    """Store, spool, caches and the control socket live here."""
    slots: int = 1
    """Engine and training batches at the same time."""
    user_slots: int = 1
    """User functions at the same time; the number of CPUs by default."""
    drain_s: float = 10.0
    """How long SIGTERM waits for what is running."""
    connect_s: float = 60.0
    """How long to try to reach the mesh before giving up at the start."""
    user_timeout_s: float = 3600.0
    """Limit of a user's function that states none, so that one that never returns ends some day."""
    user_memory_bytes: int = 0
    """Memory of a user's function that states none; 0 means half of the node's memory."""
    cache_bytes: int = 16 * 2**30
    """Largest size of the materialised inputs; the least recently used go first."""
    checkpoint_s: float = 0.0
    """How often a training writes a checkpoint; 0 lets that follow from what one costs and how often such a node is lost."""
    notice_file: Path | None = None
    """A file whose appearance says that this machine will be taken away."""
    notice_url: str = ""
    """Address of the provider's metadata service that tells the same; empty: nobody is asked."""
    allow_hub: bool = False
    """Whether executors may download from the Hugging Face hub."""


def read_join_file(path: Path) -> JoinFile:
    """Return the join file at ``path``; raise UsageError when it is missing or not one."""
    try:
        joined = msgspec.json.decode(path.read_bytes(), type=JoinFile)
    except OSError as error:
        raise UsageError(
            f"cannot read the join file {path}: {error.strerror}", hint="Ask the mesh's operator for one."
        ) from error
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} is not a join file: {error}", hint="Use the file as it was given out, unchanged.") from error
    if not joined.urls:
        raise UsageError(f"{path} names no address of the mesh", hint="Ask the mesh's operator for a new join file.")
    check_name(joined.node, "node")
    return joined


def number_from(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[float, str] | None:
    """Return the first number among environment variables ``names`` and which one gave it; refuse what is not a number."""
    for name in names:
        text = environment.get(name, "").strip()
        if text:
            return _positive(text, name), name
    return None


def _positive(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise UsageError(f"{name}={text!r} is not a number of at least 0", hint=f"Set {name} to a plain number, or unset it.")
    return number


def default_folder(node: str) -> Path:
    """Return where a node keeps its things unless told otherwise: ``$FLOWMESH_HOME/nodes/<node>`` or under ``~/.flowmesh``."""
    home = os.environ.get("FLOWMESH_HOME")
    return (Path(home) if home else Path.home() / ".flowmesh") / "nodes" / node
