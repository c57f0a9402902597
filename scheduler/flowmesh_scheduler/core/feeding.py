"""Continuous feeding: a node that is about to end a batch gets the next of the same kind, and begins it without a round trip.

Batches that run stand in a heap by the time at which it is worth looking at their queue; what came into the queue meanwhile, and
found no idle node, goes after them. One batch waits on a node at most.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from flowmesh_scheduler.core.queues import Queue
from flowmesh_scheduler.core.state import Node, State, Work


def expect_end(state: State, queue: Queue, assignment: str, predicted_s: float, now_us: int) -> None:
    """Note when a batch that begins now is so near its end that the next may follow it."""
    if queue.market == "engine" and queue.is_batching and state.settings.feed_ahead_s > 0:
        due_us = now_us + int(max(0.0, predicted_s - state.settings.feed_ahead_s) * 1e6)
        heappush(state.fleet.ending, (due_us, assignment, queue.key))


def nodes_to_feed(state: State, now_us: int, may_have: Callable[[Node, Work], bool]) -> list[tuple[Queue, Node]]:
    """Return queues with ready work and the nodes that are about to end a batch of it, and have no other waiting."""
    found: list[tuple[Queue, Node]] = []
    ending = state.fleet.ending
    while ending and ending[0][0] <= now_us:
        _, assignment, key = heappop(ending)
        outstanding, queue = state.assignments.get(assignment), state.pool.get(key)
        if outstanding is None or not outstanding.running or queue is None:
            continue
        node, head = state.nodes[outstanding.node], queue.first(state.works, state.start_check)
        running = sum(o.executor in ("engine", "train") and bool(o.running) for o in node.assignments.values())
        if head is not None and node.is_usable and running <= node.record.slots and may_have(node, head):
            found.append((queue, node))
    return found
