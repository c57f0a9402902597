"""A small leader on a real broker with real credentials: it hands assignments to real node processes and confirms at will."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from flowmesh_cas.store import MemoryStore
from flowmesh_deploy.broker import Broker
from flowmesh_deploy.keyring import Keyring
from flowmesh_mesh import content, streams, subjects, transfer
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.credentials import verify
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import (
    WIRE_VERSION,
    Abort,
    Assignment,
    Beat,
    Commit,
    Done,
    Epoch,
    Item,
    Located,
    Log,
    NodeRecord,
    Outcome,
    decode,
    encode,
)
from flowmesh_mesh.receipts import leaf, levels, statement


@dataclass
class NodeProcess:
    """A real ``flowmesh-node join``."""

    name: str
    folder: Path
    process: asyncio.subprocess.Process

    async def output(self) -> str:
        assert self.process.stdout is not None
        return (await self.process.stdout.read()).decode()


@dataclass
class SmallLeader:
    """Assigns, receives, checks receipts, confirms (unless ``confirms`` is off); holds blocks as the hub."""

    bus: Bus
    broker: Broker
    keyring: Keyring
    folder: Path
    epoch: int = 1_000
    confirms: bool = True
    store: MemoryStore = field(default_factory=MemoryStore)
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    beats: dict[str, Beat] = field(default_factory=dict)
    dones: list[Done] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    closed: dict[str, asyncio.Event] = field(default_factory=dict)
    count: int = 0

    async def begin(self) -> None:
        for config in (streams.nodes(), streams.done(), streams.assign(time.time_ns() // 1_000_000)):
            await self.bus.ensure_stream(config)
        await self.bus.ensure_consumer(subjects.DONE, streams.leader_consumer("leader"))
        await self.bus.subscribe(subjects.node_record("*"), self._on_record)
        await self.bus.subscribe(subjects.node_beat("*"), self._on_beat)
        await self.bus.subscribe(subjects.node_log("*"), self._on_log)
        await transfer.serve_blocks(self.bus, self.store, subjects.HUB, now_us=lambda: time.time_ns() // 1000)
        await self.bus.pull(subjects.DONE, "leader", self._on_done)

    async def begin_again(self) -> None:
        """Wait for the connection, and make what the broker kept in memory."""
        await self.until(lambda: self.bus.connected)
        await self.bus.ensure_stream(streams.done())
        await self.bus.ensure_consumer(subjects.DONE, streams.leader_consumer("leader"))

    async def _on_record(self, message: Delivery) -> None:
        record = decode(message.data, NodeRecord)
        await self.bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer(record.node))
        self.nodes[record.node] = record
        self.bus.post(subjects.node_control(record.node), encode(Epoch(self.epoch, "small", 0, 0, WIRE_VERSION)))

    def _on_beat(self, message: Delivery) -> None:
        beat = decode(message.data, Beat)
        self.beats[beat.node] = beat

    def _on_log(self, message: Delivery) -> None:
        self.logs.append(decode(message.data, Log))

    def _on_done(self, message: Delivery) -> None:
        done = decode(message.data, Done)
        self.dones.append(done)
        root = levels([leaf(outcome) for outcome in done.outcomes])[-1][0]
        said = statement(done.node, done.assignment, done.epoch, root, len(done.outcomes))
        assert verify(done.public_key, said, done.signature)
        for codec, block in done.blocks:
            self.store.put(codec, block)
        known = {(each.key, each.attempt) for each in self.outcomes.setdefault(done.assignment, [])}
        self.outcomes[done.assignment] += [each for each in done.outcomes if (each.key, each.attempt) not in known]
        message.post_ack()
        if done.last:
            if self.confirms:
                self.confirm(done.node, done.assignment)
            if done.assignment in self.closed:
                self.closed[done.assignment].set()

    def confirm(self, node: str, assignment: str) -> None:
        self.bus.post(subjects.node_control(node), encode(Commit(self.epoch, assignment)))

    def abort(self, node: str, assignment: str, keys: tuple[bytes, ...] = ()) -> None:
        self.bus.post(subjects.node_control(node), encode(Abort(self.epoch, assignment, keys)))

    def item(self, params: dict[str, Any], inputs: Mapping[str, Sequence[Located]] | None = None) -> Item:
        self.count += 1
        ports = {port: tuple(contents) for port, contents in (inputs or {}).items()}
        return Item(self.count.to_bytes(32, "big"), 0, 1, params, ports, f"item{self.count}")

    async def assign(self, node: str, type_name: str, items: Sequence[Item], **more: Any) -> str:
        self.count += 1
        name = str(more.pop("id", f"a{self.count}"))
        assignment = Assignment(more.pop("epoch", self.epoch), name, node, type_name, 1, "k", tuple(items), **more)
        self.closed[name] = asyncio.Event()
        await self.bus.store(subjects.assign(node, name), encode(assignment))
        return name

    async def run(
        self, node: str, type_name: str, items: Sequence[Item], *, within_s: float = 30.0, **more: Any
    ) -> list[Outcome]:
        """Assign and wait for the answer; outcomes come in the order of the items."""
        name = await self.assign(node, type_name, items, **more)
        await asyncio.wait_for(self.closed[name].wait(), within_s)
        found = {outcome.key: outcome for outcome in self.outcomes[name]}
        return [found[item.key] for item in items]

    def value(self, ref: Ref) -> Any:
        return content.read_value(self.store, ref)

    async def fetched(self, ref: Ref, holder: str) -> bytes:
        await transfer.fetch(self.bus, self.store, ref.cid, [holder])
        return content.read_bytes(self.store, ref)

    def source(self, text: str) -> Located:
        return Located(content.put_file_bytes(self.store, text.encode()), (subjects.HUB,))

    def rows(self, rows: list[dict[str, Any]]) -> Located:
        return Located(content.put_rows(self.store, rows), (subjects.HUB,))

    async def call(self, node: str, source: str, *, function: str = "f", within_s: float = 30.0, **more: Any) -> Outcome:
        """Run a user's function without inputs."""
        item = self.item({"function": function, "args": more.pop("args", {}), "returns": more.pop("returns", "value")})
        (outcome,) = await self.run(node, "python.call", [item], code=self.source(source), within_s=within_s, **more)
        return outcome

    def join_file(self, node: str) -> Path:
        path = self.folder / f"{node}.join"
        if not path.exists():
            joined = {
                "urls": [self.broker.url],
                "credentials": self.keyring.node(node).text(),
                "node": node,
                "mesh": "test",
            }
            path.write_bytes(msgspec.json.encode(joined))
        return path

    async def start_node(self, node: str, *arguments: str, environment: dict[str, str] | None = None) -> NodeProcess:
        """Start a node and wait until it has joined."""
        folder = self.folder / node
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flowmesh_node", "join", str(self.join_file(node)), "--dir", str(folder), *arguments,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | (environment or {}),
        )  # fmt: skip
        self.nodes.pop(node, None)
        deadline_s = time.monotonic() + 60.0
        while node not in self.nodes or node not in self.beats:
            assert process.returncode is None, "the node ended at once"
            assert time.monotonic() < deadline_s, "the node does not join"
            await asyncio.sleep(0.01)
        return NodeProcess(node, folder, process)

    async def until(self, condition: Any, within_s: float = 30.0) -> None:
        """Wait until ``condition()`` holds."""
        deadline_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline_s, "it did not happen in time"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def small_mesh(folder: Path) -> AsyncIterator[SmallLeader]:
    """Run a broker and a small leader for the length of the block; nodes started through it end with it."""
    keyring = Keyring.open(folder / "keys.json", "test")
    resolver = folder / "resolver"
    resolver.mkdir()
    broker = Broker(folder / "broker", security=keyring.broker_config(resolver))
    broker.start()
    try:
        credentials = keyring.scheduler()
        bus = await Bus.connect(broker.url, credentials, name="leader", inbox=credentials.inbox)
        leader = SmallLeader(bus, broker, keyring, folder)
        await leader.begin()
        yield leader
        await bus.close()
    finally:
        broker.stop()


@asynccontextmanager
async def one_node(folder: Path, *arguments: str, name: str = "n1") -> AsyncIterator[tuple[SmallLeader, NodeProcess]]:
    """Run a broker, a small leader and one node."""
    async with small_mesh(folder) as leader:
        node = await leader.start_node(name, *arguments)
        try:
            yield leader, node
        finally:
            await ended(node)


async def ended(node: NodeProcess) -> None:
    """End a node's process, by force when it must be."""
    if node.process.returncode is None:
        node.process.terminate()
        try:
            await asyncio.wait_for(node.process.wait(), 30)
        except TimeoutError:
            node.process.kill()
            await node.process.wait()
