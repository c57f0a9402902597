"""Which operators two workflows have in common, read off the documents alone: what the mesh must share, no more, no less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two workflows counted: ``operators`` in all, ``distinct`` ones, ``between`` those that stand in both."""

    operators: int
    distinct: int
    between: int

    @property
    def shared(self) -> int:
        """Return how many operators need not be run because an equal one is."""
        return self.operators - self.distinct


def overlap(one: Manifest, other: Manifest) -> Overlap:
    """Return how much two workflows have in common."""
    first, second = signatures(one), signatures(other)
    return Overlap(len(first) + len(second), len({*first, *second}), len(set(first) & set(second)))
