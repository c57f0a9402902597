"""Which operators two workflows have in common, read off the documents alone: what the mesh must share, no more, no less."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from flowmesh_cas.cid import encode_dag_cbor
from flowmesh_mesh.manifest import Manifest, Source


def signatures(manifest: Manifest) -> list[bytes]:
    """Return one digest per operator of everything that decides its result, sources followed back to given contents.

    Names, positions and everything that only says how to run an operator stay out.
    """
    known: list[bytes] = []
    for operator in manifest.operators:
        record = {
            "type": operator.type,
            "version": operator.version,
            "params": operator.params,
            "models": dict(operator.models),
            "code": operator.code.digest if operator.code else b"",
            "numeric": operator.numeric,
            "inputs": {port: [_feed(source, known) for source in sources] for port, sources in operator.inputs.items()},
        }
        known.append(sha256(encode_dag_cbor(record)).digest())
    return known


def _feed(source: Source, known: Sequence[bytes]) -> list[object]:
    if source.ref is not None:
        return [source.ref.digest, source.ref.size]
    return [known[source.op], source.port, source.item]


def common(one: Manifest, other: Manifest) -> int:
    """Return how many distinct operators the two workflows have in common."""
    return len(set(signatures(one)) & set(signatures(other)))
