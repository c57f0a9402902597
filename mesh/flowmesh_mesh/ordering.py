"""The order of a plan: sources before users; what the graph leaves open goes by rank, not by the order of the document."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from flowmesh_mesh.document import EDGES_MAX
from flowmesh_mesh.feeds import Edge
from flowmesh_mesh.problems import Problems
from flowmesh_mesh.vertices import Vertex

CYCLES_SHOWN_MAX = 10


def sources(vertex: Vertex) -> Iterator[int]:
    """Yield the vertices that feed a vertex, as often as they do."""
    for feeds in vertex.feeds.values():
        for feed in feeds:
            if isinstance(feed, Edge):
                yield feed.vertex


def order_vertices(vertices: Sequence[Vertex], problems: Problems) -> list[int]:
    """Return the vertices in topological order; note each cycle, and leave it out."""
    edges = sum(len(feeds) for vertex in vertices for feeds in vertex.feeds.values())
    if edges > EDGES_MAX:
        hint = "Gather the outputs in one operator, and connect the others to that."
        problems.add(("operators",), f"the workflow has {edges} connections; at most {EDGES_MAX} are allowed", hint)
        return []
    waits = [0] * len(vertices)
    users: list[list[int]] = [[] for _ in vertices]
    for number, vertex in enumerate(vertices):
        for source in sources(vertex):
            users[source].append(number)
            waits[number] += 1
    by_rank = sorted(range(len(vertices)), key=lambda number: vertices[number].rank)
    position = [0] * len(vertices)
    for place, number in enumerate(by_rank):
        position[number] = place
    ready = [position[number] for number in by_rank if waits[number] == 0]
    order: list[int] = []
    while ready:
        number = by_rank[heapq.heappop(ready)]
        order.append(number)
        for user in users[number]:
            waits[user] -= 1
            if waits[user] == 0:
                heapq.heappush(ready, position[user])
    if len(order) < len(vertices):
        _note_cycles(vertices, {number for number in by_rank if waits[number] > 0}, problems)
    return order


def _note_cycles(vertices: Sequence[Vertex], left: set[int], problems: Problems) -> None:
    for _ in range(CYCLES_SHOWN_MAX):
        cycle = _find_cycle(vertices, left)
        if not cycle:
            return
        names = [vertices[number].name for number in cycle]
        first = names.index(min(names))
        names = names[first:] + names[:first]
        shown = names if len(names) <= 10 else [*names[:8], "...", names[-1]]
        message = f"these operators wait for each other: {' -> '.join([*shown, names[0]])}"
        problems.add((*vertices[cycle[first]].place, "inputs"), message, "Take one of these connections away.")
        left -= set(cycle)


def _find_cycle(vertices: Sequence[Vertex], left: set[int]) -> list[int]:
    """Return one cycle among ``left`` in the direction of the data; what leads into no cycle is taken out of ``left``."""
    while left:
        at = min(left, key=lambda number: vertices[number].rank)
        path: list[int] = []
        seen: dict[int, int] = {}
        while at not in seen:
            seen[at] = len(path)
            path.append(at)
            before = next((source for source in sources(vertices[at]) if source in left), None)
            if before is None:
                break
            at = before
        else:
            return path[seen[at] :][::-1]
        left -= set(path)
    return []


def spread_privacy(vertices: Sequence[Vertex], order: Sequence[int], problems: Problems) -> None:
    """Make everything downstream of a private operator private; note what insists on being shared."""
    for number in order:
        vertex = vertices[number]
        if vertex.share == "private":
            continue
        private = next((source for source in sources(vertex) if vertices[source].share == "private"), None)
        if private is None:
            continue
        if vertex.share == "mesh" and vertex.is_share_explicit:
            message = f"it cannot be shared: it reads {vertices[private].name!r}, which is private"
            problems.add((*vertex.place, "share"), message, "Remove this 'share: mesh'.")
        vertex.share = "private"
