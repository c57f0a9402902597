"""What the broker stores while everything breaks: the guarded streams, message by message, and the ledger in the end.

It has a connection of its own, past all links. Its consumers live in the broker's memory and are made anew when they are gone;
a message that was purged before it could be read is not seen (the counts tell how many were).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Callable
from typing import Any

from chaos.history import (
    Begun,
    Complaint,
    Entry,
    History,
    Issued,
    LedgerAcceptance,
    LedgerCancellation,
    LedgerEnd,
    Stored,
)
from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus, Delivery, Pull
from flowmesh_mesh.delivery import ack_tokens
from flowmesh_mesh.manifest import RunEnd, decode_record
from flowmesh_mesh.messages import Assignment, Epoch, decode
from flowmesh_mesh.streams import SECOND_NS, ConsumerConfig

GUARDED = (subjects.LEDGER, subjects.ASSIGN)
CONSUMER = "chaos"
UNSEEN = -1
"""The fence of a batch whose first message was not seen."""
_FENCE = "Nats-Expected-Last-Subject-Sequence"
_BATCH = "Nats-Batch-Id"
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)$", re.MULTILINE)
_BEGUN = re.compile(r"took (\S+) of epoch (\d+), highest (\d+)")


class Recorder:
    """Follows the guarded streams into a history. ``on_stored`` hears of each message at once."""

    def __init__(self, bus: Bus, history: History, on_stored: Callable[[Stored], None] = lambda _: None) -> None:
        self._bus = bus
        self._history = history
        self._on_stored = on_stored
        self._seen: set[tuple[str, int]] = set()
        self._fences: dict[str, int] = {}
        self._pulls: list[Pull] = []
        self._ensuring: asyncio.Task[None] | None = None
        self.leader = ""
        """Name of the scheduler whose epoch was stored last."""
        self.epochs: dict[str, Stored] = {}
        """The last epoch record of each stream."""

    async def start(self) -> None:
        """Begin; streams that do not exist yet are waited for."""
        self._ensuring = asyncio.create_task(self._ensure())
        for stream in GUARDED:
            self._pulls.append(await self._bus.pull(stream, CONSUMER, self._receiver(stream), batch=500, expires_s=5.0))

    async def _ensure(self) -> None:
        config = ConsumerConfig(
            CONSUMER, durable_name=CONSUMER, ack_wait=30 * SECOND_NS, max_ack_pending=50_000, mem_storage=True
        )
        while True:
            for stream in GUARDED:
                with contextlib.suppress(FlowmeshError):
                    await self._bus.ensure_consumer(stream, config)
            await asyncio.sleep(1.0)

    def _receiver(self, stream: str) -> Callable[[Delivery], None]:
        def receive(message: Delivery) -> None:
            message.post_ack()
            seq = message.seq
            if (stream, seq) in self._seen:
                return
            self._seen.add((stream, seq))
            at_us = int(ack_tokens(message.reply)[3]) // 1000
            self._note(stream, seq, at_us, message)

        return receive

    def _note(self, stream: str, seq: int, at_us: int, message: Delivery) -> None:
        headers = message.headers
        fence = int(headers.get(_FENCE, 0))
        batch = headers.get(_BATCH, "")
        if batch:  # its first message names the fence for all; that one may have been purged before it could be read
            fence = self._fences.setdefault(batch, fence or UNSEEN)
        for entry in entries_of(stream, seq, at_us, message.subject, message.data, fence):
            self._history.add(entry)
            if isinstance(entry, Stored):
                if entry.kind == "epoch":
                    self.epochs[stream] = entry
                    self.leader = entry.leader or self.leader
                self._on_stored(entry)

    async def read_ledger(self) -> None:
        """Add to the history what the ledger holds now."""
        async for message in self._bus.read_stream(subjects.LEDGER):
            kind, tenant, run = [*message.subject.removeprefix("led.").split(".", 2), "", ""][:3]
            if kind == "accepted":
                self._history.add(LedgerAcceptance(tenant, run, message.seq))
            elif kind == "cancelled":
                self._history.add(LedgerCancellation(tenant, run, message.seq))
            elif kind == "ended":
                end = decode_record(message.data, RunEnd)
                self._history.add(LedgerEnd(tenant, run, message.seq, end.reason, end.actor))

    async def stop(self) -> None:
        """Stop following."""
        if self._ensuring is not None:
            self._ensuring.cancel()
            await asyncio.gather(self._ensuring, return_exceptions=True)
        for pull in self._pulls:
            await pull.stop()


def entries_of(stream: str, seq: int, at_us: int, subject: str, data: bytes, fence: int) -> list[Entry]:
    """Return what a message of a guarded stream says."""
    digest = hashlib.sha256(data).hexdigest()[:16]

    def stored(kind: str, **more: Any) -> Stored:
        return Stored(at_us, stream, seq, subject, kind, fence, digest=digest, **more)

    if ".epoch." in subject:
        record = decode(data, Epoch)
        return [stored("epoch", epoch=record.epoch, leader=record.leader)]
    if stream == subjects.LEDGER:
        return [stored(subject.split(".")[1])]
    if not subject.startswith("asg.node."):
        return [stored("other")]
    assignment = decode(data, Assignment)
    issued = [
        Issued(at_us, assignment.id, assignment.epoch, assignment.node, item.name, item.key.hex(), item.generation, item.attempt)
        for item in assignment.items
    ]
    return [stored("assignment", epoch=assignment.epoch), *issued]


def complaints_of(process: str, log: str) -> list[Complaint]:
    """Return the last line of each traceback in a log."""
    return [Complaint(process, found[1][:300]) for found in _TRACEBACK.finditer(log)]


def begun_of(node: str, log: str) -> list[Begun]:
    """Return what a node's log says about the assignments that it took up."""
    return [Begun(node, found[1], int(found[2]), int(found[3])) for found in _BEGUN.finditer(log)]
