"""One round: batches and nodes chosen together, the best first, until nothing is left that is worth placing.

Each market (kinds of executor that compete for the same slots) is cleared by itself. Every class of equal nodes ranks the queues
by what a second of such a node earns with their first batch; a rank is looked at again only when its queue has changed. Of the
best few queues each candidate (batch, node) is weighed with what that very node holds; where nodes are scarce, a node's time has
the price of the wait of those who wanted it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice
from math import inf, log2
from typing import NamedTuple

from flowmesh_scheduler.core.assigning import assign
from flowmesh_scheduler.core.classes import ORDER, NodeClass, Rank
from flowmesh_scheduler.core.feeding import expect_end, nodes_to_feed
from flowmesh_scheduler.core.fleet import can_run, refresh
from flowmesh_scheduler.core.health import may_take
from flowmesh_scheduler.core.matching import NODES_MAX, QUEUES_MAX, Pair, best_match
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import executor_of
from flowmesh_scheduler.core.pricing import (
    Base,
    base_of,
    delay_usd_per_s,
    factors_of,
    held_back,
    is_paid_anyway,
    lingers,
    place_of,
    rank_of,
    usd_per_s,
    wish_of,
)
from flowmesh_scheduler.core.queues import Queue
from flowmesh_scheduler.core.splitting import Place, batches_of
from flowmesh_scheduler.core.state import Node, State, Work
from flowmesh_scheduler.core.utility import Factors, score, terms

_QUEUES_WEIGHED = 3
"""Queues of which exact candidates are weighed for a class, from the best rank on."""

_LOOK_AGAIN_US = 2_000_000
"""After so long it is weighed anew whether to wait for a better node, or for more to join a batch."""

_NODES_WEIGHED = 4
"""With so few idle nodes in a class each is weighed; of more, the likely ones."""

_NODES_COMPARED = 8
_NOT_TAKEN = -1
_HOLDERS_SEEN = 32
_ALTERNATIVES_KEPT = 3


Entry = tuple[float, int, int, Queue, str]
"""A rank, with the tenant under which it was found."""


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
    fleet = state.fleet
    for market in ORDER:
        if market not in fleet.markets:
            continue
        if market in state.unsettled or market in fleet.changed or fleet.recheck_us.get(market, now_us + 1) <= now_us:
            _Round(state, market, now_us).clear(out)
    fleet.changed.clear()
    state.unsettled.clear()


@dataclass(slots=True)
class _Round:
    """The clearing of one market."""

    state: State
    market: str
    now_us: int
    classes: list[NodeClass] = field(default_factory=list)
    weighed: list[Candidate] = field(default_factory=list)

    def clear(self, out: Outbox) -> None:
        """Assign the best candidate, again and again; one whose queue has changed meanwhile is sought anew."""
        state, market = self.state, self.market
        changed = state.fleet.take_changed(market)
        is_freed = market in state.fleet.changed
        for klass in state.fleet.classes.values():
            klass.ranking[market].look_again(changed, self.now_us)
            if is_freed and klass.ranking[market].barred:
                klass.ranking[market].unbar()
        self.classes = [c for c in state.fleet.classes.values() if c.idle[market]]
        if not any(c.ranking[market].pending or c.ranking[market].heaps for c in self.classes):
            self._feed(out)
            self._note_recheck()
            return
        if market == "engine" and 1 < sum(len(c.idle[market]) for c in self.classes) <= NODES_MAX:
            self._match(out)
        best: list[tuple[float, int, int, Candidate]] = []
        for klass in self.classes:
            if klass.idle[market]:
                self._push(best, klass)
        while best:
            _, _, version, chosen = heappop(best)
            if version == chosen.queue.version and chosen.node.name in chosen.klass.idle[market]:
                if self._is_held_back(chosen):
                    chosen.klass.ranking[market].wait(chosen.queue, self.now_us + _LOOK_AGAIN_US)
                else:
                    self._assign(chosen, out)
            if chosen.klass.idle[market]:
                self._push(best, chosen.klass)
        self._feed(out)
        self._note_recheck()

    def _match(self, out: Outbox) -> None:
        """Bring a few idle nodes and the queues that rank first together in the best of all ways."""
        found: dict[tuple[int, str], Candidate] = {}
        times: dict[int, int] = {}
        entries: dict[Queue, Entry] = {}
        for klass in self.classes:
            heaps = klass.ranking[self.market].heaps
            for entry in self._take_first(klass, QUEUES_MAX):
                if entry[2] != _NOT_TAKEN:
                    heappush(heaps.setdefault(entry[4], []), entry[:4])
                entries.setdefault(entry[3], entry)
        least_tag = min((self.state.shares.tag(entry[4]) for entry in entries.values()), default=0.0)
        for queue in list(entries)[: 2 * QUEUES_MAX]:
            for klass in self.classes if self._first(queue) is not None else ():
                if not self._is_able(queue, klass) or klass.ranking[self.market].kept.get(queue) == queue.version:
                    continue
                base = self._base(queue, klass, least_tag)
                for node in self._likely(queue, klass):
                    candidate = self._best_node(queue, base, klass, [node])
                    if candidate is not None:
                        found[queue.number, node.name] = candidate
                        times[queue.number] = max(times.get(queue.number, 1), base.batches)
        nodes = list(dict.fromkeys(node for _, node in found))
        pairs = {pair: Pair(c.score, c.factors.seconds, c.factors.delay_usd_per_s) for pair, c in found.items()}
        self.weighed += found.values()
        for pair in best_match(nodes, pairs, times):
            chosen = found[pair]
            if chosen.node.name in chosen.klass.idle[self.market] and not self._is_held_back(chosen):
                self._assign(chosen, out)

    def _feed(self, out: Outbox) -> None:
        """Let nodes that are about to end a batch have the next of the same kind."""
        state = self.state
        if self.market != "engine" or not state.fleet.ending or state.fleet.ending[0][0] > self.now_us:
            return
        for queue, node in nodes_to_feed(state, self.now_us, self._may_have):
            klass, head = node.klass, self._first(queue)  # what was fed before may have used a tenant's quota up
            if klass is None or head is None or klass.idle[self.market]:
                continue
            base = self._base(queue, klass, state.shares.tag(head.tenant))
            factors = factors_of(state, queue, head, base, klass, node)
            self._assign(Candidate(score(factors), queue, klass, node, base, factors), out)

    def _may_have(self, node: Node, head: Work) -> bool:
        return node.name not in head.unfit and node.name not in head.avoided and can_run(node.record, head)

    def _note_recheck(self) -> None:
        """Note when to look again at what is kept back."""
        fleet, market = self.state.fleet, self.market
        waiting = [c.ranking[market].waiting[0][0] for c in fleet.classes.values() if c.ranking[market].waiting]
        if market == "engine" and fleet.ending and self.state.pool:
            waiting.append(fleet.ending[0][0])
        if waiting:
            fleet.recheck_us[market] = min(waiting)
        else:
            fleet.recheck_us.pop(market, None)

    def _push(self, best: list[tuple[float, int, int, Candidate]], klass: NodeClass) -> None:
        ranking = klass.ranking[self.market]
        found = self._search(klass) if ranking.pending or ranking.heaps else None
        if found is not None:
            heappush(best, (-found.score, klass.number, found.queue.version, found))

    # --- ranking

    def _entries(self, klass: NodeClass) -> dict[str, list[Rank]]:
        """Return the heaps of ranked queues of a class, by tenant, after a look at those that have changed."""
        ranking = klass.ranking[self.market]
        pending, ranking.pending = ranking.pending, {}
        heaps = ranking.heaps
        for queue in pending:
            if queue.count and self._first(queue) is not None and self._is_able(queue, klass):
                rank = rank_of(self.state, queue, klass, self.now_us)
                for tenant in queue.heaps:
                    heappush(heaps.setdefault(tenant, []), (-rank, queue.number, queue.version, queue))
        return heaps

    def _take_first(self, klass: NodeClass, wanted: int = 0) -> list[Entry]:
        """Take the entries of the queues that rank first: by what they earn, and by whose turn it is."""
        heaps, kept = self._entries(klass), klass.ranking[self.market].kept
        shares, scale_s = self.state.shares, self.state.settings.fair_scale_s
        is_fair = "fairness" not in self.state.settings.ablate
        is_scarce = self.market == "engine" and len(klass.idle[self.market]) < _QUEUES_WEIGHED
        wanted = wanted or (_QUEUES_WEIGHED if is_scarce else 1)
        found: dict[Queue, Entry] = {}
        again: list[tuple[str, Rank]] = []
        heads, may_start = [], self.state.start_check
        for tenant in list(heaps):
            heap = heaps[tenant]
            if _top(heap, kept) is None:
                del heaps[tenant]
                continue
            if may_start is not None and not may_start(tenant):
                continue
            handicap = shares.tag(tenant) / scale_s - log2(shares.weight(tenant)) if is_fair else 0.0
            heads.append((heap[0][0] + handicap, tenant, handicap))
        latest = inf
        if is_fair and len(heads) > 1:
            latest = self._latest_tag(klass, [tenant for _, tenant, _ in heads])
            heads = [head for head in heads if shares.tag(head[1]) <= latest]
        heapify(heads)
        while heads and len(found) < wanted:
            _, tenant, handicap = heads[0]
            entry = heappop(heaps[tenant])
            if entry[3] in found:
                again.append((tenant, entry))
            else:
                found[entry[3]] = (entry[0], entry[1], entry[2], entry[3], tenant)
            following = _top(heaps[tenant], kept)
            if following is None:
                heappop(heads)
            else:
                heapreplace(heads, (following[0] + handicap, tenant, handicap))
        for tenant, entry in again:
            heappush(heaps[tenant], entry)
        for home in self._at_home(klass, latest):
            found.setdefault(home[3], home)
        return list(found.values())

    def _at_home(self, klass: NodeClass, latest: float) -> list[Entry]:
        """Return queues of which a model is loaded on one of a few idle nodes, wherever they rank; they stay in the heaps."""
        idle, kept = klass.idle[self.market], klass.ranking[self.market].kept
        if self.market != "engine" or len(idle) > _NODES_WEIGHED:
            return []
        resident = frozenset[str]().union(*(node.resident for node in idle.values()))
        found: list[Entry] = []
        for queue in list(self.state.pool.values()) if resident else ():
            if queue.model in resident and queue.market == self.market and queue.count and kept.get(queue) != queue.version:
                head = self._first(queue)
                if head is not None and self._is_able(queue, klass) and self.state.shares.tag(head.tenant) <= latest:
                    found.append((0.0, queue.number, _NOT_TAKEN, queue, head.tenant))
        return found[:_QUEUES_WEIGHED]

    def _latest_tag(self, klass: NodeClass, tenants: list[str]) -> float:
        """Return how far ahead of the tenant whose turn it is another may be, and still go first because it is worth more.

        Changing the model of a node takes time in which nobody gets anything: as much again and again may be saved by going on.
        """
        state, heaps = self.state, klass.ranking[self.market].heaps
        tag, tenant = min((state.shares.tag(tenant), tenant) for tenant in tenants)
        model = heaps[tenant][0][3].model
        slack_s = state.settings.fair_slack_s
        if model and not any(name in klass.idle[self.market] for name in klass.warm.get(model, ())):
            slack_s += state.settings.fair_loads * state.costs.load_s(model, klass.device)
        return tag + slack_s

    def _first(self, queue: Queue) -> Work | None:
        head = queue.first(self.state.works, self.state.start_check)
        if head is None and not queue.heaps:
            self.state.pool.pop(queue.key, None)
        return head

    def _is_able(self, queue: Queue, klass: NodeClass) -> bool:
        able = queue.able.get(klass.number)
        if able is None:
            head = queue.head
            assert head is not None
            able = queue.able[klass.number] = can_run(klass.sample, head)
        return able

    def _batches(self, queue: Queue, head: Work, wish: float) -> int:
        """Return into how many batches the queue is cut now: over idle nodes, or for kinds that queue on a node over all."""
        state = self.state
        if self.market != "engine":
            depth = state.settings.depth_limit.get(self.market, 1)
            able = [c for c in state.fleet.classes.values() if self._is_able(queue, c)]
            return depth * sum(len(c.nodes) * c.sample.slots for c in able)
        if not queue.is_batching or queue.count == 1:
            return 1
        idle = sum(len(c.idle[self.market]) for c in self.classes)
        if idle == 1:
            return 1
        if queue.split[:2] != (queue.version, idle):
            places: list[Place] = []
            for klass in self.classes:
                if self._is_able(queue, klass):
                    places += self._places(queue, head, klass)
            batches = batches_of(queue.count, delay_usd_per_s(state, queue, wish), places)
            queue.split = (queue.version, idle, batches)
        return queue.split[2]

    def _places(self, queue: Queue, head: Work, klass: NodeClass) -> list[Place]:
        """Return the idle nodes of a class: those with the model loaded, those that have it at hand, the others."""
        idle = klass.idle[self.market]
        groups: list[list[Node]] = []
        seen: set[str] = set()
        for held in (klass.warm, klass.cached):
            names = [name for name in islice(held.get(queue.model, ()), _HOLDERS_SEEN) if name in idle and name not in seen]
            if names:
                groups.append([idle[name] for name in names])
                seen.update(names)
        found = [place_of(self.state, queue, head, klass, group) for group in groups]
        others = [node for name, node in islice(idle.items(), _HOLDERS_SEEN) if name not in seen]
        if others:
            more = len(idle) - len(seen)
            found.append(place_of(self.state, queue, head, klass, others)._replace(nodes=more))
        return found

    # --- weighing

    def _search(self, klass: NodeClass) -> Candidate | None:
        """Return the best exact candidate on an idle node of a class, of the queues that rank first.

        Where all of those are better kept back, what ranks next may go.
        """
        best: Candidate | None = None
        while best is None and (first := self._take_first(klass)):
            best = self._best_of(klass, first)
        return best

    def _best_of(self, klass: NodeClass, first: list[Entry]) -> Candidate | None:
        """Return the best of the queues that rank first; where nodes are scarce, what waits meanwhile counts too."""
        found: list[Candidate] = []
        least_tag = min((self.state.shares.tag(entry[4]) for entry in first), default=0.0)
        ranking = klass.ranking[self.market]
        for entry in first:
            nodes = self._likely(entry[3], klass)
            if not nodes:
                ranking.bar(entry[3])
                continue
            candidate = self._best_node(entry[3], self._base(entry[3], klass, least_tag), klass, nodes)
            if candidate is None:
                ranking.wait(entry[3], self.now_us + self._pause_us(entry[3]))
                continue
            if entry[2] != _NOT_TAKEN:
                heappush(ranking.heaps.setdefault(entry[4], []), entry[:4])
            found.append(candidate)
        if len(found) > 1 and sum(len(c.idle[self.market]) for c in self.classes) < len(found):
            found = _priced(found)
        self.weighed += found
        return max(found, key=lambda c: c.score, default=None)

    def _base(self, queue: Queue, klass: NodeClass, least_tag: float) -> Base:
        head = self._first(queue)
        assert head is not None
        wish = wish_of(self.state, head, least_tag, self.now_us)
        return base_of(self.state, queue, head, klass, self._batches(queue, head, wish), wish)

    def _pause_us(self, queue: Queue) -> int:
        head, settings = queue.head, self.state.settings
        linger_s = settings.linger_s.get(executor_of(head), 0.0) if head is not None else 0.0
        waited_us = self.now_us - head.queued_at_us if head is not None else 0
        left_us = int(linger_s * 1e6) - waited_us
        return max(1_000, left_us) if left_us > 0 else _LOOK_AGAIN_US

    def _best_node(self, queue: Queue, base: Base, klass: NodeClass, nodes: list[Node]) -> Candidate | None:
        """Return the best of the likely nodes for a queue; None where it is better to wait."""
        state, head = self.state, queue.head
        assert head is not None
        if lingers(state, queue, head, base, usd_per_s(state, klass), self.now_us):
            return None
        best: Candidate | None = None
        for node in nodes:
            factors = factors_of(state, queue, head, base, klass, node)
            candidate = Candidate(score(factors), queue, klass, node, base, factors)
            if best is None or candidate.score > best.score:
                best, candidate = candidate, best
            if candidate is not None:
                self.weighed.append(candidate)
        return best

    def _is_held_back(self, chosen: Candidate) -> bool:
        """Tell whether the batch should rather wait for a better node: of a class that is all busy, or one that has the model."""
        queue, market, head = chosen.queue, self.market, chosen.queue.head
        if head is None or not self.state.assignments or len(self.state.fleet.classes) == 1 > chosen.factors.load_s:
            return False
        busy = [c for c in self.state.fleet.classes.values() if c.nodes and not c.idle[market] and self._is_able(queue, c)]
        if chosen.factors.load_s:
            held = chosen.klass.warm if queue.model in chosen.node.cached else chosen.klass.cached
            if any(name not in chosen.klass.idle[market] for name in held.get(queue.model, ())):
                busy.append(chosen.klass)
        if not busy:
            return False
        return held_back(self.state, queue, head, chosen.factors, chosen.base.count, busy, self.now_us)

    def _likely(self, queue: Queue, klass: NodeClass) -> list[Node]:
        """Return the idle nodes that may be the best: all of few; of many one with the model, some with inputs, any one."""
        head, idle = self._first(queue), klass.idle[self.market]
        if head is None:
            return []
        barred = head.unfit
        if head.avoided and self._has_other(head):
            barred = barred | head.avoided
        if barred:
            idle = {name: node for name, node in idle.items() if name not in barred}
        if len(idle) <= _NODES_WEIGHED:
            found = list(idle.values())
            return found if self.market == "engine" else sorted(found, key=self._busy)
        return self._likely_of_many(queue, klass, head, idle)

    def _busy(self, node: Node) -> tuple[bool, int]:
        """Order nodes for small work: first those that are paid for something else anyway, then those with the least of it."""
        return not is_paid_anyway(node), node.busy.get(self.market, 0)

    def _likely_of_many(self, queue: Queue, klass: NodeClass, head: Work, idle: dict[str, Node]) -> list[Node]:
        state = self.state
        found: dict[str, Node] = {}
        for held in (klass.warm, klass.cached):
            name = next((name for name in islice(held.get(queue.model, ()), _HOLDERS_SEEN) if name in idle), "")
            if name:
                found[name] = idle[name]
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
            n.is_usable
            and may_take(self.state, n, self.now_us)
            and n.name not in head.unfit
            and n.name not in head.avoided
            and can_run(n.record, head)
            for n in self.state.nodes.values()
        )

    # --- assigning

    def _assign(self, chosen: Candidate, out: Outbox) -> None:
        state, queue = self.state, chosen.queue
        works = queue.take(chosen.base.count, state.works, chosen.base.fits(state), state.start_check)
        state.fleet.note_change(queue)
        if not works:
            return
        identity = assign(state, chosen.node, works, self.now_us, out, terms(chosen.factors), chosen.factors.seconds)
        expect_end(state, queue, identity, chosen.factors.seconds, self.now_us)
        others = self._others(chosen)
        decision = Decision(identity, chosen.node.name, len(works), label_of(queue), chosen.factors, others, self.now_us)
        state.note_decision(decision)
        refresh(state)
        changed = state.fleet.take_changed(self.market)
        for klass in state.fleet.classes.values():
            klass.ranking[self.market].look_again(changed, self.now_us)

    def _others(self, chosen: Candidate) -> tuple[Alternative, ...]:
        """Return the best of what was weighed besides: other nodes for these works, other works for this node."""
        near = [c for c in self.weighed if c is not chosen and (c.queue is chosen.queue or c.node is chosen.node)]
        self.weighed = [c for c in self.weighed if c.queue is not chosen.queue and c.node is not chosen.node][-32:]
        found: dict[tuple[str, int], Candidate] = {}
        for candidate in sorted(near, key=lambda c: -c.score):
            if candidate.node is not chosen.node or candidate.queue is not chosen.queue:
                found.setdefault((candidate.node.name, candidate.queue.number), candidate)
        return tuple(
            Alternative(f"{label_of(c.queue)} on {c.node.name}", c.node.name, c.base.count, label_of(c.queue), c.factors)
            for c in list(found.values())[:_ALTERNATIVES_KEPT]
        )


def _priced(found: list[Candidate]) -> list[Candidate]:
    """Give the time of scarce nodes its price: what each second costs those that wait for the same."""
    waiting = sum(c.factors.delay_usd_per_s for c in found)
    priced = []
    for candidate in found:
        factors = candidate.factors
        factors = factors._replace(opportunity_usd_per_s=waiting - factors.delay_usd_per_s)
        priced.append(candidate._replace(score=score(factors), factors=factors))
    return priced


def _top(heap: list[Rank], kept: Mapping[Queue, int]) -> Rank | None:
    """Return the first entry of a heap that still counts and is not kept back; forget the others before it."""
    while heap:
        _, _, version, queue = heap[0]
        if version == queue.version and queue.count and kept.get(queue) != version:
            return heap[0]
        heappop(heap)
    return None


def label_of(queue: Queue) -> str:
    """Return the name of a queue for people: what its operators share."""
    return queue.key if isinstance(queue.key, str) else queue.key[0]
