"""Blocks between nodes over a real broker with the rights of nodes: honest, lying, lacking, silent and dying holders."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flowmesh_cas import dag, unixfs
from flowmesh_cas.cid import DAG_CBOR, RAW, cid_of, codec_of, encode_dag_cbor
from flowmesh_cas.errors import FlowmeshError, NotFoundError, TransientError
from flowmesh_cas.pack_store import PackStore
from flowmesh_cas.pull import BlocksMissingError
from flowmesh_cas.store import BlockStore, MemoryStore
from flowmesh_cas.wrappers import FaultyStore
from flowmesh_deploy.broker import Broker
from flowmesh_deploy.keyring import Keyring
from flowmesh_mesh import content, subjects, transfer
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.messages import BlockAsk, Blocks, Have, Held, decode, encode
from flowmesh_mesh.transfer import fetch, fetch_many, serve_blocks

MIB = 1024 * 1024
NOW_US = 1_000_000_000

Connect = Callable[[str], Awaitable[Bus]]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Keyring]]:
    folder = tmp_path_factory.mktemp("mesh")
    keyring = Keyring.open(folder / "keys.json", "test")
    broker = Broker(folder / "broker", security=keyring.broker_config(folder / "resolver"))
    yield broker.start(), keyring
    broker.stop()


@pytest.fixture
async def connect(mesh: tuple[str, Keyring]) -> AsyncIterator[Connect]:
    url, keyring = mesh
    buses: list[Bus] = []

    async def connect_as(node: str) -> Bus:
        credentials = keyring.node(node)
        bus = await Bus.connect(url, credentials, name=node, inbox=credentials.inbox)
        buses.append(bus)
        return bus

    yield connect_as
    for bus in buses:
        await bus.close()


@asynccontextmanager
async def holding(connect: Connect, name: str, store: BlockStore) -> AsyncIterator[Bus]:
    bus = await connect(name)
    subscription = await serve_blocks(bus, store, name, now_us=lambda: NOW_US)
    await bus.flush()
    yield bus
    await subscription.unsubscribe()


def large_file(store: BlockStore, size: int = 40 * MIB + 17) -> unixfs.Imported:
    return unixfs.import_bytes(store, random.Random(size).randbytes(size))


def lineage(store: BlockStore, records: int = 3000) -> bytes:
    """Return the root of a DAG of many small records, 100 wide."""
    level = [store.put(DAG_CBOR, encode_dag_cbor({"n": number})) for number in range(records)]
    while len(level) > 1:
        level = [store.put(DAG_CBOR, encode_dag_cbor(level[at : at + 100])) for at in range(0, len(level), 100)]
    return level[0]


class CountingBus:
    """Counts the requests that go over a bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.requests = 0

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        self.requests += 1
        return await self._bus.request(subject, data, timeout_s=timeout_s)


async def test_a_file_is_pulled_whole_from_two_holders(connect: Connect, tmp_path: Path) -> None:
    source = MemoryStore()
    imported = large_file(source)
    with PackStore(tmp_path) as target:
        bus = await connect("asker")
        async with holding(connect, "one", source), holding(connect, "two", source):
            fetched = await fetch(bus, target, imported.cid, ["one", "two"], deadline_s=30)
        assert fetched == sum(len(source.get(cid)) for cid in source.cids())
        assert unixfs.read_bytes(target, imported.cid) == unixfs.read_bytes(source, imported.cid)


