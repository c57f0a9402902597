"""Many simulated nodes in one process: real credentials, connections, subjects and receipts; nothing is executed.

What a FakeNode does as a real agent does: it announces itself, beats each second, pulls from its own consumer, answers for
``flow.noop`` and ``flow.delay`` after their time with a signed receipt, keeps what it has answered until the leader confirms it,
offers it again, and drops what carries an old epoch. Beside its connection it opens the two idle ones that an agent has: for
blocks, and that of its witness.

``python -m bench.fake_nodes FILE``: FILE holds address and credentials. Commands come as lines, each is answered by one of JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import resource
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvloop

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh import messages, receipts, subjects
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.manifest import Metered
from flowmesh_mesh.messages import Abort, Assignment, Beat, Commit, Done, Epoch, NodeRecord, Outcome, Reason, decode, encode
from flowmesh_node.operators.noop import noop_value
from flowmesh_node.outputs import leaf_ref, manifest_of

BEAT_S = 1.0
OFFER_AGAIN_S = 3.0
CONNECTS_AT_ONCE = 32
ASIDE = (" blocks", " witness")
Control = Assignment | Commit | Abort | Epoch


class Plan(msgspec.Struct, frozen=True):
    """What a process of simulated nodes is told: where the broker is, and the credentials of each node by name."""

    urls: list[str]
    nodes: dict[str, str]
    aside: int = len(ASIDE)


class Idle(asyncio.Protocol):
    """A connection that says nothing but that it is there, and comes back when it is cut; it costs this process little."""

    def __init__(self, url: str, name: str, credentials: Credentials) -> None:
        self.connected = False
        self._url, self._name, self._credentials = urlsplit(url), name, credentials
        self._read = b""
        self._transport: asyncio.Transport | None = None
        self._opening: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, again and again until it succeeds."""
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(OSError):
                await loop.create_connection(lambda: self, self._url.hostname or "", self._url.port or 0)
                return
            await asyncio.sleep(random.uniform(0.1, 0.5))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._read = transport, b""

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        *lines, self._read = (self._read + data).split(b"\r\n")
        for line in lines:
            if line.startswith(b"INFO ") and not self.connected:
                signature = base64.urlsafe_b64encode(self._credentials.sign(json.loads(line[5:])["nonce"].encode()))
                told = {"verbose": False, "pedantic": False, "lang": "python", "version": "1", "protocol": 1, "name": self._name}
                keys = {"jwt": self._credentials.jwt, "sig": signature.decode().rstrip("=")}
                self._transport.write(b"CONNECT " + json.dumps({**told, **keys}).encode() + b"\r\nPING\r\n")
            elif line == b"PING":
                self._transport.write(b"PONG\r\n")
            elif line == b"PONG":
                self.connected = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.connected = False
        self._opening = asyncio.get_running_loop().create_task(self.open())


