"""No-ops: what they cost adds up to the time that the batch took."""

from __future__ import annotations

from typing import cast

import pytest

from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.messages import Assignment, Item, Outcome
from flowmesh_node.held import Held, Reply
from flowmesh_node.inline import Inline


class Settled:
    """Collects outcomes by position."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}

    def settle(self, index: int, outcome: Outcome, blocks: object = ()) -> None:
        self.outcomes[index] = outcome


async def test_no_ops_that_sleep_side_by_side_share_the_time_so_that_it_adds_up() -> None:
    sleeps = (0.03, 0.0, 0.01, 0.03)
    items = tuple(Item(bytes([n]) * 32, 0, 1, {"nonce": n, "sleep_s": s}, {}) for n, s in enumerate(sleeps))
    held = Held(Assignment(1, "a", "n", "flow.noop", 1, "flow.noop@1", items), None)
    reply = Settled()
    await Inline(MemoryStore()).run(held, cast(Reply, reply), list(range(len(items))))
    spent_us = [reply.outcomes[index].metered.exec_us for index in range(len(items))]
    assert sum(spent_us) == pytest.approx(30_000, abs=4), "as long as the longest sleeps, not as all of them together"
    assert spent_us == pytest.approx([13_333, 0, 3_333, 13_333], abs=1), "whoever sleeps longer pays for the rest of the time"