async def test_a_folder_is_pulled_and_exported_as_it_was(connect: Connect, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, size in {"weights": 3 * MIB, "config.json": 40, "sub/empty": 0}.items():
        (folder / name).write_bytes(os.urandom(size))
    source, target = MemoryStore(), MemoryStore()
    ref = content.put_folder(source, folder)
    async with holding(connect, "one", source):
        await fetch(await connect("asker"), target, ref.cid, ["one"], deadline_s=30)
    content.export(target, ref, tmp_path / "out")
    for name in ("weights", "config.json", "sub/empty"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


async def test_many_small_records_share_few_questions(connect: Connect) -> None:
    source, target = MemoryStore(), MemoryStore()
    root = lineage(source)
    bus = CountingBus(await connect("asker"))
    async with holding(connect, "one", source):
        await fetch(bus, target, root, ["one"], deadline_s=30)
    assert dag.missing(target, root) == []
    assert bus.requests < 40


async def test_what_is_here_is_not_asked_for(connect: Connect) -> None:
    source = MemoryStore()
    roots = [large_file(source, 3 * MIB).cid, lineage(source, 200), source.put(RAW, b"tiny")]
    bus = CountingBus(await connect("asker"))
    assert await fetch_many(bus, source, {root: ["nobody"] for root in roots}) == 0
    assert bus.requests == 0


async def test_a_holder_that_lies_is_dropped_and_nothing_false_is_kept(connect: Connect) -> None:
    source, target = MemoryStore(), MemoryStore()
    imported = large_file(source, 12 * MIB)
    liar = FaultyStore(source, lambda cid: "flip" if codec_of(cid) == RAW else None)
    async with holding(connect, "liar", liar), holding(connect, "good", source):
        await fetch(await connect("asker"), target, imported.cid, ["liar", "good"], deadline_s=30)
    assert dag.missing(target, imported.cid) == []
    assert all(target.get(cid) == source.get(cid) for cid in target.cids())


async def test_when_everybody_lies_the_answer_is_not_found(connect: Connect) -> None:
    source, target = MemoryStore(), MemoryStore()
    root = source.put(RAW, b"truth")
    async with holding(connect, "liar", FaultyStore(source, lambda cid: "flip")):
        with pytest.raises(BlocksMissingError, match="liar: lied") as caught:
            await fetch(await connect("asker"), target, root, ["liar"], deadline_s=10)
    assert caught.value.missing == (root,)
    assert isinstance(caught.value, NotFoundError)
    assert list(target.cids()) == []


async def test_holders_that_each_lack_blocks_complete_each_other(connect: Connect) -> None:
    source, one, two, target = MemoryStore(), MemoryStore(), MemoryStore(), MemoryStore()
    imported = large_file(source, 10 * MIB)
    for number, cid in enumerate(dag.walk(source, imported.cid)):
        for store in (one, two) if number == 0 else (one,) if number % 2 else (two,):
            store.put_many([(cid, source.get(cid))])
    async with holding(connect, "one", one), holding(connect, "two", two):
        await fetch(await connect("asker"), target, imported.cid, ["one", "two"], deadline_s=30)
    assert dag.missing(target, imported.cid) == []


async def test_a_block_that_went_bad_at_the_holder_is_answered_as_lacking(connect: Connect, tmp_path: Path) -> None:
    with PackStore(tmp_path / "bad") as bad:
        ref = content.put_value(bad, {"text": "precious" * 10})
        (pack,) = (tmp_path / "bad" / "packs").iterdir()
        pack.write_bytes(pack.read_bytes().replace(b"precious", b"pernicio", 1))
        healthy, target = MemoryStore(), MemoryStore()
        content.put_value(healthy, {"text": "precious" * 10})
        async with holding(connect, "bad", bad), holding(connect, "healthy", healthy):
            bus = await connect("asker")
            await fetch(bus, target, ref.cid, ["bad", "healthy"], deadline_s=10)
            assert content.read_value(target, ref) == {"text": "precious" * 10}
            # And it heals itself from another holder.
            await fetch(bus, bad, ref.cid, ["healthy"], deadline_s=10)
        assert content.read_value(bad, ref) == {"text": "precious" * 10}


async def test_nobody_there_is_told_soon(connect: Connect) -> None:
    began = time.monotonic()
    with pytest.raises(BlocksMissingError, match="ghost"):
        await fetch(await connect("asker"), MemoryStore(), cid_of(RAW, b"x"), ["ghost"], deadline_s=90)
    assert time.monotonic() - began < 30
    with pytest.raises(BlocksMissingError):
        await fetch(await connect("asker"), MemoryStore(), cid_of(RAW, b"x"), [], deadline_s=90)


HOLDER = """
import asyncio, os, sys
from pathlib import Path
from flowmesh_cas.pack_store import PackStore
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.transfer import serve_blocks

async def main(url, credentials, store, name):
    bus = await Bus.connect(url, credentials, name=name, inbox=credentials.inbox)
    await serve_blocks(bus, store, name, now_us=lambda: 0)
    await bus.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1], Credentials.load(sys.argv[2]), PackStore(Path(sys.argv[3])), sys.argv[4]))
"""


async def test_a_holder_that_is_killed_in_the_middle_is_replaced(
    mesh: tuple[str, Keyring], connect: Connect, tmp_path: Path
) -> None:
    url, keyring = mesh
    with PackStore(tmp_path / "source") as source:
        imported = large_file(source, 60 * MIB)
        keyring.node("mortal").save(tmp_path / "mortal.creds")
        command = [sys.executable, "-c", HOLDER, url, str(tmp_path / "mortal.creds"), str(tmp_path / "source"), "mortal"]
        child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 20) == b"ready\n"
        target = MemoryStore()
        answers = 0

        class Killing(CountingBus):
            async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
                nonlocal answers
                answer = await super().request(subject, data, timeout_s=timeout_s)
                answers += subject == subjects.blocks("mortal")
                if answers == 10 and child.returncode is None:
                    child.kill()
                return answer

        async with holding(connect, "heir", source):
            await fetch(Killing(await connect("asker")), target, imported.cid, ["mortal", "heir"], deadline_s=60)
        await child.wait()
        assert answers >= 10
        assert unixfs.read_bytes(target, imported.cid) == unixfs.read_bytes(source, imported.cid)


async def test_a_fetch_that_was_cut_off_resumes(connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemoryStore()
    imported = large_file(source, 30 * MIB)
    total = sum(1 for _ in source.cids())
    with PackStore(tmp_path) as target:
        asker = await connect("asker")
        async with holding(connect, "one", source):

            class Stalling(CountingBus):
                async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
                    if self.requests >= 15:
                        await asyncio.sleep(60)
                    return await super().request(subject, data, timeout_s=timeout_s)

            with pytest.raises(TransientError, match="longer than"):
                await fetch(Stalling(asker), target, imported.cid, ["one"], deadline_s=2)
            held = len(list(target.cids()))
            assert held >= 10
            bus = CountingBus(asker)
            await fetch(bus, target, imported.cid, ["one"], deadline_s=30)
        assert bus.requests <= total - held + 4
        assert dag.missing(target, imported.cid) == []


async def test_a_holder_that_is_silent_holds_nothing_up_for_ever(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "REQUEST_TIMEOUT_S", 0.3)
    silent = await connect("silent")

    async def swallow(delivery: Delivery) -> None:
        return

    await silent.subscribe(subjects.blocks("silent"), swallow)
    await silent.flush()
    source, target = MemoryStore(), MemoryStore()
    imported = large_file(source, 6 * MIB)
    async with holding(connect, "good", source):
        await fetch(await connect("asker"), target, imported.cid, ["silent", "good"], deadline_s=20)
    assert dag.missing(target, imported.cid) == []


@pytest.mark.parametrize(
    "answer", [b"", b"\xff garbage", encode(Blocks(())), encode(Blocks((), error="no")), encode(Blocks((b"x",) * 100))]
)
async def test_an_answer_that_makes_no_sense_is_a_failure_of_the_holder(connect: Connect, answer: bytes) -> None:
    fool = await connect("fool")

    async def babble(delivery: Delivery) -> None:
        await fool.publish(delivery.reply, answer)

    await fool.subscribe(subjects.blocks("fool"), babble)
    await fool.flush()
    source, target = MemoryStore(), MemoryStore()
    root = lineage(source, 50)
    async with holding(connect, "good", source):
        await fetch(await connect("asker"), target, root, ["fool", "good"], deadline_s=20)
    assert dag.missing(target, root) == []


async def test_roots_with_holders_of_their_own_are_pulled_together(connect: Connect) -> None:
    one, two, target = MemoryStore(), MemoryStore(), MemoryStore()
    first = [one.put(RAW, f"one {number}".encode()) for number in range(200)]
    second = [two.put(RAW, f"two {number}".encode()) for number in range(200)]
    bus = CountingBus(await connect("asker"))
    async with holding(connect, "one", one), holding(connect, "two", two):
        wanted = dict.fromkeys(first, ("one",)) | dict.fromkeys(second, ("two",))
        await fetch_many(bus, target, wanted, deadline_s=10)
    assert all(target.has_many(first + second))
    assert bus.requests < 40


async def test_the_loop_stays_free_while_a_large_file_is_pulled(connect: Connect, tmp_path: Path) -> None:
    source = MemoryStore()
    imported = large_file(source, 80 * MIB)
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            cpu = time.process_time()
            await asyncio.sleep(0.001)
            # Wall time counts other processes too; only what this one computed is ours.
            gaps.append(min(time.perf_counter() - began, time.process_time() - cpu))

    with PackStore(tmp_path) as target:
        bus = await connect("asker")
        async with holding(connect, "one", source):
            ticker = asyncio.create_task(tick())
            await fetch(bus, target, imported.cid, ["one"], deadline_s=60)
            ticker.cancel()
    assert max(gaps) < 0.1


# --- Have


async def ask(bus: Bus, holder: str, question: BlockAsk | Have) -> bytes:
    return await bus.request(subjects.blocks(holder), encode(question), timeout_s=5.0)


async def test_have_tells_which_roots_are_whole_and_keeps_them(connect: Connect) -> None:
    store = MemoryStore()
    whole, gapped, leaf = lineage(store, 300), large_file(store, 3 * MIB).cid, store.put(RAW, b"leaf")
    store.delete(dag.links(gapped, store.get(gapped))[1])
    roots = (whole, gapped, leaf, cid_of(RAW, b"never"), whole)
    async with holding(connect, "one", store):
        answer = decode(await ask(await connect("asker"), "one", Have(roots, lease_s=30.0)), Held)
    assert answer.held == (True, False, True, False, True)
    assert [pin.expires_at_us for pin in store.pins(whole)] == [NOW_US + 30_000_000]
    assert store.pins(gapped) == []
    store.sweep(NOW_US + 1, 0)
    assert dag.missing(store, whole, leaf) == []


async def test_have_reads_what_it_vouches_for(connect: Connect, tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        value = content.put_value(store, "x" * 100).cid
        imported = large_file(store, 3 * MIB + 1)
        (pack,) = (tmp_path / "packs").iterdir()
        damaged = bytearray(pack.read_bytes())
        damaged[pack.stat().st_size // 2] ^= 1
        damaged[damaged.index(b"x" * 100) + 3] ^= 1
        pack.write_bytes(damaged)
        async with holding(connect, "one", store):
            answer = decode(await ask(await connect("asker"), "one", Have((value, imported.cid))), Held)
    assert answer.held == (False, False)


async def test_an_answer_keeps_within_its_room(connect: Connect) -> None:
    store = MemoryStore()
    cids = [store.put(RAW, bytes((number,)) * 300_000) for number in range(6)]
    async with holding(connect, "one", store):
        bus = await connect("asker")
        answer = decode(await ask(bus, "one", BlockAsk(tuple(cids), max_bytes=700_000)), Blocks)
        assert [len(block or b"") for block in answer.blocks] == [300_000, 300_000]
        answer = decode(await ask(bus, "one", BlockAsk(tuple(cids), max_bytes=1)), Blocks)
        assert len(answer.blocks) == 1
        answer = decode(await ask(bus, "one", BlockAsk(tuple(cids), max_bytes=1 << 40)), Blocks)
        assert len(answer.blocks) == 6
        answer = decode(await ask(bus, "one", BlockAsk(())), Blocks)
        assert answer.blocks == ()


async def test_a_question_that_makes_no_sense_is_answered_with_an_error(connect: Connect) -> None:
    async with holding(connect, "one", MemoryStore()):
        bus = await connect("asker")
        for question in (b"", b"\x00garbage", encode(Held((True,))), encode(BlockAsk((b"no cid",)))):
            answer = decode(await bus.request(subjects.blocks("one"), question, timeout_s=5.0), Blocks)
            assert answer.error
        with pytest.raises(FlowmeshError):
            decode(b"\x00", Blocks)
        assert not decode(await ask(bus, "one", BlockAsk((cid_of(RAW, b"x"),))), Blocks).error
