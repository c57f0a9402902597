"""Sick nodes, stragglers and second attempts in random worlds: nothing is lost or done twice, and the spending is bounded."""

from __future__ import annotations

import os
import random

import pytest
from tests.property.test_scheduler import KINDS, compare
from tests.unit.scheduler.flows import SECOND
from tests.unit.scheduler.workload import random_requests
from tests.unit.scheduler.world import World

from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.standing import OK, SCHEDULER

SEEDS = int(os.environ.get("FLOWMESH_SEEDS", "30"))
SETTINGS = Settings(
    nodes_lost_limit=1000,
    results_lost_limit=1000,
    sick_samples=2,
    sick_failures=2,
    sick_z=2.0,
    cordon_share=0.5,
    cordon_pause_s=3.0,
    canaries=2,
    speculation_share=0.3,
    straggler_min_s=0.1,
)
"""Quick to distrust, quick to try again, much to spend: as much as possible happens in half a minute."""

WITHHELD_MAX_US = 2 * SECOND
"""For so long nobody may be left who takes work: until the next look."""


class Distrustful(World):
    """A world with slow and unreliable nodes, where somebody orders cordons now and then; trust and spending are watched."""

    def __init__(self, seed: int, kind: str, nodes: int) -> None:
        super().__init__(seed, KINDS[kind], nodes, SETTINGS)
        self.exec_us = SECOND // 2
        self.speculated = self.won = self.cordons = self.recoveries = self.ordered = 0
        self._all_withheld_us = 0
        self._totals: dict[str, int] = {}
        draw = random.Random(f"health {seed}")
        for node in list(self.nodes.values())[1:]:
            node.slowness = draw.choice((1.0, 1.0, 5.0))
            node.crashes = draw.choice((0.0, 0.0, 0.9))
        self._draw = draw

    def apply(self, event: e.Event) -> None:
        state = self.state
        before = {n.name: n.health.state for n in state.nodes.values()} if state is not None else {}
        super().apply(event)
        if state is None or self.state is not state:
            return
        for node in state.nodes.values():
            if node.health.by == SCHEDULER and before.get(node.name, OK) == OK != node.health.state:
                self.cordons += 1
            if node.health.by == SCHEDULER and before.get(node.name) == "canary" and node.health.state == OK:
                self.recoveries += 1
        copies = state.copies
        assert copies.spent_usd() <= SETTINGS.speculation_share * copies.rent_usd() + 1e-12, "copies cost more than they may"
        self._watch_trust()
        if isinstance(event, e.Tick):
            self.speculated = max(self.speculated, state.totals["speculated"])
            self.won = max(self.won, state.totals["speculation_won"])
            if self.is_stormy and self._draw.random() < 0.02:
                self.ordered += 1
                name = self._draw.choice(list(self.nodes))
                super().apply(e.CordonRequested(name, False, "somebody"))

    def _watch_trust(self) -> None:
        """The scheduler never leaves itself without anybody who takes work."""
        assert self.state is not None
        there = [n for n in self.state.nodes.values() if n.is_usable]
        if self.is_cut_off or not there or any(n.health.state == OK for n in there):
            self._all_withheld_us = 0
        elif not self._all_withheld_us:
            self._all_withheld_us = self.now_us
        else:
            assert self.now_us - self._all_withheld_us <= WITHHELD_MAX_US, "nobody is trusted"


def play(kind: str, seed: int, *, records: bool = False) -> Distrustful:
    draw = random.Random(f"{kind} {seed}")
    world = Distrustful(draw.randrange(1 << 30), kind, draw.randint(2, 5))
    world.records = records
    requests = random_requests(draw, is_kind=True, count=12)
    for request in requests:
        world.submit(request, at_s=draw.random() * 20)
    world.run_until_calm(limit_s=1200)
    for request in requests:
        if world.ended[request.tenant, request.run].reason == "succeeded":
            compare(world, request)
        else:
            assert world.ended[request.tenant, request.run].reason in ("crashed", "timeout")
    return world


@pytest.mark.parametrize("kind", ["calm", "unreliable messages", "dying nodes", "cut cables", "many leaders", "everything"])
def test_whatever_is_distrusted_and_tried_twice_every_run_ends_as_it_must(kind: str) -> None:
    for seed in range(SEEDS):
        try:
            play(kind, seed)
        except AssertionError as error:
            raise AssertionError(f"kind {kind!r}, seed {seed}: {error}") from error


def test_the_worlds_hold_what_they_are_made_for() -> None:
    """Copies, wins of copies, cordons and recoveries all happen: else the test above would show nothing."""
    worlds = [play("calm", seed) for seed in range(12)] + [play("everything", seed) for seed in range(12)]
    worlds += [play("cut cables", seed) for seed in (0, 36, 37)]
    assert sum(w.speculated for w in worlds) > 10
    assert sum(w.won for w in worlds) > 3
    assert sum(w.cordons for w in worlds) > 5
    assert sum(w.recoveries for w in worlds) > 0


def test_the_same_seed_gives_the_same_commands() -> None:
    for seed in range(3):
        first, second = (play("everything", seed, records=True) for _ in range(2))
        assert first.digest.hexdigest() == second.digest.hexdigest()
