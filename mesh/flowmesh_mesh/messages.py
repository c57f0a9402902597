"""Every message of the wire: frozen, typed, versioned by its tag, msgpack arrays.

A message of a version that this build does not know is refused with its tag in the error. Fields are only ever
added at the end, with defaults; anything else is a new tag.
Submissions, questions and the events of runs also exist as JSON, so that any NATS client can take part:
whoever speaks JSON is answered in JSON (docs/protocol.md).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.manifest import Metered, Operator, Ref

INLINE_MAX_BYTES = 512 * 1024
"""Largest workflow with its inputs that travels inside the submission; larger ones are put first."""

WIRE_VERSION = 2
"""Version of the wire that this build speaks. It grows when a message changes its meaning, or an old build could misread one."""

WIRE_OLDEST = 1
"""Oldest version that this build still understands. What is older, or so new that it no longer understands us, is refused."""

PARAMETER_MAX_BYTES = 1024 * 1024
"""Largest parameter value; bigger data belongs into an input."""


class Reason(StrEnum):
    """Why a run or an operator ended; every end has one, and an actor."""

    SUCCEEDED = "succeeded"
    USER_ERROR = "user-error"
    OOM = "oom"
    CRASHED = "crashed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    NODE_LOST = "node-lost"
    PREEMPTED = "preempted"
    LEASE_EXPIRED = "lease-expired"
    INPUT_MISSING = "input-missing"
    MODEL_MISSING = "model-missing"
    UPSTREAM_FAILED = "upstream-failed"
    UNSATISFIABLE = "unsatisfiable"
    REJECTED = "rejected"
    POISON = "poison"
    BUDGET = "budget"
    INTERNAL = "internal"


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="message"):
    """Base of all messages."""


# --- tenants ---------------------------------------------------------------------------------------------------------


class Submit(_Message, frozen=True, tag="submit/1"):
    """A workflow to run. ``run`` is chosen by the client and makes the submission idempotent.

    ``manifest`` is the CID of the compiled workflow; ``blocks`` carries it and small inputs inline (at most
    INLINE_MAX_BYTES); everything else the client has put before. ``wire`` and ``wire_oldest`` are the versions of the wire that
    the client speaks and still understands.
    """

    run: str
    manifest: bytes
    blocks: tuple[bytes, ...] = ()
    wire: int = 1
    wire_oldest: int = 1


class Cancel(_Message, frozen=True, tag="cancel/1"):
    """End a run."""

    run: str
    actor: str = ""


class Ready(_Message, frozen=True, tag="ready/1"):
    """Ask the leader to look at a run again (stream READY); its own planner needs no such message."""

    tenant: str
    run: str


class Ask(_Message, frozen=True, tag="ask/1"):
    """A question to the leader: status, runs, run, operators, lineage, why a run ended ... (docs/protocol.md)."""

    what: str
    args: dict[str, Any] = {}
    wire: int = 1
    wire_oldest: int = 1


class Answer(_Message, frozen=True, tag="answer/1"):
    """Answer to an Ask, a Put or a Cancel; ``error`` is empty when it went well.

    ``wire`` and ``wire_oldest`` are the versions of the wire that the leader speaks and still understands.
    """

    body: Any = None
    error: str = ""
    hint: str = ""
    kind: str = ""
    wire: int = 1
    wire_oldest: int = 1


class Put(_Message, frozen=True, tag="put/1"):
    """Blocks to be held by the mesh. ``root`` with ``last`` pins the DAG; the answer lists CIDs still missing."""

    blocks: tuple[bytes, ...]
    codecs: tuple[int, ...]
    root: bytes = b""
    last: bool = False


class Get(_Message, frozen=True, tag="get/1"):
    """Ask for the DAG under ``root``, in the order of its depth-first walk, from block number ``cursor`` on."""

    root: bytes
    cursor: int = 0


class Blocks(_Message, frozen=True, tag="blocks/1"):
    """Blocks in answer to Get or BlockAsk; ``codecs`` tells how to name each; ``cursor`` is the next one, -1 at the end.

    A block that the holder lacks stands as None.
    """

    blocks: tuple[bytes | None, ...]
    codecs: tuple[int, ...] = ()
    cursor: int = -1
    error: str = ""


class RunEvent(_Message, frozen=True, tag="run-event/1"):
    """What happened to a run, for whoever watches. ``seq`` counts up by one per run; a gap means: ask again.

    ``kind``: received, rejected, accepted, operators, log, cancelling, ended. ``body`` is plain data; for ``operators`` it is
    {"changes": [[index, state, node, reason, shared], ...], "counts": {...}}.
    """

    run: str
    seq: int
    at_us: int
    kind: str
    body: dict[str, Any] = {}


# --- nodes: assignments and results ----------------------------------------------------------------------------------


class Located(_Message, frozen=True):
    """Content and who is known to hold it."""

    ref: Ref
    holders: tuple[str, ...] = ()


class Item(_Message, frozen=True):
    """One operator of a batch: an attempt at (key, generation). It goes on from ``checkpoint``, where an earlier one left one."""

    key: bytes
    generation: int
    attempt: int
    params: dict[str, Any]
    inputs: dict[str, tuple[Located, ...]]
    name: str = ""
    checkpoint: Located | None = None


class Hop(_Message, frozen=True):
    """An operator that follows another in a chain: the node runs it on what that one gave (flowmesh_mesh.hops).

    Each source of ``operator`` is given content, which the hub holds, or an output of the operator before. ``salt`` is that of
    its key, empty where the result may be shared.
    """

    operator: Operator
    salt: bytes = b""


class Assignment(_Message, frozen=True, tag="assignment/1"):
    """A batch for one node, under an epoch, with a lease. All items share type, models, code and engine options.

    ``life`` is when the node that it was given to had started: after another start nobody works on it any more.
    ``tails`` holds for each item what follows it in a chain, in order; it is empty where nothing follows any of them. What
    follows is attempt 1 at generation 0 of its key, and is reported like an item.
    """

    epoch: int
    id: str
    node: str
    type: str
    version: int
    batch_key: str
    items: tuple[Item, ...]
    models: dict[str, str] = {}
    model_digests: dict[str, str] = {}
    code: Located | None = None
    timeout_s: float = 0.0
    lease_s: float = 10.0
    memory_bytes: int = 0
    numeric: str = "any"
    life: int = 0
    tails: tuple[tuple[Hop, ...], ...] = ()


class Outcome(_Message, frozen=True):
    """What became of one item, or of a hop of its tail. ``reason`` is a Reason; on success ``result`` is the CID of the
    ResultManifest of ``outputs``.

    ``missing`` lists root CIDs that no holder could give; ``inline`` carries the blocks of small results.
    """

    key: bytes
    generation: int
    attempt: int
    reason: str
    result: bytes = b""
    outputs: dict[str, list[Ref]] = {}
    error: str = ""
    missing: tuple[bytes, ...] = ()
    metered: Metered = Metered()
    log: Ref | None = None


class Done(_Message, frozen=True, tag="done/1"):
    """Results of an assignment, all or the next part of them (``last`` closes it).

    ``signature`` is the node's, over the receipt of these outcomes (flowmesh_mesh.receipts); ``blocks`` are the inline blocks
    of small results, result manifests included, as (codec, bytes).
    """

    node: str
    assignment: str
    epoch: int
    outcomes: tuple[Outcome, ...]
    public_key: str
    signature: bytes
    numeric: str = ""
    blocks: tuple[tuple[int, bytes], ...] = ()
    last: bool = True


class Beat(_Message, frozen=True, tag="beat/1"):
    """Heartbeat: renews the leases of what is held. ``resident`` are digests of loaded models; ``load`` 0..1.

    ``running`` assignments are at work; ``queued`` ones wait on the node for their inputs or for a process. ``life`` is when the
    node started, so that the last word on an earlier life says nothing of this one; 0 is untold. The ``state`` of a node whose
    agent ended without a goodbye is ``died``: its witness says so (flowmesh_node.witness).
    """

    node: str
    at_us: int
    epoch: int
    held: tuple[str, ...] = ()
    running: int = 0
    resident: tuple[str, ...] = ()
    load: float = 0.0
    memory_free_bytes: int = 0
    state: str = "active"
    queued: int = 0
    life: int = 0


class Device(_Message, frozen=True):
    """One accelerator, as measured; sizes in bytes. What is 0 of its figures is looked up by its name."""

    kind: str
    name: str
    uuid: str = ""
    memory_bytes: int = 0
    flops: float = 0.0
    bandwidth_bytes_per_s: float = 0.0


class NodeRecord(_Message, frozen=True, tag="node/1"):
    """What a node says of itself when it joins and when it changes.

    ``hazard_per_hour`` is how often such a node is taken away by its owner; ``watts`` and ``idle_watts`` what it draws busy and
    idle; ``bandwidth_bytes_per_s`` of its link; 0 is unknown. ``wire`` and ``wire_oldest`` are the versions of the wire that it
    speaks and still understands. ``leaving_at_us`` is when its owner takes it away, if that was announced.
    """

    node: str
    public_key: str
    started_at_us: int
    types: tuple[str, ...]
    python: str
    cpus: float
    memory_bytes: int
    devices: tuple[Device, ...] = ()
    price_per_hour: float = 0.0
    numeric: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    slots: int = 1
    site: str = ""
    state: str = "active"
    hazard_per_hour: float = 0.0
    watts: float = 0.0
    idle_watts: float = 0.0
    bandwidth_bytes_per_s: float = 0.0
    egress_usd_per_gb: float = 0.0
    wire: int = 1
    wire_oldest: int = 1
    leaving_at_us: int = 0


class NodeHealth(_Message, frozen=True, tag="health/1"):
    """How far a node is trusted (stream HEALTH, last value per node); ``state`` is ok, cordoned or canary.

    ``by`` is the scheduler, or who asked; ``until_us`` ends a cordon of the scheduler's own; ``strikes`` counts these in a row;
    ``kind`` is the operator type on which the node was found sick.
    """

    node: str
    state: str
    reason: str = ""
    by: str = ""
    since_us: int = 0
    until_us: int = 0
    strikes: int = 0
    kind: str = ""


class Log(_Message, frozen=True, tag="log/1"):
    """Lines that a running operator printed."""

    node: str
    key: bytes
    attempt: int
    lines: tuple[str, ...]
    at_us: int = 0


class Checkpoint(_Message, frozen=True, tag="checkpoint/1"):
    """A running attempt can be gone on with from here: the node holds the folder ``at``, whole, with a manifest of its files.

    ``step`` of ``steps`` are done; the training stood still for ``stall_us`` to make it.
    """

    node: str
    assignment: str
    epoch: int
    key: bytes
    generation: int
    attempt: int
    step: int
    steps: int
    at: Ref
    stall_us: int = 0


class Recalled(_Message, frozen=True, tag="recalled/1"):
    """Answer to Recall: sealed acceptances that the holder keeps, from ``cursor`` on; ``cursor`` -1 at the end.

    Asked for ``runs``, it names them alone (tenant, run); asked for ``records``, a scheduler gives entries of the ledger
    (subject, record) out of its journal.
    """

    holder: str
    acceptances: tuple[tuple[bytes, bytes], ...] = ()
    cursor: int = -1
    runs: tuple[tuple[str, str], ...] = ()
    records: tuple[tuple[str, bytes], ...] = ()


# --- leader to node --------------------------------------------------------------------------------------------------


class Commit(_Message, frozen=True, tag="commit/1"):
    """The ledger shows these results (key, generation, result CID): the node may drop spool and assignment.

    ``closed`` is true once the whole assignment is settled (committed, released or refused).
    """

    epoch: int
    assignment: str
    results: tuple[tuple[bytes, int, bytes], ...] = ()
    closed: bool = True


class Abort(_Message, frozen=True, tag="abort/1"):
    """Stop working on these keys of an assignment (empty: on all of it)."""

    epoch: int
    assignment: str
    keys: tuple[bytes, ...] = ()
    reason: str = ""


class CheckpointKept(_Message, frozen=True, tag="checkpoint-kept/1"):
    """The mesh holds this checkpoint apart from the node, and an attempt elsewhere would go on from it: earlier ones may go."""

    epoch: int
    assignment: str
    key: bytes
    step: int


class Sealed(_Message, frozen=True):
    """A sealed acceptance, and the contents to fetch and pin with it."""

    acceptance: bytes
    seal: bytes
    roots: tuple[bytes, ...] = ()


class Guard(_Message, frozen=True, tag="guard/1"):
    """Keep a sealed acceptance, with everything that its manifest needs, until told to forget it (flowmesh_mesh.seals).

    ``roots`` are the contents to fetch and pin; ``holders`` name who has them now. ``others`` are kept along with it, so that
    one message and one sync serve many. An empty ``acceptance`` asks for the contents alone, for a while: their run is not
    accepted yet.
    """

    epoch: int
    acceptance: bytes
    seal: bytes
    roots: tuple[bytes, ...] = ()
    holders: tuple[str, ...] = ()
    others: tuple[Sealed, ...] = ()


class Guarded(_Message, frozen=True, tag="guarded/1"):
    """Answer to Guard: this holder has the acceptances and their contents on disk, pinned; ``error`` is empty then.

    Otherwise ``runs`` are those (tenant, run) that it has all the same.
    """

    holder: str
    error: str = ""
    runs: tuple[tuple[str, str], ...] = ()


class Unguard(_Message, frozen=True, tag="unguard/1"):
    """These runs (tenant, run) have ended and their ends are written: their acceptances need no further keeping."""

    epoch: int
    runs: tuple[tuple[str, str], ...]


class Recall(_Message, frozen=True, tag="recall/1"):
    """Tell what you keep, from ``cursor`` on: the ledger may have been lost. ``what`` is acceptances, runs or records."""

    cursor: int = 0
    what: str = "acceptances"


class Refused(_Message, frozen=True, tag="refused/1"):
    """The mesh cannot work with this node, or this scheduler: why, and how to mend it."""

    node: str
    why: str
    hint: str = ""


class Resolve(_Message, frozen=True, tag="resolve/1"):
    """Ask a node what a model reference stands for there."""

    reference: str


class Resolved(_Message, frozen=True, tag="resolved/1"):
    """``digest`` is ``sha256:<hex>`` of the model's files; ``error`` tells why it cannot be had on this node."""

    reference: str
    digest: str = ""
    size: int = 0
    error: str = ""


