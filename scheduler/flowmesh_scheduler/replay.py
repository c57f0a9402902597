"""A recorded event log through the production core: the same settings and events give the same assignments, hash for hash."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowmesh_mesh.messages import Assignment
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.placement import place
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import Placer, step
from flowmesh_scheduler.recording import EventLog, assigned_by, chain, decode_event
from flowmesh_scheduler.recording import Step as Recorded


@dataclass(frozen=True, slots=True)
class Made:
    """An assignment that a replay made."""

    at_us: int
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first step whose assignments are not the recorded ones."""

    step: int
    at_us: int
    kind: str


@dataclass(slots=True)
class Replayed:
    """What a replay came to. ``recorded`` is the digest that the leader had when it made its last recorded assignment."""

    epoch: int = 0
    version: str = ""
    steps: int = 0
    operators: int = 0
    made: list[Made] = field(default_factory=list)
    digest: bytes = b""
    recorded: bytes = b""
    divergence: Divergence | None = None
    ended: str = ""

    @property
    def is_same(self) -> bool:
        return self.divergence is None and self.digest == self.recorded

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "epoch": self.epoch,
            "version": self.version,
            "steps": self.steps,
            "operators": self.operators,
            "digest": self.digest.hex(),
            "recorded_digest": self.recorded.hex(),
            "is_same": self.is_same,
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "ended": self.ended,
            "assignments": [_plain_assignment(made) for made in self.made],
        }


def _plain_assignment(made: Made) -> dict[str, Any]:
    assignment = made.assignment
    return {
        "at_us": made.at_us,
        "id": assignment.id,
        "node": assignment.node,
        "type": assignment.type,
        "first": assignment.items[0].name if assignment.items else "",
        "keys": [item.key.hex() for item in assignment.items],
    }


def replay(path: Path, placer: Placer = place) -> Replayed:
    """Run a log through the core; stop at the first step that chooses otherwise than recorded."""
    found = EventLog(path)
    state, names = begin(found)
    told = Replayed(found.header.epoch, found.header.version)
    for recorded in found.steps():
        event = decode_event(recorded.kind, recorded.event)
        commands = apply(state, names, recorded, event, placer)
        told.steps += 1
        assignments = assigned_by(commands)
        if assignments:
            told.digest = chain(told.digest, assignments)
            told.made += (Made(recorded.at_us, assignment) for assignment in assignments)
            told.operators += sum(len(assignment.items) for assignment in assignments)
        told.recorded = recorded.digest or told.recorded
        if (told.digest if assignments else b"") != recorded.digest:
            told.divergence = Divergence(told.steps, recorded.at_us, recorded.kind)
            break
    told.ended = found.ended
    return told


class Names:
    """Gives private operators the keys that they had: a log has no tenant's secret to compute them from."""

    def __init__(self) -> None:
        self.recorded: list[bytes] = []

    def __call__(self, key: bytes) -> bytes:
        return self.recorded.pop(0) if self.recorded else key


def begin(log: EventLog) -> tuple[State, Names]:
    """Return the state in which the epoch of a log began."""
    header, names = log.header, Names()
    state = State(log.settings(), epoch=header.epoch, name_private=names)
    state.places.update((root, set(held)) for root, held in header.places.items())
    state.costs.restore(header.costs)
    return state, names


def apply(state: State, names: Names, recorded: Recorded, event: e.Event, placer: Placer) -> list[Any]:
    """Apply one recorded step; return its commands."""
    for root in recorded.held:
        state.places.setdefault(root, set()).add(HUB)
    names.recorded = list(recorded.private)
    return step(state, event, recorded.at_us, placer)
