"""A core that is driven by hand: each event as one call, the commands kept, every invariant checked after each step.

What a test does not care about can be left to the desk: commits and ends are written at once, holders and outputs of runs are
confirmed, unless the test switches that off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.unit.scheduler.flows import SECOND, content, manifest_cid, node_record, result_of

from flowmesh_mesh.manifest import Manifest, Metered, Ref, ResultRecord, RunEnd, decode_record, record_cid
from flowmesh_mesh.messages import Abort, Assignment, Beat, Checkpoint, Commit, Done, Item, NodeRecord, Outcome
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.check import Memory, check
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import Run, State, Vertex
from flowmesh_scheduler.core.step import step

C = TypeVar("C")


@dataclass
class Desk:
    """A leader without a service.

    ``held`` is the truth about who has which root: whoever produced it, and the hub what it fetched; given content is the hub's.
    """

    settings: Settings = field(default_factory=Settings)
    epoch: int = 100
    commits: bool = True
    ends: bool = True
    locates: bool = True
    keeps: bool = True
    checks_every: int = 1
    now_us: int = 1_000 * SECOND
    held: dict[bytes, set[str]] = field(default_factory=dict)
    commands: list[c.Command] = field(default_factory=list)
    ledger: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    uncommitted: list[c.CommitResults] = field(default_factory=list)
    ended: dict[tuple[str, str], RunEnd] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[Any, Manifest]] = field(default_factory=dict)
    assigned: dict[str, Assignment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = State(self.settings, epoch=self.epoch)
        self.state.tenant_secrets.update({"ta": b"secret a", "tb": b"secret b"})
        self.memory = Memory()
        self._steps = 0

    # --- events

    def apply(self, *events: e.Event) -> list[c.Command]:
        """Apply events, and what follows from them by itself; return all the commands."""
        begun = len(self.commands)
        queue = list(events)
        while queue:
            event = queue.pop(0)
            commands = step(self.state, event, self.now_us)
            self._steps += 1
            if self._steps % self.checks_every == 0:
                check(self.state)
                self.memory.check(self.state)
            self.commands.extend(commands)
            self._hear(event, commands)
            for command in commands:
                queue.extend(self._follow(command))
        return self.commands[begun:]

    def _hear(self, event: e.Event, commands: Sequence[c.Command]) -> None:
        """Be told of a step; whoever writes stories does something about it."""

    def _follow(self, command: c.Command) -> Iterable[e.Event]:
        if isinstance(command, c.Accept):
            pair = (command.acceptance.tenant, command.acceptance.run)
            self.manifests[pair] = (command.acceptance, self.state.runs[pair].manifest)
        elif isinstance(command, c.Assign):
            self.assigned[command.assignment.id] = command.assignment
        elif isinstance(command, c.Release):
            self.assigned.pop(command.assignment, None)
        elif isinstance(command, c.Tell) and getattr(command.message, "closed", False):
            self.assigned.pop(command.message.assignment, None)
        elif isinstance(command, c.CommitResults):
            self.uncommitted.append(command)
            if self.commits:
                yield self.commit_event()
        elif isinstance(command, c.Locate) and self.locates:
            yield e.Located({root: self.holders(root) for root in command.roots})
        elif isinstance(command, c.Keep) and self.keeps:
            yield self.kept_event(command)
        elif isinstance(command, c.EndRun):
            pair = (command.end.tenant, command.end.run)
            assert pair not in self.ended
            self.ended[pair] = command.end
            if self.ends:
                yield e.Ended(*pair)

    def holders(self, root: bytes) -> list[str]:
        """Return who holds a root and can be reached."""
        gone = {n.name for n in self.state.nodes.values() if n.state == "gone"}
        return sorted(self.held.get(root, {HUB}) - gone)

    def kept_event(self, command: c.Keep) -> e.Kept:
        """Fetch what the hub is to keep; return the event that tells what it could not have."""
        lost = [root for root in command.roots if not self.holders(root)]
        for root in command.roots:
            if root not in lost:
                self.held.setdefault(root, set()).add(HUB)
        return e.Kept(command.tenant, command.run, lost)

    def commit_event(self) -> e.Committed:
        """Write what waits to be committed into the ledger; return the event that tells of it."""
        command = self.uncommitted.pop(0)
        for key, generation, block in command.records:
            assert (key, generation) not in self.ledger, "a result was published twice"
            self.ledger[key, generation] = block
        return e.Committed([(key, record_cid(block)) for key, _, block in command.records])

    def commit(self) -> list[c.Command]:
        """Let the ledger show everything that waits."""
        done: list[c.Command] = []
        while self.uncommitted:
            done += self.apply(self.commit_event())
        return done

    def submit(self, manifest: Manifest, run: str = "r1", tenant: str = "ta", **fields: Any) -> Run:
        """Submit a workflow whose given contents the hub holds."""
        for each in manifest.operators:
            refs = [s.ref for sources in each.inputs.values() for s in sources if s.ref is not None]
            for ref in [*refs, *([each.code] if each.code is not None else [])]:
                self.state.places.setdefault(ref.cid, set()).add(HUB)
        self.apply(e.Submitted(tenant, run, manifest, manifest_cid(manifest), **fields))
        return self.state.runs[tenant, run]

    def join(self, *names: str, **fields: Any) -> None:
        """Let nodes join."""
        for name in names:
            self.apply(e.NodeJoined(node_record(name, **fields)))

    def join_as(self, record: NodeRecord) -> list[c.Command]:
        return self.apply(e.NodeJoined(record))

    def beat(self, node: str, held: Sequence[str] | None = None, state: str = "active") -> list[c.Command]:
        """Let a node say that it lives; by default it holds what it was assigned."""
        mine = [a.id for a in self.assigned.values() if a.node == node] if held is None else held
        return self.apply(e.BeatReceived(Beat(node, self.now_us, self.epoch, tuple(mine), state=state)))

    def wait(self, seconds: float, *, beating: Sequence[str] = ()) -> list[c.Command]:
        """Let time pass in steps of half a second, while ``beating`` nodes say that they live."""
        begun = len(self.commands)
        until_us = self.now_us + int(seconds * SECOND)
        while self.now_us < until_us:
            self.now_us = min(until_us, self.now_us + SECOND // 2)
            for name in beating:
                self.beat(name)
            self.apply(e.Tick())
        return self.commands[begun:]

    def lose(self, node: str) -> list[c.Command]:
        """Let a node vanish: everyone else lives on until its lease has ended."""
        others = [n.name for n in self.state.nodes.values() if n.name != node and n.state != "gone"]
        return self.wait(self.settings.node_lease_us / SECOND + 1, beating=others)

    # --- what nodes answer

    def outcome(self, item: Item, kind: str, label: str | None = None, reason: str = "succeeded", **fields: Any) -> Outcome:
        if reason != "succeeded":
            return Outcome(item.key, item.generation, item.attempt, reason, error=f"it was {reason}", **fields)
        outputs, result = result_of(kind, label if label is not None else item.key.hex()[:12])
        fields.setdefault("metered", Metered(exec_us=1000))
        return Outcome(item.key, item.generation, item.attempt, reason, result, outputs, **fields)

    def report(
        self, assignment: Assignment, outcomes: Sequence[Outcome], *, last: bool = True, node: str = ""
    ) -> list[c.Command]:
        """Deliver outcomes of an assignment."""
        name = node or assignment.node
        for outcome in outcomes:
            for ref in (ref for refs in outcome.outputs.values() for ref in refs):
                self.held.setdefault(ref.cid, set()).add(name)
        done = Done(name, assignment.id, assignment.epoch, tuple(outcomes), f"U{name}", b"signed", last=last)
        return self.apply(e.DoneReceived(done))

    def succeed(self, assignment: Assignment, label: str | None = None, **fields: Any) -> list[c.Command]:
        """Let every item of an assignment succeed."""
        outcomes = [self.outcome(item, assignment.type, label, **fields) for item in assignment.items]
        return self.report(assignment, outcomes)

    def fail(self, assignment: Assignment, reason: str, **fields: Any) -> list[c.Command]:
        """Let every item of an assignment fail."""
        return self.report(
            assignment, [self.outcome(item, assignment.type, reason=reason, **fields) for item in assignment.items]
        )

    def run(self, assignment: Assignment) -> list[c.Command]:
        """Let an assignment be carried out: items whose inputs nobody holds say so, the others succeed."""
        outcomes = []
        for item in assignment.items:
            inputs = [located.ref.cid for port in item.inputs.values() for located in port]
            lost = tuple(root for root in inputs if not self.holders(root))
            fields: dict[str, Any] = {"reason": "input-missing", "missing": lost} if lost else {}
            outcomes.append(self.outcome(item, assignment.type, **fields))
        return self.report(assignment, outcomes)

    def work_off(self, limit: int = 10_000) -> int:
        """Carry out what is outstanding until nothing is; return how many assignments that took."""
        for count in range(limit):
            if not self.assigned:
                return count
            self.run(next(iter(self.assigned.values())))
        raise AssertionError("there is always more to do")

    def answer(self, name: str, label: str | None = None, reason: str = "succeeded", **fields: Any) -> list[c.Command]:
        """Deliver the outcome of one operator; it closes its assignment if nothing else of it runs."""
        assignment = self.named(name)
        item = next(item for item in assignment.items if item.name == name)
        running = self.state.assignments[assignment.id].running
        outcome = self.outcome(item, assignment.type, label, reason, **fields)
        return self.report(assignment, [outcome], last=running <= {item.key})

    # --- what a test looks at

    def only(self) -> Assignment:
        """Return the one assignment that is outstanding."""
        assert len(self.assigned) == 1, list(self.assigned)
        return next(iter(self.assigned.values()))

    def named(self, operator: str) -> Assignment:
        """Return the outstanding assignment that holds an operator of that name."""
        found = [a for a in self.assigned.values() if any(i.name == operator for i in a.items)]
        assert len(found) == 1, f"{operator} is in {len(found)} assignments"
        return found[0]

    def is_assigned(self, operator: str) -> bool:
        return any(item.name == operator for a in self.assigned.values() for item in a.items)

    def vertex(self, name: str, run: str = "r1", tenant: str = "ta") -> Vertex:
        return next(v for v in self.state.runs[tenant, run].vertices if v.operator.name == name)

    def states(self, run: str = "r1", tenant: str = "ta") -> dict[str, str]:
        return {v.operator.name: v.state.value for v in self.state.runs[tenant, run].vertices}

    def end(self, run: str = "r1", tenant: str = "ta") -> RunEnd:
        assert (tenant, run) in self.ended, f"{run} has not ended: {self.states(run, tenant)}"
        return self.ended[tenant, run]

    def records(self) -> list[ResultRecord]:
        return [decode_record(block, ResultRecord) for block in self.ledger.values()]

    def of(self, commands: Iterable[c.Command], kind: type[C]) -> list[C]:
        return [command for command in commands if isinstance(command, kind)]

    def told(self, commands: Iterable[c.Command], node: str) -> list[Commit | Abort]:
        """Return what a node was told."""
        return [command.message for command in commands if isinstance(command, c.Tell) and command.node == node]

    def lose_input(self, consumer: str, *labels: str) -> None:
        """Let a consumer report inputs that nobody holds any more."""
        self.forget(*(content(label) for label in labels))
        self.answer(consumer, reason="input-missing", missing=tuple(content(label).cid for label in labels))

    def forget(self, ref: Ref, *more: Ref) -> None:
        """Let nobody hold these contents any more, until somebody makes them again."""
        for each in (ref, *more):
            self.held[each.cid] = set()

    def recovered(self) -> e.Recovered:
        """Return what a new leader would find."""
        results = [(record_cid(block), decode_record(block, ResultRecord)) for block in self.ledger.values()]
        live = [
            e.RecoveredRun(acceptance, manifest, self.state.runs[pair].cancelled_by)
            for pair, (acceptance, manifest) in self.manifests.items()
            if pair not in self.ended
        ]
        ended = [(end, self.manifests[pair][0]) for pair, end in self.ended.items()]
        return e.Recovered(results, live, ended, list(self.assigned.values()))

    def successor(self, *nodes: str, pointers: Sequence[Checkpoint] = (), **fields: Any) -> Desk:
        """Return a new leader that has taken over, with the nodes that it knows of."""
        desk = Desk(
            self.settings, self.epoch + 100, now_us=self.now_us, ledger=dict(self.ledger), ended=dict(self.ended), **fields
        )
        desk.held = {root: set(names) for root, names in self.held.items()}
        desk.manifests = dict(self.manifests)
        desk.assigned = dict(self.assigned)
        for name in nodes:
            desk.join_as(self.state.nodes[name].record)
        for acceptance, manifest in self.manifests.values():
            assert acceptance is not None
            for each in manifest.operators:
                for source in (s for sources in each.inputs.values() for s in sources if s.ref is not None):
                    assert source.ref is not None
                    desk.state.places.setdefault(source.ref.cid, set()).add(HUB)
        desk.apply(*(e.Checkpointed(made) for made in pointers), self.recovered())
        return desk


def tally(items: Iterable[str]) -> dict[str, int]:
    """Return how often each word occurs."""
    return dict(Counter(items))
