"""A whole mesh in memory, with a seed: ledger, streams, hub, nodes that die and come back, leaders that follow one another.

The core's commands are carried out as service and nodes would, only late, twice, in another order or not at all; every
invariant is checked after every step. Nothing here decides anything: what must come out is the oracle's business.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from heapq import heappop, heappush
from typing import Any

from msgspec.structs import replace
from tests.unit.scheduler.flows import SECOND, manifest_cid, node_record, result_of
from tests.unit.scheduler.tails import Tails

from flowmesh_cas.cid import RAW, cid_of
from flowmesh_mesh.manifest import Acceptance, Manifest, Metered, Ref, ResultRecord, RunEnd, decode_record, record_cid
from flowmesh_mesh.messages import Abort, Assignment, Beat, Checkpoint, Commit, Done, Item, NodeHealth, NodeRecord, Outcome
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.check import Memory, check
from flowmesh_scheduler.core.checkpoints import order_of, refusal
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step

Pair = tuple[str, str]
TICK_US = SECOND // 2
OFFER_AGAIN_US = 3 * SECOND
MODELS_LOADED = 2
SETTINGS = Settings(nodes_lost_limit=1000, results_lost_limit=1000)
"""Limits that no accident of a random world reaches: they have tests of their own."""


@dataclass
class Faults:
    """How unkind the world is: probabilities per message, and per second for what befalls nodes and leaders."""

    lost: float = 0.03
    twice: float = 0.05
    delay_s: float = 0.05
    kill: float = 0.03
    cut: float = 0.05
    forget: float = 0.05
    leader: float = 0.02
    leader_cut: float = 0.02
    until_us: int = 25 * SECOND


@dataclass
class Part:
    """One report of a node, kept until the leader closes its assignment."""

    done: Done
    blocks: dict[bytes, bytes]
    offer_at_us: int


@dataclass
class SimNode:
    """A node: what it has on its disk, what it holds, what it has yet to deliver."""

    record: NodeRecord
    lacks_model: bool = False
    is_saboteur: bool = False
    slowness: float = 1.0
    crashes: float = 0.0
    is_alive: bool = True
    is_connected: bool = True
    epoch: int = 0
    resident: tuple[str, ...] = ()
    blocks: set[bytes] = field(default_factory=set)
    held: dict[str, Assignment] = field(default_factory=dict)
    left: dict[str, dict[bytes, Item]] = field(default_factory=dict)
    spool: dict[str, list[Part]] = field(default_factory=dict)
    tails: dict[str, Tails] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.record.node

    @property
    def is_there(self) -> bool:
        return self.is_alive and self.is_connected


class Checkpoints:
    """What nodes have come to, drawn apart from everything else; and what must hold of where attempts go on."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(f"checkpoints {seed}")
        self.steps: dict[tuple[str, bytes], int] = {}
        self.pointed: dict[bytes, Checkpoint] = {}
        self.taking: set[bytes] = set()
        self.resumed = 0

    def make(self, node: str, assignment: Assignment, item: Item) -> Checkpoint | None:
        """Let an item come a few steps further than where it began; some of these it tells."""
        pair = (assignment.id, item.key)
        began_at = self.pointed[item.checkpoint.ref.cid].step if item.checkpoint is not None else 0
        step = self.steps[pair] = self.steps.get(pair, began_at) + self.random.randrange(1, 5)
        if step >= 100 or self.random.random() < 0.3:
            return None
        root = cid_of(RAW, f"{item.key.hex()} {item.generation} {item.attempt} {step}".encode())
        at = Ref("folder", root, root[4:], 10)
        return Checkpoint(node, assignment.id, assignment.epoch, item.key, item.generation, item.attempt, step, 100, at)

    def check_forward(self, former: Checkpoint | None, made: Checkpoint) -> None:
        """Assert that a pointer moves forward only."""
        self.pointed[made.at.cid] = made
        assert former is None or order_of(former) <= order_of(made), f"{former} was followed by {made}"

    def check_given(self, assignment: Assignment) -> None:
        """Assert that an attempt goes on from what was pointed to, of an earlier attempt at the same key and generation."""
        for item in assignment.items:
            if item.checkpoint is not None:
                self.resumed += 1
                made = self.pointed[item.checkpoint.ref.cid]
                assert (made.key, made.generation) == (item.key, item.generation)
                assert made.attempt < item.attempt


