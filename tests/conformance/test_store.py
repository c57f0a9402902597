"""What every store promises, run on each of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowmesh_cas.cid import DAG_CBOR, DAG_PB, RAW, cid_of, encode_dag_cbor
from flowmesh_cas.errors import IntegrityError, NotFoundError, UsageError
from flowmesh_cas.pack_store import PackStore
from flowmesh_cas.store import BLOCK_MAX_BYTES, BlockStore, MemoryStore, Pin
from flowmesh_cas.wrappers import FaultyStore, StagedStore, WrapperStore

STORES: dict[str, Callable[[Path], BlockStore]] = {
    "memory": lambda path: MemoryStore(),
    "pack": PackStore,
    "pack-unsynced": lambda path: PackStore(path, sync=False),
    "wrapped": lambda path: WrapperStore(PackStore(path)),
    "staged": lambda path: StagedStore(PackStore(path)),
    "faultless": lambda path: FaultyStore(MemoryStore(), lambda cid: None),
}

HOUR_US = 3_600_000_000


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockStore]:
    with STORES[request.param](tmp_path / "store") as made:
        yield made


def block(number: int) -> tuple[bytes, bytes]:
    data = f"block {number}".encode()
    return cid_of(RAW, data), data


def record(*children: bytes, salt: int = 0) -> tuple[bytes, bytes]:
    data = encode_dag_cbor({"children": list(children), "salt": salt})
    return cid_of(DAG_CBOR, data), data


def test_what_is_put_comes_back(store: BlockStore) -> None:
    blocks = [block(number) for number in range(100)]
    store.put_many(iter(blocks))
    assert [store.get(cid) for cid, _ in blocks] == [data for _, data in blocks]
    assert store.get_many([cid for cid, _ in blocks]) == [data for _, data in blocks]


def test_put_names_the_block(store: BlockStore) -> None:
    cid = store.put(RAW, b"hello")
    assert cid == cid_of(RAW, b"hello")
    assert store.has(cid)


def test_the_empty_block_is_a_block(store: BlockStore) -> None:
    cid = store.put(RAW, b"")
    assert store.has(cid)
    assert store.get(cid) == b""
    assert store.get_many((cid,)) == [b""]


def test_a_block_that_is_not_here_is_not_found(store: BlockStore) -> None:
    cid, _ = block(1)
    assert not store.has(cid)
    assert store.has_many([]) == []
    assert store.get_many((cid,)) == [None]
    with pytest.raises(NotFoundError):
        store.get(cid)


def test_what_is_no_cid_is_refused(store: BlockStore) -> None:
    for wrong in (b"", b"short", bytes(36), cid_of(RAW, b"x") + b"y"):
        with pytest.raises(UsageError):
            store.get(wrong)
        with pytest.raises(UsageError):
            store.put_many(((wrong, b"x"),))


def test_a_block_that_is_not_what_its_cid_says_is_refused(store: BlockStore) -> None:
    cid, data = block(1)
    with pytest.raises(IntegrityError):
        store.put_many([block(2), (cid, data + b"!")])
    assert not store.has(cid)


def test_a_block_is_named_by_its_codec_too(store: BlockStore) -> None:
    data = encode_dag_cbor([])
    store.put(RAW, data)
    assert not store.has(cid_of(DAG_CBOR, data))


def test_the_largest_block_is_taken_and_a_larger_one_refused(store: BlockStore) -> None:
    largest = bytes(BLOCK_MAX_BYTES)
    assert store.get(store.put(RAW, largest)) == largest
    with pytest.raises(UsageError):
        store.put(RAW, largest + b"\0")


def test_blocks_put_twice_are_kept_once(store: BlockStore) -> None:
    blocks = [block(1), block(2), block(1)]
    store.put_many(blocks)
    store.put_many(blocks)
    assert sorted(store.cids()) == sorted({cid for cid, _ in blocks})


def test_has_many_answers_in_order(store: BlockStore) -> None:
    numbers = list(range(3000))
    store.put_many(block(number) for number in numbers[::3])
    flags = store.has_many([block(number)[0] for number in numbers])
    assert flags == [number % 3 == 0 for number in numbers]


def test_a_deleted_block_is_gone_and_can_come_back(store: BlockStore) -> None:
    cid, data = block(1)
    store.put(RAW, data)
    store.delete(cid)
    assert not store.has(cid)
    store.delete(cid)
    store.put(RAW, data)
    assert store.get(cid) == data


def test_a_failing_source_leaves_whole_blocks_only(store: BlockStore) -> None:
    def source() -> Iterator[tuple[bytes, bytes]]:
        yield block(1)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError):
        store.put_many(source())
    for cid in list(store.cids()):
        assert cid_of(RAW, store.get(cid)) == cid


def test_threads_may_share_a_store(store: BlockStore) -> None:
    if isinstance(store, StagedStore):
        pytest.skip("made for one thread")
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for number in range(30):
                mine = [block(number * 10 + worker), block(number)]
                store.put_many(mine)
                assert all(store.has_many([cid for cid, _ in mine]))
                assert store.get(mine[0][0]) == mine[0][1]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


# --- pins and sweep


def test_pins_are_listed_by_root(store: BlockStore) -> None:
    root, other = block(1)[0], block(2)[0]
    store.pin(root, "run-1")
    store.pin(root, "lease", 50)
    store.pin(other, "run-1", 70)
    assert sorted(store.pins(root), key=lambda pin: pin.owner) == [Pin(root, "lease", 50), Pin(root, "run-1", None)]
    assert len(store.all_pins()) == 3
    store.unpin(root, "run-1")
    store.unpin(root, "nobody")
    assert store.pins(root) == [Pin(root, "lease", 50)]


@pytest.mark.parametrize(("first", "second", "kept"), [(50, 70, 70), (70, 50, 70), (None, 50, None), (50, None, None), (0, 1, 1)])
def test_a_second_pin_extends_and_never_shortens(
    store: BlockStore, first: int | None, second: int | None, kept: int | None
) -> None:
    root = block(1)[0]
    store.pin(root, "lease", first)
    store.pin(root, "lease", second)
    assert store.pins(root) == [Pin(root, "lease", kept)]


def test_sweep_keeps_what_a_pin_reaches_and_removes_the_rest_after_the_grace(store: BlockStore) -> None:
    leaf, stray = block(1), block(2)
    middle = record(leaf[0])
    root = record(middle[0], block(3)[0])  # block 3 was never put: a gap does not stop the mark
    store.put_many([leaf, middle, root, stray])
    store.pin(root[0], "run-1")
    first = store.sweep(HOUR_US, HOUR_US)
    assert (first.live_blocks, first.condemned_blocks, first.removed_blocks) == (3, 1, 0)
    # Listing does not count as use; reading would.
    second = store.sweep(2 * HOUR_US, HOUR_US)
    assert (second.removed_blocks, second.removed_bytes) == (1, len(stray[1]))
    assert sorted(store.cids()) == sorted([leaf[0], middle[0], root[0]])


def test_a_block_in_use_is_spared(store: BlockStore) -> None:
    uses: list[Callable[[bytes, bytes], object]] = [
        lambda cid, data: store.put_many(((cid, data),)),
        lambda cid, data: store.has(cid),
        lambda cid, data: store.get(cid),
        lambda cid, data: store.pin(cid, "late", 10 * HOUR_US),
    ]
    for number, use in enumerate(uses):
        cid, data = block(number)
        store.put_many(((cid, data),))
        store.sweep(0, HOUR_US)
        use(cid, data)
        store.sweep(HOUR_US, HOUR_US)
        assert store.has(cid), number


def test_an_expired_pin_keeps_nothing(store: BlockStore) -> None:
    cid, data = block(1)
    store.put(RAW, data)
    store.pin(cid, "lease", 100)
    assert store.sweep(99, 0).expired_pins == 0
    assert store.has(cid)
    swept = store.sweep(100, 0)
    assert (swept.expired_pins, swept.removed_blocks) == (1, 1)
    assert not store.has(cid)
    assert store.pins(cid) == []


def test_sweep_frees_folders_whose_nodes_are_dag_pb(store: BlockStore, tmp_path: Path) -> None:
    from flowmesh_cas.unixfs import import_folder, read_bytes

    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(bytes(3 << 20) + b"end")
    kept = import_folder(store, source)
    (source / "large").write_bytes(b"\x01" * (2 << 20))
    dropped = import_folder(store, source)
    store.pin(kept.cid, "keep")
    assert store.sweep(1, 0).removed_blocks == 3
    assert not store.has(dropped.cid)
    assert store.has(kept.cid)
    from flowmesh_cas.dag_pb import decode

    (large,) = decode(store.get(kept.cid)).links
    assert read_bytes(store, large.cid) == bytes(3 << 20) + b"end"


def test_closing_twice_is_harmless(store: BlockStore) -> None:
    store.put(DAG_PB, b"\x0a\x02\x08\x01")
    store.close()
    store.close()
