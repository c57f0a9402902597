"""The scheduler process: stand by, lead, stand by again."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import uvloop

from flowmesh_cas.errors import FlowmeshError, NotFoundError, TransientError, UsageError
from flowmesh_cas.pack_store import PackStore
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.clock import monotonic_s, now_us
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.transfer import serve_blocks
from flowmesh_mesh.wire import OutdatedError
from flowmesh_scheduler.config import Config, load_config
from flowmesh_scheduler.lease import Connect, Keeper, SchedulerLease, ThreadKeeper
from flowmesh_scheduler.service import Leader
from flowmesh_scheduler.standby_keeper import StandbyKeeper
from flowmesh_scheduler.standbys import LOOK_S, Highest, LeaseWatch, Presence, Vacancy, digest_of_secret, read_highest
from flowmesh_scheduler.takeover import make_streams

log = logging.getLogger("flowmesh.scheduler")

REFUSED_PAUSE_S = 1.0

CONNECT_S = 60.0
"""How long a scheduler that starts looks for a broker."""

TRY_S = 5.0
"""How long one attempt may take."""

GC_THRESHOLDS = (100_000, 20, 20)
"""Runs of many operators are many long-lived objects: look at them seldom."""


class SchedulerProcess:
    """One process: at any time a standby or the leader."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        open_store: Callable[[Path], BlockStore] = PackStore,
        make_keeper: Callable[[Connect], Keeper] = ThreadKeeper,
    ) -> None:
        self.config = config
        self.folder = folder
        self._open_store = open_store
        self.name = config.name or f"scheduler-{os.getpid()}-{random.getrandbits(24):06x}"
        self.secret = self._read_secret()
        self.presence = Presence(self.name, digest_of_secret(self.secret))
        self.highest = Highest.load(folder / "highest_epoch")
        self.leader: Leader | None = None
        self.watch: LeaseWatch | None = None
        self.memory: StandbyKeeper | None = None
        self.stopping = asyncio.Event()
        self._keeper = make_keeper(lambda: self._connect(" lease"))

    async def run(self) -> None:
        """Run until stopped."""
        async with contextlib.AsyncExitStack() as open_:
            bus = await self._connect("", on_reconnect=self._on_reconnect)
            open_.push_async_callback(bus.close)
            watcher = await self._watch_connections()
            if watcher is not None:
                open_.push_async_callback(watcher.close)
            store = self._open_store(self.folder / self.config.store)
            open_.callback(store.close)
            open_.push_async_callback(self._keeper.close)
            await self._keeper.open()
            open_.push_async_callback(self.presence.close)
            await self.presence.open(bus)
            await serve_blocks(bus, store, subjects.hub_of(self.name), now_us=now_us)
            self.memory = StandbyKeeper(bus, store, self.name, self.folder, journal_max_bytes=self.config.journal_max_bytes)
            open_.push_async_callback(self.memory.close)
            await self.memory.open()
            self.watch = LeaseWatch(bus, self.presence.secret)
            while not self.stopping.is_set():
                await self._turn(bus, store, self.watch)

    async def _connect(self, suffix: str, on_reconnect: Callable[[], None] | None = None, *, is_watcher: bool = False) -> Bus:
        """Connect; raise TransientError when no broker answers for CONNECT_S: one may be starting, or out of reach for now."""
        credentials = Credentials.load(self.folder / (self.config.watcher if is_watcher else self.config.credentials))
        inbox = subjects.inbox_prefix("watcher" if is_watcher else "scheduler")
        name, until_s = self.name + suffix, monotonic_s() + CONNECT_S
        while True:
            try:
                return await Bus.connect(
                    self.config.urls, credentials, name=name, inbox=inbox, deadline_s=TRY_S, on_reconnect=on_reconnect
                )
            except TransientError as error:
                if self.stopping.is_set() or monotonic_s() > until_s:
                    raise
                log.info("%s; trying again", error.message)
                await asyncio.sleep(random.uniform(0.1, 0.5))

    def _on_reconnect(self) -> None:
        if self.watch is not None:
            self.watch.disturb()
        if self.leader is not None:
            self.leader.on_reconnect()

    async def _watch_connections(self) -> Bus | None:
        """Listen to the broker's own connection events, if there are credentials for it."""
        if not self.config.watcher:
            return None
        bus = await self._connect("-watcher", is_watcher=True)
        await bus.subscribe("$SYS.ACCOUNT.*.DISCONNECT", self._on_disconnect)
        return bus

    def _on_disconnect(self, delivery: Delivery) -> None:
        try:
            client = msgspec.json.decode(delivery.data).get("client", {})
        except msgspec.DecodeError:
            return
        key = client.get("nkey") or client.get("user") or ""
        if self.leader is not None and key:
            self.leader.reports.node_gone(key, str(client.get("name", "")))

    # --- standing by

    async def _turn(self, bus: Bus, store: BlockStore, watch: LeaseWatch) -> None:
        """Stand by until the lease may be taken; lead if nobody is faster."""
        vacancy = await self._stand_by(bus, watch)
        lease = SchedulerLease(self.name, self.presence.secret)
        try:
            if vacancy is None or not await lease.take(bus, vacancy.seq):
                return
        except FlowmeshError as error:
            log.info("no lease: %s", error)
            return
        await self._lead(bus, store, lease, vacancy)

    async def _stand_by(self, bus: Bus, watch: LeaseWatch) -> Vacancy | None:
        """Look at the lease until it may be taken; None when the process is to stop."""
        known = ""
        if self.memory is not None:
            await self.memory.stand_by()
        while not self.stopping.is_set():
            try:
                vacancy = await watch.turn()
                if vacancy is not None:
                    return vacancy
                if known != watch.previous:
                    known = watch.previous
                    await self._note_epochs(bus)
            except NotFoundError:
                await self._make_streams(bus)
            except UsageError:
                raise
            except FlowmeshError as error:
                log.info("the broker does not tell who leads: %s", error)
                watch.disturb()
            await asyncio.sleep(LOOK_S * random.uniform(0.7, 1.0))
        return None

    async def _make_streams(self, bus: Bus) -> None:
        """Make what lacks of the streams: the store is new, or it was wiped. Without enough brokers for that, wait."""
        try:
            await make_streams(bus, max(now_us() // 1000, self.highest.sequence + 1), self.config.replicas)
        except FlowmeshError as error:
            log.warning("no streams yet: %s", error)
            await asyncio.sleep(REFUSED_PAUSE_S * random.uniform(0.5, 1.0))

    async def _note_epochs(self, bus: Bus) -> None:
        if await read_highest(bus, self.highest):
            await asyncio.to_thread(self.highest.write)

    # --- leading

    async def _lead(self, bus: Bus, store: BlockStore, lease: SchedulerLease, vacancy: Vacancy) -> None:
        """Lead until the lease or the fence is lost, and again at once under a higher epoch where a node has seen one."""
        self.presence.role = "leader"
        is_again = True
        try:
            while is_again and not self.stopping.is_set():
                is_again = await self._lead_once(bus, store, lease, vacancy)
        finally:
            self.presence.role = "standby"
            await self._keeper.drop(is_released=lease.is_held)

    async def _lead_once(self, bus: Bus, store: BlockStore, lease: SchedulerLease, vacancy: Vacancy) -> bool:
        """Lead for one epoch; tell whether to go on with another."""
        record = self.folder / self.config.record if self.config.record else None
        secret, highest, presence = self.secret, self.highest, self.presence
        leader = Leader(bus, self.config, self.name, lease, store, secret, record, highest, presence, vacancy, self.memory)
        self.leader = leader
        stopped = asyncio.create_task(self._stop_leader(leader))
        has_failed = False
        await self._keeper.hold(lease, leader.on_lease)
        try:
            if self.memory is not None:
                await self.memory.lead()
            log.warning("no longer leading: %s", await leader.run())
        except OutdatedError:
            raise
        except FlowmeshError as error:
            log.error("take-over failed: %s", error)
            has_failed = True
        finally:
            stopped.cancel()
            await self._step_down(leader)
        if has_failed:
            await asyncio.sleep(REFUSED_PAUSE_S * random.uniform(0.1, 0.3))
        return leader.is_overtaken and lease.is_held

    async def _step_down(self, leader: Leader) -> None:
        """Write what must not be lost, let the next leader begin, and only then put the rest away."""
        await leader.finish()
        if not leader.is_overtaken:
            await self._keeper.drop(is_released=leader.lease.is_held)
        self.leader = None
        self.presence.refused_writes += leader.refused_writes
        await leader.close()

    async def _stop_leader(self, leader: Leader) -> None:
        await self.stopping.wait()
        leader.stop("the process is stopping")

    def _read_secret(self) -> bytes:
        """Return the mesh's secret behind private operator keys, made on first use."""
        from flowmesh_mesh.credentials import write_secret

        path = self.folder / self.config.secret
        if not path.exists():
            write_secret(path, os.urandom(32).hex())
        try:
            return bytes.fromhex(path.read_text().strip())
        except ValueError as error:
            raise UsageError(
                f"{path} does not hold a secret in hex", hint="Copy it from another scheduler of the mesh."
            ) from error


async def serve(folder: Path) -> None:
    """Run a scheduler process until SIGTERM or SIGINT."""
    process = SchedulerProcess(load_config(folder), folder)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.stopping.set)
    await process.run()


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="flowmesh scheduler", description="Run one scheduler of a mesh.")
    parser.add_argument("--dir", type=Path, required=True, help="folder with scheduler.json")
    parser.add_argument("--verbose", action="store_true", help="log more")
    options = parser.parse_args(arguments)
    level = logging.INFO if options.verbose or os.environ.get("FLOWMESH_DEBUG") else logging.WARNING
    gc.set_threshold(*GC_THRESHOLDS)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        uvloop.run(serve(options.dir))
    except FlowmeshError as error:
        print(f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        sys.exit(error.exit_code)
