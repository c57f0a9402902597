"""The life of a mesh as text: one line per event into the core and per command out of it, with names instead of digests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, content

from flowmesh_mesh.manifest import Ref, ResultRecord, decode_record
from flowmesh_mesh.messages import Commit, Item, Outcome
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e


class Story(Desk):
    """A desk that writes down what it does. Ticks and beats that lead to nothing are left out."""

    def __init__(self, **fields: Any) -> None:
        self.lines: list[str] = []
        self.labels: dict[bytes, str] = {}
        super().__init__(**fields)
        self.begun_us = self.now_us

    def note(self, text: str) -> None:
        """Add a line of prose."""
        self.lines.append(f"# {text}")

    def given(self, label: str) -> Ref:
        """Return a content that is called by its label."""
        ref = content(label)
        self.labels[ref.cid] = label
        return ref

    def outcome(self, item: Item, kind: str, label: str | None = None, reason: str = "succeeded", **fields: Any) -> Outcome:
        told = super().outcome(item, kind, label if label is not None else f"{item.name}'s result", reason, **fields)
        for ref in (ref for refs in told.outputs.values() for ref in refs):
            self.labels[ref.cid] = label if label is not None else f"{item.name}'s result"
        return told

    def _hear(self, event: e.Event, commands: Sequence[c.Command]) -> None:
        is_dull = isinstance(event, e.Tick | e.BeatReceived) and not commands
        if not is_dull:
            self.lines.append(f"{(self.now_us - self.begun_us) / SECOND:7.3f} -> {self._event(event)}")
            self.lines.extend(f"        <- {self._command(command)}" for command in commands)

    # --- words

    def _name(self, key: bytes) -> str:
        for run in self.state.runs.values():
            for vertex in run.vertices:
                if vertex.key == key:
                    return vertex.operator.name
        return key.hex()[:8]

    def _roots(self, roots: Iterable[bytes] | Mapping[bytes, Sequence[str]]) -> str:
        if isinstance(roots, Mapping):
            return "; ".join(f"{self.labels[root]}: {', '.join(names) or 'nobody'}" for root, names in roots.items())
        return ", ".join(self.labels[root] for root in roots) or "nothing"

    def _event(self, event: e.Event) -> str:
        match event:
            case e.Submitted():
                return f"submitted {event.tenant}/{event.run}: {', '.join(o.name for o in event.manifest.operators)}"
            case e.NodeJoined():
                return f"joined {event.record.node} ({event.record.state})"
            case e.BeatReceived():
                return f"beat of {event.beat.node} holding {', '.join(event.beat.held) or 'nothing'}"
            case e.DoneReceived():
                return f"done {event.done.assignment} by {event.done.node}: {'; '.join(map(self._outcome, event.done.outcomes))}"
            case e.Committed():
                return f"committed {', '.join(self._name(key) for key, _ in event.records)}"
            case e.Located():
                return f"located {self._roots(event.holders)}"
            case e.Kept():
                return f"kept outputs of {event.tenant}/{event.run}, missing {self._roots(event.missing)}"
            case e.Ended() | e.ReadySeen() | e.CancelRequested():
                return f"{type(event).__name__.lower()} {event.tenant}/{event.run}"
            case e.NodeDisconnected():
                return f"disconnected {event.node}"
            case _:
                return type(event).__name__.lower()

    def _outcome(self, outcome: Outcome) -> str:
        name = f"{self._name(outcome.key)}#{outcome.attempt}"
        if outcome.reason == "succeeded":
            return f"{name} made {self._roots(ref.cid for refs in outcome.outputs.values() for ref in refs)}"
        return f"{name} {outcome.reason}" + (f" ({self._roots(outcome.missing)})" if outcome.missing else "")

    def _command(self, command: c.Command) -> str:
        match command:
            case c.Accept():
                return f"accept {command.acceptance.tenant}/{command.acceptance.run}"
            case c.Assign():
                assignment = command.assignment
                items = "; ".join(f"{i.name}#{i.attempt} generation {i.generation}{self._inputs(i)}" for i in assignment.items)
                return f"assign {assignment.id} to {assignment.node}: {items}"
            case c.CommitResults():
                return "commit " + "; ".join(self._record(key, generation, block) for key, generation, block in command.records)
            case c.Tell():
                return self._tell(command)
            case c.Release():
                return f"release {command.assignment} of {command.node}"
            case c.Locate():
                return f"locate {self._roots(command.roots)}"
            case c.Keep():
                return f"keep for {command.tenant}/{command.run}: {self._roots(command.roots)}"
            case c.RecordCancel():
                return f"record that {command.cancellation.actor} cancelled {command.cancellation.run}"
            case c.EndRun():
                end = command.end
                saved = f", saved {end.saved_us} us" if end.saved_us else ""
                return f"end {end.tenant}/{end.run}: {command.state} ({end.reason} by {end.actor}{saved})"
            case c.Change():
                run = self.state.runs[command.tenant, command.run]
                told = ", ".join(
                    f"{run.vertices[i].operator.name} {word}{' (shared)' * s}" for i, word, _, _, s in command.changes
                )
                return f"change of {command.tenant}/{command.run}: {told}"
            case c.RecordHealth():
                return f"record that {command.health.node} is {command.health.state}: {command.health.reason}"
            case c.DropCheckpoint():
                return f"drop the checkpoint of {self._name(command.key)}"

    def _inputs(self, item: Item) -> str:
        parts = [f"{self.labels[x.ref.cid]} from {', '.join(x.holders)}" for refs in item.inputs.values() for x in refs]
        return f" ({'; '.join(parts)})" if parts else ""

    def _record(self, key: bytes, generation: int, block: bytes) -> str:
        record = decode_record(block, ResultRecord)
        return f"{self._name(key)} generation {generation} by attempt {record.attempt} on {record.receipt.node}"

    def _tell(self, command: c.Tell) -> str:
        message = command.message
        if isinstance(message, Commit):
            shown = ", ".join(f"{self._name(key)} generation {generation}" for key, generation, _ in message.results)
            return f"tell {command.node}: {message.assignment} is closed, the ledger shows {shown or 'nothing'}"
        return f"tell {command.node}: stop {', '.join(map(self._name, message.keys))} of {message.assignment}"
