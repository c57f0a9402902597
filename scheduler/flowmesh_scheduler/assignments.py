"""Where assignments stand in their stream, and their removal once they are settled: in bulk, node by node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from flowmesh_cas.errors import TransientError
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus


class AssignmentQueue:
    """Sequences of the assignments that are not settled, by node."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._open: dict[str, dict[str, int]] = {}
        self._last: dict[str, int] = {}
        self._swept: dict[str, int] = {}

    def note(self, node: str, assignment: str) -> Callable[[int], None]:
        """Remember an assignment that is being written; call what is returned with its sequence."""
        self._open.setdefault(node, {})[assignment] = 0

        def stored(sequence: int) -> None:
            self._last[node] = max(self._last.get(node, 0), sequence)
            if assignment in self._open.get(node, {}):
                self._open[node][assignment] = sequence

        return stored

    def found(self, node: str, assignment: str, sequence: int) -> None:
        """Remember an assignment that an earlier leader wrote."""
        self._open.setdefault(node, {})[assignment] = sequence
        self._last[node] = max(self._last.get(node, 0), sequence)

    def settle(self, node: str, assignment: str) -> int:
        """Forget an assignment; return its sequence, 0 when it is not known."""
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
