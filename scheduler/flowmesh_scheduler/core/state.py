"""The scheduler's state: runs and their vertices, work by operator key, nodes, assignments.

All of it is rebuilt from ledger, manifests and streams by a new leader; nothing here is authority.
Classes are plain and slotted: there may be a million vertices.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from flowmesh_mesh.manifest import Acceptance, Manifest, Operator, Ref, Resources, RunEnd
from flowmesh_mesh.messages import Checkpoint, NodeRecord
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core.classes import Fleet, NodeClass
from flowmesh_scheduler.core.costs import CostClass, Costs, Size
from flowmesh_scheduler.core.fairness import Account, Shares, may_start
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.standing import Copies, Health, Ward

if TYPE_CHECKING:
    from flowmesh_scheduler.core.placement import Decision
    from flowmesh_scheduler.core.queues import Queue


_NO_SIZE = Size(0.0, 1.0)
_DECISIONS_KEPT = 2_000
_TOTALS = ("executed", "shared", "saved_us", "repeated", "speculated", "speculation_won")
_NOTHING_ISSUED: Mapping[str, tuple[int, str]] = {}


def _nothing_issued() -> Mapping[str, tuple[int, str]]:
    """Return the one empty record that all work shares until it is issued: there may be a million."""
    return _NOTHING_ISSUED


class VertexState(Enum):
    """Life of an operator in a run. ``word`` is the value as a plain attribute: it is read several times for every operator."""

    WAITING = "waiting"
    READY = "ready"
    ASSIGNED = "assigned"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"

    def __init__(self, word: str) -> None:
        self.word = word
        self.is_final = word in ("done", "failed", "skipped", "cancelled")


class WorkState(Enum):
    """Life of the work behind one operator key.

    LOCATING: waiting to hear who holds the result (a hit) or the inputs. QUEUED: in the pool. ASSIGNED: on a node.
    COMMITTING: its result is on the way into the ledger.
    """

    LOCATING = "locating"
    QUEUED = "queued"
    ASSIGNED = "assigned"
    COMMITTING = "committing"


STORY_MAX = 8
"""Ended attempts that are remembered for an operator: the last ones."""


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended that gave no result: a reason, who ended it, when, and what is to be known about it."""

    attempt: int
    node: str
    reason: str
    actor: str
    at_us: int
    detail: str = ""

    def plain(self) -> dict[str, object]:
        """Return it as plain data."""
        return {
            "attempt": self.attempt,
            "node": self.node,
            "reason": self.reason,
            "actor": self.actor,
            "at_us": self.at_us,
            "detail": self.detail,
        }


@dataclass(slots=True, eq=False)
class Vertex:
    """One operator of one run. ``actor`` is who ended it; ``story`` tells of its attempts that gave no result.

    ``repeats`` counts how often its result was lost; ``former`` is the work that ended for want of inputs: its history goes on.
    """

    run: Run
    index: int
    operator: Operator
    waits_for: int
    state: VertexState = VertexState.WAITING
    work: Work | None = None
    key: bytes = b""
    generation: int = 0
    outputs: Mapping[str, list[Ref]] | None = None
    result: bytes = b""
    record: bytes = b""
    reason: str = ""
    error: str = ""
    node: str = ""
    attempt: int = 0
    shared: bool = False
    is_private: bool = False
    repeats: int = 0
    former: Work | None = None
    saved_us: int = 0
    exec_us: int = 0
    load_us: int = 0
    started_at_us: int = 0
    ended_at_us: int = 0
    log: Ref | None = None
    actor: str = ""
    story: tuple[AttemptEnd, ...] = ()


@dataclass(slots=True, eq=False)
class Run:
    """One execution of a workflow."""

    tenant: str
    id: str
    manifest: Manifest
    acceptance: Acceptance
    vertices: list[Vertex] = field(default_factory=list)
    consumers: list[Sequence[int]] = field(default_factory=list)
    unfinished: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    changes: list[tuple[int, str, str, str, bool]] = field(default_factory=list)
    cancelled_by: str = ""
    reason: str = ""
    detail: str = ""
    actor: str = ""
    failed_by: str = ""
    keeping: bool = False
    kept: bool = False
    end: RunEnd | None = None
    saved_us: int = 0
    order: int = 0
    deadline_us: int = 0
    paths_s: Sequence[float] = ()
    account: Account = field(default_factory=Account)
    digests: dict[tuple[tuple[str, str], ...], Mapping[str, str]] = field(default_factory=dict)
    """Digests of the models by role, by what the operators ask for: equal ones are kept once."""

    id_pair: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        self.id_pair = (self.tenant, self.id)

    @property
    def is_stopped(self) -> bool:
        """Tell whether somebody ended the run before it was settled; who, stands in ``actor``."""
        return bool(self.actor)