# --- blocks ----------------------------------------------------------------------------------------------------------


class BlockAsk(_Message, frozen=True, tag="block-ask/1"):
    """Ask a holder for blocks; it answers with as many, in order, as fit into ``max_bytes``."""

    cids: tuple[bytes, ...]
    max_bytes: int = 960 * 1024


class Have(_Message, frozen=True, tag="have/1"):
    """Ask a holder whether it holds the whole DAG of each root, and to keep it for ``lease_s`` seconds."""

    roots: tuple[bytes, ...]
    lease_s: float = 60.0


class Held(_Message, frozen=True, tag="held/1"):
    """Answer to Have, one flag per root."""

    held: tuple[bool, ...]


class Epoch(_Message, frozen=True, tag="epoch/1"):
    """Epoch record of a guarded stream: ``wire`` is the version that a scheduler must speak to read what the stream holds.

    Sent to nodes it tells them who leads, and ``wire`` is the version that the leader speaks.
    """

    epoch: int
    leader: str
    lease: int
    at_us: int
    wire: int = 1


class Lease(_Message, frozen=True, tag="lease/1"):
    """Holder of the scheduler's lease.

    ``life`` tells this process from an earlier one of the same name, ``secret`` is a digest of the mesh's secret that it has.
    """

    leader: str
    at_us: int
    address: str = ""
    life: str = ""
    secret: str = ""


