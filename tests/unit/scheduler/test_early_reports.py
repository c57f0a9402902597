"""What nodes report while a new leader still reads its state: kept, and taken once the nodes are known."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from flowmesh_mesh import receipts, subjects
from flowmesh_mesh.credentials import USER, Key
from flowmesh_mesh.messages import Done, Outcome, encode
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.reports import Reports
from flowmesh_scheduler.service import Leader


class _Leader:
    """As much of a leader as reports need."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(nodes={})
        self.hub = SimpleNamespace(put_soon=lambda _: None)
        self.bus = SimpleNamespace(read_stream=self._read)
        self.applied: list[e.Event] = []

    async def _read(self, _: str) -> AsyncIterator[Any]:
        for nothing in list[Any]():
            yield nothing

    def apply(self, event: e.Event) -> None:
        self.applied.append(event)


def _done(key: Key) -> bytes:
    outcome = Outcome(b"k" * 32, 0, 1, "user-error")
    root = receipts.levels([receipts.leaf(outcome)])[-1][0]
    return encode(Done("n1", "a", 5, (outcome,), key.public_key, key.sign(receipts.statement("n1", "a", 5, root, 1))))


def _receive(reports: Reports, data: bytes) -> None:
    reports._on_done(cast(Any, SimpleNamespace(subject=subjects.node_done("n1"), data=data)))


async def test_a_report_that_comes_before_its_node_is_known_is_not_dropped() -> None:
    leader, key = _Leader(), Key.new(USER)
    reports = Reports(cast(Leader, leader))
    _receive(reports, _done(key))
    assert leader.applied == []
    leader.state.nodes["n1"] = SimpleNamespace(record=SimpleNamespace(public_key=key.public_key))
    await reports.catch_up()
    assert [type(event) for event in leader.applied] == [e.DoneReceived]


async def test_a_report_of_a_node_that_nobody_knows_is_dropped_afterwards() -> None:
    leader = _Leader()
    reports = Reports(cast(Leader, leader))
    await reports.catch_up()
    _receive(reports, _done(Key.new(USER)))
    await reports.catch_up()
    assert leader.applied == []
