"""How a mesh of very many nodes behaves: 1,500 simulated nodes on one real broker, under a real leader with a standby.

Parts, in this order and on one mesh: all nodes join; nothing happens; no-ops run while all nodes are idle, and while they are
busy; the leader is killed; every connection is cut at once (the broker is killed and started again); the broker is stopped.
The nodes are simulated (:mod:`bench.fake_nodes`), and so is nothing else. Figures go to out/scale.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import psutil

from bench.fake_nodes import Plan, raise_file_limit
from bench.flowmesh import Document, document, noop
from bench.report import Record, machine, write
from flowmesh_cas.errors import FlowmeshError, TransientError
from flowmesh_deploy.broker import STOP_S, Broker
from flowmesh_deploy.keyring import Keyring
from flowmesh_deploy.layout import write_json
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.client.questions import ask
from flowmesh_mesh.context import load_context
from flowmesh_scheduler.sim.verdict import commit

NODES = 1500
PROCESSES = 4
"""Processes among which the simulated nodes are divided."""

TENANT = "team-a"
IDLE_S = 10.0
RUN_OPERATORS = 3000
BUSY_S = 30.0
DEADLINE_S = 300.0
PARTS = ("idle", "work", "takeover", "storm", "stop")
POLL_S = 1.0
"""How long a question waits that a leader may have taken with it; a client is more patient."""

SETTLED_S = 1.0
"""How long after its assignment an operator is hurt at the earliest: then its node works on it."""

MIB = 2**20

TAKEOVER_BAR_S = 5.0
BROKER_BAR_MIB = 450
"""257 to 284 MiB were measured once all have joined (4,500 connections, 1,500 consumers), 344 with work on every node: its heap
grows by half between two collections. Readers that lag behind cost more: the broker keeps what they have not read."""

LEADER_BAR_MIB = 400


class Figures:
    """Collects records and prints each as it comes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.records: list[Record] = []

    def add(self, name: str, value: float, unit: str, at_most: float | None = None, exactly: float | None = None) -> None:
        """Keep a figure; its bar is a limit, or the one right value."""
        bar, ok = ("", None) if at_most is None else (f"<= {at_most:g} {unit}", value <= at_most)
        if exactly is not None:
            bar, ok = f"= {exactly:g} {unit}", value == exactly
        self.records.append(Record(f"scale.{name}", value, unit, bar, ok, self._seed, commit()))
        verdict = "" if ok is None else f"   {bar}: {'ok' if ok else 'MISSED'}"
        print(f"{'scale.' + name:44} {value:12,.3f} {unit}{verdict}", flush=True)