class FakeNode:
    """One simulated node."""

    def __init__(self, name: str, credentials: Credentials) -> None:
        self.name = name
        self.epoch = 0
        self.answered = 0
        self.executed = 0
        self._credentials = credentials
        self._started_at_us = now_us()
        self._aside: list[Idle] = []
        self._held: dict[str, tuple[Assignment, Delivery | None]] = {}
        self._open: dict[str, tuple[bytes, float]] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, urls: list[str], aside: int) -> None:
        """Connect and take part."""
        inbox = subjects.inbox_prefix(self.name)
        options: dict[str, Any] = {"inbox": inbox, "deadline_s": 120.0}
        self.bus = await Bus.connect(
            urls, self._credentials, name=f"node {self.name}", on_reconnect=self._on_reconnect, **options
        )
        for purpose in ASIDE[:aside]:
            idle = Idle(urls[0], f"node {self.name}{purpose}", self._credentials)
            self._aside.append(idle)
            await idle.open()
        for subject in (subjects.node_control(self.name), subjects.ALL_NODES_CONTROL):
            await self.bus.subscribe(subject, self._on_control)
        await self.bus.pull(subjects.ASSIGN, subjects.assign_consumer(self.name), self._on_assignment)
        await self._announce()
        self._spawn(self._beat())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _announce(self) -> None:
        record = NodeRecord(
            self.name,
            self._credentials.public_key,
            self._started_at_us,
            ("flow.noop", "flow.delay"),
            "3.11",
            2.0,
            8 << 30,
            wire=messages.WIRE_VERSION,
            wire_oldest=messages.WIRE_OLDEST,
        )
        pause_s = 0.05
        while True:
            with contextlib.suppress(FlowmeshError):
                await self.bus.store(subjects.node_record(self.name), encode(record), timeout_s=5.0)
                return
            await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
            pause_s = min(1.0, pause_s * 1.5)

    def _on_reconnect(self) -> None:
        for data, _ in self._open.values():
            self._post(subjects.node_done(self.name), data)
        self._spawn(self._announce())

    def _post(self, subject: str, data: bytes) -> None:
        if self.bus.connected:
            with contextlib.suppress(FlowmeshError):
                self.bus.post(subject, data)

    async def _beat(self) -> None:
        await asyncio.sleep(random.uniform(0.0, BEAT_S))
        while True:
            held = tuple({**dict.fromkeys(self._held), **dict.fromkeys(self._open)})
            running = len(self._held) - len(self._open.keys() & self._held.keys())
            beat = Beat(self.name, now_us(), self.epoch, held, running, memory_free_bytes=8 << 30)
            self._post(subjects.node_beat(self.name), encode(beat))
            now_s = time.monotonic()
            for name, (data, due_s) in list(self._open.items()):
                if due_s <= now_s:
                    self._open[name] = (data, now_s + 2 * OFFER_AGAIN_S)
                    self._post(subjects.node_done(self.name), data)
            await asyncio.sleep(BEAT_S)

    def _on_assignment(self, message: Delivery) -> None:
        self._take(decode(message.data, Assignment), message)

    def _on_control(self, message: Delivery) -> None:
        try:
            control: Control = decode(message.data, Control)  # type: ignore[arg-type]
        except FlowmeshError:
            return  # what only a real node can do
        if getattr(control, "epoch", 0) < self.epoch:
            return
        if isinstance(control, Assignment):
            self._take(control, None)
        elif isinstance(control, Commit) and control.closed:
            self._settle(control.assignment)
        elif isinstance(control, Abort):
            self._held.pop(control.assignment, None)

    def _take(self, assignment: Assignment, message: Delivery | None) -> None:
        if assignment.id in self._closed:
            if message is not None:
                message.post_ack()
            return
        if assignment.epoch < self.epoch:
            return
        self.epoch = assignment.epoch
        if assignment.id in self._held:
            self._held[assignment.id] = (assignment, message or self._held[assignment.id][1])
            return
        self._held[assignment.id] = (assignment, message)
        first = assignment.items[0].params
        sleep_s = float(first.get("batch_s", 0.0)) + sum(float(item.params.get("item_s", 0.0)) for item in assignment.items)
        sleep_s += max(float(item.params.get("sleep_s", 0.0)) for item in assignment.items)
        if sleep_s:
            asyncio.get_running_loop().call_later(sleep_s, self._answer, assignment, sleep_s)
        else:
            self._answer(assignment, 0.0)

    def _answer(self, assignment: Assignment, sleep_s: float) -> None:
        if assignment.id not in self._held or assignment.id in self._open:
            return
        blocks: dict[bytes, tuple[int, bytes]] = {}
        outcomes = []
        for item in assignment.items:
            data = noop_value(item.params) if assignment.type == "flow.noop" else str(item.params["nonce"]).encode()
            kept = manifest_of({"out": [leaf_ref("value", data)]}, [data])
            blocks[kept.result] = kept.inline[0]
            for codec, block in kept.inline[1:]:
                blocks[block] = (codec, block)
            metered = Metered(exec_us=round(sleep_s * 1e6))
            outcomes.append(
                Outcome(item.key, item.generation, item.attempt, Reason.SUCCEEDED, kept.result, kept.outputs, metered=metered)
            )
        root = receipts.levels([receipts.leaf(outcome) for outcome in outcomes])[-1][0]
        statement = receipts.statement(self.name, assignment.id, assignment.epoch, root, len(outcomes))
        signature, key = self._credentials.sign(statement), self._credentials.public_key
        done = Done(
            self.name, assignment.id, assignment.epoch, tuple(outcomes), key, signature, blocks=tuple(blocks.values()), last=True
        )
        self.answered += 1
        self.executed += len(outcomes)
        self._open[assignment.id] = (encode(done), time.monotonic() + OFFER_AGAIN_S)
        self._post(subjects.node_done(self.name), self._open[assignment.id][0])

    def _settle(self, assignment: str) -> None:
        self._closed[assignment] = None
        if len(self._closed) > 4096:
            self._closed.popitem(last=False)
        self._open.pop(assignment, None)
        _, message = self._held.pop(assignment, (None, None))
        if message is not None:
            message.post_ack()

    def figures(self) -> dict[str, int]:
        """Return what can be added up over nodes."""
        return {
            "connected": int(self.bus.connected) + sum(idle.connected for idle in self._aside),
            "held": int(bool(self._held)),
            "answered": self.answered,
            "executed": self.executed,
            "unconfirmed": len(self._open),
        }


def raise_file_limit() -> int:
    """Let this process open as many files as its hard limit allows; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


async def serve(plan: Plan) -> None:
    """Start the nodes, then answer each line with the sum of their figures, until the input ends."""
    nodes = [FakeNode(name, Credentials.parse(text)) for name, text in plan.nodes.items()]
    limit = asyncio.Semaphore(CONNECTS_AT_ONCE)

    async def begin(node: FakeNode) -> None:
        async with limit:
            await node.start(plan.urls, plan.aside)

    starting = asyncio.gather(*(begin(node) for node in nodes))
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await starting
    print(json.dumps({"started": len(nodes)}), flush=True)
    while await reader.readline():
        total: dict[str, int] = {}
        for node in nodes:
            for name, value in node.figures().items():
                total[name] = total.get(name, 0) + value
        print(json.dumps(total), flush=True)


if __name__ == "__main__":
    raise_file_limit()
    uvloop.run(serve(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)))
