"""UnixFS: the CIDs of IPFS tools, any valid file read, anything else refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from flowmesh_cas import dag_pb, unixfs
from flowmesh_cas.cid import DAG_CBOR, DAG_PB, RAW, cid_of, cid_parse, cid_text, encode_dag_cbor, sha256
from flowmesh_cas.dag import walk
from flowmesh_cas.dag_pb import Link
from flowmesh_cas.errors import IntegrityError, NotFoundError, UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_cas.unixfs import (
    Imported,
    TooLargeError,
    export,
    folder_digest,
    import_bytes,
    import_file,
    import_folder,
    read_bytes,
)

MIB = 1024 * 1024

# Recorded from an importer whose CIDs were compared one by one with those of Kubo and Helia.
GOLDEN = {
    0: "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
    1: "bafkreiekgmp53zydf4z2ohq3fysx3aawny2i4ah4wf4rj5el3nl2drrqa4",
    MIB - 1: "bafkreieo2re7pxa7c5nlwbajjvio6sytljiqem2jmlkfviyvwocphagure",
    MIB: "bafkreiglzzhdc22b5hdbycurdhnywbxixjxv7x7iws4qdzdus2335l2mh4",
    MIB + 1: "bafybeidbnktb4bqoavmujby4l3mqjapyknhjaxy2bhsgfnx5smxecd2nr4",
    5 * MIB + 123: "bafybeidkjn52cpb7n6dao4wmiti5gxjoi6dtdgsj6wbl4khmemkjedjsb4",
}
# (chunk, width, size): around 1024 leaves, and trees of three levels and more, with small chunks.
GOLDEN_SHAPES = {
    (64, 1024, 64 * 1024): "bafybeihwcha57s5merjw3mejw2e2uxqpfcqbm5uefkiel5ivpa4dwtmhwe",
    (64, 1024, 64 * 1024 + 1): "bafybeigqyy7ejyfhccq44xnlairpwph2ixrwtr7xjyauhxlqobvdu7siru",
    (64, 1024, 64 * 1024 * 3): "bafybeiesvaydwhacefz2pnezekf3zl75d4iru3oulmsnecinjx7ta7xxpm",
    (64, 4, 64 * 4**3): "bafybeihjmmezpssgglc2mqp4px2kee4uq2hufand3ycctnimslgopfe2dy",
    (64, 4, 64 * 4**3 + 1): "bafybeicpwbntlw4l4mgztbayz2fdkalousz4a23yyhpfzv4dhshfjjzpjy",
}
FOLDER = {
    "config.json": 700,
    "model.safetensors": 3_000_001,
    "optimizer/state.pt": 1_500_000,
    ".hidden": 3,
    "empty": 0,
    "Ünïcode.txt": 10,
    "Z": 1,
    "a": 1,
}
FOLDER_CID = "bafybeifdmrtuopbfqihuv5dkct6y3ho77xp45pneewfegvns5orjeamwsm"


def sample(seed: int | str, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    for name, size in FOLDER.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(sample(name, size))
    return path


# --- writing


@pytest.mark.parametrize("size", GOLDEN)
def test_bytes_get_the_cid_of_ipfs_tools(store: MemoryStore, size: int) -> None:
    data = sample(size, size)
    imported = import_bytes(store, data)
    assert cid_text(imported.cid) == GOLDEN[size]
    assert (imported.digest, imported.size) == (sha256(data), size)
    assert read_bytes(store, imported.cid) == data


@pytest.mark.parametrize("size", GOLDEN)
def test_a_file_gets_the_cid_of_its_bytes(store: MemoryStore, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(sample(size, size))
    assert import_file(store, tmp_path / "file") == import_bytes(MemoryStore(), sample(size, size))


@pytest.mark.parametrize(("chunk", "width", "size"), GOLDEN_SHAPES)
def test_trees_have_the_shape_of_ipfs_tools(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, chunk: int, width: int, size: int
) -> None:
    monkeypatch.setattr(unixfs, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(unixfs, "WIDTH", width)
    data = sample(size, size)
    imported = import_bytes(store, data)
    assert cid_text(imported.cid) == GOLDEN_SHAPES[chunk, width, size]
    assert read_bytes(store, imported.cid) == data


def test_a_folder_gets_the_cid_of_ipfs_tools(store: MemoryStore, folder: Path) -> None:
    imported = import_folder(store, folder)
    assert cid_text(imported.cid) == FOLDER_CID
    assert imported.size == sum(FOLDER.values())
    assert imported.digest == folder_digest((name, sha256(sample(name, size)), size) for name, size in FOLDER.items())
    assert set(walk(store, imported.cid)) == set(store.cids())


def test_the_digest_of_a_folder_depends_on_names_and_bytes_and_not_on_order() -> None:
    entries = [("a", sha256(b"1"), 1), ("b/c", sha256(b"22"), 2)]
    assert folder_digest(entries) == folder_digest(reversed(entries))
    assert folder_digest(entries) != folder_digest([("a", sha256(b"1"), 1), ("b/d", sha256(b"22"), 2)])
    assert folder_digest(entries) != folder_digest([("a", sha256(b"2"), 1), ("b/c", sha256(b"22"), 2)])
    assert folder_digest([]) == folder_digest(iter(()))


def test_links_devices_and_missing_paths_are_refused(store: MemoryStore, folder: Path) -> None:
    import os

    with pytest.raises(UsageError, match="not a file"):
        import_file(store, folder)
    with pytest.raises(UsageError, match="not a folder"):
        import_folder(store, folder / "missing")
    (folder / "link").symlink_to("a")
    with pytest.raises(UsageError, match="symbolic link"):
        import_folder(store, folder)
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(UsageError, match="neither"):
        import_folder(store, folder)


def test_a_name_that_is_not_utf8_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    import os

    os.close(os.open(os.fsencode(tmp_path) + b"/\xff", os.O_CREAT))
    with pytest.raises(UsageError, match="UTF-8"):
        import_folder(store, tmp_path)


def test_a_folder_with_too_many_files_is_refused(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unixfs, "FOLDER_NODE_MAX_BYTES", 4096)
    for number in range(100):
        (tmp_path / f"{number}").touch()
    with pytest.raises(UsageError, match="too many"):
        import_folder(store, tmp_path)


# --- reading


def leaf(store: MemoryStore, data: bytes) -> bytes:
    return store.put(RAW, data)


def node(store: MemoryStore, data: bytes, *links: Link) -> bytes:
    return store.put(DAG_PB, dag_pb.encode(links, data))


def file_data(kind: int, size: int | None, sizes: list[int], inline: bytes = b"") -> bytes:
    encoded = b"\x08" + dag_pb.encode_varint(kind)
    if inline:
        encoded += dag_pb.encode_bytes(2, inline)
    if size is not None:
        encoded += b"\x18" + dag_pb.encode_varint(size)
    return encoded + b"".join(b"\x20" + dag_pb.encode_varint(part) for part in sizes)


def test_files_of_other_writers_are_read(store: MemoryStore) -> None:
    # Leaves inside dag-pb nodes, uneven parts, data beside links, a tree of uneven depth.
    inline = node(store, file_data(2, 3, [], b"one"))
    raw_type = node(store, file_data(0, None, [], b"two"))
    deep = node(store, file_data(2, 8, [3, 5]), Link(inline, "", 0), Link(leaf(store, b"three"), "", 0))
    root = node(store, file_data(2, 15, [3, 8], b"zero"), Link(raw_type, "x", 7), Link(deep, "", 0))
    assert read_bytes(store, root) == b"zerotwoonethree"


def contradictions(store: MemoryStore) -> dict[str, bytes]:
    part = Link(leaf(store, b"abc"), "", 3)
    empty = Link(leaf(store, b""), "", 0)
    return {
        "total": node(store, file_data(2, 4, [3]), part),
        "part": node(store, file_data(2, 4, [4]), part),
        "count": node(store, file_data(2, 3, [3]), part, part),
        "empty part": node(store, file_data(2, 3, [3, 0]), part, empty),
        "no type": node(store, b"\x18\x03"),
        "protobuf": store.put(DAG_PB, b"\x0a\xff"),
        "stray field": store.put(DAG_PB, b"\x1a\x00"),
    }


@pytest.mark.parametrize("which", contradictions(MemoryStore()))
def test_a_file_that_contradicts_itself_is_refused(store: MemoryStore, which: str) -> None:
    with pytest.raises(IntegrityError):
        read_bytes(store, contradictions(store)[which])


def test_what_is_no_file_is_refused(store: MemoryStore) -> None:
    with pytest.raises(UsageError, match="folder"):
        read_bytes(store, node(store, b"\x08\x01"))
    with pytest.raises(UsageError, match="type 4"):
        read_bytes(store, node(store, b"\x08\x04"))
    with pytest.raises(UsageError, match="neither"):
        read_bytes(store, store.put(DAG_CBOR, encode_dag_cbor({})))
    with pytest.raises(NotFoundError):
        read_bytes(store, cid_of(RAW, b"missing"))


def test_a_small_dag_of_endless_size_is_refused_before_it_is_read(store: MemoryStore) -> None:
    cid, size = leaf(store, bytes(1000)), 1000
    for _ in range(8):
        cid = node(store, file_data(2, size * 100, [size] * 100), *[Link(cid, "", 0)] * 100)
        size *= 100
    with pytest.raises(TooLargeError):
        read_bytes(store, cid)
    with pytest.raises(TooLargeError):
        read_bytes(store, leaf(store, bytes(11)), max_bytes=10)


def test_nesting_has_a_limit(store: MemoryStore, tmp_path: Path) -> None:
    cid = leaf(store, b"x")
    for _ in range(unixfs.DEPTH_MAX + 1):
        cid = node(store, file_data(2, 1, [1]), Link(cid, "", 0))
    with pytest.raises(IntegrityError, match="deeper"):
        read_bytes(store, cid)
    cid = node(store, b"\x08\x01")
    for _ in range(unixfs.DEPTH_MAX + 2):
        cid = node(store, b"\x08\x01", Link(cid, "d", 0))
    with pytest.raises(IntegrityError, match="deeper"):
        export(store, cid, tmp_path / "out")


# --- export


def listing(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_folder_comes_back_as_it_was(store: MemoryStore, folder: Path, tmp_path: Path) -> None:
    (folder / "hollow").mkdir()
    imported = import_folder(store, folder)
    assert export(store, imported.cid, tmp_path / "new" / "out", expected=imported) == imported
    assert listing(tmp_path / "new" / "out") == listing(folder)
    assert (tmp_path / "new" / "out" / "hollow").is_dir()


def test_a_file_replaces_the_old_one(store: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    imported = import_bytes(store, sample(1, 3 * MIB))
    assert export(store, imported.cid, tmp_path / "out") == imported
    assert (tmp_path / "out").read_bytes() == sample(1, 3 * MIB)


def test_a_folder_in_use_is_not_touched(store: MemoryStore, folder: Path, tmp_path: Path) -> None:
    imported = import_folder(store, folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"mine")
    with pytest.raises(UsageError, match="not empty"):
        export(store, imported.cid, tmp_path / "out")
    assert listing(tmp_path / "out") == {"mine": b"mine"}


def spoil_gap(store: MemoryStore, imported: Imported) -> Imported:
    store.delete(cid_of(RAW, sample("config.json", 700)))
    return imported


def spoil_digest(store: MemoryStore, imported: Imported) -> Imported:
    return Imported(imported.cid, bytes(32), imported.size)


@pytest.mark.parametrize("spoil", [spoil_gap, spoil_digest])
def test_an_export_that_fails_leaves_nothing(
    store: MemoryStore, folder: Path, tmp_path: Path, spoil: Callable[[MemoryStore, Imported], Imported]
) -> None:
    expected = spoil(store, import_folder(store, folder))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises((NotFoundError, IntegrityError)):
        export(store, expected.cid, target / "out", expected=expected)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../../escape", "/etc/x", "a/b", "nul\0"])
def test_a_name_that_leads_elsewhere_is_refused(store: MemoryStore, tmp_path: Path, name: str) -> None:
    root = node(store, b"\x08\x01", Link(leaf(store, b"x"), name, 1))
    with pytest.raises(IntegrityError, match="name"):
        export(store, root, tmp_path / "a" / "out")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_name_twice_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    link = Link(leaf(store, b"x"), "x", 1)
    with pytest.raises(IntegrityError, match="twice"):
        export(store, node(store, b"\x08\x01", link, link), tmp_path / "out")


def test_a_folder_of_endless_size_is_refused(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unixfs, "EXPORT_MAX_ENTRIES", 1000)
    cid = node(store, b"\x08\x01")
    for _ in range(5):
        cid = node(store, b"\x08\x01", *[Link(cid, str(number), 0) for number in range(20)])
    with pytest.raises(UsageError, match="more than"):
        export(store, cid, tmp_path / "out")
    big = node(store, b"\x08\x01", *[Link(leaf(store, bytes(600)), str(number), 0) for number in range(2)])
    with pytest.raises(TooLargeError):
        export(store, big, tmp_path / "out", max_bytes=1000)
    assert not (tmp_path / "out").exists()


def test_the_text_of_a_cid_leads_back_to_it() -> None:
    for text in GOLDEN.values():
        assert cid_text(cid_parse(text)) == text
