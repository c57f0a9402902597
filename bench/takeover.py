"""What a take-over costs with very much outstanding: a real scheduler process on a real broker, its earlier leader this program.

The ledger holds 100 runs of 1,000 operators, half of them done, and five of 10,000, a good part of them in the hands of nodes:
100,000 operators are outstanding. A cold scheduler stands by; then this program, which held the lease, gives it back and watches
for the first new assignment. Nodes are records and heartbeats. Figures go to out/takeover.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from bench.report import Record, machine, write
from flowmesh_cas.cid import DAG_CBOR, RAW, cid_from_digest, cid_of, sha256
from flowmesh_cas.pack_store import PackStore
from flowmesh_deploy.broker import Broker
from flowmesh_deploy.keyring import Keyring
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.clock import monotonic_s, now_us
from flowmesh_mesh.compiler import Compiled, compile_document
from flowmesh_mesh.identity import batch_key, identity_record, operator_key
from flowmesh_mesh.manifest import Acceptance, Manifest, Receipt, Ref, ResultRecord, encode_record
from flowmesh_mesh.messages import Assignment, Beat, Item, NodeRecord, Recall, decode, encode
from flowmesh_scheduler.guarded import GuardedStream
from flowmesh_scheduler.lease import SchedulerLease, TaskKeeper
from flowmesh_scheduler.sim.verdict import commit
from flowmesh_scheduler.standbys import Presence, digest_of_secret
from flowmesh_scheduler.takeover import make_streams

TENANT = "bench"
RUNS, RUN_OPERATORS = 100, 1_000
LARGE_RUNS, LARGE_RUN_OPERATORS = 5, 10_000
NODES, BUSY_NODES, HELD, HELD_OPERATORS = 20, 15, 3, 500
DEADLINE_S = 120.0
TAKEOVER_BAR_S, COLD_BAR_MB = 5.0, 120.0
SECRET = bytes(32)


def noops(count: int, nonce: int, *, pairs: bool) -> dict[str, Any]:
    """Return a workflow of no-ops; in ``pairs`` the second half each waits for one of the first."""
    first = count // 2 if pairs else count
    operators: dict[str, Any] = {f"a{i}": {"type": "flow.noop", "with": {"nonce": nonce + i}} for i in range(first)}
    for i in range(count - first):
        operators[f"b{i}"] = {"type": "flow.noop", "with": {"nonce": nonce + first + i}, "inputs": {"after": f"a{i}.out"}}
    return {"apiVersion": "flowmesh/v1", "name": "bench", "operators": operators}


def result_of(manifest: Manifest, index: int) -> tuple[str, bytes]:
    """Return subject and record of an operator's result."""
    operator = manifest.operators[index]
    block = b"%d" % int(operator.params["nonce"])
    key = operator_key(identity_record(operator, {}, {}))
    ref = Ref("value", cid_of(RAW, block), sha256(block), len(block))
    receipt = Receipt("node-0", "U" * 56, 1, "earlier", bytes(32), bytes(64), index, len(manifest.operators), [])
    result = cid_of(RAW, b"result " + block)
    record = ResultRecord(cid_from_digest(DAG_CBOR, key), 0, 1, result, {"out": [ref]}, receipt, inline=[block])
    return subjects.ledger_result(key.hex(), 0), encode_record(record)


def held(manifest: Manifest, node: str, number: int, first: int, epoch: int, count: int) -> Assignment:
    """Return an assignment of ``count`` operators of a run to a node."""
    operators = manifest.operators[first : first + count]
    keys = [operator_key(identity_record(operator, {}, {})) for operator in operators]
    items = tuple(Item(key, 0, 1, operator.params, {}, operator.name) for key, operator in zip(keys, operators, strict=True))
    kind = operators[0]
    return Assignment(
        epoch, f"e{epoch}-{node}-{number}", node, kind.type, kind.version, batch_key(kind, {}, {}, keys[0]), items, life=1
    )


