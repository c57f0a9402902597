"""What follows in a chain: each hop run here, on what the one before gave, without asking the leader.

A hop is a small assignment of its own within the one that brought it, and takes the same way through the node; its outcome goes
out with the others. Where nothing has to wait, hop follows hop in one loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh.hops import inputs_after, key_of
from flowmesh_mesh.messages import Assignment, Item, Located, Outcome
from flowmesh_node.held import Held, Post, Reply, Tail
from flowmesh_node.inputs import Inputs

log = logging.getLogger("flowmesh.node")

HOPS_AT_ONCE = 64
"""Hops that may follow one another before the loop sees to everything else."""


def tails_of(assignment: Assignment) -> dict[int, Tail]:
    """Return what follows each item of an assignment, by the position of the item."""
    items = assignment.items
    if len(assignment.tails) != len(items):
        return {}
    return {index: Tail(list(hops[::-1]), {items[index].key}) for index, hops in enumerate(assignment.tails) if hops}


class Tails:
    """Goes on from outcomes. ``begin`` takes a hop up; ``goes_on`` tells whether this node still begins anything."""

    def __init__(self, inputs: Inputs, begin: Callable[[Held, Reply], None], goes_on: Callable[[], bool]) -> None:
        self._inputs = inputs
        self._begin = begin
        self._goes_on = goes_on
        self._ready: deque[tuple[Held, Post]] = deque()
        self._is_running = False

    def next(self, held: Held, index: int, outcome: Outcome) -> Held | None:
        """Return what follows on the success of an item, None if nothing does."""
        tail = held.tails.get(index)
        if tail is None or not tail.hops or not self._goes_on():
            return None
        hop = tail.hops.pop()
        operator, before = hop.operator, held.assignment
        try:
            inputs = inputs_after(operator, outcome.outputs)
            key = key_of(hop, inputs)
        except FlowmeshError as error:
            log.warning("%s: what follows cannot be run here: %s", before.id, error.message)
            return None
        if key in held.aborted:
            return None
        self._inputs.note_here(ref.cid for refs in outcome.outputs.values() for ref in refs)
        located = {port: tuple([Located(ref) for ref in refs]) for port, refs in inputs.items()}
        step = Assignment(
            before.epoch,
            before.id,
            before.node,
            operator.type,
            operator.version,
            before.batch_key,
            (Item(key, 0, 1, operator.params, located, operator.name),),
            code=None if operator.code is None else Located(operator.code),
            timeout_s=operator.timeout_s,
            lease_s=before.lease_s,
            memory_bytes=operator.resources.memory_bytes,
            numeric=operator.numeric,
            life=before.life,
        )
        tail.keys.add(key)
        tail.held = Held(step, None, aborted=held.aborted, tails={0: tail})
        return tail.held

    def start(self, held: Held, post: Post) -> None:
        """Take up what follows; no recursion, however long a chain is."""
        self._ready.append((held, post))
        if not self._is_running:
            self._run()

    def _run(self) -> None:
        self._is_running = True
        try:
            for _ in range(HOPS_AT_ONCE):
                if not self._ready:
                    return
                held, post = self._ready.popleft()
                reply = Reply(held, post, self)
                reply.cancel_aborted()
                if reply.unsettled:
                    self._begin(held, reply)
        finally:
            self._is_running = False
        if self._ready:
            self._is_running = True  # what comes in between waits its turn
            asyncio.get_running_loop().call_soon(self._run)
