"""What goes wrong in a simulation: a plan of faults, drawn from the seed, each with a beginning and an end."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.faults.history import Fault
from tests.faults.loop import FROZEN
from tests.faults.world import Machine, Node, World

GAP_S = 9.0
"""Mean time between two faults."""

WEIGHTS: dict[str, float] = {
    "node-kill": 4,
    "node-freeze": 3,
    "node-cut": 3,
    "node-hole": 3,
    "node-leave": 1.5,
    "node-slow": 1,
    "node-disk-slow": 1,
    "node-disk-full": 1,
    "node-blocks-lost": 1.5,
    "node-blocks-rotten": 1.5,
    "executor-crash": 2,
    "network-slow": 1.5,
    "scheduler-kill": 4,
    "scheduler-freeze": 3,
    "scheduler-cut": 3,
    "scheduler-hole": 2,
    "scheduler-disk-slow": 1,
    "rolling-restart": 1,
    "clock-jump": 2,
    "broker-restart": 3,
    "broker-wipe": 1.5,
    "broker-leaderless": 3,
    "lost-answers": 3,
    "client-cut": 1,
    "client-kill": 1,
    "everything-dark": 0.5,
}
KINDS = tuple(WEIGHTS)

QUIET_S = 30.0
"""Around the loss of the broker's whole store nothing else is lost: what holders still have is promised, not what nobody has."""


