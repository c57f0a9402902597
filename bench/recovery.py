"""What faults cost: nodes killed, frozen and cut off, a broker that is away. Figures go to out/recovery.jsonl.

Four parts, each on a private embedded mesh of two nodes and real processes:

- ``kill``: 200 operators of 100 ms on 2 nodes, one of them killed after 5 s and started again after 7 s, beside the raw loop
  under the same fault; ratio of the two times, operators lost, operators cut off in the middle;
- ``broker``: the same with the broker killed after 5 s and started after 7 s;
- ``reassign``: from the fault of a node to the new attempt at a dear operator that it was running;
- ``outage``: the broker away for long in the middle of work: how many operators began anew.

Restarts are counted from the attempts that the ledger's records of the results name.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bench.flowmesh import Document, document
from bench.proxy import Proxy
from bench.raw import Killed
from bench.report import Record, machine, write
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_deploy.layout import read_json
from flowmesh_deploy.process import signal_process
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.client.run import Run
from flowmesh_scheduler.sim.verdict import commit

COUNT = 200
ITEM_S = 0.1
FAULT_AT_S = 5.0
BACK_AT_S = 7.0
RATIO_BAR = 1.05
DEAR_S = 40.0
REASSIGN_BARS = {"kill": 1.0, "freeze": 8.0, "cut": 8.0}
DEADLINE_S = 300.0
PARTS = ("kill", "broker", "reassign", "outage")


def item(nonce: int, item_s: float = ITEM_S) -> Document:
    """Return an operator that takes a node ``item_s``, alone or with others."""
    return {"type": "flow.delay", "with": {"nonce": nonce, "batch_s": 0.0, "item_s": item_s}}


class Figures:
    """Collects records."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.records: list[Record] = []

    def add(self, name: str, value: float, unit: str, at_most: float | None = None, rounds: tuple[float, ...] = ()) -> None:
        """Keep a figure; ``at_most`` is its bar."""
        bar, ok = ("", None) if at_most is None else (f"<= {at_most:g} {unit}", value <= at_most)
        self.records.append(Record(name, value, unit, bar, ok, self.seed, commit(), rounds))
        verdict = "" if ok is None else f"   {bar}: {'ok' if ok else 'MISSED'}"
        print(f"{name:45} {value:10.3f} {unit}{verdict}", flush=True)


@asynccontextmanager
async def mesh_of_two() -> AsyncIterator[tuple[EmbeddedMesh, Mesh]]:
    """Run a mesh of two nodes that has learned what the operators of this benchmark cost."""
    with tempfile.TemporaryDirectory(prefix="bench-recovery-") as folder:
        async with embedded_mesh(Path(folder) / "mesh", nodes=2) as mesh, connect(context=mesh) as client:
            for number in range(3):
                run = await client.submit(document({f"w{n}": item(9_000_000 + number * 100 + n) for n in range(8)}, "w0"))
                await run.result(DEADLINE_S)
            yield mesh, client


async def attempts_of(run: Run) -> dict[str, int]:
    """Return by operator which attempt made its result; that is what the ledger's record of the result names."""
    return {row["name"]: int(row["attempt"]) for row in await run.operators()}


async def _sleep_until(began_s: float, at_s: float) -> None:
    await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))


# --- one killed in the middle


Fault = Callable[[EmbeddedMesh, Mesh, float], Coroutine[Any, Any, int]]


async def _ours_under(seed: int, fault: Fault) -> tuple[float, int, int, int]:
    """Return seconds, operators without result, operators that needed more than one attempt, and what the fault returned."""
    async with mesh_of_two() as (mesh, client):
        operators = {f"n{n}": item(seed * 1_000_000 + n) for n in range(COUNT)}
        began_s = time.perf_counter()
        hurting = asyncio.create_task(fault(mesh, client, began_s))
        run = await client.submit({**document(operators, "n0"), "outputs": {n: f"{n}.out" for n in operators}})
        results = await run.wait(DEADLINE_S)
        took_s = time.perf_counter() - began_s
        cut_off = await hurting
        attempts = await attempts_of(run)
        lost = COUNT - dict(results.counts or {}).get("done", 0)
        return took_s, lost, sum(each > 1 for each in attempts.values()), cut_off


