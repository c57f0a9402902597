"""How changed settings would have chosen in a recorded log.

What nodes reported belongs to the assignments that were made, so events cannot be applied to a core that chose otherwise. Each
round of placement is therefore made twice more from the same state, in forked processes: by the recorded settings and by the
changed ones. Their choices are compared and forgotten; what was recorded goes on. Differences do not add up over rounds.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from flowmesh_cas.errors import InternalError, UsageError
from flowmesh_mesh.messages import Assignment
from flowmesh_scheduler.core.fleet import refresh
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.placement import place
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.utility import Factors, terms

_SPENT = ("price", "load", "fetch", "energy", "egress")
"""Terms of the utility that are money paid; the others are worth, wait and risk."""


def changed(settings: Settings, weights: Iterable[str]) -> Settings:
    """Return settings with ``name=value`` put in; a dot leads into a table: ``batch_limit.engine=8``."""
    plain = msgspec.to_builtins(settings)
    for entry in weights:
        name, mark, text = entry.partition("=")
        place_of, known = _find(plain, name)
        if not mark:
            raise UsageError(f"--weight {entry!r} is not NAME=VALUE", hint="Write it like `--weight price_per_hour=0.8`.")
        try:
            value = type(known)(text) if not isinstance(known, bool) else text.lower() in ("true", "1", "yes")
        except ValueError as error:
            raise UsageError(f"--weight {name}: {text!r} is not a number") from error
        place_of[name.rpartition(".")[2]] = value
    try:
        return msgspec.convert(plain, Settings)
    except msgspec.ValidationError as error:
        raise UsageError(f"--weight: {error}") from error


def _find(plain: dict[str, Any], name: str) -> tuple[dict[str, Any], int | float]:
    """Return the table that holds a number, and the number; raise UsageError that lists the numbers there are."""
    table: Any = plain
    *path, last = name.split(".")
    for part in path:
        table = table.get(part) if isinstance(table, dict) else None
    known = table.get(last) if isinstance(table, dict) else None
    if not isinstance(known, int | float):
        raise UsageError(f"there is no setting {name!r} with a number", hint=f"Known: {', '.join(_numbers(plain))}.")
    return table, known


def _numbers(plain: Mapping[str, Any], before: str = "") -> list[str]:
    found: list[str] = []
    for name, value in plain.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{before}{name}.")
        elif isinstance(value, int | float):
            found.append(before + name)
    return found


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """One assignment of a round: which operators go to which node, and what that is predicted to take."""

    node: str
    keys: tuple[bytes, ...]
    seconds: float
    usd: float


@dataclass(slots=True)
class Side:
    """What one side predicts for the operators that both place in one round: seconds of nodes, and dollars."""

    operators: int = 0
    node_s: float = 0.0
    usd: float = 0.0

    def note(self, choice: Choice) -> None:
        """Add one operator's part of a choice."""
        self.operators += 1
        self.node_s += choice.seconds / len(choice.keys)
        self.usd += choice.usd / len(choice.keys)


