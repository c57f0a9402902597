"""The world of a simulation: machines that run production schedulers, nodes and clients on a modelled broker and network."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults.broker_model import BrokerModel
from tests.faults.connection import Network
from tests.faults.executors import Bench, SimExecutor, SimExecutors
from tests.faults.history import Begun, History, Told
from tests.faults.loop import BEGIN_S, DEAD, FROZEN, RUNNING, Process, VirtualClock, VirtualLoop, current_process
from tests.faults.stores import SimStore
from tests.faults.workload import Order

from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_deploy.keyring import Keyring
from flowmesh_mesh import clock
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.client.journal import Journal
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.client.submission import submit
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.messages import Assignment
from flowmesh_node import executors as node_executors
from flowmesh_node.agent import Agent, Parts
from flowmesh_node.intake import Intake
from flowmesh_node.inventory import Inventory
from flowmesh_node.operators.registry import REGISTRY, Available
from flowmesh_node.settings import Settings as NodeSettings
from flowmesh_scheduler import standbys
from flowmesh_scheduler.config import Config
from flowmesh_scheduler.core.check import check
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import VertexState
from flowmesh_scheduler.lease import TaskKeeper
from flowmesh_scheduler.process import SchedulerProcess

TENANTS = ("team-a", "team-b", "team-c")
TYPES = tuple(name for name in REGISTRY if not name.startswith(("llm.", "train.", "reward.")))
LOOK_S = 0.3
"""How often a standby looks at the lease here; in production five times as often, which shows nothing more and costs time."""

FETCHES_MAX = 60
"""How often a client tries to fetch what its run gave, a few seconds apart: longer than any fault."""

CHECK_S = 2.0
"""How often the leader's state is checked against the invariants of the core."""

RESTART_S = (0.5, 2.0)
"""How soon whoever watches over a process starts it again."""


