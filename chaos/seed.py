"""One seed: a fresh mesh, work and faults for a while, healing, and the verdict over everything that was seen."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from chaos.checker import Verdict, check
from chaos.faults import Breaker, Planned, plan
from chaos.history import Died, History
from chaos.network import Network
from chaos.processes import ChaosMesh, Shape
from chaos.recorder import Recorder, begun_of, complaints_of
from chaos.traffic import Traffic, now_us
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.credentials import Credentials

HEAL_S = 90.0
"""How long every accepted run has to end in, after the last fault."""

WATCH_S = 0.5


@dataclass(slots=True)
class Outcome:
    """What came of one seed."""

    seed: int
    window_s: float
    took_s: float
    verdict: Verdict
    faults: list[Planned]
    left_out: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def is_good(self) -> bool:
        return not self.verdict.violations and not self.error


async def connect_recorder(mesh: ChaosMesh) -> Bus:
    """Return a connection past all links with the rights of a scheduler."""
    credentials = Credentials.load(mesh.layout.credentials / "scheduler.creds")
    inbox = subjects.inbox_prefix("scheduler")
    return await Bus.connect(mesh.direct_urls(), credentials, name="chaos", inbox=inbox, deadline_s=30.0)


async def run_seed(seed: int, window_s: float, folder: Path, shape: Shape, faults: list[Planned] | None = None) -> Outcome:
    """Run one seed on a new mesh in ``folder``; the history stays there as ``history.jsonl``."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    began_s = time.monotonic()
    planned = plan(seed, window_s) if faults is None else faults
    history, network = History(), Network()
    mesh = ChaosMesh(folder, shape, network)
    breaker: Breaker | None = None
    outcome = Outcome(seed, window_s, 0.0, Verdict(), planned)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(network.close)
        stack.push_async_callback(mesh.stop)
        await mesh.prepare()
        recorder_of: list[Recorder] = []
        breaker = Breaker(mesh, history, lambda: recorder_of[0].leader if recorder_of else "")
        stack.callback(breaker.release_disks)
        breaker.prepare_disks(["node-1", "scheduler-1"])
        await mesh.start()
        bus = await connect_recorder(mesh)
        stack.push_async_callback(bus.close)
        recorder = Recorder(bus, history)
        recorder_of.append(recorder)
        await recorder.start()
        stack.push_async_callback(recorder.stop)
        traffic = Traffic(mesh, history, seed)
        stack.push_async_callback(traffic.close)
        await traffic.ready()
        await _play(mesh, history, traffic, breaker, planned, window_s)
        await _conclude(mesh, history, traffic, recorder)
    outcome.left_out = breaker.left_out
    history.write(folder / "history.jsonl")
    outcome.verdict = check(history)
    outcome.took_s = time.monotonic() - began_s
    return outcome


async def _play(
    mesh: ChaosMesh, history: History, traffic: Traffic, breaker: Breaker, planned: list[Planned], window_s: float
) -> None:
    """Work and faults, side by side, for the length of the window."""
    traffic.start()
    watching = asyncio.create_task(_watch(mesh, history))
    try:
        end_s = asyncio.get_running_loop().time() + window_s
        await breaker.carry_out(planned)
        await asyncio.sleep(max(0.0, end_s - asyncio.get_running_loop().time()))
        breaker.mend()
        await traffic.stop()
        await traffic.settle(HEAL_S)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _watch(mesh: ChaosMesh, history: History) -> None:
    """Note every process that ends by itself; it is started again, as a supervisor would."""
    while True:
        await asyncio.sleep(WATCH_S)
        for name, status in mesh.ended_alone():
            history.add(Died(now_us(), name, status))


async def _conclude(mesh: ChaosMesh, history: History, traffic: Traffic, recorder: Recorder) -> None:
    """Read everything that there is to know in the end."""
    await traffic.look_again()
    await asyncio.sleep(1.0)
    await recorder.read_ledger()
    traffic.read_effects()
    for name, process in mesh.processes.items():
        log = mesh.log_text(name)
        for begun in begun_of(name, log) if process.role == "node" else ():
            history.add(begun)
        for complaint in complaints_of(name, log.replace(f"{mesh.folder}/", "")):
            history.add(complaint)
