"""How large an operator is, and what that ought to cost on a device by its figures alone: where learning begins.

The rules only have to give the right shape and the right power of ten. A type without a rule counts its operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flowmesh_mesh.manifest import Operator, Ref
from flowmesh_scheduler.core.devices import Figures
from flowmesh_scheduler.core.fit import Coefficients

CostClass = tuple[str, str]
"""What costs are learned of: operator type, and what it runs (digest of the model, the user's function, or nothing)."""

BYTES_PER_TOKEN = 4.0
BYTES_PER_ROW = 400.0
MODEL_BYTES = 8_000_000_000
"""Assumed size of a model of which nobody has told the size."""

_CHUNK_BYTES = 100_000.0
_BYTES_PER_PARAMETER = 2.0
_PREFILL_EFFICIENCY = 0.4
_TRAIN_EFFICIENCY = 0.3
_LAUNCH_S = 0.004
_ROWS_AT_ONCE = 16

_Inputs = Mapping[str, Sequence[Ref]]


class Size(NamedTuple):
    """One operator: ``steps`` that follow each other whatever runs beside it, ``units`` of work in all (tokens, rows, chunks)."""

    steps: float
    units: float


_ONE = Size(0.0, 1.0)


def cost_class(operator: Operator, model_digests: Mapping[str, str]) -> CostClass:
    """Return under what the cost of an operator is learned: its type with the model, or with the user's function."""
    for digest in model_digests.values():
        return (operator.type, digest)
    if operator.code is not None:
        return (operator.type, f"{operator.params.get('function', '')}@{operator.code.digest[:6].hex()}")
    return (operator.type, "")


def size_of(operator: Operator, inputs: _Inputs) -> Size:
    """Return the size of an operator from its parameters and the sizes of its inputs."""
    rule = _SIZES.get(operator.type)
    return _ONE if rule is None else rule(operator.params, inputs)


def _rows(inputs: _Inputs) -> tuple[float, float]:
    """Return rows and bytes of the tables at port ``rows``."""
    rows = size = 0.0
    for ref in inputs.get("rows", ()):
        size += max(ref.size, 0)
        rows += ref.rows if ref.rows >= 0 else max(ref.size, 0) / BYTES_PER_ROW
    return max(rows, 1.0), size


def _bytes(params: Mapping[str, Any], inputs: _Inputs) -> Size:
    size = sum(max(ref.size, 0) for refs in inputs.values() for ref in refs)
    return Size(0.0, 1.0 + size / _CHUNK_BYTES)


def _generate(params: Mapping[str, Any], inputs: _Inputs) -> Size:
    rows, size = _rows(inputs)
    new = params.get("max_new_tokens", 64)
    return Size(new, size / BYTES_PER_TOKEN + rows * params.get("samples", 1) * new)


def _tokens(params: Mapping[str, Any], inputs: _Inputs) -> Size:
    rows, size = _rows(inputs)
    return Size(0.0, rows + size / BYTES_PER_TOKEN)


def _reward(params: Mapping[str, Any], inputs: _Inputs) -> Size:
    return _tokens(params, inputs) if params.get("model") else Size(0.0, _rows(inputs)[0])


def _train(params: Mapping[str, Any], inputs: _Inputs) -> Size:
    rows, size = _rows(inputs)
    length = min(params.get("max_length", 256), max(8.0, size / BYTES_PER_TOKEN / rows))
    steps = params.get("steps", 1)
    return Size(steps, max(1.0, steps * params.get("batch_size", 1) * length))


_SIZES: Mapping[str, Callable[[Mapping[str, Any], _Inputs], Size]] = {
    "flow.noop": lambda params, inputs: Size(params.get("sleep_s", 0.0), 1.0),
    "data.load": _bytes,
    "data.split": _bytes,
    "data.concat": _bytes,
    "data.sql": _bytes,
    "data.map": _bytes,
    "llm.generate": _generate,
    "llm.score": _tokens,
    "reward.score": _reward,
    "train.sft": _train,
    "train.dpo": _train,
}


class Prior(NamedTuple):
    """Seconds by the device's figures; ``is_firm``: the amounts are right as they are, not only their proportions."""

    coefficients: Coefficients
    is_firm: bool = False


def prior_of(kind: CostClass, figures: Figures, model_bytes: int) -> Prior:
    """Return what work of this kind ought to cost on a device."""
    name, subject = kind
    read_s = _LAUNCH_S + model_bytes / figures.bandwidth_bytes_per_s
    token_s = 2 * model_bytes / _BYTES_PER_PARAMETER / figures.flops
    if name == "flow.noop":
        return Prior((1e-5, 1.0, 1e-6), is_firm=True)
    if name == "llm.generate":
        return Prior((0.02, read_s, token_s / _PREFILL_EFFICIENCY + read_s / (2 * _ROWS_AT_ONCE)))
    if name == "llm.score" or (name == "reward.score" and subject):
        return Prior((0.02 + read_s, 0.0, token_s / _PREFILL_EFFICIENCY))
    if name == "reward.score":
        return Prior((0.005, 0.0, 5e-5))
    if name.startswith("train."):
        times = 4 if name == "train.dpo" else 3
        return Prior((2.0, 0.02, times * token_s / _TRAIN_EFFICIENCY))
    if name.startswith("data."):
        return Prior((0.01, 0.0, 0.004))
    if name == "python.call":
        return Prior((0.05, 0.0, 0.05))
    return Prior((0.02, 0.0, 0.01))


def memory_of(kind: CostClass, size: Size, model_bytes: int) -> float:
    """Return the bytes that one operator needs beside the weights."""
    name, subject = kind
    if name.startswith("data."):
        return 5 * size.units * _CHUNK_BYTES
    if not subject or name == "python.call":
        return 0.0
    layers = 32 * math.pow(model_bytes / 14e9, 1 / 3)
    # Parameters are about 12 * layers * width**2, keys and values of a token 2 * layers * width numbers that two heads share.
    token_bytes = 2 * math.sqrt(model_bytes / _BYTES_PER_PARAMETER * layers / 12)
    if name.startswith("train."):
        return model_bytes / 4 + 16 * token_bytes * size.units / max(1.0, size.steps)
    if name == "llm.generate":
        return token_bytes * min(size.units, _ROWS_AT_ONCE * (size.steps + 2048))
    return token_bytes * min(size.units, 8 * 2048)