@dataclass
class Request:
    """A run that a client wants: submitted until it is accepted."""

    tenant: str
    run: str
    manifest: Manifest
    share: str = "mesh"
    is_cancelled: bool = False


class World:
    """Everything outside the core; ``run_until_calm`` plays it to its end."""

    def __init__(self, seed: int, faults: Faults | None = None, nodes: int = 3, settings: Settings = SETTINGS) -> None:
        self.random = random.Random(seed)
        self.faults = faults or Faults()
        self.settings = settings
        self.now_us = 1_000 * SECOND
        self.begun_us = self.now_us
        self.digest = sha256()
        self.records = False
        self.steps = 0
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self.accepted: dict[Pair, Acceptance] = {}
        self.results: dict[tuple[bytes, int], bytes] = {}
        self.cancelled: dict[Pair, str] = {}
        self.ended: dict[Pair, RunEnd] = {}
        self.stream: dict[str, Assignment] = {}
        self.pointers: dict[bytes, Checkpoint] = {}
        self.checkpoints = Checkpoints(seed)
        self.given: dict[str, str] = {}
        self.node_records: dict[str, NodeRecord] = {}
        self.hub: set[bytes] = set()
        self.requests: dict[Pair, Request] = {}
        self.wanted: list[Pair] = []
        self.crashes: dict[bytes, int] = {}
        self.executions = 0
        self.exec_us = 1000
        self.pinned: dict[str, Any] = {}
        self.health: dict[str, NodeHealth] = {}
        self.views: dict[Pair, dict[int, str]] = {}
        self.nodes = {f"n{i}": SimNode(node_record(f"n{i}", started_at_us=1 + i)) for i in range(nodes)}
        self.state: State | None = None
        self.is_cut_off = False
        self.epoch = 0
        self.memory = Memory()
        self._waiting: list[e.Event] = []
        self._lead()
        for node in self.nodes.values():
            self._announce(node)
            self._later(self.random.random(), partial(self._beat, node))
        self._later(0.5, self._tick)

    # --- time

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._order += 1
        heappush(self._queue, (self.now_us + int(seconds * SECOND), self._order, action))

    def _soon(self, action: Callable[[], None]) -> None:
        self._later(self.random.random() * self.faults.delay_s, action)

    def play(self, until_us: int) -> None:
        """Let everything happen that is due until then."""
        while self._queue and self._queue[0][0] <= until_us:
            self.now_us, _, action = heappop(self._queue)
            action()
        self.now_us = until_us

    @property
    def is_stormy(self) -> bool:
        return self.now_us - self.begun_us < self.faults.until_us

    def run_until_calm(self, limit_s: float = 400.0) -> None:
        """Play until every run that was asked for has ended and everything has been let go; raise if that never comes."""
        limit_us = self.begun_us + int(limit_s * SECOND)
        while self.now_us < limit_us:
            self.play(self.now_us + SECOND)
            if not self.is_stormy and len(self.ended) == len(self.requests) and self._is_tidy():
                return
        raise AssertionError(f"not settled: {self._complaint()}")

    def _is_tidy(self) -> bool:
        state = self.state
        if state is None or state.works or state.assignments or any(r.end is None for r in state.runs.values()):
            return False
        there = [n for n in self.nodes.values() if n.is_there]
        return not any(n.held or n.spool for n in there) and not any(
            a.node in {n.name for n in there} for a in self.stream.values()
        )

    def _complaint(self) -> str:
        open_runs = sorted(set(self.requests) - set(self.ended))
        if self.state is None:
            return f"no leader; open: {open_runs}"
        states = {p: [v.state.value for v in r.vertices] for p, r in self.state.runs.items() if r.end is None}
        works = [(w.operator.name, w.state.value) for w in self.state.works.values()]
        nodes = [(n.name, n.is_there, sorted(n.held), sorted(n.spool)) for n in self.nodes.values()]
        assignments = list(self.state.assignments)
        return f"open: {open_runs}; {states}; {works}; assignments {assignments}; nodes {nodes}; stream {list(self.stream)}"

    def _tick(self) -> None:
        self._later(TICK_US / SECOND, self._tick)
        self.apply(e.Tick())
        for pair in self.wanted:
            if pair not in self.accepted and self.random.random() < 0.3:
                self._send_request(self.requests[pair])
        if self.is_stormy:
            self._befall()

    # --- the leader

    def apply(self, event: e.Event) -> None:
        """Hand an event to the leader, if there is one; carry out what it wants."""
        state = self.state
        if state is None:
            return
        if self.is_cut_off and not isinstance(event, e.Tick | e.CutOff | e.Restored):
            self._waiting.append(event)
            return
        commands = step(state, event, self.now_us)
        self.steps += 1
        if self.records:
            self.digest.update(f"{self.now_us} {event!r} {commands!r}\n".encode())
        check(state)
        self.memory.check(state)
        for command in commands:
            self._carry_out(command, state)

    def _lead(self) -> None:
        """Take over: everything that the new leader knows stands in ledger and streams."""
        self.epoch += 1
        self.is_cut_off = False
        self._waiting = []
        state = self.state = State(self.settings, epoch=self.epoch)
        state.tenant_secrets.update({"ta": b"secret a", "tb": b"secret b"})
        self.memory.ends.clear()
        results = []
        for block in self.results.values():
            record = decode_record(block, ResultRecord)
            results.append((record_cid(block), record))
            for inline in record.inline:
                self.hub.add(cid_of(RAW, inline))
                state.places.setdefault(cid_of(RAW, inline), set()).add(HUB)
        live = []
        for pair, acceptance in self.accepted.items():
            if pair not in self.ended:
                self._note_given(state, self.requests[pair].manifest)
                live.append(e.RecoveredRun(acceptance, self.requests[pair].manifest, self.cancelled.get(pair, "")))
        ended = [(end, self.accepted.get(pair)) for pair, end in self.ended.items()]
        for known in self.node_records.values():
            if known.state != "left":
                self.apply(e.NodeJoined(known))
        self.checkpoints.taking.clear()
        for pointer in self.pointers.values():
            self.apply(e.Checkpointed(pointer))
        self.views = {}
        self.apply(e.Recovered(results, live, ended, list(self.stream.values()), list(self.health.values())))

    @staticmethod
    def _note_given(state: State, manifest: Manifest) -> None:
        for operator in manifest.operators:
            for sources in operator.inputs.values():
                for source in sources:
                    if source.ref is not None:
                        state.places.setdefault(source.ref.cid, set()).add(HUB)

    def _to_leader(self, make: Callable[[], e.Event | None]) -> None:
        """Send something to whoever leads when it arrives."""

        def arrive() -> None:
            event = make()
            if event is not None:
                self.apply(event)

        self._soon(arrive)

    def _carry_out(self, command: c.Command, state: State) -> None:
        def write(action: Callable[[], None]) -> None:
            """A guarded write: refused once another leader has raised the epoch."""
            self._soon(lambda: action() if self.state is state else None)

        if isinstance(command, c.Accept):
            acceptance = command.acceptance
            write(lambda: self.accepted.__setitem__((acceptance.tenant, acceptance.run), acceptance))
        elif isinstance(command, c.Assign):
            if command.may_run_in_vain and self.random.random() < 0.5:
                self._soon(lambda: self._receive(self.nodes[command.assignment.node], command.assignment, is_direct=True))
            write(lambda: self._store_assignment(command.assignment))
        elif isinstance(command, c.CommitResults):
            write(lambda: self._store_results(command, state))
        elif isinstance(command, c.Tell):
            self._tell(command)
        elif isinstance(command, c.Release):
            write(lambda: self._release(command))
        elif isinstance(command, c.Locate):
            self._soon(lambda: self._locate(command, state))
        elif isinstance(command, c.Keep):
            self._soon(lambda: self._keep(command, state))
        elif isinstance(command, c.RecordCancel):
            cancellation = command.cancellation
            write(lambda: self.cancelled.__setitem__((cancellation.tenant, cancellation.run), cancellation.actor))
        elif isinstance(command, c.RecordHealth):
            health = command.health
            self._soon(lambda: self.health.__setitem__(health.node, health))
        elif isinstance(command, c.EndRun):
            write(lambda: self._store_end(command, state))
        elif isinstance(command, c.DropCheckpoint):
            write(lambda: self._drop_checkpoint(command.key))
        else:
            view = self.views.setdefault((command.tenant, command.run), {})
            view.update({index: word for index, word, *_ in command.changes})

    def _answer(self, state: State, event: e.Event) -> None:
        self._soon(lambda: self.apply(event) if self.state is state else None)

    def _store_assignment(self, assignment: Assignment) -> None:
        self.checkpoints.check_given(assignment)
        self.stream[assignment.id] = assignment
        self.given[assignment.id] = assignment.node
        self._deliver(assignment)

    def _release(self, command: c.Release) -> None:
        self.stream.pop(command.assignment, None)

    def _store_results(self, command: c.CommitResults, state: State) -> None:
        done = []
        for key, generation, block in command.records:
            assert self.results.get((key, generation), block) == block, f"{key.hex()} generation {generation} was published twice"
            self.results[key, generation] = block
            done.append((key, record_cid(block)))
        self._answer(state, e.Committed(done))

    def _store_end(self, command: c.EndRun, state: State) -> None:
        pair = (command.end.tenant, command.end.run)
        assert pair not in self.ended, f"{pair} ended twice"
        self.ended[pair] = command.end
        if command.end.reason == "succeeded":
            for refs in command.end.outputs.values():
                assert all(ref.cid in self.hub for ref in refs), f"{pair} succeeded without its outputs"
        self._answer(state, e.Ended(*pair))

    def _holders(self, root: bytes, names: Iterable[str]) -> list[str]:
        found = []
        for name in names:
            if name == HUB:
                if root in self.hub:
                    found.append(name)
            elif self.nodes[name].is_there and root in self.nodes[name].blocks:
                found.append(name)
        return found

    def _locate(self, command: c.Locate, state: State) -> None:
        everyone = [HUB, *(n.name for n in state.nodes.values() if n.state != "gone")]
        found = {root: self._holders(root, names) or self._holders(root, everyone) for root, names in command.roots.items()}
        self._answer(state, e.Located(found))

    def _keep(self, command: c.Keep, state: State) -> None:
        missing = []
        for root, names in command.roots.items():
            if self._holders(root, names):
                self.hub.add(root)
            else:
                missing.append(root)
        self._answer(state, e.Kept(command.tenant, command.run, missing))

    def _tell(self, command: c.Tell) -> None:
        if self.is_stormy and self.random.random() < self.faults.lost:
            return
        self._soon(lambda: self._hear(self.nodes[command.node], command.message))

    # --- clients

    def submit(self, request: Request, at_s: float = 0.0) -> None:
        """Let a client ask for a run, and ask again until it is accepted."""
        for operator in request.manifest.operators:
            for sources in operator.inputs.values():
                self.hub.update(s.ref.cid for s in sources if s.ref is not None and not s.ref.size < 0)

        self.requests[request.tenant, request.run] = request

        def begin() -> None:
            self.wanted.append((request.tenant, request.run))
            self._send_request(request)

        self._later(at_s, begin)

    def _send_request(self, request: Request) -> None:
        def make() -> e.Event | None:
            if self.state is not None:
                self._note_given(self.state, request.manifest)
            manifest = request.manifest
            root = manifest_cid(manifest)
            return e.Submitted(request.tenant, request.run, manifest, root, share=request.share, **self.pinned)

        self._to_leader(make)

    def cancel(self, request: Request, at_s: float) -> None:
        """Let a tenant cancel a run, more than once if need be."""
        request.is_cancelled = True
        for again_s in (0.0, 30.0):
            self._later(
                at_s + again_s, lambda: self._to_leader(lambda: e.CancelRequested(request.tenant, request.run, "somebody"))
            )

    # --- nodes

    def _announce(self, node: SimNode) -> None:
        record = node.record
        self.node_records[node.name] = record
        self._to_leader(lambda: e.NodeJoined(record))

    def _beat(self, node: SimNode) -> None:
        self._later(1.0, partial(self._beat, node))
        if not node.is_there:
            return
        for parts in node.spool.values():
            for part in parts:
                if part.offer_at_us <= self.now_us:
                    self._offer(node, part)
        if not (self.is_stormy and self.random.random() < self.faults.lost):
            held = tuple(dict.fromkeys([*node.held, *node.spool]))
            beat = Beat(node.name, self.now_us, self.epoch, held, resident=node.resident)
            self._to_leader(lambda: e.BeatReceived(beat) if node.is_there else None)

        for assignment in node.held.values():
            for item in node.left.get(assignment.id, {}).values():
                if made := self.checkpoints.make(node.name, assignment, item):
                    self._soon(partial(self._take_checkpoint, made))

    def _drop_checkpoint(self, key: bytes) -> None:
        self.pointers.pop(key, None)

    def _take_checkpoint(self, made: Checkpoint) -> None:
        """Do what the leader's service does: one at a time for each key, and only what the core does not refuse."""
        state = self.state
        if state is None or self.is_cut_off or made.key in self.checkpoints.taking or refusal(state, made):
            return
        self.checkpoints.taking.add(made.key)

        def write() -> None:
            if self.state is not state:
                return
            if refusal(state, made):
                self.checkpoints.taking.discard(made.key)
                return
            self.checkpoints.check_forward(self.pointers.get(made.key), made)
            self.pointers[made.key] = made
            self._soon(written)

        def written() -> None:
            if self.state is state:
                self.checkpoints.taking.discard(made.key)
                self.apply(e.Checkpointed(made))

        self._soon(write)

    def _deliver(self, assignment: Assignment) -> None:
        self._soon(lambda: self._receive(self.nodes[assignment.node], assignment))

    def _receive(self, node: SimNode, assignment: Assignment, is_direct: bool = False) -> None:
        """Take an assignment from the stream, or straight from a leader that may have been deposed before it was stored."""
        if not node.is_there or assignment.id in node.held or not (is_direct or assignment.id in self.stream):
            return
        if assignment.epoch < node.epoch:
            self.stream.pop(assignment.id, None)
            return
        self.given[assignment.id] = assignment.node
        node.epoch = assignment.epoch
        node.held[assignment.id] = assignment
        if any(part.done.last for part in node.spool.get(assignment.id, ())):
            return
        if assignment.model_digests and assignment.type != "train.sft":
            node.resident = tuple(dict.fromkeys((*assignment.model_digests.values(), *node.resident)))[:MODELS_LOADED]
        node.left[assignment.id] = {item.key: item for item in assignment.items}
        node.tails[assignment.id] = Tails(assignment)
        life = node.record.started_at_us
        for item in assignment.items:
            self._later(self.random.choice((0.01, 0.1, 1.0, 6.0)), partial(self._finish, node, life, assignment, item))

    def _finish(self, node: SimNode, life: int, assignment: Assignment, item: Item) -> None:
        left = node.left.get(assignment.id)
        if not node.is_alive or node.record.started_at_us != life or left is None or item.key not in left:
            return
        if node.is_saboteur and self.random.random() < 0.5:
            self._sabotage(node, assignment, item)
            return
        del left[item.key]
        outcome, blocks = self._execute(node, assignment, item)
        tail = node.tails[assignment.id].of(item.key)
        found = tail.next(outcome, node.name) if tail is not None and self.random.random() < 0.95 else None
        if found is not None:
            after, kind = found
            left[after.key] = after
            action = partial(self._finish, node, life, replace(assignment, type=kind), after)
            self._later(self.random.choice((0.001, 0.01, 0.1, 1.0)), action)
        self._report(node, assignment, [(outcome, blocks)])

    def _sabotage(self, node: SimNode, assignment: Assignment, item: Item) -> None:
        """Answer as no honest node would."""
        left, draw = node.left[assignment.id], self.random.randrange(6)
        outcome, _ = self._execute(node, assignment, item)
        if draw == 0:  # what it claims to have made it does not have
            node.blocks -= {ref.cid for refs in outcome.outputs.values() for ref in refs}
        elif draw == 1:
            outcome = replace(outcome, reason="cancelled", outputs={}, result=b"")
        elif draw == 2:
            outcome = replace(outcome, reason="for no reason", outputs={}, result=b"")
        elif draw == 3:
            outcome = replace(outcome, attempt=outcome.attempt + 1)
        elif draw == 4:  # a last part with something of everything missing
            left.clear()
            left.update({item.key: item})
        elif others := [a for a in self.stream.values() if a.node != node.name]:
            victim = self.random.choice(others)
            forged = [replace(outcome, key=i.key, generation=i.generation, attempt=i.attempt) for i in victim.items]
            done = Done(node.name, victim.id, victim.epoch, tuple(forged), f"U{node.name}", b"signed", last=True)
            self._to_leader(lambda: e.DoneReceived(done))
        del left[item.key]
        self._report(node, assignment, [(outcome, {})])

    def _report(self, node: SimNode, assignment: Assignment, outcomes: list[tuple[Outcome, dict[bytes, bytes]]]) -> None:
        """Report what has happened, and what was gathered before; or gather it, while there is more to come."""
        unsent = node.tails[assignment.id].unsent
        unsent += outcomes
        is_last = not node.left[assignment.id]
        if not is_last and self.random.random() < 0.3:
            return
        outcomes, unsent[:] = list(unsent), []
        blocks: dict[bytes, bytes] = {}
        for _, inline in outcomes:
            blocks.update(inline)
        told = tuple(outcome for outcome, _ in outcomes)
        done = Done(node.name, assignment.id, assignment.epoch, told, f"U{node.name}", b"signed", last=is_last)
        part = Part(done, blocks, self.now_us)
        node.spool.setdefault(assignment.id, []).append(part)
        self._offer(node, part)

    def _offer(self, node: SimNode, part: Part) -> None:
        part.offer_at_us = self.now_us + OFFER_AGAIN_US
        if not node.is_there:
            return
        copies = 1
        if self.is_stormy:
            draw = self.random.random()
            copies = 0 if draw < self.faults.lost else 2 if draw < self.faults.lost + self.faults.twice else 1
        for _ in range(copies):
            self._to_leader(lambda: self._arrive(part))

    def _arrive(self, part: Part) -> e.Event | None:
        if self.state is None or part.done.node not in self.state.nodes:
            return None
        self.hub.update(part.blocks)
        return e.DoneReceived(part.done, part.blocks)

    def _hear(self, node: SimNode, message: Commit | Abort) -> None:
        if not node.is_there or message.epoch < node.epoch:
            return
        node.epoch = message.epoch
        if isinstance(message, Commit):
            if message.closed:
                if message.assignment in node.held:
                    self.stream.pop(message.assignment, None)
                for known in (node.held, node.left, node.spool, node.tails):
                    known.pop(message.assignment, None)
            return
        left = node.left.get(message.assignment, {})
        meant = node.tails[message.assignment].meant(message.keys or tuple(left)) if left else set()
        gone = [left.pop(key) for key in list(left) if key in meant]
        if gone:
            outcomes = [Outcome(i.key, i.generation, i.attempt, "cancelled", error="stopped by the leader") for i in gone]
            self._report(node, node.held[message.assignment], [(outcome, {}) for outcome in outcomes])

    # --- what operators do

    def _execute(self, node: SimNode, assignment: Assignment, item: Item) -> tuple[Outcome, dict[bytes, bytes]]:
        def failed(reason: str, missing: tuple[bytes, ...] = ()) -> tuple[Outcome, dict[bytes, bytes]]:
            return Outcome(item.key, item.generation, item.attempt, reason, error=f"it was {reason}", missing=missing), {}

        lacking = []
        for port in item.inputs.values():
            for located in port:
                root = located.ref.cid
                if root not in node.blocks:
                    if node.is_connected and self._holders(root, located.holders):
                        node.blocks.add(root)
                    else:
                        lacking.append(root)
        if lacking:
            return failed("input-missing", missing=tuple(sorted(set(lacking))))
        if node.crashes and self.random.random() < node.crashes:
            return failed("crashed")
        fate = item.params["fate"]
        if fate == "bad":
            return failed("user-error")
        if fate == "model" and node.lacks_model:
            return failed("model-missing")
        if fate in ("crashes", "crashes-twice"):
            limit = 2 if fate == "crashes-twice" else 1_000_000
            self.crashes[item.key] = self.crashes.get(item.key, 0) + 1
            if self.crashes[item.key] <= limit:
                return failed(self.random.choice(("crashed", "oom", "timeout", "internal")))
        return self._succeed(node, assignment, item)

    def _succeed(self, node: SimNode, assignment: Assignment, item: Item) -> tuple[Outcome, dict[bytes, bytes]]:
        self.executions += 1
        label = label_of(assignment.type, item.params, [x.ref.digest for refs in item.inputs.values() for x in refs])
        if item.params["fate"] == "draws":
            label += f" {self.random.randrange(3)}"
        outputs, result = result_of(assignment.type, label, item.params.get("parts", 1))
        roots = [ref.cid for refs in outputs.values() for ref in refs]
        node.blocks.update(roots)
        inline: dict[bytes, bytes] = {}
        if self.random.random() < 0.3 and len(roots) == 1:
            inline = {roots[0]: label.encode()}
        metered = Metered(exec_us=int(self.exec_us * node.slowness))
        return Outcome(item.key, item.generation, item.attempt, "succeeded", result, outputs, metered=metered), inline

    # --- misfortune

    def _befall(self) -> None:
        """Let what may happen in half a second happen; the first node always comes back."""
        chance = self.random.random
        faults = self.faults
        for node in self.nodes.values():
            if node.is_there and chance() < faults.kill / 2:
                self.kill(node, keeps_blocks=chance() < 0.5, keeps_spool=chance() < 0.5)
                if node.name == "n0" or chance() < 0.7:
                    self._later(self.random.uniform(0.5, 12), partial(self.revive, node))
            elif node.is_there and chance() < faults.cut / 2:
                self.cut(node)
                self._later(self.random.choice((0.2, 1.0, 8.0)), partial(self.mend, node))
            elif node.is_there and chance() < faults.forget / 2:
                for root in sorted(node.blocks):
                    if chance() < 0.5:
                        node.blocks.discard(root)
        if self.state is not None and chance() < faults.leader / 2:
            self.state = None
            self._later(self.random.uniform(0.1, 4), self._lead)
        elif self.state is not None and not self.is_cut_off and chance() < faults.leader_cut / 2:
            self.apply(e.CutOff())
            self.is_cut_off = True
            state = self.state
            self._later(self.random.uniform(0.5, 8), lambda: self._restore(state))

    def _restore(self, state: State) -> None:
        if self.state is not state:
            return
        self.is_cut_off = False
        self.apply(e.Restored())
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self.apply(event)

    def kill(self, node: SimNode, *, keeps_blocks: bool, keeps_spool: bool) -> None:
        """End a node without a word."""
        node.is_alive = False
        node.resident = ()
        node.held.clear()
        node.left.clear()
        node.tails.clear()
        if not keeps_blocks:
            node.blocks.clear()
        if not keeps_spool:
            node.spool.clear()
        self._sever(node)

    def _sever(self, node: SimNode) -> None:
        if self.random.random() < 0.7:
            self._to_leader(lambda: e.NodeDisconnected(node.name))

    def revive(self, node: SimNode) -> None:
        """Start a node again: a new life on what is left of its disk."""
        node.is_alive = node.is_connected = True
        node.record = replace(node.record, started_at_us=self.now_us)
        self._come_back(node)

    def cut(self, node: SimNode) -> None:
        """Cut a node off; it goes on with what it has."""
        node.is_connected = False
        self._sever(node)

    def mend(self, node: SimNode) -> None:
        """Connect a node again."""
        node.is_connected = True
        if node.is_alive:
            self._come_back(node)

    def _come_back(self, node: SimNode) -> None:
        self._announce(node)
        for parts in node.spool.values():
            for part in parts:
                self._offer(node, part)
        for assignment in list(self.stream.values()):
            if assignment.node == node.name:
                self._deliver(assignment)


def label_of(kind: str, params: Mapping[str, object], digests: Iterable[bytes]) -> str:
    """Return what an operator makes of its inputs: the same for the same."""
    told = f"{kind} {sorted(params.items())} {[d.hex() for d in digests]}"
    return sha256(told.encode()).hexdigest()[:16]
