"""Links, walks and gaps of DAGs in every codec."""

from __future__ import annotations

import pytest

from flowmesh_cas import dag, dag_pb
from flowmesh_cas.cid import DAG_CBOR, DAG_PB, RAW, cid_of, encode_dag_cbor
from flowmesh_cas.dag_pb import Link
from flowmesh_cas.errors import IntegrityError, NotFoundError, UsageError
from flowmesh_cas.store import BlockStore, MemoryStore
from flowmesh_cas.wrappers import FaultyStore


def diamond(store: BlockStore) -> dict[str, bytes]:
    """A root over two nodes that share a leaf: record -> (record, folder) -> leaves."""
    shared, other = store.put(RAW, b"shared"), store.put(RAW, b"other")
    left = store.put(DAG_CBOR, encode_dag_cbor({"a": shared, "list": [{"deep": other}], "digest": bytes(32)}))
    right = store.put(DAG_PB, dag_pb.encode([Link(shared, "x", 6)], b"\x08\x01"))
    root = store.put(DAG_CBOR, encode_dag_cbor([left, right, left]))
    return {"shared": shared, "other": other, "left": left, "right": right, "root": root}


def test_links_stand_in_the_order_of_the_block() -> None:
    store = MemoryStore()
    cids = diamond(store)
    assert dag.links(cids["root"], store.get(cids["root"])) == [cids["left"], cids["right"], cids["left"]]
    assert dag.links(cids["left"], store.get(cids["left"])) == [cids["shared"], cids["other"]]
    assert dag.links(cids["right"], store.get(cids["right"])) == [cids["shared"]]
    assert dag.links(cids["shared"], b"shared") == []


def test_bytes_that_hold_the_tag_of_a_link_by_chance_are_no_link() -> None:
    block = encode_dag_cbor({"noise": b"\xd8\x2a" * 20, "text": "x"})
    assert dag.links(cid_of(DAG_CBOR, block), block) == []


def test_a_block_that_is_not_of_its_codec_is_refused() -> None:
    with pytest.raises(IntegrityError):
        dag.links(cid_of(DAG_PB, b"\xff"), b"\xff")
    with pytest.raises(IntegrityError):
        dag.links(cid_of(DAG_CBOR, b"\xd8\x2a\x01"), b"\xd8\x2a\x01")


def test_a_link_to_a_foreign_cid_is_refused() -> None:
    block = dag_pb.encode([Link(b"\x12\x20" + bytes(32), "old", 1)], b"")
    with pytest.raises(UsageError):
        dag.links(cid_of(DAG_PB, block), block)


def test_a_walk_goes_depth_first_and_names_each_block_once() -> None:
    store = MemoryStore()
    cids = diamond(store)
    assert list(dag.walk(store, cids["root"])) == [cids[name] for name in ("root", "left", "shared", "other", "right")]


def test_a_walk_stops_at_a_gap() -> None:
    store = MemoryStore()
    cids = diamond(store)
    store.delete(cids["right"])
    with pytest.raises(NotFoundError):
        list(dag.walk(store, cids["root"]))


def test_a_chain_of_many_records_is_walked() -> None:
    store = MemoryStore()
    cid = store.put(RAW, b"end")
    for number in range(5000):
        cid = store.put(DAG_CBOR, encode_dag_cbor({"before": cid, "n": number}))
    assert sum(1 for _ in dag.walk(store, cid)) == 5001
    assert dag.missing(store, cid) == []


def test_missing_names_each_gap_once() -> None:
    store = MemoryStore()
    cids = diamond(store)
    assert dag.missing(store, cids["root"]) == []
    store.delete_many((cids["shared"], cids["right"]))
    assert sorted(dag.missing(store, cids["root"], cids["left"])) == sorted((cids["shared"], cids["right"]))
    store.delete(cids["root"])
    assert dag.missing(store, cids["root"]) == [cids["root"]]


def test_reachable_passes_over_gaps() -> None:
    store = MemoryStore()
    cids = diamond(store)
    store.delete(cids["left"])
    assert dag.reachable(store, [cids["root"]]) == {cids["root"], cids["right"], cids["shared"]}


def test_whole_means_that_leaves_verify_too() -> None:
    store = MemoryStore()
    cids = diamond(store)
    assert dag.is_whole(store, cids["root"], max_bytes=1000)
    bad = FaultyStore(store, lambda cid: IntegrityError("bad disk") if cid == cids["other"] else None)
    assert not dag.is_whole(bad, cids["root"], max_bytes=1000)
    assert dag.is_whole(bad, cids["root"], max_bytes=0)
    store.delete(cids["other"])
    assert not dag.is_whole(store, cids["root"], max_bytes=0)


def test_a_node_reads_back_as_it_was_written() -> None:
    links = [Link(cid_of(RAW, bytes((n,))), f"näme {n}", n * 1000) for n in range(200)]
    node = dag_pb.decode(dag_pb.encode(links, b"data"))
    assert (list(node.links), node.data) == (links, b"data")


@pytest.mark.parametrize("number", [0, 127, 128, 300, 1 << 32, (1 << 63) - 1])
def test_numbers_read_back(number: int) -> None:
    ((tag, back),) = dag_pb.fields(b"\x08" + dag_pb.encode_varint(number))
    assert (tag, back) == (1, number)


@pytest.mark.parametrize(
    "block", [b"\x0a", b"\x0a\x05abc", b"\x80" * 11, b"\x0a\x00\x0a\x00", b"\x12\x02\x0a\x05", b"\x0d\x00\x00\x00\x00"]
)
def test_malformed_nodes_are_refused(block: bytes) -> None:
    with pytest.raises(IntegrityError):
        dag_pb.decode(block)