class Machine:
    """A machine with a disk, on which one process lives after the other."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.folder = world.folder / name
        self.store = SimStore()
        self.process: Process | None = None
        self.is_wanted = False
        self.lives = 0

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.state is not DEAD

    def boot(self) -> None:
        """Start a new life."""
        self.is_wanted = True
        if self.is_alive:
            return
        self.lives += 1
        process = self.process = Process(self.world.loop, self.name, self.world.rng)
        self.world.processes.append(process)
        process.start(self._live)

    async def _live(self) -> None:
        """Run until the end; whoever watches over the process starts it again."""
        process = self.process
        try:
            await self.main()
            self.world.history.note(f"{self.name} ended")
        except FlowmeshError as error:
            self.world.history.note(f"{self.name} ended: {type(error).__name__}: {error.message}")
        except Exception as error:
            self.world.failures.append(f"{self.name} crashed: {error!r}")
        if process is not None and process is self.process:
            process.kill()
            self.world.later(self.world.rng.uniform(*RESTART_S), self._revive)

    def _revive(self) -> None:
        if self.is_wanted and not self.is_alive:
            self.boot()

    async def main(self) -> None:
        """What the process does."""
        raise NotImplementedError

    def kill(self, *, is_wanted: bool = True) -> None:
        """End the process without a word; it is started again soon if it ``is_wanted``."""
        self.is_wanted = is_wanted
        if self.process is not None:
            self.process.kill()


class Scheduler(Machine):
    """A machine with a scheduler."""

    service: SchedulerProcess | None = None

    async def main(self) -> None:
        world = self.world
        self.folder.mkdir(exist_ok=True)
        for name in ("credentials", "watcher", "private.key"):
            shutil.copy(world.folder / f"scheduler.{name}", self.folder / name)
        config = Config(
            urls=["sim"],
            credentials="credentials",
            store="hub",
            name=self.name,
            replicas=3 if world.is_replicated else 1,
            mesh="sim",
            tenants=world.keyring.tenants,
            watcher="watcher",
            operators=list(TENANTS),
            settings=world.settings,
        )
        self.service = SchedulerProcess(config, self.folder, lambda _: self.store, TaskKeeper)
        await self.service.run()

    @property
    def is_leading(self) -> bool:
        return bool(
            self.is_alive and self.service is not None and self.service.leader is not None and self.service.leader.is_ready
        )


class Node(Machine):
    """A machine with a node."""

    def __init__(self, world: World, name: str, slots: int) -> None:
        super().__init__(world, name)
        self.slots = slots
        self.agent: Agent | None = None
        self.is_leaving = False
        self.highest = 0

    async def main(self) -> None:
        world = self.world
        settings = NodeSettings(
            node=self.name,
            mesh="sim",
            urls=("sim",),
            credentials=world.credentials(self.name, world.keyring.node).text(),
            folder=self.folder,
            slots=self.slots,
            user_slots=2,
        )
        inventory = Inventory(cpus=4.0, memory_bytes=1 << 34, price_per_hour=0.5)
        parts = Parts(lambda _: self.store, SimExecutors, lambda: Available(TYPES, {}), lambda: (0.1, 1 << 33))
        world.bench.lives[self.name] = self.lives
        self.agent = Agent(settings, inventory, parts)
        await self.agent.start()
        await self.agent.is_gone.wait()

    async def leave(self) -> None:
        """Drain and stop, as on SIGTERM."""
        agent = self.agent
        if agent is None or not hasattr(agent, "intake") or not self.is_alive:
            self.kill(is_wanted=False)
            return
        self.is_wanted = False
        await agent.drain(10.0)
        await agent.stop()


class SimMesh(Mesh):
    """The production client, connected through the simulated network."""

    def __init__(self, credentials: Credentials, folder: Path) -> None:
        super().__init__()
        self._given = credentials
        self.journal = Journal(folder / "submissions", "sim", credentials.account)

    async def open(self) -> None:
        """Connect; there is no context file to read."""
        given = self._given
        self._bus = await Bus.connect("sim", given, name="flowmesh client", inbox=given.inbox, deadline_s=3.0)


class Client(Machine):
    """A tenant's machine: it submits, waits, and asks."""

    def __init__(self, world: World, tenant: str, orders: list[Order]) -> None:
        super().__init__(world, f"client-{tenant}")
        self.tenant = tenant
        self.orders = orders
        self.heard: set[str] = set()
        """Runs whose end this tenant has heard, in whatever life of its process."""

    async def main(self) -> None:
        world = self.world
        given = world.credentials(f"client {self.tenant}", lambda _: world.keyring.client(self.tenant))
        mesh = SimMesh(given, self.folder)
        while True:
            try:
                await mesh.open()
                break
            except TransientError:
                await asyncio.sleep(world.rng.uniform(0.2, 1.0))
        await asyncio.gather(*(self._follow(mesh, order) for order in self.orders))
        await asyncio.Event().wait()

    async def _follow(self, mesh: SimMesh, order: Order) -> None:
        world = self.world
        if order.run in self.heard:
            return
        await asyncio.sleep(max(0.0, BEGIN_S + order.at_s - world.loop.time()))
        assert order.prepared is not None
        while True:
            try:
                run = await submit(mesh, order.prepared, order.run, 30.0)
                break
            except TransientError as error:
                world.history.note(f"{order.run} not accepted yet: {error.message}")
                await asyncio.sleep(world.rng.uniform(0.2, 1.0))
            except UsageError as error:
                world.tell(self.tenant, order.run, "rejected", {"detail": error.message})
                return
        world.tell(self.tenant, order.run, "accepted", {})
        if order.cancel_after_s:
            world.spawn_for(self, self._cancel(run, order))
        while True:
            try:
                results = await run.wait(timeout_s=60.0)
            except (TransientError, TimeoutError):
                await asyncio.sleep(1.0)
                continue
            except FlowmeshError as error:
                world.tell(self.tenant, order.run, "unknown", {"detail": error.message})
                await asyncio.sleep(1.0)
                continue
            outputs = (
                {name: [ref.digest for ref in results[name].refs] for name in results} if results.state == "succeeded" else {}
            )
            body = {"reason": results.reason, "detail": results.detail, "actor": results.actor, "outputs": outputs}
            self.heard.add(order.run)
            world.tell(self.tenant, order.run, results.state, body)
            return

    async def _cancel(self, run: Any, order: Order) -> None:
        await asyncio.sleep(order.cancel_after_s)
        with contextlib.suppress(FlowmeshError):
            await run.cancel()
            self.world.tell(self.tenant, order.run, "cancel asked", {})


