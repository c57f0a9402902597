"""An assignment in this node's hands, from its arrival until the leader closes it, and the parts of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowmesh_mesh.bus import Delivery as Message
from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.clock import monotonic_s
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import Assignment, Hop, Item, Outcome, Reason
from flowmesh_node.delivery import Delivery
from flowmesh_node.outputs import Wire

if TYPE_CHECKING:
    from flowmesh_node.tail import Tails

PART_OUTCOMES = 256
PART_DELAY_S = 0.02
PART_BYTES = 256 * 1024
ERROR_MAX_CHARS = 8000
_OUTCOME_BYTES = 200
_REF_BYTES = 150
_REASONS = frozenset(reason.value for reason in Reason)


@dataclass(slots=True)
class Tail:
    """What follows one item: the hops to come (the next one last), the keys begun so far, and the hop that is in hand."""

    hops: list[Hop]
    keys: set[bytes]
    held: Held | None = None


@dataclass(slots=True)
class Held:
    """``aborted`` holds the keys that the leader wants no more; ``message`` is the latest delivery, acked at the close.

    ``tails`` are by the position of the item that they follow.
    """

    assignment: Assignment
    message: Message | None
    state: str = "accepted"
    since_s: float = field(default_factory=monotonic_s)
    aborted: set[bytes] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    tails: dict[int, Tail] = field(default_factory=dict)
    is_given_back: bool = False

    @property
    def has_begun(self) -> bool:
        """Tell whether something of it runs, or is over."""
        return self.state not in ("accepted", "fetching", "queued")

    def is_aborted(self, item: Item) -> bool:
        return item.key in self.aborted

    def tasks(self) -> list[asyncio.Task[None]]:
        """Return what runs for it, hops that are in hand included."""
        found = [self.task, *(tail.held.task for tail in self.tails.values() if tail.held is not None)]
        return [task for task in found if task is not None and not task.done()]

    def stop(self, keys: Sequence[bytes]) -> None:
        """Stop these keys and whatever follows them in a chain; without keys, everything."""
        items = self.assignment.items
        self.aborted |= set(keys) or {item.key for item in items}
        if self.task is not None and not self.task.done() and all(self.is_aborted(item) for item in items):
            self.task.cancel()
        for tail in self.tails.values():
            if not tail.keys.isdisjoint(self.aborted):
                tail.hops.clear()
                if tail.held is not None:
                    self.aborted |= {item.key for item in tail.held.assignment.items}
                    if tail.held.task is not None:
                        tail.held.task.cancel()

    def close(self) -> None:
        """End what runs for it: the leader has closed it."""
        for tail in self.tails.values():
            tail.hops.clear()
        for task in self.tasks():
            task.cancel()


class Post:
    """Gathers the outcomes of an assignment and sends them: in parts, without waiting, the final part marked.

    ``expected`` is how many are still to come: those of the items, and those of the hops that have begun.
    """

    def __init__(self, held: Held, delivery: Delivery) -> None:
        self.expected = len(held.assignment.items)
        self._held = held
        self._delivery = delivery
        self._outcomes: list[Outcome] = []
        self._blocks: dict[bytes, Wire] = {}
        self._bytes = 0
        self._numeric = ""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, outcome: Outcome, blocks: Sequence[Wire], numeric: str) -> None:
        """Take an outcome; what ran in another class of numbers goes out before."""
        if numeric != self._numeric:
            self._flush()
            self._numeric = numeric
        self.expected -= 1
        self._outcomes.append(outcome)
        self._bytes += _OUTCOME_BYTES + len(outcome.error)
        for refs in outcome.outputs.values():
            self._bytes += _REF_BYTES * len(refs)
        for block in blocks:
            if block[1] not in self._blocks:
                self._blocks[block[1]] = block
                self._bytes += len(block[1])
        if not self.expected or len(self._outcomes) >= PART_OUTCOMES or self._bytes >= PART_BYTES:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PART_DELAY_S, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._outcomes:
            return
        outcomes, self._outcomes = tuple(self._outcomes), []
        blocks, self._blocks, self._bytes = tuple(self._blocks.values()), {}, 0
        is_last = not self.expected
        done = self._delivery.sign(self._held.assignment, outcomes, numeric=self._numeric, blocks=blocks, is_last=is_last)
        kind = CATALOG.get(self._held.assignment.type)
        self._delivery.send(done, is_safe_first=kind is not None and kind.executor == "user")
        if is_last:
            self._held.state = "answered"


class Reply:
    """The answer to an assignment, or to a hop of it: one outcome for each item. ``tails`` goes on from those that succeed."""

    def __init__(self, held: Held, post: Post, tails: Tails | None = None) -> None:
        self._held = held
        self._post = post
        self._tails = tails
        self._items = held.assignment.items
        self._is_settled = bytearray(len(self._items))
        self.numeric = ""

    @property
    def unsettled(self) -> list[int]:
        """Return the positions of the items that have no outcome yet."""
        return [index for index, done in enumerate(self._is_settled) if not done]

    def settle(self, index: int, outcome: Outcome, blocks: Sequence[Wire] = ()) -> None:
        """Take the outcome of an item; a second one for the same item is ignored."""
        if self._is_settled[index]:
            return
        self._is_settled[index] = 1
        after = None
        if self._tails is not None and self._held.tails and outcome.reason == Reason.SUCCEEDED:
            after = self._tails.next(self._held, index, outcome)
        if after is None:
            self._post.add(outcome, blocks, self.numeric)
        elif self._tails is not None:
            self._post.expected += 1
            self._post.add(outcome, blocks, self.numeric)
            self._tails.start(after, self._post)

    def fail(self, index: int, reason: str, error: str, missing: Sequence[bytes] = (), log: Ref | None = None) -> None:
        """Settle an item badly."""
        item = self._items[index]
        if self._is_settled[index]:
            return
        if reason == Reason.SUCCEEDED or reason not in _REASONS:
            reason, error = Reason.INTERNAL, f"unknown reason {reason!r}: {error}"
        outcome = Outcome(
            item.key, item.generation, item.attempt, reason, error=error[:ERROR_MAX_CHARS], missing=tuple(missing), log=log
        )
        self.settle(index, outcome)

    def fail_rest(self, reason: str, error: str) -> None:
        """Settle badly whatever is not settled."""
        for index in self.unsettled:
            self.fail(index, reason, error)

    def cancel_aborted(self) -> None:
        """Settle the items that the leader wants no more."""
        for index in self.unsettled:
            if self._held.is_aborted(self._items[index]):
                self.fail(index, Reason.CANCELLED, "stopped by the leader")
