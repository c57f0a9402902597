"""The leader's side of checkpoints: fetched, read through, pointed to, removed; and what is left when it dies in between."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import TRAIN, operator, workflow

from flowmesh_cas.cid import RAW
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import content, subjects
from flowmesh_mesh.checkpoints import FORMAT, MANIFEST, CheckpointManifest, File, encode_manifest
from flowmesh_mesh.messages import BlockAsk, Blocks, Checkpoint, CheckpointKept, decode, encode
from flowmesh_scheduler.checkpoints import Checkpoints
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.hub import Hub


@dataclass
class Stored:
    """A message of a stream."""

    subject: str
    data: bytes
    seq: int


@dataclass
class FakeBus:
    """A broker that forgets nothing, and one node's store behind it."""

    node: MemoryStore
    stream: list[Stored] = field(default_factory=list)
    told: list[CheckpointKept] = field(default_factory=list)
    seq: int = 0

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        assert subject == subjects.blocks("n1")
        return encode(Blocks(tuple(self.node.get_many(decode(data, BlockAsk).cids))))

    def post(self, subject: str, data: bytes) -> None:
        assert subject == subjects.node_control("n1")
        self.told.append(decode(data, CheckpointKept))

    def push(self) -> None: ...

    async def purge(self, stream: str, subject: str, *, below_seq: int) -> None:
        self.stream = [each for each in self.stream if each.subject != subject or each.seq >= below_seq]

    async def read_stream(self, stream: str, subject: str) -> AsyncIterator[Stored]:
        assert subject == subjects.assign_checkpoint("*")
        for each in list(self.stream):
            yield each

    def store(self, subject: str, data: bytes) -> int:
        """Write a message."""
        self.seq += 1
        self.stream.append(Stored(subject, data, self.seq))
        return self.seq

    def pointers(self) -> list[Checkpoint]:
        """Return what is pointed to."""
        return [decode(each.data, Checkpoint) for each in self.stream]


class FakeLeader:
    """A leader without lease, ledger and loop: the core of a desk, a hub's store, and whether it still writes."""

    def __init__(self, bus: Any, desk: Desk, hub: MemoryStore, *, writes: bool = True) -> None:
        self.bus = bus
        self.desk = desk
        self.state = desk.state
        self.hub = Hub(self.bus, hub)
        self.is_ready = True
        self.assign = self
        self.writes = writes
        self.tasks: set[asyncio.Task[Any]] = set()
        self.checkpoints = Checkpoints(self)  # type: ignore[arg-type]

    def write(self, subject: str, data: bytes, then: Callable[[int], None]) -> None:
        if self.writes:
            then(self.bus.store(subject, data))

    def apply(self, event: e.Event) -> None:
        self.desk.apply(event)

    def hub_holds(self, roots: Iterable[bytes]) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def hear(self, made: Checkpoint) -> None:
        """Let a node's offer arrive, and everything that follows be done."""

        @dataclass
        class Delivery:
            subject: str
            data: bytes

        self.checkpoints._on_checkpoint(Delivery(subjects.node_checkpoint(made.node), encode(made)))  # type: ignore[arg-type]
        await self.settled()

    async def settled(self) -> None:
        """Wait until nothing moves any more; what a leader that does not write waits for never comes."""
        while self.tasks and self.writes:
            await asyncio.gather(*self.tasks)
        await asyncio.sleep(0.1)


