"""Other ways to give ready work to nodes, plugged into the production core in the place of its own: for comparison only.

All take the oldest ready work first and put up to the same number of operators of one kind into a batch as the core may. They
differ in the node. ``published`` is the policy of the published system as its code computes it (docs/simulator.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from flowmesh_mesh.catalog import CATALOG
from flowmesh_scheduler.core.fleet import can_run
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import executor_of
from flowmesh_scheduler.core.placement import place
from flowmesh_scheduler.core.state import Node, State, Work
from flowmesh_scheduler.core.step import Placer
from flowmesh_scheduler.sim import pool_view
from flowmesh_scheduler.sim.draws import pick, uniform

_GIB = 1 << 30
_MERGES_MAX = 4
_CACHE_HINT_S = 3600.0

Choose = Callable[[State, Work, Sequence[Node], int], Node]
"""(state, first of the batch, free nodes that fit in the order they joined, now_us) -> the one."""


@dataclass(slots=True)
class Queueing:
    """First come, first served; ``choose`` picks the node, ``limit`` bounds a batch (0: as the core's settings say)."""

    choose: Choose
    limit: int = 0
    exact: bool = False

    def __call__(self, state: State, now_us: int, out: Outbox) -> None:
        if not state.pool or state.is_cut_off:
            return
        usable = [node for node in state.nodes.values() if node.is_usable]
        waiting = [(head.order, number, queue, head) for number, (queue, head) in enumerate(pool_view.heads(state))]
        full: set[str] = set()
        while waiting:
            _, number, queue, head = heappop(waiting)
            executor = executor_of(head)
            if executor in full:
                continue
            nodes = free_nodes(usable, head)
            if not nodes:
                if not any(has_place(node, executor) for node in usable):
                    full.add(executor)
                continue
            node = self.choose(state, head, nodes, now_us)
            works = pool_view.take(state, queue, self._count(state, head), _same_spec if self.exact else None)
            pool_view.assign(state, node, works, now_us, out)
            following = pool_view.oldest(state, queue)
            if following is not None:
                heappush(waiting, (following.order, number, queue, following))

    def _count(self, state: State, head: Work) -> int:
        kind = CATALOG[head.operator.type]
        if not kind.batches:
            return 1
        limit = state.settings.batch_limit[kind.executor]
        if not self.limit:
            return limit
        return min(limit, self.limit) if kind.executor == "engine" else 1


def has_place(node: Node, executor: str) -> bool:
    """Tell whether a node has a slot for one more assignment of a kind; nothing queues on a node."""
    busy = node.busy
    taken = busy.get("engine", 0) + busy.get("train", 0) if executor in ("engine", "train") else busy.get(executor, 0)
    return taken < node.record.slots


def free_nodes(nodes: Sequence[Node], work: Work) -> list[Node]:
    """Return the nodes that can begin this work now; those that failed it only if there is no other."""
    executor = executor_of(work)
    found = [n for n in nodes if has_place(n, executor) and n.name not in work.unfit and can_run(n.record, work)]
    return [n for n in found if n.name not in work.avoided] or found


def _same_spec(first: Work, other: Work) -> bool:
    """Tell whether two operators have the same parameters; seeds do not count, which is generous."""
    return _spec(first) == _spec(other)


def _spec(work: Work) -> dict[str, object]:
    return {name: value for name, value in work.operator.params.items() if name not in ("seed", "salt")}


def _first(state: State, work: Work, nodes: Sequence[Node], now_us: int) -> Node:
    return nodes[0]


def _cheapest(state: State, work: Work, nodes: Sequence[Node], now_us: int) -> Node:
    return min(nodes, key=lambda n: (n.record.price_per_hour, n.name))


def _random(seed: int) -> Choose:
    return lambda state, work, nodes, now_us: nodes[pick(len(nodes), "random", seed, state.next_assignment)]


def _round_robin() -> Choose:
    last_given: dict[str, int] = {}

    def choose(state: State, work: Work, nodes: Sequence[Node], now_us: int) -> Node:
        node = min(nodes, key=lambda n: last_given.get(n.name, -1))
        last_given[node.name] = state.next_assignment
        return node

    return choose


def proxy(node: Node) -> float:
    """Return the published policy's static figure of a node: 100 per GPU, VRAM in GiB, half the RAM in GiB, half the cores."""
    record = node.record
    vram = sum(device.memory_bytes for device in record.devices) / _GIB
    return 100 * len(record.devices) + vram + record.memory_bytes / _GIB / 2 + 0.5 * record.cpus


def _published(seed: int) -> Choose:
    cached: dict[tuple[str, str], int] = {}
    last_given: dict[str, int] = {}

    def choose(state: State, work: Work, nodes: Sequence[Node], now_us: int) -> Node:
        model = next(iter(work.models.values()), "")
        since = now_us - int(_CACHE_HINT_S * 1e6)
        hinted = [n for n in nodes if model and cached.get((n.name, model), -1) >= max(0, since)]
        node = best_published(hinted or nodes, executor_of(work), seed, last_given)
        if model:
            cached[node.name, model] = now_us
        last_given[node.name] = state.next_assignment
        return node

    return choose


def best_published(nodes: Sequence[Node], executor: str, seed: int, last_given: dict[str, int]) -> Node:
    """Return the node with the largest λ·norm(proxy) - (1-λ)·norm(price), both normalised among the nodes at hand."""
    weight = {"engine": 0.4, "train": 0.8}.get(executor, 0.5)
    rates = _normalised([proxy(n) for n in nodes])
    prices = _normalised([n.record.price_per_hour or 1.0 for n in nodes])

    def score(index: int) -> tuple[float, int]:
        jitter = 2e-3 * (uniform("jitter", seed, nodes[index].name) - 0.5)
        return weight * rates[index] - (1 - weight) * prices[index] + jitter, -last_given.get(nodes[index].name, -1)

    return nodes[max(range(len(nodes)), key=score)]


def _normalised(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


@dataclass(frozen=True, slots=True)
class Policy:
    """A name, how to make its placer for a seed, and whether the core may share work between runs under it."""

    name: str
    placer: Callable[[int], Placer]
    shares: bool = True


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("ours", lambda seed: place),
        Policy("fifo", lambda seed: Queueing(_first)),
        Policy("random", lambda seed: Queueing(_random(seed))),
        Policy("round-robin", lambda seed: Queueing(_round_robin())),
        Policy("cheapest", lambda seed: Queueing(_cheapest)),
        Policy("published", lambda seed: Queueing(_published(seed), _MERGES_MAX, exact=True), shares=False),
    )
}
ISOLATED = "isolated"
NAMES = (*POLICIES, ISOLATED)
