"""The nodes by what they are: classes of nodes that are alike in all that a choice depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from flowmesh_mesh.messages import NodeRecord

if TYPE_CHECKING:
    from flowmesh_scheduler.core.queues import Queue
    from flowmesh_scheduler.core.state import Node, PoolKey

MARKETS = {"inline": "inline", "data": "data", "user": "user", "engine": "engine", "train": "engine"}
"""Kinds of executor that compete for the same slots have one market."""

ORDER = ("inline", "data", "user", "engine")
"""The markets, the quickest work first."""


Rank = tuple[float, int, int, "Queue"]
"""(-rank, number, version, queue); void once the queue has another version."""


@dataclass(slots=True, eq=False)
class Ranking:
    """The queues of a market by what a second of a class earns with them.

    ``heaps`` hold the ranks by tenant. ``pending`` are queues that have changed since they were ranked; ``waiting`` a heap of
    those that are better kept back, by when to look at them again; ``barred`` those that must not go to any idle node.
    ``kept`` holds the versions of both.
    """

    heaps: dict[str, list[Rank]] = field(default_factory=dict)
    pending: dict[Queue, None] = field(default_factory=dict)
    waiting: list[tuple[int, int, Queue]] = field(default_factory=list)
    kept: dict[Queue, int] = field(default_factory=dict)
    barred: dict[Queue, None] = field(default_factory=dict)

    def bar(self, queue: Queue) -> None:
        """Keep a queue back until another node is idle: it must not go to those that are."""
        self.barred[queue] = None
        self.kept[queue] = queue.version

    def unbar(self) -> None:
        """Another node is idle."""
        for queue in self.barred:
            self.kept.pop(queue, None)
            self.pending[queue] = None
        self.barred = {}

    def wait(self, queue: Queue, until_us: int) -> None:
        """Keep a queue back for a while."""
        heappush(self.waiting, (until_us, queue.number, queue))
        self.kept[queue] = queue.version

    def look_again(self, changed: Iterable[Queue], now_us: int) -> None:
        """Note which queues are to be ranked anew."""
        for queue in changed:
            self.pending[queue] = None
        while self.waiting and self.waiting[0][0] <= now_us:
            queue = heappop(self.waiting)[2]
            self.kept.pop(queue, None)
            self.pending[queue] = None


def _rankings() -> dict[str, Ranking]:
    return {market: Ranking() for market in ORDER}


@dataclass(slots=True, eq=False)
class NodeClass:
    """Nodes that are alike in all that a choice depends on, but for what they hold.

    ``idle`` holds, by market, the usable nodes with a free slot, in the order in which they became idle; ``warm`` the usable
    nodes by the model that they have loaded, ``cached`` by those that need not be brought to them; ``ends`` a heap of when what
    runs is predicted to end.
    """

    number: int
    sample: NodeRecord
    device: str
    nodes: dict[str, Node] = field(default_factory=dict)
    idle: dict[str, dict[str, Node]] = field(default_factory=lambda: {market: {} for market in ORDER})
    warm: dict[str, dict[str, Node]] = field(default_factory=dict)
    cached: dict[str, dict[str, Node]] = field(default_factory=dict)
    memory_bytes: int = 0
    ends: list[tuple[int, str]] = field(default_factory=list)
    ranking: dict[str, Ranking] = field(default_factory=_rankings)


@dataclass(slots=True, eq=False)
class Fleet:
    """The classes, and the nodes whose place in them has to be looked at again."""

    classes: dict[object, NodeClass] = field(default_factory=dict)
    stale: dict[Node, None] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    """Markets in which a node became idle or a class came up since the last placement."""

    markets: set[str] = field(default_factory=set)
    """Markets that any work has come to so far: the others need no look."""

    queues: dict[str, dict[Queue, None]] = field(default_factory=dict)
    """Queues that have changed since the classes were told, by market."""

    ending: list[tuple[int, str, PoolKey]] = field(default_factory=list)
    """Batches by when their nodes may get the next of the same kind."""

    recheck_us: dict[str, int] = field(default_factory=dict)
    """When to look again at what is kept back, by market."""

    reference: NodeClass | None = None
    """The class with the most nodes: what work is worth is told in its seconds."""

    def note_change(self, queue: Queue) -> None:
        """Note that a queue is to be ranked anew by every class."""
        self.queues.setdefault(queue.market, {})[queue] = None

    def take_changed(self, market: str) -> Iterable[Queue]:
        """Return the queues of a market that have changed since the last call."""
        return self.queues.pop(market, ())
