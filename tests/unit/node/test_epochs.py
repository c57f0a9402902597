"""What a node knows of who leads."""

from __future__ import annotations

from pathlib import Path

from flowmesh_node.epochs import Epochs


def test_the_version_of_a_leader_counts_for_its_epoch_only(tmp_path: Path) -> None:
    epochs = Epochs(tmp_path / "epoch")
    assert epochs.see(10)
    assert epochs.wire == 1
    assert not epochs.see(10, 2)
    assert epochs.wire == 2
    assert not epochs.see(10)
    assert epochs.wire == 2
    assert epochs.see(11)
    assert epochs.wire == 1, "an older leader came back, and says nothing of its version"
    assert not epochs.see(10, 2)
    assert epochs.wire == 1
