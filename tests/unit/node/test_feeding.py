"""A node that runs a batch takes up the next one by itself: laid out while it waits, begun when the first ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from flowmesh_cas.pack_store import PackStore
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.manifest import Metered
from flowmesh_mesh.messages import Assignment, Item, Outcome
from flowmesh_node import executors, frames
from flowmesh_node.delivery import Delivery
from flowmesh_node.executor import Watch
from flowmesh_node.executors import Executors
from flowmesh_node.held import Held, Post, Reply
from flowmesh_node.inputs import Cache, Inputs
from flowmesh_node.operators import engine, generate, score, selftest
from flowmesh_node.operators.base import Batch, Model, Produced, value
from flowmesh_node.operators.base import Item as BaseItem
from flowmesh_node.operators.causal import CausalOperator
from flowmesh_node.runner import Runner
from flowmesh_node.settings import Settings


class _Process:
    """An executor without a process; each batch ends when the test says so."""

    gates: dict[str, asyncio.Event]
    story: list[str]

    def __init__(self, kind: str, environment: Mapping[str, str]) -> None:
        self.kind = kind
        self.resident: tuple[str, ...] = ()
        self.used_at = 0.0
        self.is_busy = self.is_lent = False
        self.is_alive = True
        self.pid = 0

    async def start(self) -> None:
        self.story.append("start of a process")

    async def kill(self) -> None:
        self.is_alive = False

    async def run(self, batch: Batch, watch: Watch, timeout_s: float = 0.0) -> None:
        name = batch.items[0].name
        self.story.append(f"{name} begins")
        watch.on_loaded(frames.Loaded(0))
        await self.gates[name].wait()
        for index in range(len(batch.items)):
            watch.on_settled(frames.Settled(index, produced=Produced({"out": [value(index)]}, exec_us=7, rows_shared=3)))
        self.story.append(f"{name} ends")


class _Delivery:
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[Outcome, ...]]] = {}

    def sign(self, assignment: Assignment, outcomes: tuple[Outcome, ...], **_: Any) -> tuple[str, tuple[Outcome, ...]]:
        return assignment.id, outcomes

    def send(self, done: tuple[str, tuple[Outcome, ...]], *, is_safe_first: bool = False) -> None:
        self.parts.setdefault(done[0], []).append(done[1])


class _Node:
    """A runner over processes that are made up."""

    def __init__(self, folder: Path) -> None:
        self.store = PackStore(folder / "store")
        inputs = Inputs(cast(Bus, None), self.store, "n", Cache(folder / "cache", 2**30))
        settings = Settings(node="n", mesh="m", urls=(), credentials="", folder=folder)
        pool = Executors({}, slots=1, user_slots=1, memory_bytes=2**40)
        self.runner = Runner(settings, self.store, inputs, pool, lambda log: None, 2**34)
        self.delivery = _Delivery()
        self.held: dict[str, Held] = {}
        self.gates = _Process.gates = {}
        self.story = _Process.story = []

    def take(self, name: str, count: int) -> asyncio.Task[None]:
        params = {"nonce": 0, "batch_s": 1.0, "item_s": 0.0}
        items = tuple(Item(name.encode() + bytes([n]), 0, 1, params, {}, name) for n in range(count))
        held = self.held[name] = Held(Assignment(1, name, "n", "flow.delay", 1, "delay", items), None)
        self.gates[name] = asyncio.Event()
        reply = Reply(held, Post(held, cast(Delivery, self.delivery)))
        return asyncio.create_task(self.runner.run(held, reply, range(count), "engine", Metered()))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Node]:
    monkeypatch.setattr(executors, "Executor", _Process)
    made = _Node(tmp_path)
    yield made
    made.store.close()


async def _until(node: _Node, *story: str) -> None:
    async with asyncio.timeout(20):
        while node.story != list(story):  # noqa: ASYNC110 - threads take part
            await asyncio.sleep(0.001)


async def test_a_second_assignment_waits_on_the_node_and_follows_the_first_on_its_process(node: _Node) -> None:
    first = node.take("first", 2)
    await _until(node, "start of a process", "first begins")
    second = node.take("second", 2)
    while node.held["second"].state != "queued":  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    node.gates["first"].set()
    await _until(node, "start of a process", "first begins", "first ends", "second begins")
    await first
    node.gates["second"].set()
    await second
    assert [len(part) for part in node.delivery.parts["first"]] == [2]
    assert [len(part) for part in node.delivery.parts["second"]] == [2]


async def test_a_batch_of_128_is_one_write_and_one_message(node: _Node, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    put_many = PackStore.put_many

    def counted(self: PackStore, blocks: Any) -> None:
        writes.append(len(blocks))
        put_many(self, blocks)

    monkeypatch.setattr(PackStore, "put_many", counted)
    running = node.take("all", 128)
    await _until(node, "start of a process", "all begins")
    node.gates["all"].set()
    await running
    (part,) = node.delivery.parts["all"]
    assert writes == [256]
    assert len(part) == 128
    assert {(outcome.metered.exec_us, outcome.metered.rows_shared) for outcome in part} == {(7, 3)}


@pytest.mark.parametrize("operator", [generate.Generate, score.Score])
def test_batches_that_follow_each_other_load_their_model_once(
    operator: type[CausalOperator[Any, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def read_model(path: str, dtype: str) -> object:
        read.append(path)
        return object()

    monkeypatch.setattr(engine, "_loaded", type(engine._loaded)())
    monkeypatch.setattr(engine, "read_model", read_model)
    monkeypatch.setattr(engine, "folder_of", lambda model: model.path)
    monkeypatch.setattr(selftest, "numeric_class", lambda dtype: "proved")
    made = operator()
    for number in range(3):
        batch = Batch("x", 1, [BaseItem(str(number), "x", {"dtype": "float32"})], {"model": Model("m", "sha256:1", "/m")})
        made.load(batch)
    assert read == ["/m"]
    assert made.resident() == ("sha256:1",)
