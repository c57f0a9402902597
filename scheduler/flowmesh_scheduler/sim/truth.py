"""How long things really take in the simulated world: a roofline model, which the scheduler does not know.

Decoding: a step reads weights and contexts, or multiplies, whichever takes longer; a batch takes steps until its longest row is
done, fewer rows at a time towards the end, and waits for memory where contexts do not fit. Reading prompts, scoring and training
are bound by arithmetic. Around that: fixed costs of a batch, loads from disk, the host's own slowness, noise with a heavy tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from flowmesh_mesh.manifest import Ref
from flowmesh_scheduler.sim.draws import between, lognormal, uniform
from flowmesh_scheduler.sim.fleet import DeviceClass
from flowmesh_scheduler.sim.language_models import BY_DIGEST, LanguageModel

BYTES_PER_TOKEN = 4
_BANDWIDTH_SHARE = 0.65
_DECODE_SHARE = 0.45
_PREFILL_SHARE = 0.50
_TRAIN_SHARE = 0.35
_STEP_OVERHEAD_S = 0.004
_ENGINE_OVERHEAD_S = 0.4
_TRAIN_OVERHEAD_S = 10.0
_TRAIN_STEP_OVERHEAD_S = 0.05
_MEMORY_SHARE = 0.92
_PCIE_BYTES_PER_S = 12e9
_LOAD_OVERHEAD_S = 5.0
_STRAGGLERS = 0.01
_NOISE = 0.10


@dataclass(frozen=True, slots=True)
class Demand:
    """What one operator really asks for. ``steps`` are those of its longest row; ``row_steps`` the sum over its rows."""

    type: str
    model: LanguageModel | None
    rows: int
    prompt_tokens: float
    steps: float
    row_steps: float
    trained_tokens: float
    cpu_s: float

    @property
    def is_engine(self) -> bool:
        return self.model is not None and not self.trained_tokens

    @property
    def is_gpu(self) -> bool:
        return self.model is not None


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a batch by what they went into, and the mean share of the device's power while executing."""

    fetch_s: float
    load_s: float
    exec_s: float
    power_share: float

    @property
    def seconds(self) -> float:
        return self.fetch_s + self.load_s + self.exec_s


def demand_of(kind: str, params: Mapping[str, Any], inputs: Mapping[str, Sequence[Ref]], digest: str) -> Demand:
    """Return what an operator with these inputs asks for."""
    model = BY_DIGEST.get(digest)
    refs = [ref for port, found in inputs.items() if port != "adapter" for ref in found]
    rows = sum(max(0, ref.rows) for ref in refs)
    size = sum(max(0, ref.size) for ref in refs)
    tokens = size / BYTES_PER_TOKEN
    if kind == "llm.generate":
        samples = int(params.get("samples", 1))
        limit = int(params["max_new_tokens"])
        longest = limit * between(0.75, 1.0, "longest", params.get("seed", 0), limit, size)
        rows *= samples
        return Demand(kind, model, rows, tokens * samples, longest, 0.75 * longest * rows, 0.0, 0.0)
    if kind in ("llm.score", "reward.score"):
        return Demand(kind, model, rows, tokens, 0.0, 0.0, 0.0, 0.0 if model else 0.001 * rows)
    if kind.startswith("train."):
        trained = params["steps"] * params["batch_size"] * 0.7 * params["max_length"] * (8 / 3 if kind == "train.dpo" else 1)
        return Demand(kind, model, rows, 0.0, float(params["steps"]), 0.0, trained, 0.0)
    if kind == "python.call":
        args = params.get("args", {})
        return Demand(kind, None, rows, 0.0, 0.0, 0.0, 0.0, 1.0 + args.get("fixed_s", 0.0) + args.get("row_s", 0.0) * rows)
    return Demand(kind, None, rows, 0.0, 0.0, 0.0, 0.0, 0.2 + size / 50e6 + rows * 20e-6)


def execution(device: DeviceClass, demands: Sequence[Demand], room_bytes: float) -> tuple[float, float]:
    """Return seconds without noise of a batch on a device, and the share of its power; ``room_bytes`` is left for contexts."""
    first = demands[0]
    if first.model is None:
        return sum(d.cpu_s for d in demands), 0.2
    if first.trained_tokens:
        return sum(_training_s(device, d) for d in demands), 0.95
    model = first.model
    prefill_s = 2 * model.parameters * sum(d.prompt_tokens for d in demands) / (device.flops * _PREFILL_SHARE)
    decode_s, power = _decoding(device, model, demands, room_bytes)
    total_s = prefill_s + decode_s
    return _ENGINE_OVERHEAD_S + total_s, (0.9 * prefill_s + power * decode_s) / max(total_s, 1e-9)


