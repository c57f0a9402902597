"""What nodes send: records, heartbeats, reports, log lines. Each is checked against the subject that its sender may use."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import UsageError
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import Delivery, Pull, Subscription
from flowmesh_mesh.messages import Beat, Done, Log, NodeRecord, decode
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.hub import check_codecs
from flowmesh_scheduler.receipt_check import check_receipt

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

REPORTS_REMEMBERED = 4096


class Reports:
    """The leader's ear for nodes."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._seen: dict[int, None] = {}

    async def listen(self) -> list[Subscription | Pull]:
        """Subscribe to what nodes publish."""
        subscribe = self._leader.bus.subscribe
        return [
            await subscribe("fm.node.*.beat", self._on_beat),
            await subscribe("fm.node.*.done", self._on_done),
            await subscribe("fm.node.*.log", self._on_log),
            await subscribe("fm.nodes.*", self._on_node_record),
        ]

    async def pull(self) -> Pull:
        """Take the reports that waited in their stream for a leader."""
        bus = self._leader.bus
        await bus.ensure_consumer(subjects.DONE, streams.leader_consumer("leader"))
        return await bus.pull(subjects.DONE, "leader", self._on_stored_done)

    def _on_beat(self, delivery: Delivery) -> None:
        beat = read(delivery, Beat)
        if beat is not None and delivery.subject == subjects.node_beat(beat.node):
            self._leader.apply(e.BeatReceived(beat))

    def _on_node_record(self, delivery: Delivery) -> None:
        record = read(delivery, NodeRecord)
        if record is not None and delivery.subject == subjects.node_record(record.node) and self._leader.is_ready:
            self._leader.spawn(self.join(record))

    async def join(self, record: NodeRecord) -> None:
        await self._leader.bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer(record.node))
        self._leader.apply(e.NodeJoined(record))

    def node_gone(self, public_key: str) -> None:
        """The broker saw the connection of this key end."""
        for node in self._leader.state.nodes.values():
            if node.record.public_key == public_key:
                self._leader.apply(e.NodeDisconnected(node.name))

    def _on_stored_done(self, delivery: Delivery) -> None:
        self._on_done(delivery)
        delivery.post_ack()

    def _on_done(self, delivery: Delivery) -> None:
        """Take a report, from the subject itself or from the stream, whichever is first; the other copy is dropped."""
        mark = hash(delivery.data)
        if self._seen.pop(mark, 0) is None:
            return
        self._seen[mark] = None
        if len(self._seen) > REPORTS_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        done = read(delivery, Done)
        if done is None:
            return
        node = self._leader.state.nodes.get(done.node)
        if delivery.subject != subjects.node_done(done.node) or node is None:
            log.warning("report on %s from an unknown node", delivery.subject)
            return
        if not check_receipt(done, node.record.public_key):
            log.warning("report of %s on %s has no valid receipt", done.node, done.assignment)
            return
        blocks = check_codecs([codec for codec, _ in done.blocks], [block for _, block in done.blocks])
        self._leader.hub.put_soon(blocks)
        self._leader.apply(e.DoneReceived(done, dict(blocks)))

    def _on_log(self, delivery: Delivery) -> None:
        message = read(delivery, Log)
        if message is None or delivery.subject != subjects.node_log(message.node):
            return
        work = self._leader.state.works.get(message.key)
        for vertex in work.waiters if work is not None else ():
            self._leader.feeds.note_lines(
                vertex.run.tenant, vertex.run.id, vertex.index, vertex.operator.name, list(message.lines)
            )


def read(delivery: Delivery, kind: Any) -> Any:
    """Return the message of a delivery, or None (and a warning) if it cannot be read."""
    try:
        return decode(delivery.data, kind)
    except UsageError as error:
        log.warning("on %s: %s", delivery.subject, error)
        return None
