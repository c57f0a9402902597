"""What happens to the core. Each event is complete: the core looks nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowmesh_mesh.manifest import Acceptance, Manifest, ResultRecord, RunEnd
from flowmesh_mesh.messages import Assignment, Beat, Checkpoint, Done, NodeHealth, NodeRecord


@dataclass(frozen=True, slots=True)
class Submitted:
    """A checked workflow whose manifest and inputs the mesh holds; models are pinned."""

    tenant: str
    run: str
    manifest: Manifest
    manifest_cid: bytes
    models: Mapping[str, str] = field(default_factory=dict)
    encoding: str = "msgpack"
    share: str = "mesh"
    model_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """A tenant, or whoever may, wants a run to stop."""

    tenant: str
    run: str
    actor: str


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node says what it is: when it starts, when that changes, when it leaves."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class BeatReceived:
    """A node is alive and tells what it holds."""

    beat: Beat


@dataclass(frozen=True, slots=True)
class NodeDisconnected:
    """The broker saw the node's connection end: suspicion, not death."""

    node: str


@dataclass(frozen=True, slots=True)
class CordonRequested:
    """Somebody who may wants a node to get no work (``is_on``), or to be trusted again."""

    node: str
    is_on: bool
    actor: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class QuarantineLifted:
    """Somebody who may wants an operator key to be tried again although it took nodes with it."""

    key: bytes
    actor: str


@dataclass(frozen=True, slots=True)
class DoneReceived:
    """Results of an assignment whose receipt has been verified; ``blocks`` came inline, by CID, and the hub keeps them."""

    done: Done
    blocks: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Committed:
    """The ledger shows these records: (operator key, CID of the record)."""

    records: Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Located:
    """Who confirmed to hold (and lease) each root asked for; a root that nobody holds has no holders."""

    holders: Mapping[bytes, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Kept:
    """The hub holds the outputs of a run, except for the missing."""

    tenant: str
    run: str
    missing: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The ledger shows the end of a run."""

    tenant: str
    run: str


@dataclass(frozen=True, slots=True)
class ReadySeen:
    """Somebody asks to look at a run again (stream READY)."""

    tenant: str
    run: str


@dataclass(frozen=True, slots=True)
class CutOff:
    """The leader lost the broker: lease clocks stand still."""


@dataclass(frozen=True, slots=True)
class Restored:
    """The leader has the broker again: lease clocks start anew."""


@dataclass(frozen=True, slots=True)
class RecoveredRun:
    """An accepted run that has not ended, with its manifest."""

    acceptance: Acceptance
    manifest: Manifest
    cancelled_by: str = ""


@dataclass(frozen=True, slots=True)
class Recovered:
    """Everything that a new leader finds: ledger and outstanding assignments."""

    results: Sequence[tuple[bytes, ResultRecord]]
    runs: Sequence[RecoveredRun]
    ended: Sequence[tuple[RunEnd, Acceptance | None]]
    assignments: Sequence[Assignment]
    health: Sequence[NodeHealth] = ()


@dataclass(frozen=True, slots=True)
class Reinstated:
    """Accepted runs that were lost to this leader and are found: the ledger shows their acceptances."""

    runs: Sequence[RecoveredRun]


@dataclass(frozen=True, slots=True)
class Replanned:
    """Operators of a run, by index, that neither ran nor waited for anything: they find their way again."""

    tenant: str
    run: str
    indices: Sequence[int]


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Nobody has the manifest of an accepted run any more; ``detail`` says what is gone and who was asked."""

    acceptance: Acceptance
    detail: str


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """The mesh holds a checkpoint apart from the node that made it, and the pointer to it is written."""

    checkpoint: Checkpoint
    is_at_hub: bool = True


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Submitted
    | CancelRequested
    | NodeJoined
    | BeatReceived
    | NodeDisconnected
    | CordonRequested
    | QuarantineLifted
    | DoneReceived
    | Committed
    | Located
    | Kept
    | Ended
    | ReadySeen
    | CutOff
    | Restored
    | Recovered
    | Reinstated
    | Replanned
    | GivenUp
    | Checkpointed
    | Tick
)
