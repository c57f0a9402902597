"""The leader: take-over, and the loop of events, ``step`` and commands. All decisions are the core's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import subjects, tasks
from flowmesh_mesh.bus import Bus, Pull, Subscription
from flowmesh_mesh.clock import SteadyClock, monotonic_s, now_us
from flowmesh_mesh.messages import WIRE_VERSION, Epoch, encode
from flowmesh_scheduler.assignments import AssignmentQueue
from flowmesh_scheduler.audit import Audit
from flowmesh_scheduler.checkpoints import Checkpoints
from flowmesh_scheduler.config import Config
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step
from flowmesh_scheduler.costs_store import CostsStore
from flowmesh_scheduler.feeds import Feeds
from flowmesh_scheduler.guarded import GuardedStream, patiently
from flowmesh_scheduler.hands import Hands
from flowmesh_scheduler.hub import Hub
from flowmesh_scheduler.intake import Resolver
from flowmesh_scheduler.keepers import Keepers
from flowmesh_scheduler.lease import Change, SchedulerLease
from flowmesh_scheduler.recording import Recording
from flowmesh_scheduler.reports import Reports
from flowmesh_scheduler.requests import Requests
from flowmesh_scheduler.standby_keeper import StandbyKeeper
from flowmesh_scheduler.standbys import Highest, Presence, Vacancy
from flowmesh_scheduler.takeover import Found, Report, Stopwatch, collection_put_off, lacking_streams, make_streams, read_state

log = logging.getLogger("flowmesh.scheduler")

TICK_S = 0.1
SWEEP_S = 0.5

FINISH_S = 0.5
"""Longest wait of a leader that stops for its last writes."""

STEP_ALLOWANCE_S = 120.0
"""Rebuilding the state of a mesh is one step, the longest of all: it counts as a sign of life for so long."""


class Leader:
    """One epoch of leadership, from take-over until the lease or the fence is lost."""

    def __init__(
        self,
        bus: Bus,
        config: Config,
        name: str,
        lease: SchedulerLease,
        store: BlockStore,
        secret: bytes,
        record: Path | None = None,
        highest: Highest | None = None,
        presence: Presence | None = None,
        vacancy: Vacancy | None = None,
        memory: StandbyKeeper | None = None,
    ) -> None:
        self.bus = bus
        self.config = config
        self.name = name
        self.lease = lease
        self.secret = secret
        self.hub = Hub(bus, store)
        self.state = State(config.settings)
        self.tenant_names = {key: tenant for tenant, key in config.tenants.items()}
        for key in config.tenants.values():
            self.state.tenant_secrets[key] = secret
        self.now_us = SteadyClock().now_us
        """The time of the core: a wall clock that jumps must not make nodes seem silent."""
        self.since_us = self.now_us()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.feeds = Feeds(bus.post, now_us)
        self.resolver = Resolver(bus, lambda: [n.name for n in self.state.nodes.values() if n.is_usable])
        self.highest = highest if highest is not None else Highest()
        self.presence = presence if presence is not None else Presence(name, "")
        self.report = Report(why=vacancy.why, previous=vacancy.previous) if vacancy is not None else Report()
        self._last_sign_s = vacancy.last_sign_s if vacancy is not None else 0.0
        self.is_overtaken = False
        """A node has seen a higher epoch than ours: lead again under one that is higher still."""
        self.ledger = self._guarded(subjects.LEDGER, subjects.LEDGER_EPOCHS, subjects.ledger_epoch)
        self.assign = self._guarded(subjects.ASSIGN, subjects.ASSIGN_EPOCHS, subjects.assign_epoch)
        self.queue = AssignmentQueue(bus, self.assign)
        self.hands = Hands(self)
        self._carry_out = self.hands.carry_out
        self.tenant_roots: dict[str, set[bytes]] = {}
        self.inline: dict[tuple[str, str], list[bytes]] = {}
        self.costs = CostsStore(bus, self.state.costs)
        self.reports = Reports(self)
        self.requests = Requests(self)
        self.checkpoints = Checkpoints(self)
        self.memory = memory
        self.keepers = Keepers(self)
        self.audit = Audit(self)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listening: list[Subscription | Pull] = []
        self.is_ready = False
        self.is_cut_off = False
        self._is_looking = False
        self._early: list[e.Event] = []
        self._woken_at_us = 0
        self._record = record
        self.recording: Recording | None = None

    def _guarded(self, stream: str, epochs: str, subject: Callable[[int], str]) -> GuardedStream:
        return GuardedStream(self.bus, stream, epochs, subject, self._fenced, is_replicated=self.config.replicas > 1)

    # --- life

    async def run(self) -> str:
        """Lead until it is lost; return why. :meth:`finish` and :meth:`close` must follow."""
        self.spawn(self._tick())
        await self._take_over()
        self.spawn(self._sweep())
        self.spawn(self.costs.run())
        self.spawn(self.audit.run())
        return await self.lost

    async def _take_over(self) -> None:
        """Fence, read, rebuild, listen, act: in the order of docs/scheduler.md."""
        watch = Stopwatch(self.report)
        with collection_put_off():
            await self._raise_epochs()
            watch.lap("fence")
            self._listening += await self.reports.listen()
            self._listening += await self.checkpoints.listen()
            self.tell_epoch(subjects.ALL_NODES_CONTROL)
            await self.keepers.restore_ledger()
            watch.lap("restore")
            reading = read_state(self.bus, self.hub, self.state, self.queue)
            found, _, _ = await asyncio.gather(reading, self.costs.read(), self.checkpoints.recover())
            watch.lap("read")
            await self.reports.join_all(found.nodes)
            watch.lap("nodes")
            self._begin_recording()
            early = self._rebuild(found)
            watch.lap("rebuild")
        if self.lost.done():
            return
        self.report.count(self.state, found)
        for acceptance in found.recovered.runs:
            feed = self.feeds.feed(acceptance.acceptance.tenant, acceptance.acceptance.run, acceptance.acceptance.encoding)
            self.feeds.open(feed)
        self.keepers.begin(found.lost)
        for event in early:
            self.apply(event)
        watch.lap("act")
        await self._listen_to_tenants()
        await patiently(self.bus.flush)
        watch.lap("listen")
        log.warning("leading with epoch %d: %s", self.state.epoch, self.report.text())

    def _rebuild(self, found: Found) -> list[e.Event]:
        """Let the core take over: nodes and checkpoints first, then runs and assignments. Return what else came meanwhile.

        A heartbeat must not come before: it names assignments that the core would not know yet, and have stopped.
        """
        early, self._early = self._early, []
        self.is_ready = True
        for event in early:
            if isinstance(event, e.NodeJoined | e.Checkpointed):
                self.apply(event)
        self.lease.beat(STEP_ALLOWANCE_S)
        self.apply(found.recovered)
        self.lease.beat()
        return [event for event in early if not isinstance(event, e.NodeJoined | e.Checkpointed)]

    def tell_epoch(self, subject: str) -> None:
        """Let nodes know who leads, under which epoch, and which version of the wire that is."""
        self.bus.post(subject, encode(Epoch(self.state.epoch, self.name, self.lease.revision, self.since_us, WIRE_VERSION)))

    async def _raise_epochs(self) -> None:
        """Write the epoch records; from here on nobody who led earlier can write."""
        at_us, lease = now_us(), self.lease.revision
        await patiently(partial(make_streams, self.bus, max(at_us // 1000, self.highest.sequence + 1), self.config.replicas))
        at_least = max(at_us // 1000, self.highest.epoch + 1)
        epoch = await self.ledger.raise_epoch(at_least, self.name, lease, at_us)
        if self._last_sign_s:
            self.report.silent_s = monotonic_s() - self._last_sign_s
        epoch = await self.assign.raise_epoch(epoch, self.name, lease, at_us)
        self.state.epoch = self.presence.epoch = epoch
        self.feeds = Feeds(self.bus.post, now_us, first=epoch)
        self.highest.note(epoch, max(self.ledger.fence_sequence, self.assign.fence_sequence))
        self.spawn(asyncio.to_thread(self.highest.write))

    def _begin_recording(self) -> None:
        """Begin the event log of this epoch, if one is wanted; without it the leader leads all the same."""
        if self._record is None:
            return
        try:
            self.recording = Recording(self._record, self.state, self.since_us, max_bytes=self.config.record_max_bytes)
        except OSError as error:
            log.error("no event log: %s", error)
            return
        self.spawn(self.recording.run())

    def hub_holds(self, roots: Iterable[bytes]) -> None:
        """Let the core know that the hub holds contents which no event tells of."""
        found = list(roots)
        for root in found:
            self.state.places.setdefault(root, set()).add(subjects.HUB)
        if self.recording is not None:
            self.recording.note_held(found)

    async def _listen_to_tenants(self) -> None:
        from flowmesh_mesh.transfer import serve_blocks

        self._listening.append(await serve_blocks(self.bus, self.hub.store, subjects.HUB, now_us=now_us))
        # the step before may have taken longer than the broker waits for a sign of this connection: it comes back by itself
        await patiently(self.reports.catch_up)
        await self.requests.listen(self._listening)

    async def finish(self) -> None:
        """The end of a leadership that nobody has taken: let what was decided become durable, so that the next leader has it."""
        if not self.lease.is_held or not self.is_ready:
            return
        for listening in self._listening:
            if isinstance(listening, Subscription):
                listening.mute()
        self.queue.close(is_written=True)
        self.hands.write_ends()
        await asyncio.gather(self.ledger.drain(FINISH_S), self.assign.drain(FINISH_S), self._answer_last())

    async def _answer_last(self) -> None:
        """Answer what has been asked: whoever asks the next leader is answered there, whoever asked us would wait in vain."""
        with contextlib.suppress(FlowmeshError):
            await self.bus.flush(FINISH_S)
        until_s = monotonic_s() + FINISH_S
        await asyncio.sleep(0)
        while self.requests.answering and monotonic_s() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self.bus.push()

    async def close(self) -> None:
        """Listen and write no more."""
        self.is_ready = False
        self.queue.close(is_written=False)
        for listening in self._listening:
            with contextlib.suppress(FlowmeshError):
                await (listening.unsubscribe() if isinstance(listening, Subscription) else listening.stop())
        await tasks.end(self._tasks)
        await asyncio.gather(self.ledger.close(), self.assign.close())
        await self.costs.close()
        await self.hub.store.drain()
        if self.recording is not None:
            await self.recording.close(self.lost.result() if self.lost.done() else "the take-over was interrupted")

    def stop(self, why: str) -> None:
        """End this leadership."""
        if not self.lost.done():
            self.lost.set_result(why)

    @property
    def refused_writes(self) -> int:
        """How many writes the broker refused because another scheduler leads."""
        return self.ledger.refused + self.assign.refused

    # --- the lease

    def on_lease(self, change: Change) -> None:
        """Hear what became of the lease: without it nothing new is given out, and no clock of a node's lease runs."""
        if change is Change.LOST:
            self.stop("the lease was taken by another scheduler")
        elif change is Change.UNSURE:
            self._cut_off("the broker does not take the lease's renewal")
            self.spawn(self._look_after_streams())
        elif change is Change.RETAKEN:
            self.spawn(self._go_on())
        elif self.is_cut_off:
            self._restore()

    def _cut_off(self, why: str) -> None:
        if not self.is_cut_off:
            log.warning("cut off: %s", why)
            self.is_cut_off = True
            self.apply(e.CutOff())

    def _restore(self) -> None:
        log.warning("no longer cut off")
        self.is_cut_off = False
        self.apply(e.Restored())

    async def _go_on(self) -> None:
        """The lease had run out, and we have it again: go on if nobody led meanwhile."""
        current = await asyncio.gather(patiently(self.ledger.is_current), patiently(self.assign.is_current))
        if not all(current):
            self.stop("another scheduler led while this one was cut off")
        elif self.is_cut_off and self.lease.is_held:
            self._restore()

    def on_reconnect(self) -> None:
        """The broker is back, perhaps without what it kept in memory, perhaps with an empty store."""
        self.spawn(self._look_after_streams())

    async def _look_after_streams(self) -> None:
        """Make what lacks of the streams; a leader whose guarded streams are gone has lost its fence."""
        if self._is_looking:
            return
        self._is_looking = True
        try:
            lacking = await patiently(partial(lacking_streams, self.bus))
            if lacking:
                self.stop(f"the broker has lost its streams {', '.join(lacking)}")
            else:
                await patiently(partial(make_streams, self.bus, now_us() // 1000, self.config.replicas))
                await patiently(self.requests.ensure_consumer)
        except FlowmeshError as error:
            log.warning("the streams cannot be looked after now: %s", error)
        finally:
            self._is_looking = False

    def hear_epoch(self, node: str, epoch: int) -> None:
        """A node tells the highest epoch that it has seen. It takes nothing from a leader below that."""
        if epoch > self.state.epoch and self.is_ready and self.highest.accepts(node, epoch):
            self.highest.note(epoch)
            self.is_overtaken = True
            self.stop(f"node {node} has seen epoch {epoch}")

    def _fenced(self, error: Exception) -> None:
        self.stop(f"fenced: {error}")

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        log.error("leader task failed", exc_info=error)
        if not isinstance(error, TransientError | UsageError):
            self.stop(f"internal error: {error!r}")

    async def _tick(self) -> None:
        while True:
            self.lease.beat()
            await asyncio.sleep(TICK_S)
            if self.is_ready:
                self.apply(e.Tick())

    async def _sweep(self) -> None:
        """Remove what is settled from the streams of requests and assignments."""
        while True:
            await asyncio.sleep(SWEEP_S)
            if self.is_cut_off or not self.lease.is_held:
                continue  # removing is not fenced: another leader may be about to read
            with contextlib.suppress(TransientError):
                await self.queue.sweep()
                await self.requests.sweep()
                await self.reports.sweep()

    # --- the loop: event, step, commands

    def _send(self) -> None:
        """Let guarded writes and messages leave now: nodes and the disk work while this loop goes on."""
        self.ledger.flush()
        self.assign.flush()
        self.bus.push()

    def apply(self, event: e.Event) -> None:
        """Let the core decide about an event and carry out what it wants."""
        if self.lost.done():
            return
        if not self.is_ready:
            self._early.append(event)
            return
        if not (self.is_cut_off or self.lease.is_held):
            self._cut_off("the lease ran out")  # this process stood still: nothing may happen before the lease is sure
        at_us, commands = self.now_us(), list[c.Command]()
        try:
            try:
                commands = step(self.state, event, at_us)
            finally:
                if self.recording is not None:
                    self.recording.note(at_us, event, commands)
            is_urgent = True
            for command in commands:
                if is_urgent and not isinstance(command, c.CommitResults | c.Assign):
                    is_urgent = False
                    self._send()
                self._carry_out(command)
            self._send()
            self._wake_when_due()
        except Exception as error:
            log.exception("step failed on %s", type(event).__name__)
            self.stop(f"internal error: {error!r}")

    def _wake_when_due(self) -> None:
        """Let the core look again at what it keeps back, if that is due before the next tick."""
        due_us = min(self.state.fleet.recheck_us.values(), default=0)
        if not due_us or due_us == self._woken_at_us:
            return
        left_s = (due_us - self.now_us()) / 1e6
        if left_s < TICK_S:
            self._woken_at_us = due_us
            asyncio.get_running_loop().call_later(max(0.0, left_s), self.apply, e.Tick())