class Stage:
    """A training on node n1, its store, and the hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node, self.hub = MemoryStore(), MemoryStore()
        self.desk = Desk()
        self.desk.join("n1")
        self.desk.submit(workflow([operator("train", **TRAIN)]))
        self.bus = FakeBus(self.node)
        self.leader = FakeLeader(self.bus, self.desk, self.hub)

    def make(self, step: int, said: Callable[[CheckpointManifest], CheckpointManifest] = lambda manifest: manifest) -> Checkpoint:
        """Let the training write a checkpoint into the node's store."""
        running = self.desk.only()
        (item,) = running.items
        path = self.folder / str(step)
        path.mkdir()
        files = {"weights": b"same for ever" * 1000, "state": f"step {step}".encode() * 1000}
        for name, data in files.items():
            (path / name).write_bytes(data)
        named = {name: File(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
        key = item.key.hex()
        manifest = CheckpointManifest(FORMAT, key, item.generation, item.attempt, "train.sft", "", step, 100, {}, named)
        (path / MANIFEST).write_bytes(encode_manifest(said(manifest)))
        at = content.put_folder(self.node, path)
        return Checkpoint(running.node, running.id, running.epoch, item.key, item.generation, item.attempt, step, 100, at)

    def states_at_hub(self) -> list[int]:
        """Return the steps of which the hub holds what changed."""
        blocks = [self.hub.get(cid) for cid in self.hub.cids() if cid[1] == RAW]
        return sorted(int(data[5:].split(b"s")[0]) for data in blocks if data.startswith(b"step"))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_a_whole_checkpoint_is_fetched_pointed_to_and_confirmed(stage: Stage) -> None:
    made = stage.make(10)
    await stage.leader.hear(made)
    assert stage.bus.pointers() == [made]
    assert stage.bus.told == [CheckpointKept(stage.desk.epoch, made.assignment, made.key, 10)]
    assert stage.leader.hub.holds(made.at.cid)
    assert stage.desk.state.checkpoints[made.key].made == made


async def test_one_pointer_and_one_checkpoint_are_kept_however_many_came(stage: Stage) -> None:
    for step in range(10, 60, 10):
        await stage.leader.hear(stage.make(step))
    assert [made.step for made in stage.bus.pointers()] == [50]
    assert stage.states_at_hub() == [50]
    assert len(stage.hub.all_pins()) == 1
    assert len(list(stage.hub.cids())) == 4, "a folder, its manifest and two files"
    assert [kept.step for kept in stage.bus.told] == [10, 20, 30, 40, 50]


async def test_nothing_is_left_when_the_operator_has_ended(stage: Stage) -> None:
    made = stage.make(10)
    await stage.leader.hear(made)
    stage.leader.checkpoints.drop(made.key)
    await stage.leader.settled()
    assert not stage.bus.stream
    assert not list(stage.hub.cids())
    assert not stage.hub.all_pins()


async def test_a_repeated_offer_is_confirmed_again_and_fetched_no_more(stage: Stage) -> None:
    made = stage.make(10)
    await stage.leader.hear(made)
    await stage.leader.hear(made)
    assert len(stage.bus.told) == 2
    assert stage.bus.seq == 1


@pytest.mark.parametrize(
    "said",
    [
        lambda manifest: msgspec.structs.replace(manifest, operator="00" * 32),
        lambda manifest: msgspec.structs.replace(manifest, generation=1),
        lambda manifest: msgspec.structs.replace(manifest, attempt=2),
        lambda manifest: msgspec.structs.replace(manifest, step=11),
        lambda manifest: msgspec.structs.replace(manifest, files={**manifest.files, "state": File("00" * 32, 7)}),
        lambda manifest: msgspec.structs.replace(manifest, files={"state": manifest.files["state"]}),
        lambda manifest: msgspec.structs.replace(manifest, format=FORMAT + 1),
    ],
    ids=["operator", "generation", "attempt", "step", "a torn file", "a file too many", "a later format"],
)
async def test_a_checkpoint_that_is_not_what_it_says_moves_nothing_and_leaves_nothing(
    stage: Stage, said: Callable[[CheckpointManifest], CheckpointManifest]
) -> None:
    made = stage.make(10, said)
    for _ in range(2):
        await stage.leader.hear(made)
    assert not stage.bus.stream
    assert not stage.bus.told
    assert not list(stage.hub.cids())
    assert not stage.hub.all_pins()


async def test_a_torn_block_on_the_node_is_asked_for_again_when_it_is_offered_again(stage: Stage) -> None:
    made = stage.make(10)
    (torn,) = [cid for cid in stage.node.cids() if cid[1] == RAW and stage.node.get(cid).startswith(b"step")]
    whole = stage.node.get(torn)
    stage.node._blocks[torn] = whole[:-1]
    await stage.leader.hear(made)
    assert not stage.bus.stream
    stage.node._blocks[torn] = whole
    await stage.leader.hear(made)
    assert stage.bus.pointers() == [made]


async def test_a_checkpoint_of_an_attempt_that_ended_meanwhile_is_not_pointed_to(stage: Stage) -> None:
    made = stage.make(10)
    stage.desk.lose("n1")
    await stage.leader.hear(made)
    assert not stage.bus.stream
    assert not list(stage.hub.cids())


async def test_a_leader_that_dies_between_fetch_and_pointer_leaves_nothing_that_the_next_does_not_mend(stage: Stage) -> None:
    former = stage.make(10)
    await stage.leader.hear(former)
    stage.leader.writes = False
    made = stage.make(20)
    await stage.leader.hear(made)
    assert stage.leader.hub.holds(made.at.cid), "it is fetched"
    assert stage.bus.pointers() == [former], "and not pointed to"
    for task in list(stage.leader.tasks):
        task.cancel()
    pointers = stage.bus.pointers()
    after = FakeLeader(stage.bus, stage.desk.successor("n1"), stage.hub)
    await after.checkpoints.recover()
    await after.settled()
    assert [known.made for known in after.state.checkpoints.values()] == pointers == [former]
    assert stage.states_at_hub() == [10], "what nobody points to is gone"
    await after.hear(made)
    assert stage.bus.pointers() == [made], "the node has offered it again"
    assert stage.bus.told[-1].epoch == after.state.epoch
    assert stage.states_at_hub() == [20]


async def test_a_new_leader_with_another_hub_fetches_what_pointers_stand_for(stage: Stage) -> None:
    made = stage.make(10)
    await stage.leader.hear(made)
    other = MemoryStore()
    after = FakeLeader(stage.bus, stage.desk.successor("n1"), other)
    await after.checkpoints.recover()
    await after.settled()
    assert after.hub.holds(made.at.cid)
