"""The agent: one process per node that connects, announces itself, takes assignments, answers for its blocks, and leaves.

It never blocks: what does (store, hashing, models) runs in threads, operators run in processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from flowmesh_cas.errors import FlowmeshError, NotFoundError, UsageError
from flowmesh_cas.pack_store import PackStore
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import messages, subjects, tasks, transfer
from flowmesh_mesh.bus import Bus, Pull, Subscription
from flowmesh_mesh.bus import Delivery as Message
from flowmesh_mesh.clock import monotonic_s, now_us
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.messages import (
    Abort,
    Assignment,
    Beat,
    CheckpointKept,
    Commit,
    Epoch,
    Guard,
    Log,
    NodeRecord,
    Recall,
    Refused,
    Resolve,
    Resolved,
    Unguard,
    decode,
    encode,
)
from flowmesh_node.checkpoints import Checkpoints
from flowmesh_node.delivery import Delivery
from flowmesh_node.epochs import Epochs
from flowmesh_node.executors import Executors, executor_environment
from flowmesh_node.inline import Inline
from flowmesh_node.inputs import Cache, Inputs
from flowmesh_node.intake import Intake
from flowmesh_node.inventory import Inventory
from flowmesh_node.keeper import node_keeper
from flowmesh_node.operators.registry import Available, available
from flowmesh_node.runner import Runner
from flowmesh_node.settings import Settings
from flowmesh_node.spool import Spool

log = logging.getLogger("flowmesh.node")

BEAT_S = 1.0
CONFIRM_S = 2.0
"""How long a node that leaves waits for the leader to confirm what it has answered."""

LINES_WAIT_MAX_BYTES = 4 * 1024 * 1024
"""Most bytes of printed lines that wait for a connection; the oldest go."""

LINES_WAIT_S = 1.5
"""How long they wait after it is back: they are not kept by anybody, and the leader may come back later."""

BEAT_SPACING_S = 0.1
"""Least time between two heartbeats, so that a burst of changes is one message."""

VERSIONS = ("flowmesh-nats", "torch", "transformers", "trl", "peft", "duckdb")
Control = Assignment | Commit | Abort | CheckpointKept | Resolve | Epoch | Refused | Guard | Unguard | Recall


def _load() -> tuple[float, int]:
    """Return the share of the CPUs that is busy, and the bytes of memory that are free."""
    return psutil.cpu_percent() / 100, int(psutil.virtual_memory().available)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an agent is made of that touches the machine under it; a simulation puts others in their place."""

    open_store: Callable[[Path], BlockStore] = PackStore
    make_executors: Callable[..., Executors] = Executors
    available: Callable[[], Available] = available
    load: Callable[[], tuple[float, int]] = _load


