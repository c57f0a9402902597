"""Small workflows, nodes and results for the tests of the scheduler's core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowmesh_cas.cid import RAW, cid_of, sha256
from flowmesh_mesh.catalog import operator_type
from flowmesh_mesh.manifest import (
    Manifest,
    Operator,
    Output,
    Ref,
    Resources,
    ResultManifest,
    Retry,
    Source,
    encode_record,
    record_cid,
)
from flowmesh_mesh.messages import Device, NodeRecord

SECOND = 1_000_000
TRAIN: dict[str, Any] = {"type": "train.sft", "params": {"seed": 1}}
EVERY_TYPE = ("flow.noop", "data.sql", "data.split", "python.call", "llm.generate", "train.sft")
PORT_OF = {"flow.noop": "out", "python.call": "out", "data.split": "parts", "train.sft": "adapter"}
KIND_OF = {"flow.noop": "value", "python.call": "value", "train.sft": "folder"}


def content(label: str, size: int = 1) -> Ref:
    """Return the reference of a content that is known by its label."""
    block = label.encode()
    return Ref("value", cid_of(RAW, block), sha256(block), size)


def output_port(kind: str) -> str:
    """Return the output port of a type that the tests use."""
    return PORT_OF.get(kind, "rows")


def result_of(kind: str, label: str, parts: int = 1) -> tuple[dict[str, list[Ref]], bytes]:
    """Return outputs and result CID of an operator that produces the content called ``label``."""
    refs = [content(label if parts == 1 else f"{label}#{part}") for part in range(parts)]
    outputs = {output_port(kind): refs}
    return outputs, record_cid(encode_record(ResultManifest(outputs)))


def operator(
    name: str,
    *,
    type: str = "flow.noop",
    after: Sequence[int | Ref | Source] = (),
    nonce: int | None = None,
    params: Mapping[str, Any] | None = None,
    of: Sequence[Operator] = (),
    **fields: Any,
) -> Operator:
    """Return an operator that reads the outputs of the operators ``after`` (indices into ``of``, or of its own type)."""
    kind = operator_type(type)
    port = {"flow.noop": "after", "data.split": "rows", "llm.generate": "rows", "train.sft": "rows"}.get(type, "t")
    sources = []
    for source in after:
        if isinstance(source, Source):
            sources.append(source)
        elif isinstance(source, Ref):
            sources.append(Source(ref=source))
        else:
            sources.append(Source(op=source, port=output_port(of[source].type) if of else output_port(type)))
    filled = dict(params or {})
    if nonce is not None:
        filled["nonce"] = nonce
    fields.setdefault("determinism", kind.determinism_of(filled))
    return Operator(name, type, 1, filled, {port: sources} if sources else {}, **fields)


def workflow(operators: Sequence[Operator], outputs: Mapping[str, int] | None = None, name: str = "flow") -> Manifest:
    """Return a manifest; its outputs name operators by index (by default the last one is ``out``)."""
    named = {"out": len(operators) - 1} if outputs is None and operators else dict(outputs or {})
    return Manifest(
        name, list(operators), {label: Output(index, output_port(operators[index].type)) for label, index in named.items()}
    )


def chain(length: int, first: int = 0) -> Manifest:
    """Return a workflow of operators that follow one another."""
    return workflow([operator(f"o{i}", nonce=first + i, after=[i - 1] if i else []) for i in range(length)])


def fan(width: int, first: int = 0) -> Manifest:
    """Return a workflow of independent operators; the first is its output."""
    return workflow([operator(f"o{i}", nonce=first + i) for i in range(width)], {"out": 0})


def manifest_cid(manifest: Manifest) -> bytes:
    """Return the CID of a workflow."""
    return record_cid(encode_record(manifest))


def node_record(name: str, *, started_at_us: int = 1, types: Sequence[str] = EVERY_TYPE, **fields: Any) -> NodeRecord:
    """Return what a node says of itself."""
    values: dict[str, Any] = {"python": "3.11", "cpus": 4.0, "memory_bytes": 1 << 34, "slots": 1, **fields}
    return NodeRecord(name, f"U{name}", started_at_us, tuple(types), **values)


def gpu(memory_bytes: int = 1 << 34) -> Device:
    """Return an accelerator."""
    return Device("cuda", "gpu", "", memory_bytes)


__all__ = [
    "EVERY_TYPE",
    "SECOND",
    "TRAIN",
    "Manifest",
    "Operator",
    "Resources",
    "Retry",
    "Source",
    "chain",
    "content",
    "fan",
    "gpu",
    "manifest_cid",
    "node_record",
    "operator",
    "output_port",
    "result_of",
    "workflow",
]