class World:
    """Everything of one simulation."""

    def __init__(self, seed: int, folder: Path, loop: VirtualLoop, *, is_replicated: bool = False) -> None:
        self.seed = seed
        self.folder = folder
        self.loop = loop
        self.is_replicated = is_replicated
        self.speculates = seed % 3 == 0
        """Whether second attempts are made beside stragglers."""
        self.rng = random.Random(f"{seed} world")
        self.history = History(loop.time)
        self.failures: list[str] = []
        self.settings = Settings(nodes_lost_limit=1000, speculation_share=0.05 if self.speculates else 0.0)
        self.broker = BrokerModel(loop, random.Random(f"{seed} broker"), clock.now_us)
        self.network = Network(loop, self.broker, random.Random(f"{seed} network"))
        self.keyring = _keyring(folder)
        self.broker.mesh_account = self.keyring.mesh_account
        self.broker.system_account = self.keyring.system_account
        self.broker.on_kept.append(self.history.keep)
        self.broker.on_published.append(self.history.publish)
        self.broker.on_wiped.append(self._note_wiped)
        self.bench = Bench(loop.time, random.Random(f"{seed} bench"))
        self.processes: list[Process] = []
        self.schedulers: list[Scheduler] = []
        self.nodes: list[Node] = []
        self.clients: list[Client] = []
        self._credentials: dict[str, Credentials] = {}
        for name, found in (("credentials", self.keyring.scheduler()), ("watcher", self.keyring.watcher())):
            (folder / f"scheduler.{name}").write_text(found.text())
        (folder / "scheduler.private.key").write_text(os.urandom(32).hex())

    def _note_wiped(self) -> None:
        self.history.life += 1

    def credentials(self, name: str, make: Callable[[str], Credentials]) -> Credentials:
        """Return the credentials of somebody, made once."""
        if name not in self._credentials:
            self._credentials[name] = make(name)
        return self._credentials[name]

    def add(self, schedulers: int, nodes: int, orders: list[Order]) -> None:
        """Put machines into the world."""
        self.schedulers += [Scheduler(self, f"scheduler-{number}") for number in range(schedulers)]
        self.nodes += [Node(self, f"node-{number}", 1 + number % 2) for number in range(nodes)]
        self.clients += [Client(self, tenant, [o for o in orders if o.tenant == tenant]) for tenant in TENANTS]

    @property
    def machines(self) -> list[Machine]:
        return [*self.schedulers, *self.nodes, *self.clients]

    @property
    def leader(self) -> Scheduler | None:
        """Return the scheduler that leads with the highest epoch."""
        leading = [each for each in self.schedulers if each.is_leading]
        return max(
            leading, key=lambda each: each.service.leader.state.epoch if each.service and each.service.leader else 0, default=None
        )

    def running(self, tenant: str, run: str) -> list[str]:
        """Return what the leader lets run for a run, by the names of its operators."""
        leader = self.leader
        if leader is None or leader.service is None or leader.service.leader is None:
            return []
        found = leader.service.leader.state.runs.get((self.keyring.tenants[tenant], run))
        vertices = found.vertices if found is not None else []
        return [each.operator.name for each in vertices if each.state is VertexState.ASSIGNED]

    def check_cores(self) -> None:
        """Check the state of whoever leads, again and again."""
        for scheduler in self.schedulers:
            leader = scheduler.service.leader if scheduler.is_leading and scheduler.service is not None else None
            if leader is not None:
                try:
                    check(leader.state)
                except AssertionError as error:
                    self.failures.append(f"invariant of the core at {self.loop.time():.3f}: {error}")
        self.later(CHECK_S, self.check_cores)

    def later(self, after_s: float, action: Callable[[], Any]) -> None:
        """Do something later, outside of all processes."""
        self.loop.call_later(after_s, action, context=_outside())

    def spawn_for(self, machine: Machine, work: Any) -> None:
        """Run a coroutine as part of a machine's process."""
        if machine.process is not None:
            self.loop.create_task(work, context=machine.process.context)

    def tell(self, tenant: str, run: str, state: str, body: dict[str, Any]) -> None:
        """Note what a client was told."""
        self.history.told.append(Told(self.loop.time(), tenant, run, state, body))
        self.history.note(f"{tenant} hears of {run}: {state} {body.get('reason', '')} {body.get('detail', '')}")

    def stop_broker(self, **how: Any) -> None:
        self.broker.stop(**how)

    def start_broker(self) -> None:
        if not self.broker.is_up:
            self.broker.start()

    def heal(self) -> None:
        """End every fault and start whatever does not run."""
        self.start_broker()
        self.broker.leaderless_until_s.clear()
        self.broker.lose_answers = 0
        self.bench.crash_next.clear()
        self.bench.slow.clear()
        for machine in self.machines:
            self.network.heal(machine.name)
            machine.store.is_full = False
            if machine.process is not None:
                machine.process.disk_s = (0.0001, 0.001)
                machine.process.wall_offset_us = 0
                if machine.process.state is FROZEN:
                    machine.process.thaw()
            machine.boot()


