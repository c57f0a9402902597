"""The one place where the simulator and its comparison policies look into the core's pool of ready work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop

from flowmesh_scheduler.core.assigning import assign as give
from flowmesh_scheduler.core.fleet import refresh
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.queues import Queue
from flowmesh_scheduler.core.state import Node, State, Work, WorkState

_LOOKED_AT_MAX = 64

Same = Callable[[Work, Work], bool]


def heads(state: State) -> list[tuple[Queue, Work]]:
    """Return every queue with its oldest work, oldest first, whoever's it is; queues that are empty go."""
    refresh(state)
    found = []
    for key, queue in list(state.pool.items()):
        first = oldest(state, queue)
        if first is not None:
            found.append((queue, first))
        elif not queue.heaps:
            del state.pool[key]
    found.sort(key=lambda entry: entry[1].order)
    return found


def oldest(state: State, queue: Queue) -> Work | None:
    """Return the work of a queue that came first."""
    found = _oldest(state, queue)
    return None if found is None else found[1]


def _oldest(state: State, queue: Queue) -> tuple[str, Work] | None:
    firsts = [(work.order, tenant, work) for tenant in list(queue.heaps) if (work := queue._first_of(tenant, state.works))]
    return min(firsts)[1:] if firsts else None


def ready(state: State) -> Iterator[Work]:
    """Yield all ready work, in no order that matters."""
    for queue in state.pool.values():
        for heap in queue.heaps.values():
            for _, _, ticket, work, _, _ in heap:
                if work.ticket == ticket and work.state is WorkState.QUEUED and state.works.get(work.key) is work:
                    yield work


def take(state: State, queue: Queue, count: int, same: Same | None = None) -> list[Work]:
    """Take up to ``count`` works from a queue, the oldest first; with ``same`` only those like the first."""
    taken: list[Work] = []
    others: list[Work] = []
    while len(taken) < count:
        first = _oldest(state, queue)
        if first is None or len(others) == _LOOKED_AT_MAX:
            break
        tenant, work = first
        entry = queue.heaps[tenant][0]
        if taken and same is not None and not same(taken[0], work):
            others.append(work)
        else:
            taken.append(work)
        assert entry[3] is work
        _pop(queue, tenant)
    for work in others:
        queue.add(work, queue.last_arrival_us)
    return taken


def _pop(queue: Queue, tenant: str) -> None:
    queue.drop(heappop(queue.heaps[tenant]))
    queue.version += 1
    queue.head = None


def assign(state: State, node: Node, works: Sequence[Work], now_us: int, out: Outbox) -> None:
    """Give works to a node."""
    for work in works:
        work.ticket = 0
    give(state, node, works, now_us, out, {})
