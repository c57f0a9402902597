"""Nodes whose version of the wire does not fit this leader's: they are told why, shown to people, and get no work."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from flowmesh_mesh import subjects
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.messages import NodeRecord, Refused, encode
from flowmesh_mesh.wire import misfit_of
from flowmesh_scheduler.core import events as e

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node that was refused, since when, why, and how to mend it."""

    record: NodeRecord
    at_us: int
    why: str
    hint: str


class Refusals:
    """Who was refused under this leader, by name, until a node of that name fits; those that have left since stay to be seen."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self.rows: dict[str, Refusal] = {}

    def admits(self, record: NodeRecord) -> bool:
        """Tell whether a node may take part; tell the node, if not."""
        why, hint = misfit_of("the mesh's leader", f"node {record.node}", record.wire, record.wire_oldest)
        if not why:
            self.rows.pop(record.node, None)
            return True
        if record.state == "left" and record.node in self.rows:
            return False
        if record.node not in self.rows:
            log.warning("refused node %s: %s", record.node, why)
            self._forget(record)
        self.rows[record.node] = Refusal(record, now_us(), why, hint)
        self._leader.bus.post(subjects.node_control(record.node), encode(Refused(record.node, why, hint)))
        return False

    def _forget(self, record: NodeRecord) -> None:
        """An earlier life of the node fitted, and is over: what it held runs elsewhere."""
        known = self._leader.state.nodes.get(record.node)
        if known is not None and known.state != "gone" and known.record.started_at_us < record.started_at_us:
            self._leader.apply(e.NodeJoined(msgspec.structs.replace(record, state="left")))
