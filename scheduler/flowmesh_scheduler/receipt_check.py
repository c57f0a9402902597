"""Whether a node's report carries its valid receipt."""

from __future__ import annotations

from flowmesh_mesh import receipts
from flowmesh_mesh.credentials import verify
from flowmesh_mesh.messages import Done


def check_receipt(done: Done, public_key: str) -> bool:
    """Tell whether ``done`` is signed by the key that the node joined with, over exactly these outcomes."""
    if not done.outcomes or done.public_key != public_key:
        return False
    try:
        root = receipts.levels([receipts.leaf(outcome) for outcome in done.outcomes])[-1][0]
    except OverflowError:  # a generation or attempt that no leader gave out
        return False
    statement = receipts.statement(done.node, done.assignment, done.epoch, root, len(done.outcomes))
    return verify(public_key, statement, done.signature)
