"""An assignment in this node's hands, from its arrival until the leader closes it, and the parts of its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from flowmesh_mesh.bus import Delivery as Message
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import Assignment, Item, Outcome, Reason
from flowmesh_node.delivery import Delivery
from flowmesh_node.outputs import Wire

PART_OUTCOMES = 256
PART_DELAY_S = 0.02
PART_BYTES = 256 * 1024
ERROR_MAX_CHARS = 8000
_OUTCOME_BYTES = 200
_REF_BYTES = 150
_REASONS = frozenset(reason.value for reason in Reason)


@dataclass(slots=True)
class Held:
    """``aborted`` holds the keys that the leader wants no more; ``message`` is the latest delivery, acked at the close."""

    assignment: Assignment
    message: Message | None
    state: str = "accepted"
    since_s: float = field(default_factory=time.monotonic)
    aborted: set[bytes] = field(default_factory=set)
    task: asyncio.Task[None] | None = None

    def is_aborted(self, item: Item) -> bool:
        return item.key in self.aborted


class Reply:
    """Collects outcomes and sends them: in parts, without waiting, each outcome once, the final part marked."""

    def __init__(self, held: Held, delivery: Delivery) -> None:
        self._held = held
        self._delivery = delivery
        self._items = held.assignment.items
        self._is_settled = bytearray(len(self._items))
        self._left = len(self._items)
        self._outcomes: list[Outcome] = []
        self._blocks: dict[bytes, Wire] = {}
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
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
        self._left -= 1
        self._outcomes.append(outcome)
        self._bytes += _OUTCOME_BYTES + len(outcome.error)
        for refs in outcome.outputs.values():
            self._bytes += _REF_BYTES * len(refs)
        for block in blocks:
            if block[1] not in self._blocks:
                self._blocks[block[1]] = block
                self._bytes += len(block[1])
        if not self._left or len(self._outcomes) >= PART_OUTCOMES or self._bytes >= PART_BYTES:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PART_DELAY_S, self._flush)

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

    def drop(self) -> None:
        """Say nothing more."""
        self._is_settled = bytearray(b"\1" * len(self._items))
        self._outcomes = []
        self._blocks = {}
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._outcomes:
            return
        outcomes, self._outcomes = tuple(self._outcomes), []
        blocks, self._blocks, self._bytes = tuple(self._blocks.values()), {}, 0
        done = self._delivery.sign(self._held.assignment, outcomes, numeric=self.numeric, blocks=blocks, is_last=not self._left)
        self._delivery.send(done)
        if not self._left:
            self._held.state = "answered"
