"""One run of the simulator: the production core, with the service and the nodes played around it on a virtual clock.

Every event that the core would see in a mesh goes through ``step``, every command it gives is carried out: this module decides
nothing about work. What it adds is the world: machines that are rented and taken away, time that passes, contents that move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from heapq import heappop, heappush

import msgspec

from flowmesh_cas.cid import DAG_CBOR, cid_from_digest
from flowmesh_mesh.manifest import Manifest, record_cid
from flowmesh_mesh.messages import Abort, Assignment, Commit
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.check import Memory, check
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step
from flowmesh_scheduler.sim import pool_view
from flowmesh_scheduler.sim.fleet import Offer, node_record
from flowmesh_scheduler.sim.language_models import PINNED, SIZES
from flowmesh_scheduler.sim.machine import HUB_BYTES_PER_S, Machine
from flowmesh_scheduler.sim.metrics import Figures, RunTimes
from flowmesh_scheduler.sim.policies import Policy
from flowmesh_scheduler.sim.rental import Backlog, Kind, Market, Terms, backlog_of, wanted
from flowmesh_scheduler.sim.truth import demand_of
from flowmesh_scheduler.sim.worker import Batch, Lane, Worker
from flowmesh_scheduler.sim.workloads import Arrival, Scenario

_US = 1_000_000
_COMMIT_US = 3_000
_LOCATE_US = 2_000
_TICK_US = 10 * _US
_BEAT_US = 2 * _US
_SOON_US = 500_000
_LONGEST_US = 30 * 86_400 * _US
_EPOCH = 1


class Stuck(RuntimeError):
    """A run of the simulator that does not end: work is ready and nothing happens any more."""


@dataclass
class Simulation:
    """A scenario under a policy. ``checks``: assert the core's invariants after every step (slow)."""

    scenario: Scenario
    policy: Policy
    seed: int
    terms: Terms = field(default_factory=Terms)
    settings: Settings = field(default_factory=Settings)
    salts: bool = False
    checks: bool = False
    now_us: int = 0
    workers: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = State(self.settings, epoch=_EPOCH)
        self.market = Market(self.scenario.offers(), self.scenario.seed)
        self.placer = self.policy.placer(self.seed)
        self.times = RunTimes()
        self.hub: set[bytes] = set()
        self.batches = 0
        self.operators_run = 0
        self.lost_s = 0.0
        self.useful_s = 0.0
        self.preemptions = 0
        self.memory = Memory()
        self._digest = blake2b(digest_size=16)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0
        self._waiting_since: dict[bytes, int] = {}
        self._booting: dict[str, Machine] = {}
        self._sizes: dict[bytes, int] = {}
        self._unfinished = len(self.scenario.arrivals)
        self._wake_us = 0
        self._beaten_at_us = 0

    # --- the clock

    def run(self) -> Figures:
        """Play the scenario to its end; return what came of it."""
        for arrival in self.scenario.arrivals:
            self._at(round(arrival.at_s * _US), partial(self._submit, arrival))
        self._at(_TICK_US, self._tick)
        self._at(round(self.terms.review_s * _US), self._review)
        while self._heap:
            self.now_us, _, action = heappop(self._heap)
            if self.now_us > _LONGEST_US:
                raise Stuck(f"{self.policy.name} on {self.scenario.name}, seed {self.seed}: {self._unfinished} runs do not end")
            action()
        return self._figures()

    def _at(self, at_us: int, action: Callable[[], None]) -> None:
        self._number += 1
        heappush(self._heap, (max(at_us, self.now_us), self._number, action))

    def _tell(self, at_us: int, event: e.Event) -> None:
        self._at(at_us, partial(self.apply, event))

    def apply(self, event: e.Event) -> None:
        """Let the core see an event; carry out what it wants."""
        for command in step(self.state, event, self.now_us, self.placer):
            handler = _HANDLERS.get(type(command))
            if handler is not None:
                handler(self, command)
        if self.checks:
            check(self.state)
            self.memory.check(self.state)
        self._wake_when_due()

    def _wake_when_due(self) -> None:
        """Let the core look again at what it keeps back, as the service does."""
        due_us = min(self.state.fleet.recheck_us.values(), default=0)
        if due_us:
            wake_us = max(due_us, self.now_us + _SOON_US)
            if not self.now_us < self._wake_us <= wake_us:
                self._wake_us = wake_us
                self._at(wake_us, self._tick_once)

    # --- tenants

    def _submit(self, arrival: Arrival) -> None:
        manifest = salted(arrival.manifest, arrival.run) if self.salts else arrival.manifest
        for operator in manifest.operators:
            for sources in operator.inputs.values():
                for source in sources:
                    if source.ref is not None:
                        self.hub.add(source.ref.cid)
            if operator.code is not None:
                self.hub.add(operator.code.cid)
        named = dict.fromkeys(ref for operator in manifest.operators for ref in operator.models.values())
        models = {reference: PINNED[reference] for reference in named}
        sizes = {digest: SIZES[digest] for digest in models.values()}
        cid = cid_from_digest(DAG_CBOR, blake2b(arrival.run.encode(), digest_size=32).digest())
        self.times.submitted(arrival.run, self.now_us)
        self.apply(e.Submitted(arrival.tenant, arrival.run, manifest, cid, models, model_bytes=sizes))

    def _on_end(self, command: c.EndRun) -> None:
        self.times.ended(command.end.run, self.now_us, command.end.reason)
        self._unfinished -= 1
        self._tell(self.now_us + _COMMIT_US, e.Ended(command.end.tenant, command.end.run))

    # --- the ledger and the hub

    def _on_commit(self, command: c.CommitResults) -> None:
        records = [(key, record_cid(block)) for key, _, block in command.records]
        self._tell(self.now_us + _COMMIT_US, e.Committed(records))

    def _on_locate(self, command: c.Locate) -> None:
        self._at(self.now_us + _LOCATE_US, partial(self._located, tuple(command.roots)))

    def _located(self, roots: Sequence[bytes]) -> None:
        self.apply(e.Located({root: self._holders(root) for root in roots}))

    def _holders(self, root: bytes) -> list[str]:
        found = [w.name for w in self.workers.values() if root in w.machine.blocks]
        return [*found, HUB] if root in self.hub else found

    def _on_keep(self, command: c.Keep) -> None:
        seconds = 0.02 + sum(self._sizes.get(root, 0) for root in command.roots if root not in self.hub) / HUB_BYTES_PER_S
        self._at(self.now_us + round(seconds * _US), partial(self._kept, command))

    def _kept(self, command: c.Keep) -> None:
        missing = [root for root in command.roots if not self._holders(root)]
        self.hub.update(root for root in command.roots if root not in missing)
        self.apply(e.Kept(command.tenant, command.run, missing))

    # --- nodes

    def _on_assign(self, command: c.Assign) -> None:
        assignment = command.assignment
        worker = self.workers.get(assignment.node)
        self.batches += 1
        self._digest.update(f"{self.now_us} {assignment.node} {assignment.type} ".encode())
        self._digest.update(b"".join(item.key for item in assignment.items))
        if worker is not None:
            self._start(worker, worker.take(assignment))

    def _link_of(self, name: str) -> float:
        worker = self.workers.get(name)
        return HUB_BYTES_PER_S if worker is None else worker.machine.offer.link_bytes_per_s

    def _start(self, worker: Worker, lane: Lane) -> None:
        batch = worker.start(lane, self.now_us, self._link_of)
        if batch is not None:
            for at_us, keys in batch.parts:
                self._at(at_us, partial(self._finish, worker, lane, batch, keys))

    def _finish(self, worker: Worker, lane: Lane, batch: Batch, keys: Sequence[bytes]) -> None:
        if batch.is_stopped:
            return
        _, done, inline = worker.finish(lane, keys)
        assert batch.spent is not None
        self.hub.update(inline)
        if lane.running is None:
            self.useful_s += batch.spent.exec_s
            self._start(worker, lane)
            if tuple(worker.machine.resident) != worker.told_resident:
                self.apply(e.BeatReceived(worker.beat(self.now_us, _EPOCH)))
        if done is not None:
            for outcome in done.outcomes:
                for refs in outcome.outputs.values():
                    self._sizes.update((ref.cid, ref.size) for ref in refs)
            self.operators_run += len(done.outcomes)
            self.apply(e.DoneReceived(done, inline))
        if lane.running is None:
            self._watch_idle(worker)

    def _on_told(self, command: c.Tell) -> None:
        worker = self.workers.get(command.node)
        message = command.message
        batch = worker.held.get(message.assignment) if worker is not None else None
        if worker is None or batch is None:
            return
        if isinstance(message, Commit):
            if message.closed:
                del worker.held[message.assignment]
        elif isinstance(message, Abort):
            for key in message.keys or tuple(batch.items):
                batch.items.pop(key, None)
                batch.demands.pop(key, None)
            if not batch.items:
                for lane in worker.every_lane():
                    if lane.running is batch:
                        self.lost_s += worker.stop(lane, self.now_us)
                        self._start(worker, lane)
                self._watch_idle(worker)

    # --- machines

    def _review(self) -> None:
        """Apply the rule of the market to what is ready; see :mod:`rental`."""
        if self._unfinished:
            self._at(self.now_us + round(self.terms.review_s * _US), self._review)
        patient_until_us = self.now_us - round(self.terms.patience_s * _US)
        seen: dict[bytes, int] = {}
        late: dict[Kind, Backlog] = {}
        for work in pool_view.ready(self.state):
            since_us = seen[work.key] = self._waiting_since.get(work.key, self.now_us)
            if since_us <= patient_until_us:
                backlog = backlog_of(late, work, self.settings.batch_limit)
                backlog.since_us = min(backlog.since_us, since_us)
                digest = next(iter(work.model_digests.values()), "")
                backlog.demands.append(demand_of(work.operator.type, work.operator.params, work.inputs, digest))
        self._waiting_since = seen
        if late:
            supply = [w.machine for w in self.workers.values() if not w.is_leaving and w.is_idle]
            supply += self._booting.values()
            for offer in wanted(late, supply, self.market, self.terms, self.now_us / _US):
                self._rent(offer)

    def _rent(self, offer: Offer) -> None:
        machine, lifetime_s = self.market.rent(offer, self.now_us / _US)
        self._booting[machine.name] = machine
        self._at(round(machine.ready_at_s * _US), partial(self._boot, machine))
        if lifetime_s < 1e9:
            self._at(self.now_us + round(lifetime_s * _US), partial(self._preempt, machine))

    def _boot(self, machine: Machine) -> None:
        if self._booting.pop(machine.name, None) is None:
            return
        worker = Worker(
            machine, node_record(machine.offer, machine.name, self.now_us), self.scenario.seed, idle_since_us=self.now_us
        )
        self.workers[machine.name] = worker
        self.apply(e.NodeJoined(worker.record))
        self._watch_idle(worker)

    def _preempt(self, machine: Machine) -> None:
        """The owner takes the machine away without a word."""
        if machine.is_gone:
            return
        self.preemptions += 1
        self._booting.pop(machine.name, None)
        worker = self.workers.pop(machine.name, None)
        if worker is not None:
            for lane in worker.every_lane():
                self.lost_s += worker.stop(lane, self.now_us)
        self.market.give_back(machine, self.now_us / _US, is_taken=True)
        if worker is not None:
            self.apply(e.NodeDisconnected(machine.name))
            self._at(self.now_us + self.settings.suspicion_us + 1, self._tick_once)
            self._at(self.now_us + self.settings.node_lease_us + 1, self._tick_once)

    def _watch_idle(self, worker: Worker) -> None:
        if worker.is_idle and not worker.is_leaving:
            worker.idle_since_us = self.now_us
            self._at(self.now_us + round(self.terms.idle_release_s * _US), partial(self._release_if_idle, worker, self.now_us))

    def _release_if_idle(self, worker: Worker, since_us: int) -> None:
        if not worker.is_idle or worker.is_leaving or worker.machine.is_gone or worker.idle_since_us != since_us:
            return
        worker.is_leaving = True
        alone = [cid for cid in worker.made if cid not in self.hub]
        if not alone:
            self._leave(worker)
            return
        self.apply(e.NodeJoined(msgspec.structs.replace(worker.record, state="draining")))
        seconds = sum(worker.made[cid] for cid in alone) / min(HUB_BYTES_PER_S, worker.machine.offer.link_bytes_per_s)
        self._at(self.now_us + round(seconds * _US), partial(self._bring_home, worker, alone))

    def _bring_home(self, worker: Worker, roots: Sequence[bytes]) -> None:
        if not worker.machine.is_gone:
            self.hub.update(roots)
            self.apply(e.Located({root: self._holders(root) for root in roots}))
            self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        del self.workers[worker.name]
        self.market.give_back(worker.machine, self.now_us / _US)
        self.apply(e.NodeJoined(msgspec.structs.replace(worker.record, state="left")))

    # --- time

    def _tick(self) -> None:
        if self._unfinished:
            self._at(self.now_us + _TICK_US, self._tick)
            self._tick_once()

    def _tick_once(self) -> None:
        """Let time pass in the core, for which every node has been heard of within its lease."""
        if self.now_us - self._beaten_at_us > _BEAT_US:
            self._beaten_at_us = self.now_us
            for worker in list(self.workers.values()):
                self.apply(e.BeatReceived(worker.beat(self.now_us, _EPOCH)))
        self.apply(e.Tick())

    # --- what came of it

    def _figures(self) -> Figures:
        assert self._unfinished == 0, "runs are left over"
        totals = self.state.totals
        return Figures.of(
            self.market.machines,
            self.times,
            operators=self.operators_run,
            hits=totals["shared"],
            batches=self.batches,
            useful_s=self.useful_s,
            lost_s=self.lost_s,
            preemptions=self.preemptions,
            digest=self._digest.hexdigest(),
        )


_HANDLERS: dict[type, Callable[[Simulation, object], None]] = {
    c.Assign: Simulation._on_assign,  # type: ignore[dict-item]
    c.CommitResults: Simulation._on_commit,  # type: ignore[dict-item]
    c.Locate: Simulation._on_locate,  # type: ignore[dict-item]
    c.Keep: Simulation._on_keep,  # type: ignore[dict-item]
    c.Tell: Simulation._on_told,  # type: ignore[dict-item]
    c.EndRun: Simulation._on_end,  # type: ignore[dict-item]
}


def salted(manifest: Manifest, salt: str) -> Manifest:
    """Return the workflow with operators that are nobody else's: for policies that share nothing between runs."""
    operators = [msgspec.structs.replace(o, params={**o.params, "salt": salt}) for o in manifest.operators]
    return msgspec.structs.replace(manifest, operators=operators)


__all__ = ["Assignment", "Simulation", "Stuck", "salted"]
