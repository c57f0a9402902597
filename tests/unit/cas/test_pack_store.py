"""The store on disk: crashes, damage, several processes, space, speed."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowmesh_cas import pack, pack_store
from flowmesh_cas.cid import DAG_CBOR, RAW, cid_of, cid_parse, cid_text, encode_dag_cbor
from flowmesh_cas.dag import reachable
from flowmesh_cas.errors import IntegrityError, NotFoundError, TransientError, UsageError
from flowmesh_cas.pack_store import PackStore
from flowmesh_cas.store import Block


def block(number: int, size: int = 100) -> Block:
    data = random.Random(number).randbytes(size)
    return cid_of(RAW, data), data


def packs(path: Path) -> list[Path]:
    return sorted((path / "packs").iterdir())


def footprint(path: Path) -> list[tuple[str, int, int]]:
    """What a write to disk would change: size and time of every file but the shared memory of the readers."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith("-shm")]
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def test_blocks_outlive_the_process(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        store.put_many(block(number) for number in range(10))
        store.pin(block(0)[0], "run-1")
    with PackStore(tmp_path) as store:
        assert [store.get(block(number)[0]) for number in range(10)] == [block(number)[1] for number in range(10)]
        assert [pin.owner for pin in store.pins(block(0)[0])] == ["run-1"]
        store.put_many([block(10)])
    assert len(packs(tmp_path)) == 1


def test_two_stores_on_one_folder_see_each_other_at_once(tmp_path: Path) -> None:
    with PackStore(tmp_path) as one, PackStore(tmp_path) as two:
        one.put_many([block(1)])
        assert two.get(block(1)[0]) == block(1)[1]
        two.put_many([block(2)])
        assert one.has_many([block(1)[0], block(2)[0]]) == [True, True]
        assert one.get(block(2)[0]) == block(2)[1]
    assert len(packs(tmp_path)) == 2  # each writes to one of its own


def test_a_pack_that_is_full_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_store, "PACK_MAX_BYTES", 1000)
    with PackStore(tmp_path) as store:
        for number in range(30):
            store.put_many([block(number)])
        assert len(packs(tmp_path)) > 2
        assert all(store.get(block(number)[0]) == block(number)[1] for number in range(30))


def test_what_lies_behind_the_committed_end_is_void(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        store.put_many([block(1)])
    with packs(tmp_path)[0].open("ab") as file:
        file.write(pack.HEADER.pack(block(2)[0], 100) + b"torn")
    with PackStore(tmp_path) as store:
        assert not store.has(block(2)[0])
        store.put_many([block(3)])
        assert [store.get(block(number)[0]) for number in (1, 3)] == [block(1)[1], block(3)[1]]


WRITER = """
import random, sys
from pathlib import Path
from flowmesh_cas.cid import RAW, cid_of, cid_text
from flowmesh_cas.pack_store import PackStore
store, seed = PackStore(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
while True:
    blocks = [seed.randbytes(seed.randint(0, 3000)) for _ in range(seed.randint(1, 40))]
    store.put_many((cid_of(RAW, data), data) for data in blocks)
    print(" ".join(cid_text(cid_of(RAW, data)) for data in blocks), flush=True)
"""


@pytest.mark.parametrize("seed", range(4))
def test_whatever_was_acknowledged_survives_a_kill(tmp_path: Path, seed: int) -> None:
    acknowledged: list[bytes] = []
    for life in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), f"{seed}{life}"], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(random.Random(seed).randint(1, 25)):
            acknowledged += [cid_parse(text) for text in child.stdout.readline().split()]
        time.sleep(random.Random(seed + life).random() * 0.01)
        child.send_signal(signal.SIGKILL)
        acknowledged += [cid_parse(text) for line in child.stdout if line.endswith("\n") for text in line.split()]
        child.wait(10)
        child.stdout.close()
    with PackStore(tmp_path) as store:
        assert acknowledged
        assert all(store.has_many(acknowledged))
        for cid in store.cids():
            store.get(cid)


SHARER = """
import random, sys
from pathlib import Path
from flowmesh_cas.cid import RAW, cid_of
from flowmesh_cas.pack_store import PackStore
with PackStore(Path(sys.argv[1]), sync=False) as store:
    for number in range(40):
        mine = [f"{sys.argv[2]} {number} {n}".encode() * 20 for n in range(20)] + [f"shared {number}".encode()]
        store.put_many((cid_of(RAW, data), data) for data in mine)
        assert all(store.get(cid_of(RAW, data)) == data for data in mine)
        if number % 10 == 9:
            store.delete_many(cid_of(RAW, data) for data in mine[:15])
            store.compact()
"""


