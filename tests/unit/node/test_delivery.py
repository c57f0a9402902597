"""Results on their way: what is on disk before it is told, what happens where there is no room, what is told again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowmesh_mesh.messages import Done, Outcome, decode
from flowmesh_node.delivery import OFFER_SOON_S, Delivery
from flowmesh_node.spool import Spool


class FakeBus:
    """Takes what is published, and notes what lay on disk then."""

    def __init__(self, folder: Path) -> None:
        self.connected = True
        self.folder = folder
        self.told: list[tuple[str, int]] = []
        self.ids: list[str] = []

    def post(self, subject: str, data: bytes) -> None:
        self.told.append((decode(data, Done).assignment, len(list(self.folder.glob("*.done")))))

    def push(self) -> None:
        pass

    async def store(self, subject: str, data: bytes, *, message_id: str, timeout_s: float) -> None:
        self.ids.append(message_id)
        self.post(subject, data)


class FullSpool(Spool):
    """A disk without room."""

    def write(self, entries: Iterable[tuple[str, int, bytes]]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def done(assignment: str, *, is_last: bool = True) -> Done:
    return Done("n1", assignment, 1, (Outcome(b"k" * 32, 0, 1, "succeeded"),), "U", b"s", last=is_last)


def delivery(tmp_path: Path, spool: type[Spool] = Spool) -> tuple[Any, FakeBus, Clock]:
    folder, clock = tmp_path / "spool", Clock()
    bus = FakeBus(folder)
    made: Any = Delivery(bus, "n1", None, spool(folder), clock)  # type: ignore[arg-type]
    return made, bus, clock


async def settle(made: Any) -> None:
    while made._sending:
        await asyncio.gather(*made._sending)


async def test_what_may_have_effects_is_on_disk_before_it_is_told_and_in_order(tmp_path: Path) -> None:
    made, bus, _ = delivery(tmp_path)
    made.send(done("a", is_last=False), is_safe_first=True)
    made.send(done("a"), is_safe_first=True)
    made.send(done("b"))
    assert bus.told == [("b", 0)], "other results are told at once"
    await settle(made)
    assert bus.told[1:] == [("a", 1), ("a", 2)]


async def test_a_full_disk_loses_no_result(tmp_path: Path) -> None:
    made, bus, clock = delivery(tmp_path, FullSpool)
    made.send(done("a"), is_safe_first=True)
    made.send(done("b"))
    await settle(made)
    clock.now_s = 10.0
    await made._spool_old()
    assert {assignment for assignment, _ in bus.told} == {"a", "b"}
    assert set(made.unconfirmed()) == {"a", "b"}, "both are kept and offered until the leader shows them"


async def test_after_a_reconnection_results_are_told_at_once_and_soon_again_each_time_by_another_name(tmp_path: Path) -> None:
    made, bus, clock = delivery(tmp_path)
    made.send(done("a"))
    watching = asyncio.create_task(made.watch())
    for _ in range(3):
        made.offer_all()
        await settle(made)
        clock.now_s += 2 * OFFER_SOON_S
        before = len(bus.told)
        async with asyncio.timeout(10):
            while len(bus.told) == before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    watching.cancel()
    assert len(set(bus.ids)) == len(bus.ids), "the broker would take a repetition for a duplicate"
