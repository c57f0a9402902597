"""Assignments on their way to nodes: sent at once where that is safe, written to their stream, removed once they are settled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial

from flowmesh_cas.errors import TransientError
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.messages import Assignment, encode
from flowmesh_scheduler.guarded import GuardedStream

SENT_MAX_BYTES = 16 * 1024
"""Assignments up to this size are sent to the node at once, if they may run in vain: it need not wait for a disk."""

WRITTEN_AFTER_S = 0.01
"""An assignment that was sent is written once it has lasted this long; what is settled sooner needs no record."""


class AssignmentQueue:
    """Assignments that are not settled, by node: those being sent, and the sequences of those that are written."""

    def __init__(self, bus: Bus, stream: GuardedStream) -> None:
        self._bus = bus
        self._stream = stream
        self._sent: dict[str, tuple[asyncio.TimerHandle, Callable[[], None]]] = {}
        self._open: dict[str, dict[str, int]] = {}
        self._last: dict[str, int] = {}
        self._swept: dict[str, int] = {}

    def hand_over(self, assignment: Assignment, *, may_run_in_vain: bool) -> None:
        """Give an assignment to its node: by its stream, or at once and by its stream if it lasts."""
        data = encode(assignment)
        if may_run_in_vain and len(data) <= SENT_MAX_BYTES:
            self._bus.post(subjects.node_control(assignment.node), data)
            loop = asyncio.get_running_loop()
            write = partial(self._write, assignment.node, assignment.id, data)
            self._sent[assignment.id] = (loop.call_later(WRITTEN_AFTER_S, write), write)
        else:
            self._write(assignment.node, assignment.id, data)

    def _write(self, node: str, assignment: str, data: bytes) -> None:
        self._sent.pop(assignment, None)
        self._open.setdefault(node, {})[assignment] = 0

        def stored(sequence: int) -> None:
            self._last[node] = max(self._last.get(node, 0), sequence)
            if assignment in self._open.get(node, {}):
                self._open[node][assignment] = sequence

        self._stream.write(subjects.assign(node, assignment), data, stored)

    def found(self, node: str, assignment: str, sequence: int) -> None:
        """Remember an assignment that an earlier leader wrote."""
        self._open.setdefault(node, {})[assignment] = sequence
        self._last[node] = max(self._last.get(node, 0), sequence)

    def knows(self, node: str) -> bool:
        """Tell whether anything was written for a node: what is settled of that is swept."""
        return node in self._open

    def settle(self, node: str, assignment: str) -> int:
        """Forget an assignment; return its sequence, 0 when it is not written."""
        sent = self._sent.pop(assignment, None)
        if sent is not None:
            sent[0].cancel()
        return self._open.get(node, {}).pop(assignment, 0)

    async def delete(self, sequence: int) -> None:
        """Remove one assignment now: its node must not get it again."""
        with contextlib.suppress(TransientError):
            await self._bus.delete_message(subjects.ASSIGN, sequence)

    async def sweep(self) -> None:
        """Remove everything of each node that stands before its first open assignment."""
        for node, last in list(self._last.items()):
            sequences = self._open.get(node, {}).values()
            floor = min(sequences, default=last + 1)
            if floor > self._swept.get(node, 0):
                await self._bus.purge(subjects.ASSIGN, subjects.assign(node, "*"), below_seq=floor)
                self._swept[node] = floor

    def close(self, *, is_written: bool) -> None:
        """Hand over nothing more; what was only sent is written now if ``is_written``, for the next leader to know of."""
        sent, self._sent = self._sent, {}
        for timer, write in sent.values():
            timer.cancel()
            if is_written:
                write()