@dataclass(slots=True)
class Comparison:
    """A placer that lets changed settings choose beside the recorded ones, and counts where they differ.

    What the recorded settings place, the changed ones place on the same node (``same``, or in another batch: ``other_batch``),
    ``elsewhere``, or not now (``only_recorded``). ``earlier`` are operators that only the changed ones would begin already.
    """

    settings: Settings
    rounds: int = 0
    rounds_changed: int = 0
    same: int = 0
    elsewhere: int = 0
    only_recorded: int = 0
    earlier: set[bytes] = field(default_factory=set)
    other_batch: int = 0
    before: Side = field(default_factory=Side)
    after: Side = field(default_factory=Side)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, state: State, now_us: int, out: Outbox) -> None:
        if state.is_cut_off or not state.pool:
            place(state, now_us, out)
            return
        own = _in_fork(lambda: _choose_by(state, state.settings, now_us, out))
        other = _in_fork(lambda: _choose_by(state, self.settings, now_us, out))
        place(state, now_us, out)
        if own or other:
            self._compare(own, other, now_us)

    def plain(self, weights: Iterable[str]) -> dict[str, Any]:
        """Return the counts as plain data."""
        return {
            "weights": list(weights),
            "rounds": self.rounds,
            "rounds_changed": self.rounds_changed,
            "same": self.same,
            "elsewhere": self.elsewhere,
            "other_batch": self.other_batch,
            "only_recorded": self.only_recorded,
            "earlier": len(self.earlier),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "examples": self.examples,
        }

    @property
    def _differing(self) -> int:
        return self.elsewhere + self.only_recorded + self.other_batch + len(self.earlier)

    def _compare(self, own: list[Choice], other: list[Choice], now_us: int) -> None:
        self.rounds += 1
        ours = {key: choice for choice in own for key in choice.keys}
        theirs = {key: choice for choice in other for key in choice.keys}
        before = self._differing
        self.earlier.update(key for key in theirs if key not in ours)
        for key, mine in ours.items():
            yours = theirs.get(key)
            if yours is None:
                self.only_recorded += 1
                continue
            self.before.note(mine)
            self.after.note(yours)
            if mine.node != yours.node:
                self.elsewhere += 1
            elif mine.keys != yours.keys:
                self.other_batch += 1
            else:
                self.same += 1
        if self._differing > before:
            self.rounds_changed += 1
            if len(self.examples) < EXAMPLES_MAX:
                self.examples.append({"at_us": now_us, "recorded": _plain(own), "changed": _plain(other)})


EXAMPLES_MAX = 20


def _plain(choices: Iterable[Choice]) -> list[dict[str, Any]]:
    return [{"node": c.node, "operators": len(c.keys), "seconds": c.seconds, "usd": c.usd} for c in choices]


def _choose(state: State, now_us: int, out: Outbox) -> list[Choice]:
    """Let a round of placement happen; return what it chose."""
    before = len(out.assigns)
    place(state, now_us, out)
    return [_choice(state, command.assignment) for command in out.assigns[before:]]


def _choose_by(state: State, settings: Settings, now_us: int, out: Outbox) -> list[Choice]:
    """Let a round of placement happen under these settings: what was derived from settings before is derived anew.

    It looks at the markets that the recorded settings look at, and where a node comes to be idle by the change. What was kept
    back stays so until it is looked at again.
    """
    refresh(state)
    fleet = state.fleet
    due, idle = set(fleet.changed), _idle(state)
    state.settings = settings
    for klass in fleet.classes.values():
        for ranking in klass.ranking.values():
            ranking.heaps.clear()
    for queue in state.pool.values():
        fleet.note_change(queue)
    fleet.stale.update(dict.fromkeys(state.nodes.values()))
    refresh(state)
    fleet.changed = due | {market for market, _ in _idle(state) - idle}
    return _choose(state, now_us, out)


def _idle(state: State) -> set[tuple[str, str]]:
    return {(market, name) for c in state.fleet.classes.values() for market, nodes in c.idle.items() for name in nodes}


def _choice(state: State, assignment: Assignment) -> Choice:
    keys = tuple(item.key for item in assignment.items)
    decision = state.decisions.get(assignment.id)
    if decision is None:
        return Choice(assignment.node, keys, state.assignments[assignment.id].predicted_s, 0.0)
    factors = decision.factors
    return Choice(assignment.node, keys, factors.wait_s + factors.seconds, spent(factors))


def spent(factors: Factors) -> float:
    """Return the dollars that a choice is predicted to pay."""
    found = terms(factors)
    return -sum(found[name] for name in _SPENT)


_choices = msgspec.msgpack.Decoder(list[Choice])


def _in_fork(work: Callable[[], list[Choice]]) -> list[Choice]:
    """Do ``work`` in a copy of this process, the one copy of a state that is certainly whole; return what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _work_and_leave(work, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        data = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise InternalError(f"the changed settings cannot choose: {data.decode('utf-8', 'replace').strip() or status}")
    return _choices.decode(data)


def _work_and_leave(work: Callable[[], list[Choice]], writer: int) -> None:
    """Run in the child; nothing of the parent's (buffers, exit handlers) is touched."""
    gc.disable()
    code = 0
    try:
        data = msgspec.msgpack.encode(work())
    except BaseException:
        data, code = traceback.format_exc().encode(), 1
    try:
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(code)
