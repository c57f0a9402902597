"""The leader: take-over, lease, and the loop of events, ``step`` and commands. All decisions are the core's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus, Pull, Subscription
from flowmesh_mesh.clock import now_us
from flowmesh_scheduler.assignments import AssignmentQueue
from flowmesh_scheduler.config import Config
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step
from flowmesh_scheduler.costs_store import CostsStore
from flowmesh_scheduler.feeds import Feeds
from flowmesh_scheduler.guarded import GuardedStream
from flowmesh_scheduler.hands import Hands
from flowmesh_scheduler.hub import Hub
from flowmesh_scheduler.intake import Resolver
from flowmesh_scheduler.lease import RENEW_S, SchedulerLease
from flowmesh_scheduler.recording import Recording
from flowmesh_scheduler.reports import Reports
from flowmesh_scheduler.requests import Requests
from flowmesh_scheduler.takeover import read_state

log = logging.getLogger("flowmesh.scheduler")

TICK_S = 0.1
SWEEP_S = 0.5


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
    ) -> None:
        self.bus = bus
        self.config = config
        self.name = name
        self.lease = lease
        self.hub = Hub(bus, store)
        self.state = State(config.settings)
        self.tenant_names = {key: tenant for tenant, key in config.tenants.items()}
        for key in config.tenants.values():
            self.state.tenant_secrets[key] = secret
        self.since_us = now_us()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.feeds = Feeds(bus.post, now_us)
        self.resolver = Resolver(bus, lambda: [n.name for n in self.state.nodes.values() if n.is_usable])
        self.ledger = GuardedStream(bus, subjects.LEDGER, subjects.LEDGER_EPOCHS, subjects.ledger_epoch, self._fenced)
        self.assign = GuardedStream(bus, subjects.ASSIGN, subjects.ASSIGN_EPOCHS, subjects.assign_epoch, self._fenced)
        self.queue = AssignmentQueue(bus, self.assign)
        self._carry_out = Hands(self).carry_out
        self.tenant_roots: dict[str, set[bytes]] = {}
        self.inline: dict[tuple[str, str], list[bytes]] = {}
        self.costs = CostsStore(bus, self.state.costs)
        self.reports = Reports(self)
        self.requests = Requests(self)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listening: list[Subscription | Pull] = []
        self.is_ready = False
        self._early: list[e.Event] = []
        self._woken_at_us = 0
        self._record = record
        self.recording: Recording | None = None

    # --- life

    async def run(self) -> str:
        """Lead until it is lost; return why."""
        try:
            await self._take_over()
            self.spawn(self._tick())
            self.spawn(self._renew())
            self.spawn(self._sweep())
            self.spawn(self.costs.run())
            return await self.lost
        finally:
            await self._close()

    async def _take_over(self) -> None:
        """Fence, read, rebuild, listen, act: in the order of docs/scheduler.md."""
        at_us = now_us()
        epoch = await self.ledger.raise_epoch(at_us // 1000, self.name, self.lease.revision, at_us)
        epoch = await self.assign.raise_epoch(epoch, self.name, self.lease.revision, at_us)
        self.state.epoch = epoch
        self.feeds = Feeds(self.bus.post, now_us, first=epoch)
        self._listening += await self.reports.listen()
        found = await read_state(self.bus, self.hub, self.state, self.queue)
        await self.costs.read()
        self._begin_recording()
        self.is_ready = True
        await self.reports.join_all(found.nodes)
        self.apply(found.recovered)
        if self.lost.done():
            return
        for acceptance in found.recovered.runs:
            feed = self.feeds.feed(acceptance.acceptance.tenant, acceptance.acceptance.run, acceptance.acceptance.encoding)
            self.feeds.open(feed)
        early, self._early = self._early, []
        for event in early:
            self.apply(event)
        await self._listen_to_tenants()
        await self.bus.flush()
        log.info("leading with epoch %d: %d runs, %d results", epoch, len(self.state.runs), len(self.state.results))

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

        self._listening.append(await self.bus.subscribe(subjects.LEADER_ALIVE, lambda d: d.post_respond(self.name.encode())))
        self._listening.append(await serve_blocks(self.bus, self.hub.store, subjects.HUB, now_us=now_us))
        await self.reports.catch_up()
        self._listening += await self.requests.listen()

    async def _close(self) -> None:
        self.is_ready = False
        self.queue.close()
        for listening in self._listening:
            with contextlib.suppress(FlowmeshError):
                await (listening.unsubscribe() if isinstance(listening, Subscription) else listening.stop())
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(self.ledger.close(), self.assign.close())
        await self.costs.close()
        await self.hub.store.drain()
        if self.recording is not None:
            await self.recording.close(self.lost.result() if self.lost.done() else "the take-over was interrupted")

    def stop(self, why: str) -> None:
        """End this leadership."""
        if not self.lost.done():
            self.lost.set_result(why)

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
            await asyncio.sleep(TICK_S)
            self.apply(e.Tick())

    async def _sweep(self) -> None:
        """Remove what is settled from the streams of requests and assignments."""
        while True:
            await asyncio.sleep(SWEEP_S)
            with contextlib.suppress(TransientError):
                await self.queue.sweep()
                await self.requests.sweep()
                await self.reports.sweep()

    async def _renew(self) -> None:
        """Keep the lease; fail closed when it cannot be kept."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                if not await self.lease.renew(now_us()):
                    self.stop("the lease was taken by another scheduler")
                    return
                if self.state.is_cut_off:
                    self.apply(e.Restored())
            except TransientError as error:
                if loop.time() > self.lease.held_until - RENEW_S and not self.state.is_cut_off:
                    log.warning("cut off: %s", error)
                    self.apply(e.CutOff())

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
        at_us, commands = now_us(), list[c.Command]()
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
        left_s = (due_us - now_us()) / 1e6
        if left_s < TICK_S:
            self._woken_at_us = due_us
            asyncio.get_running_loop().call_later(max(0.0, left_s), self.apply, e.Tick())
