"""The transformers engine: loaded models, and forward passes of canonical shape.

A kernel may add up in another order when the shape of its matrices changes, so the bits of a row must not depend on who
else is in the batch. Every pass here has a fixed number of rows, and a length that follows from the row itself; rows that
are missing are made up. Together with MKL's reproducible mode (it must be set before torch loads) a row then has one
result, whatever its company, place and thread count.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import ExecutionError
from flowmesh_node import models
from flowmesh_node.operators.base import Input, Model

PREFILL_ROWS = 8
"""Rows of a pass over whole prompts. Fewer than 8 take other kernels, one row quite another path."""

DECODE_ROWS = 16
"""Rows of a pass over one new token each: a compromise between throughput and the cost of a lone row."""

LOADED_MODELS = 2
LOADED_ADAPTERS = 4

_REPRODUCIBLE = {"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "avx2"}

_ENVIRONMENT = {
    # Nodes share a machine: a thread that waits must not spin.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def prepare_environment() -> None:
    """Ask for reproducible kernels; without effect once torch is loaded. What is set already stays."""
    if "torch" not in sys.modules:
        wanted = _ENVIRONMENT | (_REPRODUCIBLE if _has_avx2() else {})
        for name, setting in wanted.items():
            os.environ.setdefault(name, setting)


def _has_avx2() -> bool:
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


@lru_cache(maxsize=1)
def torch_module() -> Any:
    """Import torch with reproducible kernels, once per process; warn when that comes too late."""
    prepare_environment()
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ExecutionError(
            f"this node cannot run models: {error}", reason="unsatisfiable", hint="Install the 'node' extra there."
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "STRICT" not in os.environ.get("MKL_CBWR", "") and not torch.cuda.is_available():
        warnings.warn("torch was loaded without MKL_CBWR=AVX2,STRICT; running on one thread to stay repeatable", stacklevel=2)
        torch.set_num_threads(1)
    elif threads := os.environ.get("FLOWMESH_THREADS"):
        torch.set_num_threads(max(1, int(threads)))
    return torch


def folder_of(model: Model) -> str:
    """Return the folder of a model's files: the one given, or made ready here, by one process of the machine."""
    if model.path:
        return str(models.loadable(Path(model.path)))
    return str(models.materialise(model.reference, model.digest))


def resident() -> tuple[str, ...]:
    """Return the digests of the causal language models in memory."""
    return tuple(dict.fromkeys(digest for digest, _ in _loaded))


def device_name() -> str:
    """Return ``cuda`` where there is a GPU, or else ``cpu``."""
    return "cuda" if torch_module().cuda.is_available() else "cpu"


def bucket(length: int) -> int:
    """Return the padded length of a row: the next of 32, 64, 128, 256, 512, then multiples of 512 tokens."""
    size = 32
    while size < min(length, 512):
        size *= 2
    return size if length <= 512 else -(-length // 512) * 512


@dataclass
class Loaded:
    """A causal language model in memory, with the adapters that were used last."""

    model: Any
    tokenizer: Any
    device: str
    pad_id: int
    stop_ids: frozenset[int]
    max_tokens: int
    adapters: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def use_adapter(self, adapter: Input | None) -> None:
        """Apply a LoRA adapter (a PEFT folder) to the passes that follow, or none."""
        if adapter is None:
            if self.adapters:
                self.model.base_model.disable_adapter_layers()
            return
        name = "a" + adapter.digest.replace(":", "")[:24]
        if name not in self.adapters:
            self._load_adapter(name, adapter.path)
        self.adapters.move_to_end(name)
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(name)
        self.model.eval()

    def _load_adapter(self, name: str, path: str) -> None:
        from peft import PeftModel

        try:
            if not isinstance(self.model, PeftModel):
                self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name)
            else:
                while len(self.adapters) >= LOADED_ADAPTERS:
                    self.model.delete_adapter(self.adapters.popitem(last=False)[0])
                self.model.load_adapter(path, adapter_name=name)
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            raise ExecutionError(f"the adapter does not fit the model: {error}") from error
        self.adapters[name] = None


_loaded: OrderedDict[tuple[str, str], Loaded] = OrderedDict()


def load(model: Model, dtype: str) -> Loaded:
    """Return the model in memory; the ones used last stay there."""
    key = (model.digest, dtype)
    if key not in _loaded:
        while len(_loaded) >= LOADED_MODELS:
            _loaded.popitem(last=False)
        _loaded[key] = read_model(folder_of(model), dtype)
    _loaded.move_to_end(key)
    return _loaded[key]


def read_tokenizer(path: str) -> Any:
    """Return the tokenizer of a model folder."""
    torch_module()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ExecutionError(f"the model has no usable tokenizer: {error}", reason="model-missing") from error


