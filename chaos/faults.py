"""What is broken, when, and for how long: a plan that the seed decides, and the hands that carry it out.

A plan knows no processes, only kinds and random numbers; whom a fault hits is decided when it begins (the leader preferably,
where a scheduler is hit), so that the same seed breaks the same things in the same order although the mesh does not run alike
twice. At most a minority of the brokers is away at once, unless the fault is that all of them restart.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from chaos import disk
from chaos.history import Fault, History
from chaos.network import Link, Mode
from chaos.processes import ChaosMesh
from chaos.traffic import now_us

LEADER_SHARE = 0.7
"""How often a fault on schedulers hits the leader."""

HUB_SHARE = 0.3
"""How often it is a hub's disk that rots, not a node's."""

_WEIGHTS: dict[str, float] = {
    "scheduler-kill": 3,
    "scheduler-stop": 3,
    "node-kill": 3,
    "node-stop": 2,
    "broker-kill": 2,
    "broker-stop": 1,
    "brokers-restart": 0.6,
    "cut": 2,
    "hole": 2,
    "swallow": 1,
    "half-open": 1,
    "slow": 1,
    "broker-alone": 1,
    "disk-full": 1,
    "corrupt": 1.5,
    "clock": 1.5,
    "power-loss": 1.5,
}
KINDS = tuple(_WEIGHTS)


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault: when it begins and how long it lasts, in seconds; ``draw`` seeds what else is left to chance."""

    at_s: float
    lasts_s: float
    kind: str
    draw: int


def plan(seed: int, window_s: float, kinds: tuple[str, ...] = KINDS, pause_s: float = 3.0) -> list[Planned]:
    """Return the faults of one seed. They may overlap, and all of them end within the window."""
    source = random.Random(f"{seed}/faults")
    weights = [_WEIGHTS[kind] for kind in kinds]
    found: list[Planned] = []
    at_s = source.uniform(1.0, 3.0)
    while at_s < window_s - 2.0:
        kind = source.choices(kinds, weights)[0]
        lasts_s = min(source.choice([0.5, 2.0, 5.0, 8.0, 12.0]) * source.uniform(0.7, 1.3), window_s - at_s)
        found.append(Planned(round(at_s, 3), round(lasts_s, 3), kind, source.randrange(2**32)))
        at_s += source.expovariate(1 / pause_s) + 0.5
    return found