@dataclass(slots=True, eq=False)
class Work:
    """The execution behind one operator key; every vertex with that key waits for it.

    ``waiters`` are a tuple while there is one, as for nearly all work, and the keys of a dict from the second on.
    ``issued`` holds attempt and node by assignment; ``copy`` is a second assignment beside the first, while both run.
    ``avoided`` nodes are used only if there is no other, ``unfit`` ones never; ``lost_on`` are those that it was lost with.
    ``ticket`` is the number of its place in the pool, or in the pause before that; any other place of it is void.
    ``charged_us`` of a node's time are paid by ``payers`` (waiters by tenant), or by one ``tenant``; it waits under that tenant
    and ``tag``. ``standing`` tells among what it is counted there: waiting, running, or neither.
    """

    key: bytes
    operator: Operator
    inputs: Mapping[str, list[Ref]]
    model_digests: Mapping[str, str]
    models: Mapping[str, str]
    batch_key: str
    order: int
    priority: int
    state: WorkState = WorkState.QUEUED
    waiters: Collection[Vertex] = ()
    generation: int = 0
    attempts: int = 0
    failures: int = 0
    misses: int = 0
    nodes_lost: int = 0
    avoided: frozenset[str] = frozenset()
    unfit: frozenset[str] = frozenset()
    issued: Mapping[str, tuple[int, str]] = field(default_factory=_nothing_issued)
    assignment: str = ""
    copy: str = ""
    is_copied: bool = False
    lost_on: tuple[str, ...] = ()
    not_before_us: int = 0
    ticket: int = 0
    timeout_s: float = 0.0
    awaited: Collection[bytes] = ()
    is_hit: bool = False
    previous: Result | None = None
    pending: Result | None = None
    tenant: str = ""
    cost_kind: CostClass = ("", "")
    size: Size = _NO_SIZE
    seconds: float = 0.0
    queued_at_us: int = 0
    deadline_us: int = 0
    payers: dict[str, int] | None = None
    charged_us: int = 0
    tag: float = 0.0
    standing: str = ""
    story: tuple[AttemptEnd, ...] = ()

    @property
    def model(self) -> str:
        """The digest of the model that it needs loaded; empty if none."""
        return self.cost_kind[1] if self.models else ""

    @property
    def steps(self) -> float:
        return self.size[0]

    @property
    def units(self) -> float:
        return self.size[1]

    def add_waiter(self, vertex: Vertex) -> None:
        """Let one more vertex wait."""
        waiters = self.waiters
        if not isinstance(waiters, dict):
            waiters = self.waiters = dict.fromkeys(waiters)
        waiters[vertex] = None

    def drop_waiter(self, vertex: Vertex) -> None:
        """Let a vertex wait no more."""
        if isinstance(self.waiters, dict):
            self.waiters.pop(vertex, None)
        elif vertex in self.waiters:
            self.waiters = ()

    def note_end(self, end: AttemptEnd) -> None:
        """Remember how an attempt ended, here and with everyone who waits."""
        self.story = (*self.story[-STORY_MAX + 1 :], end)
        for vertex in self.waiters:
            vertex.story = self.story

    def issue(self, assignment: str, attempt: int, node: str) -> None:
        """Note that an attempt was given to a node."""
        self.issued = {**self.issued, assignment: (attempt, node)} if self.issued else {assignment: (attempt, node)}

    def roots(self) -> list[bytes]:
        """Return the roots of the inputs and the code."""
        found = [ref.cid for refs in self.inputs.values() for ref in refs]
        if self.operator.code is not None:
            found.append(self.operator.code.cid)
        return found


PoolKey = str | tuple[str, Resources, float, tuple[str, ...], tuple[str, ...]]
"""What work must share to wait in one queue: type, models and options; resources; time limit; nodes avoided; nodes unfit.

The first alone where there is nothing else to say, as for nearly all work: it is looked up many times."""


@dataclass(slots=True, eq=False)
class Result:
    """What the ledger holds for an operator key, and how dear it was."""

    generation: int
    result: bytes
    outputs: Mapping[str, list[Ref]]
    record: bytes
    exec_us: int
    load_us: int
    attempt: int
    node: str
    log: Ref | None = None
    at_us: int = 0


@dataclass(slots=True, eq=False)
class Node:
    """A node as the leader knows it. ``busy`` counts, by kind of executor, the assignments of which something still runs.

    ``resident`` are models that it has loaded, ``cached`` those that it has had and need not be brought again.
    """

    record: NodeRecord
    last_beat_us: int
    state: str = "active"
    disconnected_at_us: int = 0
    klass: NodeClass | None = None
    classed_as: NodeRecord | None = None
    warm: frozenset[str] = frozenset()
    cached: set[str] = field(default_factory=set)
    assignments: dict[str, Outstanding] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    resident: frozenset[str] = frozenset()
    load: float = 0.0
    running: int = 0
    queued: int = 0
    memory_free_bytes: int = 0
    health: Health = field(default_factory=Health)

    @property
    def name(self) -> str:
        return self.record.node

    @property
    def is_usable(self) -> bool:
        return self.state == "active" and not self.disconnected_at_us


@dataclass(slots=True, eq=False)
class Chain:
    """What follows an operator on its node: indices of the run's vertices, the next one last."""

    run: tuple[str, str]
    rest: list[int]