def test_several_processes_may_write_and_compact_one_store(tmp_path: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", SHARER, str(tmp_path), str(worker)]) for worker in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    with PackStore(tmp_path) as store:
        kept = [cid_of(RAW, f"{worker} {number} 19".encode() * 20) for worker in range(3) for number in range(40)]
        kept += [cid_of(RAW, f"shared {number}".encode()) for number in range(40)]
        assert all(store.get(cid) for cid in kept)


OPENER = """
import os, sys
from pathlib import Path
from flowmesh_cas.pack_index import PackIndex
print("ready", flush=True)
for folder in sys.stdin.readline().split():
    PackIndex(Path(folder) / "index.db", sync=False).close()
"""


def test_several_processes_may_open_new_stores_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(60)]
    for folder in folders:
        folder.mkdir()
    told = " ".join(map(str, folders)) + "\n"
    command = [sys.executable, "-c", OPENER]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [child.stdout and child.stdout.readline() for child in children] == ["ready\n"] * 3
    for child in children:
        assert child.stdin is not None
        child.stdin.write(told)
        child.stdin.flush()
    assert [child.wait(60) for child in children] == [0, 0, 0]
    for child in children:
        child.communicate()


# --- damage


def flip(path: Path, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(data) + len(data) // 2] ^= 1
    path.write_bytes(content)


def test_a_block_that_went_bad_is_never_served_and_can_be_healed(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        store.put_many([block(1), block(2)])
        flip(packs(tmp_path)[0], block(1)[1])
        with pytest.raises(IntegrityError):
            store.get(block(1)[0])
        assert not store.has(block(1)[0])
        with pytest.raises(NotFoundError):
            store.get(block(1)[0])
        assert store.get(block(2)[0]) == block(2)[1]
        store.put_many([block(1)])
        assert store.get(block(1)[0]) == block(1)[1]


def test_many_reads_pass_over_what_went_bad(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        store.put_many([block(1), block(2)])
        flip(packs(tmp_path)[0], block(1)[1])
        assert store.get_many([block(1)[0], block(2)[0], block(3)[0]]) == [None, block(2)[1], None]
        assert not store.has(block(1)[0])


def test_a_pack_that_was_replaced_under_a_reader_costs_no_block(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        store.put_many([block(1)])
        assert store.get(block(1)[0]) == block(1)[1]
        (path,) = packs(tmp_path)
        old = tmp_path / "old"
        path.rename(old)
        path.write_bytes(old.read_bytes())
        old.write_bytes(bytes(old.stat().st_size))
        assert store.get(block(1)[0]) == block(1)[1]


def test_a_pack_that_is_gone_makes_its_blocks_missing(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        store.put_many([block(1)])
    packs(tmp_path)[0].unlink()
    with PackStore(tmp_path) as store:
        with pytest.raises(IntegrityError):
            store.get(block(1)[0])
        store.put_many([block(1)])
        assert store.get(block(1)[0]) == block(1)[1]


def test_an_index_that_is_lost_is_built_again(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        store.put_many(block(number) for number in range(50))
    flip(packs(tmp_path)[0], block(7)[1])
    with packs(tmp_path)[0].open("ab") as file:
        file.write(pack.HEADER.pack(block(99)[0], 100) + b"torn")
    for file_name in tmp_path.glob("index.db*"):
        file_name.unlink()
    with PackStore(tmp_path) as store:
        assert [number for number in range(50) if not store.has(block(number)[0])] == [7]
        store.put_many([block(7), block(99)])
        assert all(store.get(block(number)[0]) == block(number)[1] for number in (*range(50), 99))


def test_an_index_that_is_damaged_says_how_to_mend_it(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        store.put_many([block(1)])
    (tmp_path / "index.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(IntegrityError) as caught:
        PackStore(tmp_path)
    assert "rebuilt" in caught.value.hint


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        PackStore(tmp_path / "file" / "store")


def test_a_full_disk_is_told_and_nothing_is_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PackStore(tmp_path) as store:
        store.put_many([block(1)])
        real = os.pwrite

        def short(fd: int, data: bytes, at: int) -> int:
            if len(data) > 100:
                return real(fd, data[: len(data) // 2], at)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", short)
        with pytest.raises(TransientError, match="No space"):
            store.put_many([block(2, 5000)])
        monkeypatch.setattr(os, "pwrite", real)
        assert not store.has(block(2)[0])
        store.put_many([block(3), block(2)])
        assert [store.get(block(number)[0]) for number in (1, 2, 3)] == [block(number)[1] for number in (1, 2, 3)]


def test_running_out_of_file_descriptors_drops_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PackStore(tmp_path) as store:
        store.put_many([block(1)])

        def refuse(*_: object) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(TransientError):
                store.get(block(1)[0])
        assert store.get(block(1)[0]) == block(1)[1]


# --- write order and speed


def test_data_is_synced_before_the_index_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PackStore(tmp_path) as store, PackStore(tmp_path) as witness:
        store.put_many([block(0)])
        seen: list[bool] = []
        real = os.fdatasync

        def spy(fd: int) -> None:
            seen.append(witness.has(block(1)[0]))
            real(fd)

        monkeypatch.setattr(os, "fdatasync", spy)
        store.put_many([block(1)])
        assert seen == [False]
        assert witness.has(block(1)[0])


def test_nothing_new_is_written_to_disk_for_blocks_that_are_here(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        blocks = [block(number) for number in range(100)]
        store.put_many(blocks)
        before = footprint(tmp_path)
        store.put_many(blocks)
        store.put_many([])
        store.put_many(iter(()))
        store.has_many([cid for cid, _ in blocks])
        assert footprint(tmp_path) == before
        store.put_many([block(100)])
        assert footprint(tmp_path) != before


def test_ten_thousand_small_blocks_are_stored_in_one_go_and_found_at_once(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store:
        blocks = [block(number) for number in range(10_000)]
        store.put_many(blocks)
        assert all(store.has_many([cid for cid, _ in blocks]))
        assert store.get_many([cid for cid, _ in blocks]) == [data for _, data in blocks]


# --- space


def test_a_sweep_gives_space_back_and_readers_go_on(tmp_path: Path) -> None:
    blocks = [block(number, 5000) for number in range(200)]
    with PackStore(tmp_path) as store, PackStore(tmp_path) as reader:
        store.put_many(blocks)
        full = sum(file.stat().st_size for file in packs(tmp_path))
        assert reader.get(blocks[0][0]) == blocks[0][1]
        for cid, _ in blocks[:40]:
            store.pin(cid, "keep")
        swept = store.sweep(1, 0)
        assert (swept.live_blocks, swept.removed_blocks) == (40, 160)
        assert sum(file.stat().st_size for file in packs(tmp_path)) < full / 4
        assert [reader.get(cid) for cid, _ in blocks[:40]] == [data for _, data in blocks[:40]]
        assert not any(reader.has_many([cid for cid, _ in blocks[40:]]))
        store.put_many([block(1000)])
        assert reader.get(block(1000)[0]) == block(1000)[1]


def test_a_pack_that_another_process_writes_to_is_not_rewritten(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store, PackStore(tmp_path) as other:
        other.put_many([block(1), block(2)])
        other.delete_many([block(1)[0], block(2)[0]])
        (held,) = packs(tmp_path)
        store.compact()
        assert held.exists()
        other.put_many([block(3)])
        assert store.get(block(3)[0]) == block(3)[1]


def test_pins_made_while_a_sweep_marks_keep_what_lies_under_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PackStore(tmp_path) as store, PackStore(tmp_path) as other:
        store.put_many([block(1), block(2)])
        root = store.put(DAG_CBOR, encode_dag_cbor([block(1)[0]]))
        store.sweep(0, 10)
        real = reachable

        def pin_late(*arguments: object) -> set[bytes]:
            live = real(*arguments)  # type: ignore[arg-type]
            monkeypatch.setattr(pack_store, "reachable", real)
            other.pin(root, "late")
            return live

        monkeypatch.setattr(pack_store, "reachable", pin_late)
        assert store.sweep(10, 10).removed_blocks == 1
        assert store.get(block(1)[0]) == block(1)[1]
        assert store.has(root)


def test_cids_are_printed_as_text_in_errors(tmp_path: Path) -> None:
    with PackStore(tmp_path) as store, pytest.raises(NotFoundError, match=cid_text(block(1)[0])):
        store.get(block(1)[0])
