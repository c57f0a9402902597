"""The node as a keeper: it guards acceptances of the mesh beside its own work, and survives for them what the broker does not."""

from __future__ import annotations

from pathlib import Path

from flowmesh_cas.store import BlockStore
from flowmesh_mesh.keeping import Keeper
from flowmesh_mesh.transfer import Requester
from flowmesh_node.epochs import Epochs

FOLDER = "kept"


def node_keeper(bulk: Requester, store: BlockStore, node: str, folder: Path, epochs: Epochs) -> Keeper:
    """Return the keeper of a node, with what an earlier life of it kept; blocking.

    Contents come over ``bulk``, so that no heartbeat queues behind them, into the node's own store. What a deposed leader says
    is not heard: it could let go what the mesh still needs.
    """
    keeper = Keeper(bulk, store, node, folder / FOLDER, lambda epoch: not epochs.is_stale(epoch))
    keeper.restore()
    return keeper