@dataclass(slots=True, eq=False)
class Outstanding:
    """An assignment on a node: which work is still open, and of which the node has yet to tell the outcome (``running``).

    ``count`` is how many operators it had; ``begun_us`` when the node could begin with it, 0 while it waits there.
    ``chains`` holds, by the key of open work, what its node goes on to once that is done; ``folded`` what it has gone on to.
    ``unnamed_since_us`` is when its node began to leave it out of its heartbeats.
    """

    id: str
    node: str
    executor: str
    open: dict[bytes, Work]
    running: set[bytes]
    assigned_at_us: int
    answered_at_us: int = 0
    confirmed: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    tenants: tuple[str, ...] = ()
    kind: CostClass = ("", "")
    device: str = ""
    is_cold: bool = False
    max_steps: float = 0.0
    sum_units: float = 0.0
    predicted_s: float = 0.0
    count: int = 0
    begun_us: int = 0
    items: int = 0
    succeeded: int = 0
    expected_s: float = 0.0
    exec_us: int = 0
    load_us: int = 0
    fetch_us: int = 0
    bytes_fetched: int = 0
    chains: dict[bytes, Chain] = field(default_factory=dict)
    folded: set[bytes] = field(default_factory=set)
    unnamed_since_us: int = 0


@dataclass(slots=True, eq=False)
class KeptCheckpoint:
    """From where the next attempt at an operator goes on; ``idle_since_us`` is when nothing wanted it any more, 0 while it is."""

    made: Checkpoint
    idle_since_us: int = 0


@dataclass(slots=True, eq=False)
class TakenBack:
    """An assignment that its node may still be working on although it was taken back: the node was silent, not dead."""

    node: str
    started_at_us: int
    keys: tuple[bytes, ...]
    counts_as_loss: bool
    chains: dict[bytes, Chain] = field(default_factory=dict)


@dataclass(slots=True)
class State:
    """Everything that the core knows."""

    settings: Settings
    epoch: int = 0
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    ended: dict[tuple[str, str], tuple[RunEnd, Acceptance | None]] = field(default_factory=dict)
    finished: deque[tuple[str, str]] = field(default_factory=deque)
    works: dict[bytes, Work] = field(default_factory=dict)
    results: dict[bytes, Result] = field(default_factory=dict)
    pool: dict[PoolKey, Queue] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)
    fleet: Fleet = field(default_factory=Fleet)
    costs: Costs = field(default_factory=Costs)
    model_bytes: dict[str, int] = field(default_factory=dict)
    decisions: OrderedDict[str, Decision] = field(default_factory=OrderedDict)
    now_us: int = 0
    delayed: list[tuple[int, int, Work]] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    assignments: dict[str, Outstanding] = field(default_factory=dict)
    taken_back: dict[str, TakenBack] = field(default_factory=dict)
    checkpoints: dict[bytes, KeptCheckpoint] = field(default_factory=dict)
    places: dict[bytes, set[str]] = field(default_factory=dict)
    locating: dict[bytes, list[Work]] = field(default_factory=dict)
    shares: Shares = field(default_factory=Shares)
    ward: Ward = field(default_factory=Ward)
    copies: Copies = field(default_factory=Copies)
    is_cut_off: bool = False
    next_order: int = 0
    next_assignment: int = 0
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TOTALS, 0))
    tenant_secrets: dict[str, bytes] = field(default_factory=dict)
    name_private: Callable[[bytes], bytes] | None = None
    """Told each private operator key as it is computed; returns the one to use. A recording notes it; a replay has no secret."""

    def __post_init__(self) -> None:
        self.costs.bandwidth_bytes_per_s = self.settings.bandwidth_bytes_per_s
        self.shares.tenants, self.shares.burst_s = self.settings.tenants, self.settings.fair_burst_s

    def know_models(self, sizes: Mapping[str, int]) -> None:
        """Learn how large models are."""
        for digest, size_bytes in sizes.items():
            self.model_bytes[digest] = size_bytes
            self.costs.know_model(digest, size_bytes)

    def may_start(self, tenant: str) -> bool:
        """Tell whether a tenant's quota allows one more assignment."""
        return may_start(self, tenant)

    @property
    def start_check(self) -> Callable[[str], bool] | None:
        """Return what tells whether a tenant may start something; None where no tenant has such a quota."""
        return self.may_start if self.shares.has_slot_quotas else None

    def touch(self, node: Node) -> None:
        """Note that a node has changed in something that a choice depends on."""
        self.fleet.stale[node] = None

    def note_decision(self, decision: Decision) -> None:
        """Remember why a batch went where it went; the oldest memories go."""
        self.decisions[decision.assignment] = decision
        if len(self.decisions) > _DECISIONS_KEPT:
            self.decisions.popitem(last=False)

    def take_order(self) -> int:
        """Return the next number of arrival."""
        self.next_order += 1
        return self.next_order

    def holders(self, root: bytes) -> list[str]:
        """Return who is believed to hold a root: reachable nodes, and the hub; in the order of their names."""
        places = self.places.get(root)
        if not places:
            return []
        return sorted(name for name in places if name == HUB or self._is_reachable(name))

    def _is_reachable(self, name: str) -> bool:
        node = self.nodes.get(name)
        return node is not None and node.state != "gone" and not node.disconnected_at_us
