"""Noticing that a broker is cut off from the others: the link to it holds, and nobody behind it answers any more."""

from __future__ import annotations

from flowmesh_mesh.subjects import blocks

ALONE_S = 15.0
"""How long nothing may be answered before another broker is tried; an election among brokers takes four to nine seconds."""

_ASKS_MIN = 5
_BLOCKS = blocks("")


class Silence:
    """Counts what was asked in vain since the last answer; not where there is one broker, and so nobody else to go to."""

    def __init__(self, brokers: int) -> None:
        self._is_watched = brokers > 1
        self._since_s = 0.0
        self._count = 0

    def broken(self) -> None:
        """Somebody answered."""
        self._count = 0

    def grows(self, now_s: float, subject: str = "") -> bool:
        """Nobody answered; tell whether it has lasted so long that another broker should be tried, and begin anew then.

        A peer that has no blocks to give any more says nothing of the broker.
        """
        if not self._is_watched or (subject and subject.startswith(_BLOCKS)):
            return False
        if not self._count:
            self._since_s = now_s
        self._count += 1
        if self._count < _ASKS_MIN or now_s - self._since_s < ALONE_S:
            return False
        self._count = 0
        return True