class SchedulerBeat(_Message, frozen=True, tag="scheduler-beat/1"):
    """A scheduler is there: ``role`` is leader or standby. ``holder`` is the name under which it gives its hub's blocks.

    ``secret`` is a digest of the mesh's secret that it has; ``refused_writes`` counts what the broker refused it once deposed.
    """

    scheduler: str
    at_us: int
    role: str
    holder: str = ""
    started_at_us: int = 0
    epoch: int = 0
    version: str = ""
    wire: int = 1
    wire_oldest: int = 1
    memory_bytes: int = 0
    secret: str = ""
    refused_writes: int = 0


M = TypeVar("M")

_UNKNOWN_TAG = "The sender is newer, or older: install the same FlowMesh on both sides (`flowmesh version`)."

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(message: msgspec.Struct) -> bytes:
    """Return the msgpack bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes, kind: type[M]) -> M:
    """Return the message in ``data``; raise UsageError naming what is wrong with it.

    ``kind`` may be a union of message classes: the tag decides.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        message: M = decoder.decode(data)
    except msgspec.DecodeError as error:
        is_unknown = str(error).endswith("`$[0]`")
        raise UsageError(f"unreadable message: {error}", hint=_UNKNOWN_TAG if is_unknown else "") from error
    return message


def is_json(data: bytes) -> bool:
    """Tell whether a payload is the JSON form (it begins with a brace, which no msgpack message does)."""
    return data[:1] == b"{"