@dataclass
class Stage:
    """A broker with the state of a mesh, under this program as its leader."""

    folder: Path
    keyring: Keyring
    broker: Broker
    bus: Bus
    scale: float
    lease: SchedulerLease = field(default_factory=lambda: SchedulerLease("scheduler-bench", digest_of_secret(SECRET)))
    first_s: float = 0.0
    epoch: int = 0

    async def connect(self) -> Bus:
        credentials = self.keyring.scheduler()
        return await Bus.connect(self.broker.url, credentials, name="bench", inbox=credentials.inbox)

    async def fill(self) -> None:
        """Write what an earlier leader has left."""
        at_us = now_us()
        await make_streams(self.bus, at_us // 1000, 1)
        assert await self.lease.take(self.bus, 0)
        faults: list[Exception] = []
        ledger = GuardedStream(self.bus, subjects.LEDGER, subjects.LEDGER_EPOCHS, subjects.ledger_epoch, faults.append)
        assign = GuardedStream(self.bus, subjects.ASSIGN, subjects.ASSIGN_EPOCHS, subjects.assign_epoch, faults.append)
        self.epoch = await ledger.raise_epoch(at_us // 1000, self.lease.leader, self.lease.revision, at_us)
        await assign.raise_epoch(self.epoch, self.lease.leader, self.lease.revision, at_us)
        store = PackStore(self.folder / "hub")
        for subject, data in await asyncio.to_thread(lambda: list(self._ledger_entries(store))):
            ledger.write(subject, data)
        large: list[Manifest] = []
        count, size = int(LARGE_RUN_OPERATORS * self.scale), int(HELD_OPERATORS * self.scale)
        for number in range(LARGE_RUNS):
            compiled = await asyncio.to_thread(
                self._compiled, store, count, RUNS * RUN_OPERATORS + number * LARGE_RUN_OPERATORS, False
            )
            ledger.write(*self._acceptance(f"large-{number}", compiled))
            large.append(compiled.manifest)
        store.close()
        for number, node in enumerate(nodes()):
            await self.bus.store(subjects.node_record(node.node), encode(node))
            for batch in range(HELD if number < BUSY_NODES else 0):
                place = number // LARGE_RUNS * HELD + batch
                made = held(large[number % LARGE_RUNS], node.node, batch, place * size, self.epoch, size)
                assign.write(subjects.assign(node.node, made.id), encode(made))
        ledger.write(subjects.ledger_restored(self.epoch), encode(Recall(0, "records")))  # the ledger is whole
        await ledger.drain(DEADLINE_S)
        await assign.drain(DEADLINE_S)
        assert not faults, faults

    def _compiled(self, store: PackStore, count: int, nonce: int, pairs: bool) -> Compiled:
        return compile_document(noops(count, nonce, pairs=pairs), base=None, store=store)

    def _acceptance(self, run: str, compiled: Compiled) -> tuple[str, bytes]:
        record = Acceptance(self.keyring.tenants[TENANT], run, compiled.cid, now_us(), name="bench")
        return subjects.ledger_accepted(record.tenant, run), encode_record(record)

    def _ledger_entries(self, store: PackStore) -> Iterator[tuple[str, bytes]]:
        count = int(RUN_OPERATORS * self.scale)
        for number in range(RUNS):
            compiled = self._compiled(store, count, number * RUN_OPERATORS, True)
            yield self._acceptance(f"run-{number}", compiled)
            for index in range(count // 2):
                yield result_of(compiled.manifest, index)

    def configure(self) -> Path:
        """Write the folder of the scheduler that is to take over."""
        folder = self.folder / "scheduler"
        folder.mkdir()
        self.keyring.scheduler().save(folder / "scheduler.creds")
        (folder / "private.key").write_text(SECRET.hex())
        config = {
            "urls": [self.broker.url],
            "credentials": "scheduler.creds",
            "store": str(self.folder / "hub"),
            "name": "scheduler-cold",
            "mesh": "bench",
            "tenants": dict(self.keyring.tenants),
        }
        (folder / "scheduler.json").write_text(json.dumps(config))
        return folder

    async def beat(self) -> None:
        """Let the nodes show signs of life."""
        while True:
            for number, node in enumerate(nodes()):
                ids = tuple(f"e{self.epoch}-{node.node}-{i}" for i in range(HELD)) if number < BUSY_NODES else ()
                self.bus.post(subjects.node_beat(node.node), encode(Beat(node.node, now_us(), self.epoch, ids, life=1)))
            await asyncio.sleep(1.0)

    def note(self, delivery: Delivery) -> None:
        """Note the first assignment of another epoch than ours."""
        if self.first_s or not delivery.data:
            return
        try:
            found = decode(delivery.data, Assignment)
        except Exception:  # other words to nodes
            return
        if found.epoch > self.epoch:
            self.first_s = monotonic_s()


def nodes() -> list[NodeRecord]:
    """Return the nodes: those that hold something, and idle ones."""
    types = tuple(CATALOG)
    return [NodeRecord(f"node-{n}", "U" * 56, 1, types, "3.11", 8.0, 1 << 34, wire=2) for n in range(NODES)]


@asynccontextmanager
async def staged(folder: Path, scale: float) -> AsyncIterator[Stage]:
    """Give a broker that is filled, and held by this program."""
    keyring = Keyring.open(folder / "keys" / "keyring.json", "bench")
    keyring.add_tenants([TENANT])
    broker = Broker(folder / "broker", security=keyring.broker_config(folder / "accounts"))
    broker.start()
    credentials = keyring.scheduler()
    bus = await Bus.connect(broker.url, credentials, name="bench", inbox=credentials.inbox)
    try:
        yield Stage(folder, keyring, broker, bus, scale)
    finally:
        await bus.close()
        broker.stop(2.0)


async def measure(folder: Path, scale: float) -> dict[str, float]:
    """Measure one take-over; return figures by name."""
    async with staged(folder, scale) as stage:
        await stage.fill()
        keeper = TaskKeeper(stage.connect)
        await keeper.open()
        alive = asyncio.create_task(_live(stage.lease))
        await keeper.hold(stage.lease, lambda _: None)
        await stage.bus.subscribe("asg.node.>", stage.note)
        await stage.bus.subscribe("fm.ctl.*", stage.note)
        presence = Presence("scheduler-bench", digest_of_secret(SECRET), role="leader")
        await presence.open(stage.bus)
        beating = asyncio.create_task(stage.beat())
        log = (folder / "scheduler.log").open("wb")
        command = [sys.executable, "-m", "flowmesh_scheduler", "--dir", str(stage.configure())]
        process = await asyncio.create_subprocess_exec(*command, stderr=log)
        try:
            found = {"standby_memory": await _settled_mb(presence)}
            before = psutil.Process(process.pid).cpu_times()
            await keeper.drop(is_released=True)
            began_s = monotonic_s()
            async with asyncio.timeout(DEADLINE_S):
                while not stage.first_s:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            found["first_assignment"] = stage.first_s - began_s
            after = psutil.Process(process.pid).cpu_times()
            found["cpu"] = after.user + after.system - before.user - before.system
            await asyncio.sleep(3.0)
            seen = presence.others["scheduler-cold"].beat
            found["leader_memory"] = seen.memory_bytes / 1e6
            found |= await _phases(stage)
            return found
        finally:
            process.terminate()
            await process.wait()
            beating.cancel()
            alive.cancel()
            await presence.close()
            await keeper.close()
            log.close()
            print((folder / "scheduler.log").read_text()[-2000:], file=sys.stderr)


async def _live(lease: SchedulerLease) -> None:
    while True:
        lease.beat()
        await asyncio.sleep(0.1)


async def _settled_mb(presence: Presence) -> float:
    """Return the memory of the standby in MB after it has stood by for a while."""
    async with asyncio.timeout(DEADLINE_S):
        while "scheduler-cold" not in presence.others:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await asyncio.sleep(4.0)
    return presence.others["scheduler-cold"].beat.memory_bytes / 1e6


async def _phases(stage: Stage) -> dict[str, float]:
    """Ask the new leader how its take-over went."""
    from flowmesh_mesh.client.questions import ask

    credentials = stage.keyring.client(TENANT)
    bus = await Bus.connect(stage.broker.url, credentials, name="bench-client", inbox=credentials.inbox)
    try:
        told = (await ask(bus, "status"))["takeover"]
    finally:
        await bus.close()
    print(json.dumps(told), file=sys.stderr)
    return {**{f"phase.{name}": seconds for name, seconds in told["phases_s"].items()}, "operators": told["operators"]}


def records(rounds: list[dict[str, float]], seed: int) -> list[Record]:
    """Return medians with their bars."""
    bars = {"first_assignment": (TAKEOVER_BAR_S, "s"), "standby_memory": (COLD_BAR_MB, "MB")}
    found = []
    for name in rounds[0]:
        values = tuple(figures[name] for figures in rounds)
        bar, unit = bars.get(name, (0.0, "MB" if name.endswith("memory") else "" if name == "operators" else "s"))
        value = median(values)
        told = f"<= {bar:g}" if bar else ""
        found.append(Record(f"takeover.{name}", value, unit, told, value <= bar if bar else None, seed, commit(), values))
    return found


def main() -> None:
    """Measure, print, append to the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.takeover", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the operators, for a quick look; bars hold at 1")
    parser.add_argument("--out", type=Path, default=Path("out/takeover.jsonl"))
    options = parser.parse_args()
    print(machine())
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            began_s = time.monotonic()
            rounds.append(asyncio.run(measure(Path(folder), options.scale)))
            print(f"round: {time.monotonic() - began_s:.0f} s in all", file=sys.stderr)
    found = records(rounds, 0)
    for record in found:
        verdict = "" if record.ok is None else f"  {record.bar} {'ok' if record.ok else 'MISSED'}"
        print(f"{record.name:32} {record.value:10.3f} {record.unit}{verdict}")
    write(found, options.out)
    sys.exit(0 if all(record.ok is not False for record in found) else 1)


if __name__ == "__main__":
    main()
