"""What nodes send: records, heartbeats, reports, log lines. Each is checked against the subject that its sender may use."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import Delivery, Pull, Subscription
from flowmesh_mesh.messages import Beat, Done, Log, NodeRecord, decode
from flowmesh_mesh.transfer import fetch
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.hub import check_codecs
from flowmesh_scheduler.receipt_check import check_receipt
from flowmesh_scheduler.refusals import Refusals

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

LOG_DEADLINE_S = 30.0

_ASIDE = (" blocks", " witness")
"""How the names of those connections of a node end that carry no heartbeat."""
JOINS_AT_ONCE = 16
JOIN_AGAIN_S = 0.5


class Reports:
    """The leader's ear for nodes."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._passed = 0
        self._keeping = asyncio.Semaphore(4)
        self._sought: set[str] = set()
        self._early: list[tuple[str, bytes]] | None = []
        """Reports that came before the nodes were known, as all do that nodes offer at the sight of a new epoch."""
        self._by_key: dict[str, str] = {}
        self._joining = asyncio.Semaphore(JOINS_AT_ONCE)
        self.refusals = Refusals(leader)

    async def listen(self) -> list[Subscription | Pull]:
        """Subscribe to what nodes publish."""
        subscribe = self._leader.bus.subscribe
        return [
            await subscribe("fm.node.*.beat", self._on_beat),
            await subscribe("fm.node.*.done", self._on_done),
            await subscribe("fm.node.*.log", self._on_log),
            await subscribe("fm.nodes.*", self._on_node_record),
        ]

    async def catch_up(self) -> None:
        """Take the reports that came while nobody led. From now on they are taken from their subjects; what should be missed
        there, its node offers again."""
        early, self._early = self._early or [], None
        for subject, data in early:
            self._take(subject, data)
        async for message in self._leader.bus.read_stream(subjects.DONE):
            self._take(message.subject, message.data)

    async def sweep(self) -> None:
        """Remove reports that were there at the last sweep: they have been taken from their subject since."""
        bus = self._leader.bus
        found = await bus.stream_state(subjects.DONE)
        if found is None or not found.messages:
            return
        if self._passed:
            await bus.purge(subjects.DONE, below_seq=self._passed + 1)
        self._passed = found.last_seq

    def _on_beat(self, delivery: Delivery) -> None:
        beat = read(delivery.subject, delivery.data, Beat)
        if beat is None or delivery.subject != subjects.node_beat(beat.node):
            return
        if beat.node not in self._leader.state.nodes and beat.node not in self._sought:
            self._sought.add(beat.node)
            self._leader.spawn(self._seek(beat.node))
        self._leader.hear_epoch(beat.node, beat.epoch)
        self._leader.apply(e.BeatReceived(beat))

    async def _seek(self, node: str) -> None:
        """A node beats that is not known: its record must be in the stream. What fails now, its next beats begin again."""
        try:
            async with self._joining:
                found = await self._leader.bus.last_message(subjects.NODES, subjects.node_record(node))
            record = read(found.subject, found.data, NodeRecord) if found is not None else None
            if record is not None:
                await self.join(record)
        except TransientError as error:
            log.info("cannot look up node %s: %s", node, error)
        finally:
            self._sought.discard(node)

    def _on_node_record(self, delivery: Delivery) -> None:
        record = read(delivery.subject, delivery.data, NodeRecord)
        if record is not None and delivery.subject == subjects.node_record(record.node):
            self._leader.spawn(self.join(record))

    async def join_all(self, records: Sequence[NodeRecord]) -> None:
        """Join the nodes that an earlier leader knew, side by side; what has its consumer needs no other.

        A consumer costs the broker a sync, and a take-over waits for all of them.
        """
        there = set(await self._leader.bus.consumer_names(subjects.ASSIGN)) if records else set()
        await asyncio.gather(*(self.join(r, has_consumer=subjects.assign_consumer(r.node) in there) for r in records))

    async def join(self, record: NodeRecord, *, has_consumer: bool = False) -> None:
        """Let a node take part: it gets a consumer, and the core knows it. One whose version does not fit is refused.

        Few consumers are made at once: the broker's interface answers one question after the other, also those that are urgent.
        """
        if not self.refusals.admits(record):
            return
        self._sought.add(record.node)
        try:
            while not (has_consumer or self._is_same_life(record)) and not self._leader.lost.done():
                try:
                    async with self._joining:
                        await self._leader.bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer(record.node))
                    break
                except TransientError as error:
                    log.info("no consumer for node %s yet: %s", record.node, error)
                    await asyncio.sleep(JOIN_AGAIN_S * random.uniform(0.5, 1.5))
            self._by_key[record.public_key] = record.node
            self._leader.apply(e.NodeJoined(record))
            if not has_consumer:
                self._leader.tell_epoch(subjects.node_control(record.node))
        finally:
            self._sought.discard(record.node)

    def _is_same_life(self, record: NodeRecord) -> bool:
        """Tell whether a node that is known says something new of itself: it has its consumer already."""
        known = self._leader.state.nodes.get(record.node)
        return known is not None and known.record.started_at_us == record.started_at_us

    def node_gone(self, public_key: str, name: str = "") -> None:
        """The broker saw the connection of this key end; those for blocks and of the witness say nothing of the node."""
        if name.endswith(_ASIDE):
            return
        node = self._leader.state.nodes.get(self._by_key.get(public_key, ""))
        if node is not None and node.record.public_key == public_key:
            self._leader.apply(e.NodeDisconnected(node.name))

    def _on_done(self, delivery: Delivery) -> None:
        self._take(delivery.subject, delivery.data)

    def _take(self, subject: str, data: bytes) -> None:
        done = read(subject, data, Done)
        if done is None:
            return
        node = self._leader.state.nodes.get(done.node)
        if node is None and self._early is not None:
            self._early.append((subject, data))
            return
        if subject != subjects.node_done(done.node) or node is None:
            log.warning("report on %s from an unknown node", subject)
            return
        if not check_receipt(done, node.record.public_key):
            log.warning("report of %s on %s has no valid receipt", done.node, done.assignment)
            return
        blocks = check_codecs([codec for codec, _ in done.blocks], [block for _, block in done.blocks])
        self._leader.apply(e.DoneReceived(done, dict(blocks)))
        self._leader.hub.put_soon(blocks)
        for outcome in done.outcomes:
            if outcome.log is not None:
                self._leader.spawn(self._keep_log(outcome.log.cid, done.node))

    async def _keep_log(self, root: bytes, node: str) -> None:
        """Bring a log to the hub: it is wanted most when its node is gone."""
        async with self._keeping:
            try:
                await fetch(self._leader.bus, self._leader.hub.store, root, [node], deadline_s=LOG_DEADLINE_S)
            except FlowmeshError as error:
                log.info("a log of %s cannot be had: %s", node, error)

    def _on_log(self, delivery: Delivery) -> None:
        message = read(delivery.subject, delivery.data, Log)
        if message is None or delivery.subject != subjects.node_log(message.node):
            return
        work = self._leader.state.works.get(message.key)
        for vertex in work.waiters if work is not None else ():
            self._leader.feeds.note_lines(
                vertex.run.tenant,
                vertex.run.id,
                vertex.index,
                vertex.operator.name,
                list(message.lines),
                message.attempt,
                message.node,
            )


def read(subject: str, data: bytes, kind: Any) -> Any:
    """Return the message in ``data``, or None (and a warning) if it cannot be read."""
    try:
        return decode(data, kind)
    except UsageError as error:
        log.warning("on %s: %s", subject, error)
        return None
