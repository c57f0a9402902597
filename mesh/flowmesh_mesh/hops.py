"""Hops: the operators of a chain that a node runs one after the other, each on what the one before gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowmesh_mesh.identity import identity_record, operator_key
from flowmesh_mesh.manifest import Operator, Ref
from flowmesh_mesh.messages import Hop


def inputs_after(operator: Operator, outputs: Mapping[str, Sequence[Ref]]) -> dict[str, list[Ref]]:
    """Return the contents at each input port of an operator whose only producing source gave ``outputs``."""
    found: dict[str, list[Ref]] = {}
    for port, sources in operator.inputs.items():
        refs = found[port] = []
        for source in sources:
            if source.ref is not None:
                refs.append(source.ref)
            else:
                produced = outputs.get(source.port, ())
                refs.extend(produced if source.item < 0 else produced[source.item : source.item + 1])
    return found


def key_of(hop: Hop, inputs: Mapping[str, Sequence[Ref]]) -> bytes:
    """Return the operator key of a hop whose inputs are known. It names no models: operators with models are no hops."""
    return operator_key(identity_record(hop.operator, inputs, {}, hop.salt))