class Agent:
    """A node of the mesh, from :meth:`start` to :meth:`stop`."""

    def __init__(self, settings: Settings, inventory: Inventory, parts: Parts | None = None) -> None:
        self.settings = settings
        self.inventory = inventory
        self._parts = parts or Parts()
        self.state = "active"
        self.started_at_us = now_us()
        self.is_gone = asyncio.Event()
        self.is_refused = asyncio.Event()
        self.refusal: Refused | None = None
        self._credentials = Credentials.parse(settings.credentials)
        self._available = self._parts.available()
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._changed = asyncio.Event()
        self._numeric: set[str] = set()
        self.leaving_at_us = 0
        self.taking_leave = False
        self.on_notice: list[Callable[[int], None]] = []
        """Called with the time, in microseconds, when this machine is to be taken away."""
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._is_stopping = False
        self._pull: Pull | None = None

    # --- the beginning

    async def start(self) -> None:
        """Connect and take part; raise TransientError when the mesh cannot be reached, UsageError when it refuses."""
        settings = self.settings
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.bus, self.bulk = await asyncio.gather(self._connect(), self._connect(" blocks"))
        self.store = await asyncio.to_thread(self._parts.open_store, settings.folder / "store")
        cache = await asyncio.to_thread(Cache, settings.folder / "cache", settings.cache_bytes)
        self.inputs = Inputs(self.bulk, self.store, settings.node, cache)
        self.delivery = Delivery(self.bus, settings.node, self._credentials, Spool(settings.folder / "spool"), monotonic_s)
        await asyncio.to_thread(self.delivery.restore)
        environment = executor_environment(cpus=self.inventory.cpus, slots=settings.slots, allow_hub=settings.allow_hub)
        self.executors = self._parts.make_executors(
            environment,
            slots=settings.slots,
            user_slots=settings.user_slots,
            memory_bytes=self.inventory.memory_bytes,
            on_change=self._note_change,
        )
        self.checkpoints = Checkpoints(self.bus, self.store, settings.node, self.inputs.note_here)
        runner = Runner(
            settings,
            self.store,
            self.inputs,
            self.executors,
            self._send_log,
            self.inventory.memory_bytes,
            self._note_numeric,
            self.checkpoints,
            self.inventory.hazard_per_hour,
        )
        self.intake = Intake(
            settings.node,
            self._available.types,
            Epochs(settings.folder / "epoch"),
            self.delivery,
            Inline(self.store),
            self.inputs,
            runner,
            self._note_change,
            life=self.started_at_us,
        )
        folder, epochs = settings.folder, self.intake.epochs
        self.keeper = await asyncio.to_thread(node_keeper, self.bulk, self.store, settings.node, folder, epochs)
        await self._take_part()

    async def _connect(self, purpose: str = "") -> Bus:
        """Open a connection; blocks get one of their own, so that no heartbeat queues behind them."""
        settings, deadline_s = self.settings, monotonic_s() + self.settings.connect_s
        while True:
            try:
                return await Bus.connect(
                    settings.urls,
                    self._credentials,
                    name=f"node {settings.node}{purpose}",
                    inbox=subjects.inbox_prefix(settings.node),
                    deadline_s=min(10.0, max(0.5, deadline_s - monotonic_s())),
                    on_reconnect=None if purpose else self._on_reconnect,
                )
            except UsageError:
                raise
            except FlowmeshError as error:
                if monotonic_s() > deadline_s:
                    raise
                log.info("%s; trying again", error.message)
                await asyncio.sleep(random.uniform(0.1, 0.5))

    async def _take_part(self) -> None:
        node, bus = self.settings.node, self.bus
        self._subscriptions = [
            await bus.subscribe(subjects.node_control(node), self._on_control),
            await bus.subscribe(subjects.ALL_NODES_CONTROL, self._on_control),
            await transfer.serve_blocks(self.bulk, self.store, node, now_us=now_us),
        ]
        self._pull = await bus.pull(subjects.ASSIGN, subjects.assign_consumer(node), self.intake.receive)
        await self._announce()
        self.delivery.offer_all()
        for loop in (self._beat, self.delivery.watch, self.intake.renew, self.checkpoints.watch):
            self._spawn(loop())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a part of the agent failed", exc_info=task.exception())

    # --- saying who we are

    def record(self) -> NodeRecord:
        """Return what this node says of itself."""
        found = self.inventory
        return NodeRecord(
            self.settings.node,
            self._credentials.public_key,
            self.started_at_us,
            self._available.types,
            platform.python_version(),
            found.cpus,
            found.memory_bytes,
            found.devices,
            found.price_per_hour,
            tuple(sorted(self._numeric)),
            _versions(),
            self.settings.slots,
            found.site,
            self.state,
            found.hazard_per_hour,
            found.watts,
            found.idle_watts,
            found.bandwidth_bytes_per_s,
            found.egress_usd_per_gb,
            messages.WIRE_VERSION,
            messages.WIRE_OLDEST,
            self.leaving_at_us,
        )

    def missing(self) -> dict[str, list[str]]:
        """Return what each operator type lacks that cannot run here."""
        return {name: list(lacks) for name, lacks in self._available.missing.items()}

    async def _announce(self) -> None:
        """Store the node's record; the leader that makes the stream may still be starting."""
        subject, data, pause_s = subjects.node_record(self.settings.node), encode(self.record()), 0.02
        deadline_s = monotonic_s() + self.settings.connect_s
        while True:
            try:
                await self.bus.store(subject, data, timeout_s=2.0)
                break
            except FlowmeshError as error:
                if monotonic_s() > deadline_s:
                    raise
                log.debug("not announced yet: %s", error.message)
            await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
            pause_s = min(1.0, pause_s * 1.5)
        self._send_beat()

    def _note_numeric(self, numeric: str) -> None:
        """Advertise a numeric class that an engine of this node has just proved by its self-test."""
        if numeric not in self._numeric:
            self._numeric.add(numeric)
            self._spawn(self._announce())

    def _note_change(self) -> None:
        self._changed.set()

    async def _beat(self) -> None:
        while True:
            self._changed.clear()
            self._send_beat()
            await asyncio.sleep(BEAT_SPACING_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), BEAT_S - BEAT_SPACING_S)

    def _send_beat(self) -> None:
        busy_share, free_bytes = self._parts.load()
        beat = Beat(
            self.settings.node,
            now_us(),
            self.intake.epochs.highest,
            tuple({**dict.fromkeys(self.intake.held), **dict.fromkeys(self.delivery.unconfirmed())}),
            self.intake.busy - self.intake.queued,
            self.executors.resident,
            busy_share,
            min(free_bytes, self.inventory.memory_bytes),
            self.state,
            self.intake.queued,
            self.started_at_us,
        )
        self._post(subjects.node_beat(self.settings.node), encode(beat))

    def _send_log(self, lines: Log) -> None:
        """Send lines on; while there is no connection the last of them wait for one."""
        data = encode(lines)
        if self.bus.connected and not self._unsent:
            self._post(subjects.node_log(self.settings.node), data)
            return
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        while self._unsent_bytes > LINES_WAIT_MAX_BYTES:
            self._unsent_bytes -= len(self._unsent.popleft())

    async def _send_unsent(self) -> None:
        """Send the lines that waited, once whoever listens has had time to come back too."""
        await asyncio.sleep(LINES_WAIT_S)
        while self._unsent and self.bus.connected:
            data = self._unsent.popleft()
            self._unsent_bytes -= len(data)
            self._post(subjects.node_log(self.settings.node), data)

    def _post(self, subject: str, data: bytes) -> None:
        """Publish what may be lost; while disconnected it is."""
        if self.bus.connected:
            with contextlib.suppress(FlowmeshError):
                self.bus.post(subject, data)

    def _on_reconnect(self) -> None:
        if not self._is_stopping and self._pull is not None:
            self.delivery.offer_all()
            self.checkpoints.offer_all()
            self._spawn(self._announce())
            self._spawn(self._send_unsent())
            self._note_change()

    # --- being told

    def _on_control(self, message: Message) -> None:
        try:
            control: Control = decode(message.data, Control)  # type: ignore[arg-type]
        except UsageError as error:
            log.warning("refused a control message: %s", error.message)
            return
        match control:
            case Assignment():
                self.intake.hear(control)
            case Commit():
                self.intake.commit(control)
                if control.assignment not in self.intake.held:
                    self.checkpoints.close(control.assignment)
            case CheckpointKept():
                self.checkpoints.kept(control)
            case Abort():
                self.intake.abort(control)
            case Resolve():
                self._spawn(self._resolve(control, message))
            case Guard() | Unguard() | Recall():
                self.keeper.receive(control, message)
            case Epoch():
                if self.intake.epochs.see(control.epoch, control.wire):
                    self.delivery.offer_all()
                    self.checkpoints.offer_all()
                self._note_change()
            case Refused():
                if control.node == self.settings.node:
                    self.refusal = control
                    self.is_refused.set()

    async def _resolve(self, question: Resolve, message: Message) -> None:
        try:
            answer = await asyncio.to_thread(_resolved, question.reference)
        except FlowmeshError as error:
            text = f"{error.message} ({error.hint})" if error.hint else error.message
            answer = Resolved(question.reference, error=text)
        except Exception as error:
            log.exception("resolving %s", question.reference)
            answer = Resolved(question.reference, error=f"{type(error).__name__}: {error}")
        await message.respond(encode(answer))

    # --- what people see

    def status(self) -> dict[str, Any]:
        """Return the node's state for people."""
        held = [
            {
                "assignment": each.assignment.id,
                "type": each.assignment.type,
                "items": len(each.assignment.items),
                "state": each.state,
                "for_s": round(monotonic_s() - each.since_s, 3),
            }
            for each in self.intake.held.values()
        ]
        return {
            "node": self.settings.node,
            "mesh": self.settings.mesh,
            "state": self.state,
            "leaving_at_us": self.leaving_at_us,
            "connected": self.bus.connected,
            "pid": os.getpid(),
            "epoch": self.intake.epochs.highest,
            "types": list(self._available.types),
            "missing": self.missing(),
            "assignments": held,
            "taken": self.intake.taken,
            "unconfirmed": len(self.delivery.unconfirmed()),
            "executors": self.executors.describe(),
            "uptime_s": round((now_us() - self.started_at_us) / 1e6, 1),
        }

    # --- the end

    def notice(self, at_us: int) -> None:
        """This machine is to be taken away at that time: say so, and let everything that can be saved be saved."""
        self.leaving_at_us = at_us
        for each in self.on_notice:
            each(at_us)
        self.executors.checkpoint_now()

    async def cordon(self) -> None:
        """Take nothing new, and go on with all that is held, until :meth:`resume`."""
        await self._turn("cordoned")

    async def pause(self) -> None:
        """Take nothing new, give back what has not begun, and finish the rest, until :meth:`resume`."""
        self.intake.is_draining = True
        await self._turn("draining")
        self.intake.give_back()

    async def resume(self) -> None:
        """Take work again."""
        self.intake.is_draining = False
        await self._turn("active")

    async def _turn(self, state: str) -> None:
        self.state = state
        self._note_change()
        await self._quietly(self._announce(), 2.0)

    async def drain(self, budget_s: float) -> bool:
        """Take nothing new, give back what has not begun, end and deliver the rest within ``budget_s``; tell whether all is."""
        self.state, self.intake.is_draining, self.taking_leave = "draining", True, True
        self.executors.checkpoint_now()
        if self._pull is not None:
            await self._pull.stop()
            self._pull = None
        await self._quietly(self._announce(), 2.0)
        self.intake.give_back()
        deadline_s = monotonic_s() + budget_s
        while self.intake.busy and monotonic_s() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        # What is answered is safe in the spool; the leader may be gone already.
        deadline_s = min(deadline_s, monotonic_s() + CONFIRM_S)
        while self.delivery.unconfirmed() and monotonic_s() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return not self.intake.busy

    async def stop(self) -> None:
        """Leave: end what still runs, spool what is unconfirmed, say goodbye, close. Takes seconds at most."""
        if self._is_stopping:
            return
        self._is_stopping = True
        await self.intake.stop()
        await self._quietly(self.executors.close(), 5.0)
        await self._quietly(self.delivery.close(), 3.0)
        await self._quietly(self.keeper.close(), 1.0)
        await self._quietly(self.checkpoints.settle(), 3.0)
        self.state = "left"
        if self.bus.connected:
            await self._quietly(self.bus.store(subjects.node_record(self.settings.node), encode(self.record())), 1.0)
            self._send_beat()
        await tasks.end(self._tasks)
        await asyncio.gather(self.bus.close(), self.bulk.close())
        await asyncio.to_thread(self.store.close)
        self.is_gone.set()

    @staticmethod
    async def _quietly(work: Awaitable[Any], budget_s: float) -> None:
        try:
            await asyncio.wait_for(work, budget_s)
        except (TimeoutError, FlowmeshError, OSError) as error:
            log.info("while leaving: %s", error)


def _resolved(reference: str) -> Resolved:
    try:
        from flowmesh_node import models
    except ImportError as error:
        raise NotFoundError(f"this node runs no models: {error}", hint="Install the node extra.") from error
    found = models.resolve(reference)
    return Resolved(reference, found.digest, found.size)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