def _outside() -> Any:
    import contextvars

    return contextvars.Context()


def _keyring(folder: Path) -> Keyring:
    keyring = Keyring.open(folder / "keys.json", "sim")
    keyring.add_tenants(list(TENANTS))
    return keyring


@contextlib.contextmanager
def simulated(seed: int) -> Iterator[tuple[VirtualLoop, Path]]:
    """Put virtual time, a seeded source of chance and executors of the simulation under the production code."""
    folder = Path(tempfile.mkdtemp(prefix="flowmesh-faults-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    loop = VirtualLoop(seed)
    chance = random.Random(f"{seed} bytes")
    before = clock.replace(VirtualClock(loop))
    state = random.getstate()
    random.seed(f"{seed} global")
    asyncio.set_event_loop(loop)
    gc_was_on = gc.isenabled()
    gc.disable()
    hook = sys.unraisablehook
    patches = (
        mock.patch.object(os, "urandom", chance.randbytes),
        mock.patch.object(standbys, "LOOK_S", LOOK_S),
        mock.patch("flowmesh_scheduler.process.LOOK_S", LOOK_S),
        mock.patch.object(standbys, "memory_bytes", return_value=0),
        mock.patch.dict(os.environ, {"FLOWMESH_STATE": str(folder / "state")}),
    )
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield loop, folder
    finally:
        sys.unraisablehook = lambda _: None
        logging.disable(logging.CRITICAL)
        asyncio.set_event_loop(None)
        random.setstate(state)
        clock.replace(before)
        loop.set_exception_handler(lambda *_: None)
        loop.forget()
        if gc_was_on:
            gc.enable()
        gc.collect()
        sys.unraisablehook = hook
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def watched(world: World) -> Iterator[None]:
    """Put the executors of the simulation in, and watch what nodes begin."""
    take = Intake._take

    def spy(intake: Intake, assignment: Assignment, message: Any) -> None:
        node = next((each for each in world.nodes if each.name == intake.node), None)
        process = current_process()
        if node is not None and process is not None and process.state is RUNNING:
            epoch = assignment.epoch
            world.history.begun.append(Begun(world.loop.time(), node.name, epoch, node.highest, assignment.id))
            node.highest = max(node.highest, epoch)
        take(intake, assignment, message)

    with (
        mock.patch.object(Bus, "make_connection", world.network.connection),
        mock.patch.object(node_executors, "Executor", lambda kind, environment: SimExecutor(world.bench, kind)),
        mock.patch.object(Intake, "_take", spy),
    ):
        yield