async def _kill_a_node(mesh: EmbeddedMesh, client: Mesh, began_s: float) -> int:
    """Kill and start a node; return how many operators it cut off: one for each assignment at work, for these go one by one.

    The others of those assignments had not begun: they move, and lose nothing.
    """
    await _sleep_until(began_s, FAULT_AT_S)
    running = next(int(row["running"]) for row in await client.nodes() if row["node"] == "node-1")
    mesh.kill_node("node-1")
    await _sleep_until(began_s, BACK_AT_S)
    await mesh.start_node("node-1")
    return running


async def _kill_the_broker(mesh: EmbeddedMesh, client: Mesh, began_s: float) -> int:
    await _sleep_until(began_s, FAULT_AT_S)
    await broker_away(mesh, BACK_AT_S - FAULT_AT_S)
    return 0


async def broker_away(mesh: EmbeddedMesh, for_s: float) -> None:
    """Kill the broker and keep it down: whoever would start it again is stopped for so long."""
    supervisor = read_json(mesh.layout.state)["supervisor"]
    signal_process(supervisor, signal.SIGSTOP)
    try:
        for name in [name for name in read_json(mesh.layout.state)["processes"] if name.startswith("broker")]:
            mesh.signal(name, signal.SIGKILL)
        await asyncio.sleep(for_s)
    finally:
        signal_process(supervisor, signal.SIGCONT)


def measure_kill(figures: Figures, rounds: int) -> None:
    """Compare with the raw loop, in turns."""
    ours: list[float] = []
    raw: list[float] = []
    lost = cut_off = moved = 0
    for number in range(rounds):
        loop = Killed(COUNT, ITEM_S, FAULT_AT_S, BACK_AT_S)
        took_s, raw_lost = loop.run()
        raw.append(took_s)
        figures.add(f"node_kill.raw.lost.round{number + 1}", raw_lost, "operators")
        took_s, missing, again, running = asyncio.run(_ours_under(figures.seed * 100 + number, _kill_a_node))
        ours.append(took_s)
        lost, moved, cut_off = max(lost, missing), max(moved, again), max(cut_off, running)
    figures.add("node_kill.raw.makespan", median(raw), "s", rounds=tuple(raw))
    figures.add("node_kill.flowmesh.makespan", median(ours), "s", rounds=tuple(ours))
    figures.add("node_kill.flowmesh/raw", median(ours) / median(raw), "x", RATIO_BAR)
    figures.add("node_kill.lost", lost, "operators", 0)
    figures.add("node_kill.cut_off", cut_off, "operators", 1)
    figures.add("node_kill.moved_before_they_began", max(0, moved - cut_off), "operators")


def measure_broker(figures: Figures, rounds: int) -> None:
    """Count what a broker that is away for two seconds costs."""
    found = [asyncio.run(_ours_under(figures.seed * 100 + 50 + number, _kill_the_broker)) for number in range(rounds)]
    figures.add("broker_kill.flowmesh.makespan", median(each[0] for each in found), "s", rounds=tuple(each[0] for each in found))
    figures.add("broker_kill.lost", max(each[1] for each in found), "operators", 0)
    figures.add("broker_kill.restarted", max(each[2] for each in found), "operators", 0)


# --- how soon others take over


class NodeBehindProxy:
    """A node process of ours whose connections go through a proxy."""

    def __init__(self, mesh: EmbeddedMesh, name: str) -> None:
        found = read_json(mesh.layout.join_file(name))
        address = urlsplit(found["urls"][0])
        self.name = name
        self.proxy = Proxy(str(address.hostname), int(address.port or 4222))
        self._joined = found
        self._folder = mesh.layout.folder / "behind" / name
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        if not self.proxy.port:
            await self.proxy.start()
        self._folder.mkdir(parents=True, exist_ok=True)
        join_file = self._folder / "join.json"
        join_file.write_bytes(msgspec.json.encode({**self._joined, "urls": [self.proxy.url]}))
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a fork, and nothing waits for it
                [sys.executable, "-P", "-m", "flowmesh_node", "join", str(join_file), "--dir", str(self._folder / "node")],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    async def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
        await self.proxy.close()


async def _until(condition: Callable[[], Awaitable[bool]], pause_s: float = 0.01) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 - the leader is asked, it does not tell
            await asyncio.sleep(pause_s)


async def _are_active(client: Mesh, count: int) -> bool:
    states = [str(row["state"]) for row in await client.nodes()]
    return states.count("active") == count


