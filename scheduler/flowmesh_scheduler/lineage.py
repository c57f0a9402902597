"""The lineage of a result: the ledger records behind it, followed through their links.

What is told is also put into the hub as blocks (records and identity records), so that any IPLD tool can walk it from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from flowmesh_cas.cid import DAG_CBOR, RAW, cid_from_digest, cid_text
from flowmesh_cas.errors import NotFoundError
from flowmesh_mesh import subjects
from flowmesh_mesh.identity import identity_record
from flowmesh_mesh.manifest import ResultRecord, decode_record
from flowmesh_scheduler.core.planning import inputs_of, salt_of
from flowmesh_scheduler.core.state import Run, Vertex, VertexState
from flowmesh_scheduler.feeds import plain_outputs

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader


async def of_run(leader: Leader, run: Run, roots: list[Vertex] | None = None) -> dict[str, Any]:
    """Return the lineage of the declared outputs of a run (or of the given vertices)."""
    if roots is None:
        declared = [run.vertices[output.op] for output in run.manifest.outputs.values()]
        roots = [v for v in declared if v.record] or [v for v in run.vertices if v.record and not run.consumers[v.index]]
    by_index: dict[int, dict[str, Any]] = {}
    inputs: set[str] = set()
    models: dict[str, str] = {}
    stack = list(roots)
    while stack:
        vertex = stack.pop()
        if vertex.index in by_index or not vertex.record:
            continue
        by_index[vertex.index] = await _row(leader, vertex)
        for reference in vertex.operator.models.values():
            models[reference] = run.acceptance.models.get(reference, reference)
        for sources in vertex.operator.inputs.values():
            for source in sources:
                if source.ref is not None:
                    inputs.add(cid_text(source.ref.cid))
                else:
                    stack.append(run.vertices[source.op])
        if vertex.operator.code is not None:
            inputs.add(cid_text(vertex.operator.code.cid))
    return {
        "roots": sorted({cid_text(v.record) for v in roots if v.record}),
        "records": [row for _, row in sorted(by_index.items())],
        "inputs": sorted(inputs),
        "models": models,
        "model_cids": {reference: _model_cid(reference, digest) for reference, digest in models.items()},
    }


def _model_cid(reference: str, digest: str) -> str:
    """Return the CID that names a model: its own, or the raw CID of the digest that it was pinned to."""
    if reference.startswith("cid:"):
        return reference.removeprefix("cid:")
    return cid_text(cid_from_digest(RAW, bytes.fromhex(digest.removeprefix("sha256:"))))


async def of_content(leader: Leader, tenant: str, cid: bytes) -> dict[str, Any]:
    """Return the lineage of a content, result or record that one of the tenant's runs produced."""
    from flowmesh_scheduler.asks import find_run

    pairs = [pair for pair in [*leader.state.runs, *leader.state.ended] if pair[0] == tenant]
    for pair in dict.fromkeys(pairs):
        try:
            run = find_run(leader, *pair)
        except NotFoundError:
            continue
        found = [v for v in run.vertices if v.state is VertexState.DONE and _made(v, cid)]
        if found:
            return await of_run(leader, run, found[:1])
    raise NotFoundError(f"no run of yours made {cid_text(cid)}", hint="`flowmesh show RUN` lists the CIDs of results.")


def _made(vertex: Vertex, cid: bytes) -> bool:
    if cid in (vertex.record, vertex.result):
        return True
    return any(ref.cid == cid for refs in (vertex.outputs or {}).values() for ref in refs)


async def _row(leader: Leader, vertex: Vertex) -> dict[str, Any]:
    """Return one record of the ledger as plain data, and keep its block and its identity record at the hub."""
    message = await leader.bus.last_message(subjects.LEDGER, subjects.ledger_result(vertex.key.hex(), vertex.generation))
    if message is None:
        raise NotFoundError(f"the ledger has no record of operator {vertex.operator.name}")
    record = decode_record(message.data, ResultRecord)
    pinned = vertex.run.acceptance.models
    digests = {role: pinned.get(reference, reference) for role, reference in vertex.operator.models.items()}
    identity = identity_record(vertex.operator, inputs_of(vertex), digests, salt_of(leader.state, vertex))
    leader.hub.put_soon([(vertex.record, message.data), (cid_from_digest(DAG_CBOR, vertex.key), identity)])
    return {
        "record": cid_text(vertex.record),
        "key": vertex.key.hex(),
        "operator": cid_text(record.operator),
        "type": vertex.operator.type,
        "name": vertex.operator.name,
        "params": vertex.operator.params,
        "models": dict(record.models),
        "result": cid_text(record.result),
        "outputs": plain_outputs(record.outputs),
        "inputs": [
            {"port": o.port, "cid": cid_text(o.cid), "record": cid_text(o.record) if o.record else None} for o in record.origins
        ],
        "node": record.receipt.node,
        "attempt": record.attempt,
        "generation": record.generation,
        "numeric": record.numeric,
        "receipt": {
            "public_key": record.receipt.public_key,
            "root": record.receipt.root.hex(),
            "signature": record.receipt.signature.hex(),
            "index": record.receipt.index,
            "count": record.receipt.count,
        },
        "metered": asdict(record.metered),
        "committed_at_us": record.committed_at_us,
    }
