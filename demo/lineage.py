"""Where the adapter came from: the records of its lineage, each receipt checked with nothing but public keys."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from flowmesh_cas.cid import cid_parse, digest_of
from flowmesh_cas.errors import NotFoundError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import receipts
from flowmesh_mesh.client import Mesh
from flowmesh_mesh.manifest import ResultRecord, decode_record
from flowmesh_mesh.messages import Outcome, Reason


@dataclass(frozen=True, slots=True)
class Lineage:
    """The records from the adapter back to the given files, nearest first, and how many receipts were found good."""

    records: list[dict[str, Any]]
    inputs: list[str]
    models: dict[str, str]
    verified: int
    unreachable: int
    """Records whose DAG nobody holds whole any more, such as one that links to a log which only the lost node had."""

    def types(self) -> set[str]:
        """Return the operator types on the way."""
        return {str(record["type"]) for record in self.records}


async def trace(mesh: Mesh, cid: str) -> Lineage:
    """Return the lineage of a content; every record and output on the way is fetched by its CID, every receipt checked."""
    body = await mesh.lineage(cid)
    store = MemoryStore()
    verified = unreachable = 0
    for record in body["records"]:
        root = cid_parse(record["record"])
        try:
            for ref in itertools.chain.from_iterable(record["outputs"].values()):
                await mesh.fetch(ref["cid"], store)
            await mesh.fetch(root, store)
        except NotFoundError:
            unreachable += 1
            continue
        verified += is_vouched_for(decode_record(store.get(root), ResultRecord))
    return Lineage(body["records"], list(body["inputs"]), dict(body["models"]), verified, unreachable)


def is_vouched_for(record: ResultRecord) -> bool:
    """Tell whether the receipt's signature covers exactly this result."""
    from flowmesh_mesh.credentials import verify

    receipt = record.receipt
    outcome = Outcome(digest_of(record.operator), record.generation, record.attempt, Reason.SUCCEEDED, result=record.result)
    root = receipts.root_from_path(receipts.leaf(outcome), receipt.index, receipt.count, receipt.path)
    said = receipts.statement(receipt.node, receipt.assignment, receipt.epoch, receipt.root, receipt.count)
    return root == receipt.root and verify(receipt.public_key, said, receipt.signature)
