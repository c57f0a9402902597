"""The node's side of checkpoints: the newest is offered again and again, and what is not wanted any more leaves the store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from flowmesh_cas.cid import RAW
from flowmesh_cas.pack_store import PackStore
from flowmesh_cas.store import BlockStore, MemoryStore
from flowmesh_mesh import content, subjects
from flowmesh_mesh.checkpoints import PIN
from flowmesh_mesh.messages import Assignment, Checkpoint, CheckpointKept, Item, decode
from flowmesh_node import checkpoints as module
from flowmesh_node import frames
from flowmesh_node.checkpoints import Checkpoints

MIB = 1024 * 1024
KEY = b"\x07" * 32
ITEM = Item(KEY, 0, 1, {}, {})
ASSIGNMENT = Assignment(1, "1-1", "n1", "train.sft", 1, "", (ITEM,))


class FakeBus:
    """Where offers go; it may be away."""

    def __init__(self) -> None:
        self.connected = True
        self.offered: list[Checkpoint] = []

    def post(self, subject: str, data: bytes) -> None:
        assert subject == subjects.node_checkpoint("n1")
        self.offered.append(decode(data, Checkpoint))

    def push(self) -> None: ...


class Bench:
    """A node's checkpoints with a store in memory, and a training that writes folders."""

    def __init__(self, folder: Path, store: BlockStore | None = None) -> None:
        self.folder = folder
        self.bus = FakeBus()
        self.store = store or MemoryStore()
        self.behind_s: list[float] = []
        self.checkpoints = Checkpoints(self.bus, self.store, "n1", lambda cids: None)  # type: ignore[arg-type]

    async def write(self, step: int, *, wait: bool = True, size_bytes: int = 1000) -> None:
        """Let the training write a checkpoint: one file that stays as it is, one that changes."""
        path = self.folder / str(step)
        path.mkdir()
        (path / "same").write_bytes(b"unchanged" * 100)
        (path / "state").write_bytes(f"step {step} ".encode().ljust(size_bytes))
        self.checkpoints.take(ASSIGNMENT, ITEM, frames.Checkpointed(0, str(path), step, 100, 9), self.behind_s.append)
        if wait:
            await self.settled()

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        while self.checkpoints._tasks:
            await asyncio.gather(*self.checkpoints._tasks)

    async def kept(self, step: int) -> None:
        """Let the leader say that it has a checkpoint."""
        self.checkpoints.kept(CheckpointKept(1, ASSIGNMENT.id, KEY, step))
        await self.settled()

    def steps(self) -> list[int]:
        """Return the steps of which the store holds what changed."""
        files = [self.store.get(cid) for cid in self.store.cids() if cid[1] == RAW]
        return sorted(int(data.split(b" ", 2)[1]) for data in files if data.startswith(b"step"))


async def test_a_checkpoint_is_offered_with_all_that_says_whose_it_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.write(10)
    (made,) = bench.bus.offered
    assert (made.node, made.assignment, made.epoch, made.key, made.generation, made.attempt) == ("n1", "1-1", 1, KEY, 0, 1)
    assert (made.step, made.steps, made.stall_us) == (10, 100, 9)
    assert not (tmp_path / "10").exists(), "it is in the store; the folder is gone"
    content.export(bench.store, made.at, tmp_path / "again")
    assert (tmp_path / "again" / "state").read_bytes().startswith(b"step 10")


async def test_only_the_newest_is_kept_while_nobody_answers(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.bus.connected = False
    for step in (10, 20, 30):
        await bench.write(step)
    assert not bench.bus.offered
    assert bench.steps() == [30]
    bench.bus.connected = True
    bench.checkpoints.offer_all()
    assert [made.step for made in bench.bus.offered] == [30]


async def test_what_is_overtaken_before_it_was_stored_never_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for step in (10, 20, 30):
        await bench.write(step, wait=False)
    await bench.settled()
    assert [made.step for made in bench.bus.offered] == [30]
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240


async def test_a_kept_checkpoint_stays_until_a_newer_one_is_kept_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.write(10)
    await bench.kept(10)
    assert len(bench.behind_s) == 1
    assert bench.checkpoints.unconfirmed == 0
    await bench.write(20)
    assert bench.steps() == [10, 20]
    assert bench.checkpoints.unconfirmed == 1
    await bench.kept(20)
    assert bench.steps() == [20]
    content.export(bench.store, bench.bus.offered[-1].at, tmp_path / "again")
    assert (tmp_path / "again" / "same").exists(), "what both had in common is still there"


async def test_an_answer_about_another_checkpoint_settles_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.write(10)
    await bench.write(20)
    await bench.kept(10)
    assert bench.checkpoints.unconfirmed == 1
    assert bench.steps() == [20]


async def test_nothing_is_left_when_the_assignment_is_closed(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.write(10)
    await bench.kept(10)
    await bench.write(20)
    bench.checkpoints.close(ASSIGNMENT.id)
    await bench.settled()
    assert not list(bench.store.cids())
    assert not bench.store.all_pins()


async def test_a_checkpoint_that_comes_as_the_assignment_closes_is_not_left_behind(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.write(10, wait=False)
    bench.checkpoints.close(ASSIGNMENT.id)
    await bench.settled()
    assert not bench.bus.offered
    assert not bench.store.all_pins()


async def test_it_is_offered_again_until_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OFFER_AGAIN_S", 0.01)
    bench = Bench(tmp_path)
    watching = asyncio.create_task(bench.checkpoints.watch())
    await bench.write(10)
    async with asyncio.timeout(20):
        while len(bench.bus.offered) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await bench.kept(10)
    count = len(bench.bus.offered)
    await asyncio.sleep(0.6)
    assert len(bench.bus.offered) == count
    watching.cancel()


async def test_the_store_does_not_grow_with_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPACT_BYTES", 4 * MIB)
    with PackStore(tmp_path / "store", sync=False) as store:
        bench = Bench(tmp_path, store)
        for step in range(1, 33):
            await bench.write(step, size_bytes=MIB)
            await bench.kept(step)
        sizes = [path.stat().st_size for path in (tmp_path / "store" / "packs").iterdir()]
        assert bench.steps() == [32]
        assert sum(sizes) < 10 * MIB, "32 MiB were written"


async def test_what_an_earlier_life_has_left_goes_and_nothing_else(tmp_path: Path) -> None:
    earlier = Bench(tmp_path)
    other = content.put_file_bytes(earlier.store, b"unchanged" * 101)
    earlier.store.pin(other.cid, "lease")
    await earlier.write(10)
    bench = Bench(tmp_path, earlier.store)
    watching = asyncio.create_task(bench.checkpoints.watch())
    async with asyncio.timeout(20):
        while any(pin.owner == PIN for pin in bench.store.all_pins()) or bench.steps():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    watching.cancel()
    assert bench.store.has(other.cid)
