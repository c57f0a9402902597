"""One round: batches and nodes chosen together, the best first, until nothing is left that is worth placing.

Each market (kinds of executor that compete for the same slots) is cleared by itself. For a class of equal nodes the queues are
ranked by what a second of such a node earns with their first batch; the price of a node's time is what the first batch that will
find no node would earn with it. Of the best few queues every candidate (batch, node) is weighed with what that very node holds.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from flowmesh_scheduler.core.assigning import assign
from flowmesh_scheduler.core.classes import ORDER, NodeClass
from flowmesh_scheduler.core.fleet import can_run, refresh
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.pricing import Base, base_of, factors_of, held_back, lingers, usd_per_s
from flowmesh_scheduler.core.queues import Queue
from flowmesh_scheduler.core.state import Node, State, Work
from flowmesh_scheduler.core.utility import Factors, score, terms

_QUEUES_WEIGHED = 5
"""Queues of which exact candidates are weighed for a class, from the best rank on."""

_NODES_WEIGHED = 4
"""With so few idle nodes in a class each is weighed; of more, the likely ones."""

_NODES_COMPARED = 8
_ALTERNATIVES_KEPT = 3


class Candidate(NamedTuple):
    """A batch (so many of the first of a queue) on a node."""

    score: float
    queue: Queue
    klass: NodeClass
    node: Node
    base: Base
    factors: Factors


@dataclass(slots=True, frozen=True)
class Alternative:
    """What was not chosen: another node for the batch, or another batch for the node."""

    label: str
    node: str
    count: int
    queue: str
    factors: Factors


@dataclass(slots=True)
class Decision:
    """Why a batch went to a node: what its utility came from, and the best of what else was weighed."""

    assignment: str
    node: str
    count: int
    queue: str
    factors: Factors
    alternatives: tuple[Alternative, ...]
    at_us: int


def place(state: State, now_us: int, out: Outbox) -> None:
    """Give ready work to nodes while there is a pair that is worth it."""
    refresh(state)
    if state.is_cut_off or not state.pool:
        return
    for market in ORDER:
        if market in state.unsettled or market in state.fleet.changed:
            _Round(state, market, now_us).clear(out)
    state.fleet.changed.clear()
    state.unsettled.clear()
    state.unsettled |= state.held_back
    state.held_back.clear()


@dataclass(slots=True)
class _Round:
    """The clearing of one market."""

    state: State
    market: str
    now_us: int
    queues: list[Queue] = field(default_factory=list)
    classes: list[NodeClass] = field(default_factory=list)
    ranking: dict[int, list[tuple[float, int, Queue]]] = field(default_factory=dict)
    prices: dict[int, float] = field(default_factory=dict)
    best: dict[int, Candidate | None] = field(default_factory=dict)
    weighed: list[Candidate] = field(default_factory=list)
    least_tag: float = 0.0

    def clear(self, out: Outbox) -> None:
        """Assign the best candidate, again and again."""
        self.classes = [c for c in self.state.fleet.classes.values() if c.idle[self.market]]
        if not self.classes:
            return
        self._gather()
        for klass in self.classes:
            self._rank(klass)
            self.best[klass.number] = self._search(klass)
        while True:
            found = [c for c in self.best.values() if c is not None]
            if not found:
                return
            chosen = max(found, key=lambda c: (c.score, -c.queue.number, -c.klass.number))
            self._assign(chosen, out)

    def _gather(self) -> None:
        """Look at every queue of the market: drop what is empty, find the tenant that is furthest behind."""
        state = self.state
        tags = []
        for key, queue in list(state.pool.items()):
            if queue.market != self.market:
                continue
            head = queue.first(state.works, state.may_start)
            if head is not None:
                self.queues.append(queue)
                tags.append(head.tag)
            elif not queue.heaps:
                del state.pool[key]
        self.least_tag = min(tags, default=0.0)

    def _rank(self, klass: NodeClass) -> None:
        """Order the queues by what a second of this class earns with them; find the price at which the idle nodes are taken."""
        ranked = [(-self._base(queue, klass).rate, queue.number, queue) for queue in self.queues if self._is_able(queue, klass)]
        ranked.sort()
        self.ranking[klass.number] = ranked
        slots, price = len(klass.idle[self.market]), 0.0
        if self.market == "engine":
            for rate, _, queue in ranked:
                if slots <= 0:
                    price = max(0.0, -rate)
                    break
                slots -= -(-queue.count // max(1, self._base(queue, klass).count))
        self.prices[klass.number] = price

    def _is_able(self, queue: Queue, klass: NodeClass) -> bool:
        able = queue.able.get(klass.number)
        if able is None:
            head = queue.head
            assert head is not None
            able = queue.able[klass.number] = can_run(klass.sample, head)
        return able

    def _base(self, queue: Queue, klass: NodeClass) -> Base:
        """Return what the first batch of a queue is worth on a class, whatever the node holds; kept until something changes."""
        known = queue.bases.get(klass.number)
        state = self.state
        stamp = (queue.version, state.costs.version, self.least_tag)
        if known is None or known.stamp != stamp:
            slots = self._slots(queue)
            known = queue.bases[klass.number] = base_of(state, queue, klass, slots, self.least_tag, self.now_us, stamp)
        return known

    def _slots(self, queue: Queue) -> int:
        """Return among how many places the queue could be divided: idle nodes, or for kinds that queue on a node all of them."""
        depth = self.state.settings.depth_limit.get(self.market, 1)
        if self.market == "engine" or depth == 1:
            return sum(len(c.idle[self.market]) for c in self.classes if self._is_able(queue, c))
        able = [c for c in self.state.fleet.classes.values() if self._is_able(queue, c)]
        return depth * sum(len(c.nodes) * c.sample.slots for c in able)

    # --- weighing

    def _search(self, klass: NodeClass) -> Candidate | None:
        """Return the best exact candidate on an idle node of a class, of the queues that rank first."""
        best: Candidate | None = None
        weighed = 0
        for _, _, queue in self.ranking[klass.number]:
            if not queue.count or queue.first(self.state.works, self.state.may_start) is None:
                continue
            candidate = self._best_node(queue, klass)
            if candidate is None:
                continue
            weighed += 1
            if best is None or candidate.score > best.score:
                best = candidate
            if weighed >= _QUEUES_WEIGHED or self.market != "engine":
                break
        return best

    def _best_node(self, queue: Queue, klass: NodeClass) -> Candidate | None:
        """Return the best of the likely nodes for a queue; None where it is better to wait."""
        state, head = self.state, queue.head
        assert head is not None
        base = self._base(queue, klass)
        if lingers(state, queue, head, base, usd_per_s(state, klass), self.now_us):
            state.held_back.add(self.market)
            return None
        best: Candidate | None = None
        for node in self._likely(queue, klass, head):
            factors = factors_of(state, queue, head, base, klass, node, self.prices[klass.number])
            candidate = Candidate(score(factors), queue, klass, node, base, factors)
            self.weighed.append(candidate)
            if best is None or candidate.score > best.score:
                best = candidate
        if best is not None and len(state.fleet.classes) > 1:
            count = base.count
            if held_back(state, queue, head, best.factors, count, klass, self._base, self._is_able, self.now_us):
                state.held_back.add(self.market)
                return None
        return best

    def _likely(self, queue: Queue, klass: NodeClass, head: Work) -> list[Node]:
        """Return the idle nodes that may be the best: all of few; of many one with the model, some with inputs, any one."""
        idle = klass.idle[self.market]
        barred = head.unfit
        if head.avoided and self._has_other(head):
            barred = barred | head.avoided
        if barred:
            idle = {name: node for name, node in idle.items() if name not in barred}
        if len(idle) <= _NODES_WEIGHED:
            found = list(idle.values())
            return found if self.market == "engine" else sorted(found, key=self._busy)
        return self._likely_of_many(queue, klass, head, idle)

    def _busy(self, node: Node) -> int:
        return node.busy.get(self.market, 0)

    def _likely_of_many(self, queue: Queue, klass: NodeClass, head: Work, idle: dict[str, Node]) -> list[Node]:
        state = self.state
        found: dict[str, Node] = {}
        warm = klass.warm.get(queue.model)
        if queue.model and warm:
            for name, node in warm.items():
                if name in idle:
                    found[name] = node
                    break
        for refs in head.inputs.values():
            for ref in refs[:2]:
                for name in sorted(state.places.get(ref.cid, ())):
                    if name in idle and len(found) < _NODES_WEIGHED:
                        found[name] = idle[name]
        if self.market == "engine":
            last = next(reversed(idle.values()))  # the others may come to rest, and be given back where they are rented
        else:
            last = min(islice(idle.values(), _NODES_COMPARED), key=self._busy)
        found.setdefault(last.name, last)
        return list(found.values())

    def _has_other(self, head: Work) -> bool:
        """Tell whether a node that can run it is neither unfit nor avoided, be it busy."""
        return any(
            n.is_usable and n.name not in head.unfit and n.name not in head.avoided and can_run(n.record, head)
            for n in self.state.nodes.values()
        )

    # --- assigning

    def _assign(self, chosen: Candidate, out: Outbox) -> None:
        state, queue, klass = self.state, chosen.queue, chosen.klass
        works = queue.take(chosen.base.count, state.works, chosen.base.fits(state))
        if works:
            identity = assign(state, chosen.node, works, self.now_us, out, terms(chosen.factors), chosen.factors.seconds)
            state.note_decision(
                Decision(
                    identity, chosen.node.name, len(works), label_of(queue), chosen.factors, self._others(chosen), self.now_us
                )
            )
        refresh(state)
        for other in self.classes:
            ranked = self.ranking[other.number]
            if other is klass or ((known := self.best[other.number]) is not None and known.queue is queue):
                if queue.count:
                    self._move(ranked, queue, other)
                self.best[other.number] = self._search(other) if other.idle[self.market] else None

    def _move(self, ranked: list[tuple[float, int, Queue]], queue: Queue, klass: NodeClass) -> None:
        """Give a queue that has changed its new rank."""
        if queue.first(self.state.works, self.state.may_start) is None:
            return
        for index, entry in enumerate(ranked):
            if entry[2] is queue:
                del ranked[index]
                break
        insort(ranked, (-self._base(queue, klass).rate, queue.number, queue))

    def _others(self, chosen: Candidate) -> tuple[Alternative, ...]:
        """Return the best of what was weighed besides: other nodes for these works, other works for this node."""
        near = [c for c in self.weighed if c is not chosen and (c.queue is chosen.queue or c.node is chosen.node)]
        near += [c for c in self.best.values() if c is not None and c.queue is chosen.queue and c.klass is not chosen.klass]
        self.weighed = [c for c in self.weighed if c.queue is not chosen.queue and c.node is not chosen.node][-32:]
        found: dict[tuple[str, int], Candidate] = {}
        for candidate in sorted(near, key=lambda c: -c.score):
            if candidate.node is not chosen.node or candidate.queue is not chosen.queue:
                found.setdefault((candidate.node.name, candidate.queue.number), candidate)
        return tuple(
            Alternative(f"{label_of(c.queue)} on {c.node.name}", c.node.name, c.base.count, label_of(c.queue), c.factors)
            for c in list(found.values())[:_ALTERNATIVES_KEPT]
        )


def label_of(queue: Queue) -> str:
    """Return the name of a queue for people: what its operators share."""
    return queue.key if isinstance(queue.key, str) else queue.key[0]