def shares(demands: Sequence[Demand]) -> list[float]:
    """Return after which share of a batch's execution each operator is done, in eighths.

    Without an accelerator one follows the other; where a model decodes, an operator is done with its longest row.
    """
    if demands[0].model is None:
        done, total, found = 0.0, max(1e-9, sum(d.cpu_s for d in demands)), []
        for demand in demands:
            done += demand.cpu_s
            found.append(done / total)
    else:
        longest = max(d.steps for d in demands)
        found = [d.steps / longest if longest and d.is_engine else 1.0 for d in demands]
    return [min(1.0, ceil(8 * share - 1e-9) / 8) for share in found]


def _training_s(device: DeviceClass, demand: Demand) -> float:
    assert demand.model is not None
    arithmetic_s = 6 * demand.model.parameters * demand.trained_tokens / (device.flops * _TRAIN_SHARE)
    return _TRAIN_OVERHEAD_S + arithmetic_s + demand.steps * _TRAIN_STEP_OVERHEAD_S


def context_bytes(model: LanguageModel, demands: Sequence[Demand]) -> float:
    """Return the memory that all rows of a batch take at their longest."""
    return sum((d.prompt_tokens + d.steps * d.rows) * model.kv_bytes for d in demands)


def _decoding(device: DeviceClass, model: LanguageModel, demands: Sequence[Demand], room_bytes: float) -> tuple[float, float]:
    """Return seconds of all decoding steps: rows end one after the other; what does not fit waits for a place."""
    active = [d for d in demands if d.steps]
    if not active:
        return 0.0, 0.9
    rows = sum(d.rows for d in active)
    per_row = context_bytes(model, active) / rows
    limit = max(1.0, room_bytes / per_row)
    row_steps = sum(d.row_steps for d in active)
    longest = max(d.steps for d in active)
    if rows > limit:
        step_s, power = _step(device, model, limit, per_row * 0.75)
        tail_s, _ = _step(device, model, limit / 3, per_row)
        return row_steps / limit * step_s + 0.4 * longest * tail_s, power
    # Mean number of rows over the steps of the longest; a concave step time makes the mean a fair stand-in.
    step_s, power = _step(device, model, row_steps / longest, per_row * 0.75)
    return longest * step_s, power


def _step(device: DeviceClass, model: LanguageModel, rows: float, bytes_per_row: float) -> tuple[float, float]:
    reading_s = (model.weights_bytes + rows * bytes_per_row) / (device.bandwidth_bytes_per_s * _BANDWIDTH_SHARE)
    computing_s = 2 * model.parameters * rows / (device.flops * _DECODE_SHARE)
    return max(reading_s, computing_s) + _STEP_OVERHEAD_S, 0.9 if computing_s > reading_s else 0.6


def memory_bytes(device: DeviceClass) -> float:
    """Return what of a device's memory can be used."""
    return device.vram_bytes * _MEMORY_SHARE


def load_s(disk_bytes_per_s: float, weights_bytes: float) -> float:
    """Return seconds to start an engine with a model that lies on the host's disk."""
    return _LOAD_OVERHEAD_S + weights_bytes / min(disk_bytes_per_s, _PCIE_BYTES_PER_S)


def noise(*names: object) -> float:
    """Return the factor of one batch: near 1, now and then 3 to 10."""
    factor = lognormal(_NOISE, "noise", *names)
    if uniform("straggles", *names) < _STRAGGLERS:
        factor *= between(3.0, 10.0, "by", *names)
    return factor


def _limit_of(query: str) -> int:
    _, found, rest = query.rpartition(" LIMIT ")
    return int(rest.split()[0]) if found else 1 << 62


def output_shapes(
    kind: str, params: Mapping[str, Any], inputs: Mapping[str, Sequence[Ref]], demand: Demand
) -> list[tuple[str, str, int, int]]:
    """Return (port, kind of port, bytes, rows) of what an operator makes."""
    refs = [ref for port, found in inputs.items() if port != "adapter" for ref in found]
    size = sum(max(0, ref.size) for ref in refs)
    rows = sum(max(0, ref.rows) for ref in refs)
    if kind == "llm.generate":
        samples = int(params.get("samples", 1))
        return [("rows", "rows", int(size * samples + demand.row_steps * BYTES_PER_TOKEN), rows * samples)]
    if kind in ("llm.score", "reward.score"):
        return [("rows", "rows", size + 16 * rows, rows)]
    if kind.startswith("train."):
        assert demand.model is not None
        return [("adapter", "folder", demand.model.adapter_bytes, -1), ("metrics", "rows", 20_000, 100)]
    if kind == "data.split":
        parts = int(params["parts"])
        return [("parts", "rows", size // parts, rows // parts)] * parts
    if kind == "python.call":
        return [("out", "rows", size, rows)]
    if kind == "data.load":
        limit = int(params.get("limit", 0)) or 1000
        return [("rows", "rows", int(size * min(1.0, limit / 1000)), limit)]
    if kind == "data.sql":
        kept = min(rows, _limit_of(params["query"]))
        return [("rows", "rows", int(size * kept / max(1, rows)), kept)]
    return [("rows", "rows", size, rows)]
