"""Receipts: one signature for many results, each of which can be proved alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowmesh_mesh import receipts
from flowmesh_mesh.messages import Done, Outcome
from flowmesh_scheduler.receipt_check import check_receipt


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40), st.data())
def test_every_leaf_leads_to_the_root_by_its_path(leaves: list[bytes], data: st.DataObject) -> None:
    tree = receipts.levels(leaves)
    index = data.draw(st.integers(0, len(leaves) - 1))
    path = receipts.path(tree, index)
    assert receipts.root_from_path(leaves[index], index, len(leaves), path) == tree[-1][0]


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=40, unique=True), st.data())
def test_another_leaf_does_not_lead_to_the_root(leaves: list[bytes], data: st.DataObject) -> None:
    tree = receipts.levels(leaves)
    index = data.draw(st.integers(0, len(leaves) - 1))
    forged = bytes((leaves[index][0] ^ 1,)) + leaves[index][1:]
    assert receipts.root_from_path(forged, index, len(leaves), receipts.path(tree, index)) != tree[-1][0]


def test_the_leaf_tells_attempts_generations_reasons_and_results_apart() -> None:
    base = Outcome(b"k" * 32, 0, 1, "succeeded", b"r" * 36)
    others = [
        Outcome(b"l" * 32, 0, 1, "succeeded", b"r" * 36),
        Outcome(b"k" * 32, 1, 1, "succeeded", b"r" * 36),
        Outcome(b"k" * 32, 0, 2, "succeeded", b"r" * 36),
        Outcome(b"k" * 32, 0, 1, "crashed", b"r" * 36),
        Outcome(b"k" * 32, 0, 1, "succeeded", b"s" * 36),
    ]
    assert len({receipts.leaf(outcome) for outcome in [base, *others]}) == 6


def test_a_report_with_numbers_that_no_leader_gave_out_is_refused() -> None:
    done = Done("n", "a", 1, (Outcome(b"k" * 32, -1, 1, "succeeded"),), "UKEY", b"s" * 64)
    assert not check_receipt(done, "UKEY")


def test_the_statement_binds_node_assignment_epoch_and_count() -> None:
    statements = {
        receipts.statement("n", "a", 1, b"r", 1),
        receipts.statement("m", "a", 1, b"r", 1),
        receipts.statement("n", "b", 1, b"r", 1),
        receipts.statement("n", "a", 2, b"r", 1),
        receipts.statement("n", "a", 1, b"s", 1),
        receipts.statement("n", "a", 1, b"r", 2),
    }
    assert len(statements) == 6