class Breaker:
    """Carries faults out on a mesh. ``leader`` tells who leads; what cannot be done here (no right to mount) is left out."""

    def __init__(self, mesh: ChaosMesh, history: History, leader: Callable[[], str]) -> None:
        self._mesh = mesh
        self._history = history
        self._leader = leader
        self._busy: set[str] = set()
        self._small_disks: set[str] = set()
        self.left_out: dict[str, int] = {}

    def prepare_disks(self, names: list[str]) -> None:
        """Give some processes small disks of their own before they start, if that is possible here."""
        if disk.can_mount():
            self._small_disks = {name for name in names if disk.mount(self._mesh.disk(name))}

    async def carry_out(self, faults: list[Planned]) -> None:
        """Begin each fault at its time; return when all have ended."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()

        async def one(fault: Planned) -> None:
            await asyncio.sleep(began_s + fault.at_s - loop.time())
            await self._one(fault)

        await asyncio.gather(*(one(fault) for fault in faults))

    async def _one(self, fault: Planned) -> None:
        source = random.Random(fault.draw)
        names = self._targets(fault.kind, source)
        if not names:
            self.left_out[fault.kind] = self.left_out.get(fault.kind, 0) + 1
            return
        self._busy.update(names)
        at_us = now_us()
        try:
            detail = await self._hands(fault.kind)(names, fault.lasts_s, source)
        finally:
            self._busy.difference_update(names)
        self._history.add(Fault(at_us, now_us(), fault.kind, ",".join(names), detail))

    # --- whom

    def _targets(self, kind: str, source: random.Random) -> list[str]:
        """Return whom a fault hits; nobody when those who could be hit are away already."""
        mesh = self._mesh
        if kind == "brokers-restart":
            brokers = mesh.names("broker")
            return [] if self._busy.intersection(brokers) else brokers
        if kind in ("broker-kill", "broker-stop", "broker-alone"):
            return self._one_broker(source, kind)
        if kind.startswith("scheduler-"):
            return self._one_scheduler(source)
        if kind == "disk-full":
            return self._pick(sorted(self._small_disks), source)
        if kind == "corrupt" and source.random() < HUB_SHARE:
            return self._one_scheduler(source)
        if kind in ("node-kill", "node-stop", "corrupt"):
            return self._pick(mesh.running("node"), source)
        if source.random() < 0.5:
            return self._one_scheduler(source)
        return self._pick(mesh.running("node"), source)

    def _pick(self, names: list[str], source: random.Random) -> list[str]:
        free = [name for name in names if name not in self._busy]
        return [source.choice(free)] if free else []

    def _one_broker(self, source: random.Random, kind: str) -> list[str]:
        brokers = self._mesh.names("broker")
        away = [name for name in brokers if name in self._busy]
        may_be_away = max(1, (len(brokers) - 1) // 2)
        if len(away) >= may_be_away or (kind == "broker-alone" and len(brokers) == 1):
            return []
        return self._pick(brokers, source)

    def _one_scheduler(self, source: random.Random) -> list[str]:
        leader = self._leader()
        running = self._mesh.running("scheduler")
        if leader in running and leader not in self._busy and source.random() < LEADER_SHARE:
            return [leader]
        return self._pick(running, source)

    # --- how

    def _hands(self, kind: str) -> Callable[[list[str], float, random.Random], Awaitable[str]]:
        if kind.endswith("-kill") or kind == "brokers-restart":
            return self._kill
        if kind.endswith("-stop"):
            return self._pause
        if kind in ("cut", "hole", "swallow", "half-open", "slow", "broker-alone"):
            return lambda names, lasts_s, source: self._network(kind, names, lasts_s, source)
        return {"disk-full": self._disk_full, "corrupt": self._corrupt, "clock": self._clock, "power-loss": self._power_loss}[
            kind
        ]

    async def _kill(self, names: list[str], lasts_s: float, _: random.Random) -> str:
        for name in names:
            self._mesh.processes[name].kill()
        await asyncio.sleep(lasts_s)
        for name in names:
            self._mesh.processes[name].start()
            await asyncio.sleep(0)
        return ""

    async def _pause(self, names: list[str], lasts_s: float, _: random.Random) -> str:
        for name in names:
            self._mesh.processes[name].signal(signal.SIGSTOP)
        await asyncio.sleep(lasts_s)
        for name in names:
            self._mesh.processes[name].signal(signal.SIGCONT)
        return ""

    async def _network(self, kind: str, names: list[str], lasts_s: float, source: random.Random) -> str:
        mode = {"hole": Mode.HOLE, "swallow": Mode.SWALLOW, "slow": Mode.SLOW}.get(kind, Mode.CUT)
        if kind == "half-open":
            mode = source.choice([Mode.HALF_IN, Mode.HALF_OUT])
        links = self._links(kind, names, source)
        for link in links:
            link.turn(mode, source.choice([0.05, 0.2, 0.5]))
        await asyncio.sleep(lasts_s)
        for link in links:
            if link.mode is mode:
                link.turn(Mode.OPEN)
        return f"{mode}, {len(links)} links"

    def _links(self, kind: str, names: list[str], source: random.Random) -> list[Link]:
        network = self._mesh.network
        if kind == "broker-alone":  # a broker that only its clients still reach
            return network.between(names, self._mesh.names("broker"))
        links = network.of(names[0])
        if len(links) > 1 and source.random() < 0.3:
            return source.sample(links, len(links) - 1)
        return links

    async def _disk_full(self, names: list[str], lasts_s: float, _: random.Random) -> str:
        ballast = disk.fill(self._mesh.disk(names[0]))
        await asyncio.sleep(lasts_s)
        ballast.unlink(missing_ok=True)
        return f"{ballast.parent.parent.name}"

    async def _corrupt(self, names: list[str], lasts_s: float, source: random.Random) -> str:
        return await asyncio.to_thread(disk.corrupt, self._mesh.disk(names[0]), source)

    async def _clock(self, names: list[str], lasts_s: float, source: random.Random) -> str:
        path = self._mesh.clock_file(names[0])
        path.parent.mkdir(exist_ok=True)
        offset_s = source.choice([-3600.0, -30.0, -2.0, 2.0, 30.0, 3600.0])
        path.write_text(str(offset_s))
        await asyncio.sleep(lasts_s)
        path.unlink(missing_ok=True)
        return f"{offset_s:+g} s"

    async def _power_loss(self, names: list[str], lasts_s: float, source: random.Random) -> str:
        process = self._mesh.processes[names[0]]
        process.kill()
        what = await asyncio.to_thread(disk.lose_power, self._mesh.disk(names[0]), source)
        await asyncio.sleep(lasts_s)
        process.start()
        return what

    def mend(self) -> None:
        """Mend everything that may still be broken, and start what does not run."""
        self._mesh.network.open_all()
        for name in self._small_disks:
            (self._mesh.disk(name) / "ballast").unlink(missing_ok=True)
        for path in (self._mesh.folder / "clocks").glob("*"):
            path.unlink()
        for process in self._mesh.processes.values():
            process.signal(signal.SIGCONT)
            if not process.is_wanted:
                process.start()

    def release_disks(self) -> None:
        """Take the small disks away."""
        for name in self._small_disks:
            disk.unmount(self._mesh.disk(name))
        self._small_disks.clear()
