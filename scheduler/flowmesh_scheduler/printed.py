"""What attempts printed that gave no result: their nodes are gone, but the lines came while they ran, and a stream has them.

An attempt that ends with its node keeps no log of its own: a log is content that the node hands over with the outcome. What is
shown instead are the events of the run, which the broker keeps for a day, or until there is no room: also for a new leader.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh import subjects
from flowmesh_mesh.messages import RunEvent, decode, is_json
from flowmesh_scheduler.core.state import Vertex

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

LINES_MAX = 1000
BYTES_MAX = 256 * 1024
"""Most that is shown of the earlier attempts at one operator, their last lines."""


async def earlier_attempts(leader: Leader, vertex: Vertex) -> list[dict[str, Any]]:
    """Return what earlier attempts at a vertex printed: attempt, node, why it ended if that is known, and its last lines."""
    if vertex.attempt <= 1 and not vertex.story:
        return []
    run, ends = vertex.run, {end.attempt: end for end in vertex.story}
    printed: dict[int, tuple[str, deque[str]]] = {}
    try:
        async for message in leader.bus.read_stream(subjects.RUNS, subjects.run_event(run.tenant, run.id)):
            body = _log_of(message.data)
            attempt = int(body.get("attempt") or 0)
            is_earlier = attempt < vertex.attempt or attempt in ends
            if body.get("index") == vertex.index and attempt and is_earlier:
                printed.setdefault(attempt, (str(body.get("node")), deque(maxlen=LINES_MAX)))[1].extend(body["lines"])
    except FlowmeshError:
        return []
    found: list[dict[str, Any]] = []
    room = BYTES_MAX
    for attempt, (node, lines) in sorted(printed.items(), reverse=True):
        shown: list[str] = []
        while lines and room > 0:
            shown.append(lines.pop())
            room -= len(shown[-1]) + 8
        reason = ends[attempt].reason if attempt in ends else ""
        found.append({"attempt": attempt, "node": node, "reason": reason, "lines": shown[::-1]})
    return found[::-1]


def _log_of(data: bytes) -> dict[str, Any]:
    """Return the body of an event of kind ``log``; empty for any other."""
    try:
        if is_json(data):
            plain = msgspec.json.decode(data, type=dict[str, Any])
            return plain if plain.get("kind") == "log" else {}
        event = decode(data, RunEvent)
    except (FlowmeshError, msgspec.DecodeError):
        return {}
    return event.body if event.kind == "log" else {}
