"""Sealed acceptances: nobody can forge one, and whoever keeps one has it on disk before he says so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.cid import DAG_CBOR, RAW, cid_of, encode_dag_cbor
from flowmesh_cas.errors import TransientError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import seals
from flowmesh_mesh.keeping import Keeper, Shelf, owner_of
from flowmesh_mesh.manifest import Acceptance, encode_record
from flowmesh_mesh.messages import BlockAsk, Blocks, Guard, Guarded, Recall, Recalled, Sealed, Unguard, decode, encode

SECRET = b"s" * 32
LEAF = b"an input that travels apart"
ROOT_BLOCK = encode_dag_cbor({"input": cid_of(RAW, LEAF)})
ROOT = cid_of(DAG_CBOR, ROOT_BLOCK)


def acceptance(run: str, tenant: str = "TENANT") -> bytes:
    return encode_record(Acceptance(tenant, run, ROOT, 1))


class Told:
    """A message of the leader; ``answers`` are what was said to it."""

    def __init__(self) -> None:
        self.reply = "inbox"
        self.answers: list[bytes] = []
        self.is_answered = asyncio.Event()

    def post_respond(self, data: bytes) -> None:
        self.answers.append(data)
        self.is_answered.set()


class Holders:
    """Gives blocks as the holders of a mesh do; without any, nobody answers."""

    def __init__(self, blocks: dict[bytes, bytes] | None = None) -> None:
        self.blocks = {ROOT: ROOT_BLOCK, cid_of(RAW, LEAF): LEAF} if blocks is None else blocks

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        if not self.blocks:
            raise TransientError("nobody answers")
        return encode(Blocks(tuple(self.blocks.get(cid) for cid in decode(data, BlockAsk).cids)))


async def ask(keeper: Keeper, message: Guard | Recall, kind: Any) -> Any:
    told = Told()
    keeper.receive(message, told)
    await asyncio.wait_for(told.is_answered.wait(), 10)
    return decode(told.answers[0], kind)


def guard(run: str, *, epoch: int = 5, roots: Sequence[bytes] = (ROOT,), others: Sequence[str] = ()) -> Guard:
    more = tuple(Sealed(acceptance(each), seals.seal(SECRET, acceptance(each)), tuple(roots)) for each in others)
    return Guard(epoch, acceptance(run), seals.seal(SECRET, acceptance(run)), tuple(roots), ("hub",), more)


def keeper_in(folder: Path, store: MemoryStore, holders: Holders | None = None, epoch: int = 5) -> Keeper:
    made = Keeper(holders or Holders(), store, "node-1", folder, lambda each: each >= epoch)
    made.restore()
    return made


def test_a_seal_holds_for_its_record_and_its_mesh_alone() -> None:
    record = acceptance("r")
    sealed = seals.seal(SECRET, record)
    assert seals.is_sealed(SECRET, record, sealed)
    assert not seals.is_sealed(SECRET, acceptance("other"), sealed)
    assert not seals.is_sealed(b"t" * 32, record, sealed)
    assert not seals.is_sealed(SECRET, record, sealed[:-1])
    assert sealed != seals.seal(SECRET, sealed)


async def test_a_keeper_answers_once_acceptances_and_contents_are_here_and_pinned(tmp_path: Path) -> None:
    store = MemoryStore()
    keeper = keeper_in(tmp_path, store)
    assert (await ask(keeper, guard("a", others=["b"]), Guarded)).error == ""
    assert store.get(cid_of(RAW, LEAF)) == LEAF
    assert {pin.owner for pin in store.pins(ROOT)} == {owner_of(("TENANT", "a")), owner_of(("TENANT", "b"))}
    assert {pair[1] for pair in Shelf(tmp_path).read_all()} == {"a", "b"}


async def test_a_keeper_that_cannot_have_the_contents_keeps_no_acceptance(tmp_path: Path) -> None:
    keeper = keeper_in(tmp_path, MemoryStore(), Holders({}))
    inline = Sealed(acceptance("inline"), b"seal")
    message = Guard(5, acceptance("a"), b"seal", (ROOT,), ("hub",), (inline,))
    answer = await asyncio.wait_for(ask(keeper, message, Guarded), 20)
    assert "run a" in answer.error
    assert answer.runs == (("TENANT", "inline"),)
    assert keeper.runs == (("TENANT", "inline"),)


async def test_a_keeper_that_begins_again_still_has_what_it_kept(tmp_path: Path) -> None:
    store = MemoryStore()
    await ask(keeper_in(tmp_path, store), guard("a"), Guarded)
    again = keeper_in(tmp_path, store)
    found = await ask(again, Recall(), Recalled)
    assert found.acceptances == ((acceptance("a"), seals.seal(SECRET, acceptance("a"))),)
    assert (await ask(again, Recall(what="runs"), Recalled)).runs == (("TENANT", "a"),)


async def test_what_has_ended_is_let_go_with_its_pins(tmp_path: Path) -> None:
    store = MemoryStore()
    keeper = keeper_in(tmp_path, store)
    await ask(keeper, guard("a", others=["b"]), Guarded)
    keeper.receive(Unguard(5, (("TENANT", "a"), ("TENANT", "unknown"))), Told())
    async with asyncio.timeout(10):
        while keeper.runs != (("TENANT", "b"),):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [pin.owner for pin in store.pins(ROOT)] == [owner_of(("TENANT", "b"))]


async def test_a_deposed_leader_makes_no_keeper_forget(tmp_path: Path) -> None:
    keeper = keeper_in(tmp_path, MemoryStore(), epoch=7)
    await ask(keeper, guard("a", epoch=7), Guarded)
    keeper.receive(Unguard(6, (("TENANT", "a"),)), Told())
    await asyncio.sleep(0.1)
    assert keeper.runs == (("TENANT", "a"),)


async def test_many_acceptances_are_told_page_by_page_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowmesh_mesh.keeping.PAGE_BYTES", 400)
    keeper = keeper_in(tmp_path, MemoryStore())
    names = [f"r{number:02d}" for number in range(20)]
    await ask(keeper, guard(names[0], roots=(), others=names[1:]), Guarded)
    seen: list[bytes] = []
    cursor = pages = 0
    while cursor >= 0:
        page = await ask(keeper, Recall(cursor), Recalled)
        seen += [record for record, _ in page.acceptances]
        cursor = page.cursor
        pages += 1
    assert sorted(seen) == sorted(acceptance(name) for name in names)
    assert pages > 3


async def test_contents_of_a_run_that_is_not_accepted_yet_are_held_for_a_while(tmp_path: Path) -> None:
    store = MemoryStore()
    keeper = keeper_in(tmp_path, store)
    assert (await ask(keeper, Guard(5, b"", b"", (ROOT,), ("hub",)), Guarded)).error == ""
    assert store.get(ROOT) == ROOT_BLOCK
    (pin,) = store.pins(ROOT)
    assert pin.expires_at_us is not None
    assert keeper.runs == ()


def test_a_file_that_is_damaged_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    from flowmesh_mesh.keeping import Kept

    shelf = Shelf(tmp_path)
    shelf.write((("TENANT", run), Kept(acceptance(run), b"seal")) for run in ("a", "b"))
    damaged = sorted(tmp_path.glob("*.sealed"))[0]
    damaged.write_bytes(b"\x93torn")
    assert len(shelf.read_all()) == 1
    assert not damaged.exists()
