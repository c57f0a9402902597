"""What the core wants done. The service carries commands out in order; the commands are the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowmesh_mesh.manifest import Acceptance, Cancellation, RunEnd
from flowmesh_mesh.messages import Abort, Assignment, Commit, NodeHealth


@dataclass(frozen=True, slots=True)
class Accept:
    """Write the acceptance; then the client may know."""

    acceptance: Acceptance
    name: str
    operators: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Publish a batch to a node, fenced by the epoch. ``why`` holds the terms of its utility.

    ``may_run_in_vain``: running it has no effect but its results, so the node may begin before the assignment is durable.
    """

    assignment: Assignment
    why: Mapping[str, float]
    may_run_in_vain: bool = False


@dataclass(frozen=True, slots=True)
class CommitResults:
    """Write encoded result records (operator key, generation, record); answer with Committed."""

    records: Sequence[tuple[bytes, int, bytes]]


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell a node what became of its results."""

    node: str
    message: Commit | Abort


@dataclass(frozen=True, slots=True)
class Release:
    """Remove an assignment from its stream: nobody holds it any more."""

    assignment: str
    node: str


@dataclass(frozen=True, slots=True)
class Locate:
    """Ask who holds these roots and have them leased; candidates first, everyone if none says yes."""

    roots: Mapping[bytes, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Keep:
    """Bring these roots to the hub before the run is declared a success."""

    tenant: str
    run: str
    roots: Mapping[bytes, Sequence[str]]


@dataclass(frozen=True, slots=True)
class RecordCancel:
    """Write that a tenant asked for the end of a run."""

    cancellation: Cancellation


@dataclass(frozen=True, slots=True)
class RecordHealth:
    """Write how far a node is trusted, for the next leader."""

    health: NodeHealth


@dataclass(frozen=True, slots=True)
class EndRun:
    """Write the end of a run and tell whoever watches."""

    end: RunEnd
    state: str


@dataclass(frozen=True, slots=True)
class DropCheckpoint:
    """Remove the pointer to an operator's checkpoint and what the hub holds for it: nobody will go on from it."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """Tell whoever watches a run what changed: (index, state, node, reason, shared)."""

    tenant: str
    run: str
    changes: Sequence[tuple[int, str, str, str, bool]]
    counts: Mapping[str, int]


Command = (
    Accept
    | Assign
    | CommitResults
    | Tell
    | Release
    | Locate
    | Keep
    | RecordCancel
    | RecordHealth
    | EndRun
    | Change
    | DropCheckpoint
)