async def _one_reassignment(client: Mesh, nodes: dict[str, NodeBehindProxy], fault: str, nonce: int) -> float:
    """Hurt the node that runs a dear operator; return the seconds until another node has it."""
    await _until(lambda: _are_active(client, len(nodes)))
    run = await client.submit(document({"dear": item(nonce, DEAR_S)}, "dear"))
    row: dict[str, Any] = {}

    async def is_at_work() -> bool:
        row.update((await run.operators())[0])
        return bool(row["state"] == "assigned")

    await _until(is_at_work)
    await asyncio.sleep(0.3 + nonce % 10 / 10)
    node = nodes[row["node"]]
    began_s = time.perf_counter()
    if fault == "kill":
        node.signal(signal.SIGKILL)
    elif fault == "freeze":
        node.signal(signal.SIGSTOP)
    else:
        node.proxy.swallow()

    async def is_elsewhere() -> bool:
        found = (await run.operators())[0]
        return bool(found["state"] == "assigned" and found["node"] != node.name)

    await _until(is_elsewhere, 0.005)
    took_s = time.perf_counter() - began_s
    await run.cancel()
    if fault == "kill":
        await node.start()
    elif fault == "freeze":
        node.signal(signal.SIGCONT)
    else:
        node.proxy.mend()
    return took_s


async def _reassignments(seed: int, times: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {fault: [] for fault in REASSIGN_BARS}
    async with AsyncExitStack() as stack:
        mesh, client = await stack.enter_async_context(mesh_of_two())
        nodes = {name: NodeBehindProxy(mesh, name) for name in mesh.node_names()}
        for name, node in nodes.items():
            mesh.kill_node(name)
            stack.push_async_callback(node.stop)
            await node.start()
        nonce = seed * 1_000_000
        for fault, took_s in found.items():
            for _ in range(times):
                nonce += 1
                took_s.append(await _one_reassignment(client, nodes, fault, nonce))
    return found


def measure_reassign(figures: Figures, times: int) -> None:
    """Measure how soon another node has what a node was running."""
    for fault, took_s in asyncio.run(_reassignments(figures.seed, times)).items():
        figures.add(f"node_{fault}_reassign_s_median", median(took_s), "s", REASSIGN_BARS[fault], tuple(took_s))
        figures.add(f"node_{fault}_reassign_s_worst", max(took_s), "s")


# --- a broker that is away for long


async def _outage(seed: int, for_s: float) -> tuple[int, int, int]:
    """Return how many operators ran, how many were lost, how many needed more than one attempt."""
    async with mesh_of_two() as (mesh, client):
        longs = {f"long{n}": item(seed * 1_000_000 + n, for_s * 0.6) for n in range(4)}
        quick = {f"quick{n}": {"type": "flow.noop", "with": {"nonce": seed * 1_000_000 + n, "sleep_s": 2.0}} for n in range(20)}
        after = {f"after{n}": {**item(seed * 1_000_000 + 100 + n, 0.05), "inputs": {"after": f"long{n}.out"}} for n in range(4)}
        run = await client.submit(document(longs | quick | after, "after0"))
        await asyncio.sleep(1.5)
        await broker_away(mesh, for_s)
        results = await run.wait(DEADLINE_S + 2 * for_s)
        attempts = await attempts_of(run)
        total = len(longs | quick | after)
        return total, total - dict(results.counts or {}).get("done", 0), sum(each > 1 for each in attempts.values())


def measure_outage(figures: Figures, for_s: float) -> None:
    """Count what begins anew."""
    total, lost, again = asyncio.run(_outage(figures.seed, for_s))
    figures.add("outage.seconds", for_s, "s")
    figures.add("outage.operators", total, "operators")
    figures.add("outage.lost", lost, "operators", 0)
    figures.add("outage.restarted", again, "operators", 0)


def main() -> int:
    """Run the parts; return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of kill and broker (default %(default)s)")
    parser.add_argument("--times", type=int, default=20, help="faults of each kind in reassign (default %(default)s)")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds without a broker (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/recovery.jsonl"))
    args = parser.parse_args()
    print(machine())
    figures, wanted = Figures(args.seed), args.only.split(",")
    if "kill" in wanted:
        measure_kill(figures, args.rounds)
    if "broker" in wanted:
        measure_broker(figures, args.rounds)
    if "reassign" in wanted:
        measure_reassign(figures, args.times)
    if "outage" in wanted:
        measure_outage(figures, args.outage)
    write(figures.records, args.out)
    return 1 if any(record.ok is False for record in figures.records) else 0


if __name__ == "__main__":
    raise SystemExit(main())