class Spent:
    """Seconds of processor that a process has used since this was made, and the memory it holds."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._cpu_s, self._began_s = self._used(), time.monotonic()

    def _used(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def cpu_s(self) -> float:
        return self._used() - self._cpu_s

    def share(self) -> float:
        """Return the share of one core."""
        return self.cpu_s() / (time.monotonic() - self._began_s)

    def memory_mib(self) -> float:
        return float(self._process.memory_info().rss) / MIB


class Scale:
    """One mesh with many simulated nodes."""

    def __init__(self, folder: Path, nodes: int, aside: int, figures: Figures) -> None:
        self.folder, self.count, self.figures = folder, nodes, figures
        self._aside = aside
        self._keyring = Keyring.open(folder / "keys" / "keyring.json", "scale")
        self._keyring.add_tenants([TENANT])
        self.broker = Broker(folder / "broker", security=self._keyring.broker_config(folder / "accounts"))
        self._schedulers: dict[str, subprocess.Popen[bytes]] = {}
        self._fakes: list[asyncio.subprocess.Process] = []
        self._nonces = itertools.count(1, 10_000)

    # --- starting

    async def start(self) -> None:
        """Start broker, leader, standby and client."""
        self.broker.start()
        self._keyring.client(TENANT).save(self.folder / "client.creds")
        account = self._keyring.tenants[TENANT]
        tenants = {TENANT: {"account": account, "credentials": "client.creds"}}
        context = {"version": 1, "mesh": "scale", "urls": [self.broker.url], "dir": str(self.folder), "tenants": tenants}
        write_json(self.folder / "context.json", {**context, "default_tenant": TENANT})
        secret = os.urandom(32).hex()
        for name in ("scheduler-1", "scheduler-2"):
            self._prepare_scheduler(name, account, secret)
        self._start_scheduler("scheduler-1")
        self.client = Mesh(load_context(self.folder / "context.json"))
        await self.client.open()
        await self._status()
        self._start_scheduler("scheduler-2")
        credentials = self._keyring.scheduler()
        self.bus = await Bus.connect(self.broker.url, credentials, name="scale", inbox=credentials.inbox)

    def _prepare_scheduler(self, name: str, account: str, secret: str) -> None:
        folder = self.folder / name
        folder.mkdir()
        self._keyring.scheduler().save(folder / "scheduler.creds")
        self._keyring.watcher().save(folder / "watcher.creds")
        (folder / "private.key").write_text(secret)
        given = {"urls": [self.broker.url], "credentials": "scheduler.creds", "watcher": "watcher.creds", "store": "store"}
        write_json(folder / "scheduler.json", {**given, "mesh": "scale", "tenants": {TENANT: account}, "name": name})

    def _start_scheduler(self, name: str) -> None:
        command = [sys.executable, "-P", "-m", "flowmesh_scheduler", "--dir", str(self.folder / name)]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._schedulers[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    async def leader(self) -> str:
        """Return the name of the scheduler that leads."""
        return str((await self._status())["leader"]["id"])

    async def start_nodes(self) -> None:
        """Start the processes of simulated nodes; they join by themselves."""
        names = [f"fake-{number}" for number in range(self.count)]
        for place in range(PROCESSES):
            credentials = {name: self._keyring.node(name).text() for name in names[place::PROCESSES]}
            plan = Plan([self.broker.url], credentials, self._aside)
            path = self.folder / f"fakes-{place}.json"
            path.write_bytes(msgspec.json.encode(plan))
            with (self.folder / f"fakes-{place}.log").open("ab") as log:
                self._fakes.append(
                    await asyncio.create_subprocess_exec(
                        sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {os.getcwd()!r}); sys.argv[0] = 'fakes';"
                        " import runpy; runpy.run_module('bench.fake_nodes', run_name='__main__')", str(path),
                        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                    )
                )  # fmt: skip

    async def nodes_started(self) -> None:
        for process in self._fakes:
            assert process.stdout is not None
            assert await process.stdout.readline(), "the simulated nodes ended: see their log"

    async def fakes(self) -> dict[str, int]:
        """Return the sum of what the simulated nodes count."""
        total: dict[str, int] = {}
        for process in self._fakes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"\n")
            for name, value in json.loads(await process.stdout.readline()).items():
                total[name] = total.get(name, 0) + value
        return total

    # --- looking

    async def _status(self) -> dict[str, Any]:
        """Ask until a leader answers."""
        end = time.monotonic() + DEADLINE_S
        while True:
            try:
                status: dict[str, Any] = await ask(self.client.bus, "status", deadline_s=POLL_S, timeout_s=POLL_S)
                return status
            except TransientError:
                if time.monotonic() > end:
                    raise

    async def states(self) -> dict[str, int]:
        """Return how many nodes the leader counts in each state."""
        found: dict[str, int] = {}
        for row in (await self._status())["nodes"]:
            found[row["state"]] = found.get(row["state"], 0) + 1
        return found

    async def until(self, what: str, holds: Callable[[], Awaitable[bool]]) -> float:
        """Wait for what only the mesh can tell; return the seconds that it took."""
        began = time.monotonic()
        while not await holds():
            if time.monotonic() - began > DEADLINE_S:
                raise TransientError(f"{what}: not within {DEADLINE_S:g} s; {await self.states()}")
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def all_active(self) -> bool:
        return (await self.states()).get("active", 0) == self.count

    async def all_connected(self) -> bool:
        return (await self.fakes())["connected"] == self.count * (1 + self._aside)

    def pid(self, scheduler: str) -> int:
        return self._schedulers[scheduler].pid

    # --- parts

    async def join(self) -> None:
        """All nodes join at once."""
        leader = Spent(self.pid(await self.leader()))
        await self.start_nodes()
        took_s = await self.until("all nodes joined", self.all_active)
        await self.nodes_started()
        streams = await self.bus.stream_state(subjects.ASSIGN)
        assert streams is not None
        self.figures.add("joined", (await self.states()).get("active", 0), "nodes", exactly=self.count)
        self.figures.add("join_all", took_s, "s")
        self.figures.add("join.leader_cpu", leader.cpu_s(), "s")
        self.figures.add("consumers_of_assign", float(await self._consumers()), "consumers", at_most=20_000)
        self._memory("joined")

    async def _consumers(self) -> int:
        answer = json.loads(await self.bus.request(f"$JS.API.STREAM.INFO.{subjects.ASSIGN}", b"", timeout_s=10.0))
        return int(answer["state"]["consumer_count"])

    def _memory(self, when: str) -> None:
        assert self.broker.child is not None
        self.figures.add(f"{when}.broker_memory", Spent(self.broker.child.pid).memory_mib(), "MiB", at_most=BROKER_BAR_MIB)
        for name, process in self._schedulers.items():
            self.figures.add(f"{when}.{name}_memory", Spent(process.pid).memory_mib(), "MiB", at_most=LEADER_BAR_MIB)

    async def idle(self) -> None:
        """Nothing happens but heartbeats."""
        assert self.broker.child is not None
        leader, broker = Spent(self.pid(await self.leader())), Spent(self.broker.child.pid)
        await asyncio.sleep(IDLE_S)
        self.figures.add("idle.leader_cpu", leader.share(), "cores")
        self.figures.add("idle.broker_cpu", broker.share(), "cores")
        took_ms = []
        for _ in range(15):
            began = time.perf_counter()
            await self.client.status()
            took_ms.append(1000 * (time.perf_counter() - began))
        self.figures.add("status_answer", median(took_ms), "ms")

    def _sleepers(self, sleep_s: float) -> dict[str, Document]:
        """Return as many dear operators as there are nodes; their times differ, so that none of them share a batch."""
        first = next(self._nonces)
        given = ({"nonce": first + n, "batch_s": 0.0, "item_s": sleep_s + n / 10_000} for n in range(self.count))
        return {f"s{n}": {"type": "flow.delay", "with": each} for n, each in enumerate(given)}

    async def _throughput(self, name: str) -> None:
        first = next(self._nonces)
        operators = {f"n{n}": noop(first + n) for n in range(RUN_OPERATORS)}
        began = time.perf_counter()
        run = await self.client.submit(document(operators, "n0"))
        results = await run.result(DEADLINE_S)
        took_s = time.perf_counter() - began
        assert (results.counts or {}).get("done") == RUN_OPERATORS, results.counts
        self.figures.add(f"throughput.{name}", RUN_OPERATORS / took_s, "operators/s")

    async def busy(self) -> Any:
        """Give every node something that lasts; return that run."""
        run = await self.client.submit(document(self._sleepers(BUSY_S), "s0"))

        async def all_assigned() -> bool:
            return bool((await run.status(limit=1))["counts"].get("assigned", 0) == self.count)

        self.figures.add("busy.assigned", await self.until("everything assigned", all_assigned), "s")
        await asyncio.sleep(SETTLED_S)
        self.figures.add("busy.nodes", float((await self.fakes())["held"]), "nodes")
        return run

    async def run_parts(self, parts: list[str]) -> None:
        """Measure what is wanted, in the order of PARTS; every part needs that the nodes have joined."""
        await self.join()
        for part in PARTS:
            if part in parts:
                await getattr(self, part)()

    async def work(self) -> None:
        """Short operators while all nodes are idle, and while they are busy."""
        await self._throughput("idle")
        run = await self.busy()
        await self._throughput("busy")
        await self._repeats("before", run)

    async def _repeats(self, when: str, run: Any) -> None:
        """Wait for a run of sleepers; tell how many of its operators were begun more than once."""
        results = await run.result(DEADLINE_S)
        assert (results.counts or {}).get("done") == self.count, results.counts
        rows = await run.operators()
        self.figures.add(f"{when}.begun_again", float(sum(row["attempt"] > 1 for row in rows)), "operators", exactly=0)

    async def takeover(self) -> None:
        """Kill the leader: until the other counts every node, and takes work."""
        run = await self.busy()
        leader = await self.leader()
        began = time.monotonic()
        process = self._schedulers.pop(leader)
        process.kill()
        process.wait()
        while (await self._status())["leader"]["id"] == leader:
            pass
        answered_s = time.monotonic() - began
        await self.until("all nodes with the next leader", self.all_active)
        took_s = time.monotonic() - began
        told = (await self._status()).get("takeover") or {}
        for phase, seconds in (told.get("phases_s") or {}).items():
            self.figures.add(f"takeover.phase.{phase}", seconds, "s")
        self.figures.add("takeover.leader_answers", answered_s, "s", at_most=TAKEOVER_BAR_S)
        self.figures.add("takeover.all_nodes", took_s, "s", at_most=TAKEOVER_BAR_S)
        first = await self.client.submit(document({"one": noop(next(self._nonces))}, "one"))
        await first.result(DEADLINE_S)
        self.figures.add("takeover.first_result", time.monotonic() - began, "s")
        self._memory("takeover")
        await self._repeats("takeover", run)
        self._start_scheduler(leader)

    async def storm(self) -> None:
        """Kill the broker and start it again: every connection is cut at once; nobody may be declared lost."""
        run = await self.busy()
        child = self.broker.child
        assert child is not None
        lost = 0
        began = time.monotonic()
        child.kill()
        child.wait()
        await asyncio.to_thread(self.broker.start)
        self.figures.add("storm.broker_back", time.monotonic() - began, "s")

        async def all_back() -> bool:
            nonlocal lost
            states = await self.states()
            lost = max(lost, states.get("gone", 0))
            return states.get("active", 0) == self.count and await self.all_connected()

        await self.until("all connections back", all_back)
        self.figures.add("storm.all_back", time.monotonic() - began, "s")
        self.figures.add("storm.lost_wrongly", float(lost), "nodes", exactly=0)
        await self._repeats("storm", run)
        self._memory("storm")

    async def stop(self) -> None:
        """Stop the broker: how long it takes by itself, and that killing it after the budget loses nothing."""
        before = await self._consumers()
        child = self.broker.child
        assert child is not None
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        await asyncio.to_thread(child.wait, DEADLINE_S)
        self.figures.add("stop.by_itself", time.monotonic() - began, "s")
        await asyncio.to_thread(self.broker.start)
        await self.until("all nodes after the stop", self.all_active)
        began = time.monotonic()
        await asyncio.to_thread(self.broker.stop)
        self.figures.add("stop.with_budget", time.monotonic() - began, "s", at_most=STOP_S + 1.0)
        await asyncio.to_thread(self.broker.start)
        await self.until("all nodes after the forced stop", self.all_active)
        self.figures.add("stop.consumers_lost", float(before - await self._consumers()), "consumers", exactly=0)
        await self._throughput("after_restarts")

    async def close(self) -> None:
        """End everything that was started."""
        with suppress(FlowmeshError, AttributeError):
            await self.client.close()
        with suppress(FlowmeshError, AttributeError):
            await self.bus.close()
        for fake in self._fakes:
            with suppress(ProcessLookupError):
                fake.kill()
            await fake.wait()
        for scheduler in self._schedulers.values():
            scheduler.kill()
            scheduler.wait()
        self.broker.stop(budget_s=0.1)


def _show_logs(folder: Path) -> None:
    for log in sorted(folder.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)


async def measure(args: argparse.Namespace, figures: Figures) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=args.dir) as folder:
        scale = Scale(Path(folder), args.nodes, args.aside, figures)
        try:
            await scale.start()
            await scale.run_parts(args.parts.split(","))
        except Exception:
            _show_logs(Path(folder))
            raise
        finally:
            await scale.close()


def main() -> int:
    """Measure, append to the file; return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--aside", type=int, default=2, help="idle connections beside each node's own (default %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None, help="where to make the temporary folder")
    parser.add_argument("--out", type=Path, default=Path("out/scale.jsonl"))
    args = parser.parse_args()
    print(f"{machine()}; {raise_file_limit()} files")
    figures = Figures(args.seed)
    try:
        asyncio.run(measure(args, figures))
    finally:
        write(figures.records, args.out)
    return 1 if any(record.ok is False for record in figures.records) else 0


if __name__ == "__main__":
    raise SystemExit(main())
