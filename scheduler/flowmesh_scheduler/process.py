"""The scheduler process: stand by, lead, stand by again."""

from __future__ import annotations

import argparse
import asyncio
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

from flowmesh_cas.errors import FlowmeshError, TransientError
from flowmesh_cas.pack_store import PackStore
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.wire import OutdatedError
from flowmesh_scheduler.config import Config, load_config
from flowmesh_scheduler.lease import SchedulerLease
from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

STANDBY_PAUSE_S = 0.1

GC_THRESHOLDS = (100_000, 20, 20)
"""Runs of many operators are many long-lived objects: look at them seldom."""


class SchedulerProcess:
    """One process: at any time a standby or the leader."""

    def __init__(self, config: Config, folder: Path, open_store: Callable[[Path], BlockStore] = PackStore) -> None:
        self.config = config
        self.folder = folder
        self._open_store = open_store
        self.name = f"scheduler-{os.getpid()}-{random.getrandbits(24):06x}"
        self.leader: Leader | None = None
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        """Run until stopped."""
        credentials = Credentials.load(self.folder / self.config.credentials)
        bus = await Bus.connect(self.config.urls, credentials, name=self.name, inbox=subjects.inbox_prefix("scheduler"))
        watcher = await self._watch()
        store = self._open_store(self.folder / self.config.store)
        try:
            await self._make_streams(bus)
            while not self.stopping.is_set():
                await self._lead_once(bus, store)
        finally:
            if watcher is not None:
                await watcher.close()
            await bus.close()
            store.close()

    async def _make_streams(self, bus: Bus) -> None:
        """Make the streams that lack; wait for as long as too few brokers are there for that."""
        while not self.stopping.is_set():
            try:
                for stream in streams.mesh_streams(now_us() // 1000, self.config.replicas):
                    await bus.ensure_stream(stream)
                return
            except TransientError as error:
                log.info("no streams yet: %s", error)
                await asyncio.sleep(STANDBY_PAUSE_S)

    async def _watch(self) -> Bus | None:
        """Listen to the broker's own connection events, if there are credentials for it."""
        if not self.config.watcher:
            return None
        credentials = Credentials.load(self.folder / self.config.watcher)
        inbox = subjects.inbox_prefix("watcher")
        bus = await Bus.connect(self.config.urls, credentials, name=f"{self.name}-watcher", inbox=inbox)
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

    async def _lead_once(self, bus: Bus, store: BlockStore) -> None:
        lease = SchedulerLease(bus, self.name)
        try:
            acquired = await lease.try_acquire(now_us())
        except TransientError as error:
            log.info("no lease: %s", error)
            acquired = False
        if not acquired:
            await asyncio.sleep(STANDBY_PAUSE_S * random.uniform(0.5, 1.0))
            return
        record = self.folder / self.config.record if self.config.record else None
        self.leader = Leader(bus, self.config, self.name, lease, store, self._secret(), record)
        stopped = asyncio.create_task(self._stop_leader(self.leader))
        try:
            reason = await self.leader.run()
            log.warning("no longer leading: %s", reason)
        except OutdatedError:
            await lease.release()  # another scheduler can lead, this one never
            raise
        except FlowmeshError as error:
            log.error("take-over failed: %s", error)
            await asyncio.sleep(STANDBY_PAUSE_S)
        finally:
            stopped.cancel()
            self.leader = None
            if self.stopping.is_set():
                await lease.release()

    async def _stop_leader(self, leader: Leader) -> None:
        await self.stopping.wait()
        leader.stop("the process is stopping")

    def _secret(self) -> bytes:
        """Return the mesh's secret behind private operator keys, made on first use."""
        from flowmesh_mesh.credentials import write_secret

        path = self.folder / "private.key"
        if not path.exists():
            write_secret(path, os.urandom(32).hex())
        return bytes.fromhex(path.read_text().strip())


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
