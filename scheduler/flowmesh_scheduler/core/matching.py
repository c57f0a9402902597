"""A few idle nodes and a few queues: the best of all ways to bring them together, by enumeration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

NODES_MAX = 4
QUEUES_MAX = 4


class Pair(NamedTuple):
    """A batch of a queue on a node: its utility, its seconds there, and what each second that it comes later costs."""

    score: float
    seconds: float
    delay_usd_per_s: float


def best_match(nodes: Sequence[str], pairs: Mapping[tuple[int, str], Pair], times: Mapping[int, int]) -> list[tuple[int, str]]:
    """Return which queue (by number) has its first batch on which node, so that the sum of utilities is greatest.

    ``times`` is how many nodes each queue may have. A queue that gets none follows on the node where that is best, after what it
    has now; so a bad node stays idle where waiting for a good one is worth more.
    """
    queues = list(times)
    best: list[tuple[int, str]] = []
    most = float("-inf")
    for chosen in product((None, *queues), repeat=len(nodes)):
        placed = [(queue, node) for queue, node in zip(chosen, nodes, strict=True) if queue is not None]
        if any((queue, node) not in pairs for queue, node in placed) or any(chosen.count(q) > times[q] for q in queues):
            continue
        total = sum(pairs[pair].score for pair in placed)
        for queue in queues:
            if queue not in chosen:
                total += _later(queue, placed, pairs)
        if total > most:
            best, most = placed, total
    return best


def _later(queue: int, placed: Sequence[tuple[int, str]], pairs: Mapping[tuple[int, str], Pair]) -> float:
    """Return the utility of a queue's batch after what its best node has now; none if it would go nowhere."""
    found = [
        follow.score - follow.delay_usd_per_s * pairs[other, node].seconds
        for other, node in placed
        if (follow := pairs.get((queue, node))) is not None
    ]
    return max(found, default=float("-inf") if not placed else 0.0)
