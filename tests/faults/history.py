"""What happened in a simulation, as its outside saw it: writes to guarded streams, messages, beginnings of work, ends of runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.faults.broker_model import Session
from tests.faults.streams_model import Kept, Stream

from flowmesh_mesh import subjects


@dataclass(slots=True)
class Write:
    """A message that a guarded stream took. ``life`` counts how often the broker's store was wiped before."""

    at_s: float
    life: int
    stream: str
    subject: str
    seq: int
    data: bytes
    writer: str


@dataclass(slots=True)
class Begun:
    """A node took up work: under which epoch, and the highest epoch that it had seen in all its lives."""

    at_s: float
    node: str
    epoch: int
    highest: int
    assignment: str


@dataclass(slots=True)
class Told:
    """What a client was told of a run, or the mesh published about it."""

    at_s: float
    tenant: str
    run: str
    state: str
    body: dict[str, Any]


@dataclass(slots=True)
class Fault:
    """A fault that was made, and when it was over; ``who`` names what it hit."""

    at_s: float
    kind: str
    who: str
    until_s: float


@dataclass(slots=True)
class History:
    """Everything that the checkers look at."""

    now_s: Callable[[], float]
    writes: list[Write] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    life: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def keep(self, stream: Stream, kept: Kept) -> None:
        """Note what a stream took."""
        if stream.name in (subjects.LEDGER, subjects.ASSIGN):
            self.writes.append(Write(self.now_s(), self.life, stream.name, kept.subject, kept.seq, kept.data, kept.writer))
        self._mix(stream.name, kept.subject, kept.seq, kept.data)

    def publish(self, subject: str, data: bytes, _session: Session | None) -> None:
        """Note a message."""
        self._mix(subject, data)

    def note(self, text: str) -> None:
        """Note something in words."""
        self.notes.append(f"{self.now_s():10.4f} {text}")
        self._mix(text)

    def _mix(self, *what: Any) -> None:
        self._digest.update(repr((round(self.now_s(), 6), *what)).encode())

    @property
    def digest(self) -> str:
        """Return what differs as soon as anything in the history does."""
        return str(self._digest.hexdigest())