class Plan:
    """The faults of one seed. Every seed has a handful of kinds of its own, so that some seeds see one kind again and again."""

    def __init__(self, world: World, rng: random.Random, until_s: float, kinds: tuple[str, ...] | None) -> None:
        self._world = world
        self._rng = rng
        self._until_s = until_s
        self._is_over = False
        self._quiet_until_s = 0.0
        self._kinds = kinds if kinds is not None else self._choose()

    def _choose(self) -> tuple[str, ...]:
        rng = self._rng
        possible = [k for k in KINDS if self._world.is_replicated or k != "broker-leaderless"]
        if rng.random() < 0.04:
            return ()  # an undisturbed world, for comparison
        count = rng.choice((1, 2, 4, 8, len(possible)))
        return tuple(sorted(rng.sample(possible, min(count, len(possible)))))

    def schedule(self) -> None:
        """Lay out the whole plan."""
        at_s = self._rng.uniform(5.0, 15.0)
        while self._kinds and at_s < self._until_s - 5.0:
            weights = [WEIGHTS[kind] for kind in self._kinds]
            kind = self._rng.choices(self._kinds, weights)[0]
            if kind == "broker-wipe":
                self._world.later(at_s, self._world.heal)
                at_s += QUIET_S
            self._world.later(at_s, partial(self._begin, kind))
            at_s += self._rng.expovariate(1 / GAP_S)

    def end(self) -> None:
        """Begin nothing more."""
        self._is_over = True

    # --- one fault

    def _begin(self, kind: str) -> None:
        world = self._world
        if self._is_over or world.loop.time() < self._quiet_until_s:
            return
        getattr(self, "_" + kind.replace("-", "_"))(kind)

    def _note(self, kind: str, who: str, lasts_s: float) -> None:
        now_s = self._world.loop.time()
        self._world.history.faults.append(Fault(now_s, kind, who, now_s + lasts_s))
        self._world.history.note(f"FAULT {kind} {who} for {lasts_s:.2f} s")

    def _later(self, after_s: float, action: Callable[[], Any]) -> None:
        self._world.later(after_s, lambda: None if self._is_over else action())

    def _node(self) -> Node:
        return self._rng.choice(self._world.nodes)

    def _scheduler(self) -> Machine:
        """Return a scheduler, most often the one that leads."""
        leader = self._world.leader
        return leader if leader is not None and self._rng.random() < 0.75 else self._rng.choice(self._world.schedulers)

    def _short_or_long(self, short: float, long: float) -> float:
        return self._rng.uniform(0.05, short) if self._rng.random() < 0.6 else self._rng.uniform(short, long)

    # --- nodes

    def _node_kill(self, kind: str) -> None:
        self._kill(kind, self._node(), self._short_or_long(2.0, 30.0))

    def _kill(self, kind: str, machine: Machine, down_s: float) -> None:
        self._note(kind, machine.name, down_s)
        machine.kill(is_wanted=False)
        self._later(down_s, machine.boot)

    def _node_freeze(self, kind: str) -> None:
        self._freeze(kind, self._node(), self._short_or_long(3.0, 25.0))

    def _freeze(self, kind: str, machine: Machine, lasts_s: float) -> None:
        process = machine.process
        if process is None or not machine.is_alive:
            return
        self._note(kind, machine.name, lasts_s)
        process.freeze()
        self._later(lasts_s, lambda: process.thaw() if process.state is FROZEN else None)

    def _node_cut(self, kind: str) -> None:
        self._cut(kind, self._node(), self._short_or_long(2.0, 40.0))

    def _cut(self, kind: str, machine: Machine, lasts_s: float) -> None:
        self._note(kind, machine.name, lasts_s)
        self._world.network.cut(machine.name)
        self._later(lasts_s, lambda: self._world.network.heal(machine.name))

    def _node_hole(self, kind: str) -> None:
        self._hole(kind, self._node(), self._short_or_long(3.0, 30.0))

    def _hole(self, kind: str, machine: Machine, lasts_s: float) -> None:
        self._note(kind, machine.name, lasts_s)
        self._world.network.swallow(machine.name)
        self._later(lasts_s, lambda: self._world.network.heal(machine.name))

    def _node_leave(self, kind: str) -> None:
        node = self._node()
        if not node.is_alive or node.is_leaving:
            return
        down_s = self._rng.uniform(12.0, 40.0)
        self._note(kind, node.name, down_s)
        node.is_leaving = True
        self._world.spawn_for(node, node.leave())

        def back() -> None:
            node.is_leaving = False
            node.kill(is_wanted=False)
            node.boot()

        self._later(down_s, back)

    def _node_slow(self, kind: str) -> None:
        node, lasts_s = self._node(), self._rng.uniform(5.0, 40.0)
        self._note(kind, node.name, lasts_s)
        self._world.bench.slow[node.name] = self._rng.uniform(2.0, 8.0)
        self._later(lasts_s, lambda: self._world.bench.slow.pop(node.name, None))

    def _node_disk_slow(self, kind: str) -> None:
        self._slow_disk(kind, self._node())

    def _slow_disk(self, kind: str, machine: Machine) -> None:
        process, lasts_s = machine.process, self._rng.uniform(2.0, 20.0)
        if process is None:
            return
        self._note(kind, machine.name, lasts_s)
        process.disk_s = (0.05, 1.5)

        def usual() -> None:
            process.disk_s = (0.0001, 0.001)

        self._later(lasts_s, usual)

    def _node_disk_full(self, kind: str) -> None:
        node, lasts_s = self._node(), self._rng.uniform(1.0, 15.0)
        self._note(kind, node.name, lasts_s)
        node.store.is_full = True

        def freed() -> None:
            node.store.is_full = False

        self._later(lasts_s, freed)

    def _node_blocks_lost(self, kind: str) -> None:
        node = self._node()
        self._note(kind, node.name, 0.0)
        cids = sorted(node.store.cids())
        node.store.delete_many(self._rng.sample(cids, len(cids) // 2))

    def _node_blocks_rotten(self, kind: str) -> None:
        node = self._node()
        self._note(kind, node.name, 0.0)
        cids = sorted(node.store.cids())
        node.store.rotten.update(self._rng.sample(cids, len(cids) // 2))

    def _executor_crash(self, kind: str) -> None:
        node = self._node()
        self._note(kind, node.name, 0.0)
        self._world.bench.crash_next[node.name] = 1

    # --- schedulers

    def _scheduler_kill(self, kind: str) -> None:
        self._kill(kind, self._scheduler(), self._short_or_long(2.0, 20.0))

    def _scheduler_freeze(self, kind: str) -> None:
        self._freeze(kind, self._scheduler(), self._short_or_long(4.0, 20.0))

    def _scheduler_cut(self, kind: str) -> None:
        self._cut(kind, self._scheduler(), self._short_or_long(3.0, 20.0))

    def _scheduler_hole(self, kind: str) -> None:
        self._hole(kind, self._scheduler(), self._short_or_long(4.0, 20.0))

    def _scheduler_disk_slow(self, kind: str) -> None:
        self._slow_disk(kind, self._scheduler())

    def _rolling_restart(self, kind: str) -> None:
        """Stop every scheduler in turn with a word, and start it again."""
        for number, scheduler in enumerate(self._world.schedulers):

            def stop(scheduler: Any = scheduler) -> None:
                if scheduler.service is not None and scheduler.is_alive:
                    self._note(kind, scheduler.name, 2.0)
                    scheduler.is_wanted = True  # it ends by itself, and is started again
                    scheduler.service.stopping.set()

            self._later(number * 6.0, stop)

    def _clock_jump(self, kind: str) -> None:
        machines = [*self._world.schedulers, *self._world.nodes]
        machine, lasts_s = self._rng.choice(machines), self._rng.uniform(1.0, 60.0)
        process = machine.process
        if process is None:
            return
        self._note(kind, machine.name, lasts_s)
        process.wall_offset_us = int(self._rng.choice((-3600, -60, -5, -1, 1, 5, 60, 3600)) * 1e6)

        def back() -> None:
            process.wall_offset_us = 0

        self._later(lasts_s, back)

    # --- the broker and the network

    def _broker_restart(self, kind: str) -> None:
        down_s = self._short_or_long(2.0, 40.0)
        self._note(kind, "broker", down_s)
        self._world.stop_broker()
        self._later(down_s, self._world.start_broker)

    def _broker_wipe(self, kind: str) -> None:
        world = self._world
        if any(not machine.is_alive for machine in [*world.schedulers, *world.nodes]) or not world.broker.is_up:
            return
        down_s = self._rng.uniform(0.1, 5.0)
        self._note(kind, "broker", down_s)
        self._quiet_until_s = world.loop.time() + down_s + QUIET_S
        world.stop_broker()
        world.broker.wipe()
        self._later(down_s, world.start_broker)

    def _broker_leaderless(self, kind: str) -> None:
        world, lasts_s = self._world, self._rng.uniform(4.0, 9.0)
        names = sorted(world.broker.streams)
        some = self._rng.sample(names, self._rng.randint(1, len(names))) if names else []
        self._note(kind, "broker", lasts_s)
        for name in some:
            world.broker.leaderless_until_s[name] = world.loop.time() + lasts_s

    def _lost_answers(self, kind: str) -> None:
        self._note(kind, "broker", 1.0)
        self._world.broker.lose_answers = self._rng.randint(1, 6)

    def _network_slow(self, kind: str) -> None:
        machine, lasts_s = self._rng.choice(self._world.machines), self._rng.uniform(2.0, 20.0)
        self._note(kind, machine.name, lasts_s)
        self._world.network.condition(machine.name).extra_s = self._rng.choice((0.05, 0.3, 1.0))
        self._later(lasts_s, lambda: setattr(self._world.network.condition(machine.name), "extra_s", 0.0))

    def _client_cut(self, kind: str) -> None:
        self._cut(kind, self._rng.choice(self._world.clients), self._rng.uniform(0.5, 20.0))

    def _client_kill(self, kind: str) -> None:
        self._kill(kind, self._rng.choice(self._world.clients), self._rng.uniform(0.1, 10.0))

    def _everything_dark(self, kind: str) -> None:
        """The power of the whole place fails and comes back."""
        world, down_s = self._world, self._rng.uniform(1.0, 10.0)
        self._note(kind, "everything", down_s)
        world.stop_broker()
        for machine in world.machines:
            machine.kill(is_wanted=False)
        self._later(down_s, world.start_broker)
        for machine in world.machines:
            self._later(down_s + self._rng.uniform(0.0, 5.0), machine.boot)
