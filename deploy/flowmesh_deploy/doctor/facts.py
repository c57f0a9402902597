"""What the checks look at: everything that was found out about a mesh, and what was not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowmesh_mesh.messages import NodeRecord, SchedulerBeat
from flowmesh_mesh.stream_api import StreamInfo


@dataclass(frozen=True)
class Server:
    """One broker, as it answers for itself (or as its configuration file says, when it was not asked)."""

    name: str
    is_synced: bool
    """Whether it syncs before it acknowledges."""
    version: str = ""
    skew_s: float = 0.0
    """Its clock less ours."""
    unhealthy: str = ""
    """Why it calls itself unhealthy; empty when it does not."""
    is_asked: bool = True


@dataclass(frozen=True)
class Place:
    """A folder on this machine in which something of the mesh is kept."""

    what: str
    path: Path
    filesystem: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Secret:
    """A file that only its owner may read."""

    path: Path
    mode: int
    expires_at_s: int = 0
    """When the credentials in it end; 0: never, or there are none."""


@dataclass
class Facts:
    """What was found. Lists that are empty because nobody could be asked have their reason in ``silent``."""

    now_s: float
    folder: Path | None = None
    replicas: int = 1
    """Copies of each stream that this mesh is meant to have."""
    brokers: int = 1
    schedulers: int = 1
    urls: list[str] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    """What could not be asked -> why not: ``mesh``, ``brokers``, ``streams``."""
    servers: list[Server] = field(default_factory=list)
    streams: dict[str, StreamInfo | None] = field(default_factory=dict)
    """Name of each stream that there should be -> what there is."""
    places: list[Place] = field(default_factory=list)
    secrets: list[Secret] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    """The leader's answer; empty when nobody leads."""
    beats: dict[str, SchedulerBeat] = field(default_factory=dict)
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    skews_s: dict[str, float] = field(default_factory=dict)
    """Clock of a node or scheduler less ours, as its heartbeats tell it, with what they were under way."""