def read_model(path: str, dtype: str) -> Loaded:
    """Load a model folder: safetensors only, and no code that comes with it."""
    torch = torch_module()
    from transformers import AutoModelForCausalLM

    tokenizer = read_tokenizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise ExecutionError(f"the model cannot be loaded: {error}", reason="model-missing") from error
    if getattr(model, "_is_stateful", False):
        raise ExecutionError("models with a recurrent state are not supported by this engine", reason="unsatisfiable")
    device = device_name()
    model = model.to(device).eval()
    stops = _stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    return Loaded(model, tokenizer, device, pad if pad is not None else min(stops, default=0), stops, _max_tokens(model))


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    stop = model.generation_config.eos_token_id
    listed = stop if isinstance(stop, list) else [stop]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)


def _max_tokens(model: Any) -> int:
    config = model.config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", 0) or 2**31)
    # One mask serves all layers, so a row must fit into the narrowest window.
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(limit, window or limit)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of one prompt, per layer ``(heads, length, width)``, and the logits after it, ``(vocabulary,)``."""

    layers: list[tuple[Any, Any]]
    logits: Any


def padded(torch: Any, rows: Sequence[Sequence[int]], count: int, length: int, pad_id: int, device: str) -> tuple[Any, Any, Any]:
    """Return ids ``(count, length)``, their mask ``(count, 1, length, length)`` and positions, padded on the left.

    The mask is always given in full: left to itself, the model skips it when no row happens to need one, and takes
    another kernel.
    """
    ids = torch.full((count, length), pad_id, dtype=torch.long)
    start = torch.zeros(count, dtype=torch.long)
    for index, row in enumerate(rows):
        start[index] = length - len(row)
        ids[index, length - len(row) :] = torch.tensor(row, dtype=torch.long)
    column = torch.arange(length)
    held = column[None, :] >= start[:, None]
    causal = column[None, :] <= column[:, None]
    # A position of the padding sees itself, so that no softmax is over nothing.
    mask = causal[None] & (held[:, None, :] | torch.eye(length, dtype=torch.bool)[None])
    positions = (column[None, :] - start[:, None]).clamp(min=0)
    return ids.to(device), mask[:, None].to(device), positions.to(device)


def prefill(loaded: Loaded, prompts: Sequence[Sequence[int]], length: int) -> list[Prefix]:
    """Run at most PREFILL_ROWS prompts, each padded to ``length`` tokens."""
    torch = torch_module()
    from transformers import DynamicCache

    ids, mask, positions = padded(torch, prompts, PREFILL_ROWS, length, loaded.pad_id, loaded.device)
    cache = DynamicCache()
    with torch.inference_mode():
        out = loaded.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    logits = out.logits[:, -1].float().cpu().numpy()
    return [
        Prefix([(layer.keys[index], layer.values[index]) for layer in cache.layers], logits[index])
        for index in range(len(prompts))
    ]


def tail_logits(loaded: Loaded, rows: Sequence[Sequence[int]], length: int, tail: int) -> Any:
    """Return the logits of the last ``tail`` positions, ``(PREFILL_ROWS, tail, vocabulary)``, of rows padded to ``length``."""
    torch = torch_module()
    ids, mask, positions = padded(torch, rows, PREFILL_ROWS, length, loaded.pad_id, loaded.device)
    with torch.inference_mode():
        out = loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=tail)
    return out.logits


class Decoding:
    """At most DECODE_ROWS rows that grow by one token per step, from prefixes of one padded ``length``."""

    def __init__(self, loaded: Loaded, prefixes: Sequence[Prefix], sizes: Sequence[int], length: int) -> None:
        self._torch = torch = torch_module()
        from transformers import DynamicCache

        self._loaded = loaded
        self._steps = 0
        self._cache = DynamicCache()
        missing = DECODE_ROWS - len(prefixes)
        sizes = [*sizes, *[length] * missing]
        self._sizes = torch.tensor(sizes)
        self._held = torch.arange(length)[None, :] >= (length - self._sizes)[:, None]
        with torch.inference_mode():
            for layer in range(len(prefixes[0].layers)):
                for_rows = [prefix.layers[layer] for prefix in prefixes]
                empty = torch.zeros_like(for_rows[0][0])
                keys = torch.stack([*(keys for keys, _ in for_rows), *[empty] * missing])
                values = torch.stack([*(values for _, values in for_rows), *[torch.zeros_like(for_rows[0][1])] * missing])
                self._cache.update(keys, values, layer)

    def step(self, tokens: Sequence[int]) -> Any:
        """Append one token per row; return the logits after it, ``(DECODE_ROWS, vocabulary)``."""
        torch = self._torch
        pad = self._loaded.pad_id
        ids = torch.tensor([*tokens, *[pad] * (DECODE_ROWS - len(tokens))])[:, None]
        self._held = torch.cat([self._held, torch.ones(DECODE_ROWS, 1, dtype=torch.bool)], dim=1)
        device = self._loaded.device
        with torch.inference_mode():
            out = self._loaded.model(
                input_ids=ids.to(device),
                attention_mask=self._held[:, None, None, :].to(device),
                position_ids=(self._sizes + self._steps)[:, None].to(device),
                past_key_values=self._cache,
                use_cache=True,
            )
        self._steps += 1
        return out.logits[:, -1].float().cpu().numpy()
