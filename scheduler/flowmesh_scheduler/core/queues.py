"""A queue of ready work that may run in one batch: a heap for each tenant, priorities inside it, virtual time between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from flowmesh_scheduler.core.fairness import Shares
from flowmesh_scheduler.core.state import PoolKey, Run, Work, WorkState

Entry = tuple[int, int, int, Work, Run, float]
"""(-priority, order of the run, ticket, work, run, seconds as they were then); void once the work has another ticket or is
queued no more."""

_RATE_WEIGHT = 0.2
_RATE_WINDOW_US = 1_000_000


@dataclass(slots=True, eq=False)
class Queue:
    """Ready work of one pool key.

    ``count``, ``units`` and ``runs`` (ready operators by run) also count entries that have become void and were not met yet.
    ``version`` grows with every change. ``able`` remembers which classes of nodes can run it.
    """

    key: PoolKey
    number: int
    market: str
    model: str
    shares: Shares
    is_batching: bool = True
    heaps: dict[str, list[Entry]] = field(default_factory=dict)
    count: int = 0
    units: float = 0.0
    steps: float = 0.0
    worth_s: float = 0.0
    runs: dict[tuple[str, str], int] = field(default_factory=dict)
    version: int = 0
    rate_per_s: float = 0.0
    last_arrival_us: int = 0
    able: dict[int, bool] = field(default_factory=dict)
    split: tuple[int, int, int] = (0, 0, 1)
    """(version, idle nodes, into how many batches it is cut then)."""

    head: Work | None = None

    def add(self, work: Work, now_us: int) -> None:
        """Take in work, under the tenant whose turn decides when it runs."""
        run = _run_of(work)
        heap = self.heaps.get(work.tenant)
        if heap is None:
            heap = self.heaps[work.tenant] = []
        heappush(heap, (-work.priority, run.order, work.ticket, work, run, work.seconds))
        steps, units = work.size
        self.count += 1
        self.units += units
        self.worth_s += work.seconds
        if steps > self.steps:
            self.steps = steps
        pair = run.id_pair
        self.runs[pair] = self.runs.get(pair, 0) + 1
        self.version += 1
        self.head = None
        if now_us != self.last_arrival_us:
            self._note_arrival(now_us)

    def _note_arrival(self, now_us: int) -> None:
        """Smooth how often something arrives; what arrives at one moment counts once, because it can go in one batch anyway."""
        if self.last_arrival_us:
            gap_us = min(now_us - self.last_arrival_us, 60 * _RATE_WINDOW_US)
            self.rate_per_s += _RATE_WEIGHT * (1e6 / max(gap_us, 1_000) - self.rate_per_s)
        self.last_arrival_us = now_us

    def first(self, known: dict[bytes, Work], may_start: Callable[[str], bool] | None = None) -> Work | None:
        """Return the work that is due first, over all tenants that may start something; None when there is none.

        Virtual time decides between tenants; priority, then arrival, only inside one.
        """
        head = self.head
        if head is not None and head.state is WorkState.QUEUED and may_start is None and known.get(head.key) is head:
            return head
        best: Work | None = None
        least = (0.0, 0)
        for tenant in list(self.heaps):
            if may_start is not None and not may_start(tenant):
                continue
            work = self._first_of(tenant, known)
            if work is not None:
                place = (self.shares.due(tenant, work.charged_us), work.order)
                if best is None or place < least:
                    best, least = work, place
        self.head = best
        return best

    def _first_of(self, tenant: str, known: dict[bytes, Work]) -> Work | None:
        heap = self.heaps[tenant]
        while heap:
            entry = heap[0]
            work = entry[3]
            if work.ticket == entry[2] and work.state is WorkState.QUEUED and known.get(work.key) is work:
                return work
            self.drop(heappop(heap))
        del self.heaps[tenant]
        return None

    def drop(self, entry: Entry) -> None:
        """Count an entry no more that was taken from its heap."""
        _, _, _, work, run, seconds = entry
        self.count -= 1
        self.units -= work.size[1]
        self.worth_s -= seconds
        if not self.count:
            self.units = self.worth_s = self.steps = 0.0  # sums of floats leave something behind
        runs, pair = self.runs, run.id_pair
        left = runs[pair] - 1
        if left:
            runs[pair] = left
        else:
            del runs[pair]

    def take(
        self,
        count: int,
        known: dict[bytes, Work],
        fits: Callable[[Work], bool] | None = None,
        may_start: Callable[[str], bool] | None = None,
    ) -> list[Work]:
        """Take up to ``count`` works in virtual time over tenants; stop at the first that does not fit beside the others."""
        taken: list[Work] = []
        taken_us: dict[str, int] = {}
        due = self.shares.due
        heads = [
            (due(tenant, work.charged_us), work.order, tenant)
            for tenant in list(self.heaps)
            if (may_start is None or may_start(tenant)) and (work := self._first_of(tenant, known))
        ]
        heapify(heads)
        while heads and len(taken) < count:
            tenant = heads[0][2]
            work = self.heaps[tenant][0][3]
            if fits is not None and taken and not fits(work):
                break
            self.drop(heappop(self.heaps[tenant]))
            work.ticket = 0
            taken.append(work)
            following = self._first_of(tenant, known)
            if following is None:
                heappop(heads)
            elif len(heads) > 1:
                us = taken_us[tenant] = taken_us.get(tenant, 0) + work.charged_us
                heapreplace(heads, (due(tenant, following.charged_us, us), following.order, tenant))
        self.version += 1
        self.head = None
        return taken

    def ahead_of(self, work: Work) -> int:
        """Return how many works would be taken before this one if all were taken now; all are looked at."""
        ordered = {tenant: [e[3] for e in sorted(heap) if e[2] == e[3].ticket] for tenant, heap in self.heaps.items()}
        heads = [(self.shares.due(t, works[0].charged_us), works[0].order, t, 0, 0) for t, works in ordered.items() if works]
        heapify(heads)
        ahead = 0
        while heads:
            _, _, tenant, index, taken_us = heads[0]
            works = ordered[tenant]
            if works[index] is work:
                return ahead
            ahead += 1
            taken_us += works[index].charged_us
            if index + 1 == len(works):
                heappop(heads)
                continue
            following = works[index + 1]
            due = self.shares.due(tenant, following.charged_us, taken_us)
            heapreplace(heads, (due, following.order, tenant, index + 1, taken_us))
        return ahead


def _run_of(work: Work) -> Run:
    """Return the run under which work waits: the first of the tenant whose turn decides."""
    for vertex in work.waiters:
        if vertex.run.tenant == work.tenant:
            return vertex.run
    return next(iter(work.waiters)).run
