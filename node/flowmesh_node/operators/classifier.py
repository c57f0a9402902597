"""Sequence classifiers as reward models: the first logit of (prompt, completion), in passes of canonical shape."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowmesh_cas.errors import ExecutionError
from flowmesh_node.operators import engine
from flowmesh_node.operators.base import Model

LOADED_CLASSIFIERS = 2

_ROWS = engine.PREFILL_ROWS - 1
"""Rows of a pass that carry a pair. The last is always padding: the model drops a mask that masks nothing, and would then
take another kernel."""


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier in memory."""

    model: Any
    tokenizer: Any
    device: str
    pad_id: int
    max_tokens: int


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion as the model wants to see them: tokens, and which belong to the second text."""

    ids: tuple[int, ...]
    types: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


_loaded: OrderedDict[str, Classifier] = OrderedDict()


def load(model: Model) -> Classifier:
    """Return the classifier in memory; the ones used last stay there."""
    if model.digest not in _loaded:
        while len(_loaded) >= LOADED_CLASSIFIERS:
            _loaded.popitem(last=False)
        _loaded[model.digest] = _read(engine.folder_of(model))
    _loaded.move_to_end(model.digest)
    return _loaded[model.digest]


def resident() -> tuple[str, ...]:
    """Return the digests of the classifiers in memory."""
    return tuple(_loaded)


def _read(path: str) -> Classifier:
    torch = engine.torch_module()
    from transformers import AutoModelForSequenceClassification

    tokenizer = engine.read_tokenizer(path)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise ExecutionError(f"the classifier cannot be loaded: {error}", reason="model-missing") from error
    if report["missing_keys"]:
        # A head made up at random would look like a reward.
        raise ExecutionError("the model is not a sequence classifier: it has no weights for its head", reason="model-missing")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.config.pad_token_id = pad
    limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
    device = engine.device_name()
    return Classifier(model.to(device).eval(), tokenizer, device, int(pad or 0), limit)


def tokens(loaded: Classifier, prompt: str, completion: str) -> Pair:
    """Return the pair as the tokenizer joins it; raise ExecutionError when it is too long."""
    encoded = loaded.tokenizer(prompt, completion)
    ids = tuple(encoded["input_ids"])
    if len(ids) > loaded.max_tokens or not ids:
        raise ExecutionError(f"{len(ids)} tokens do not fit into the classifier's {loaded.max_tokens}")
    return Pair(ids, tuple(encoded.get("token_type_ids") or [0] * len(ids)))


def first_logits(loaded: Classifier, pairs: Sequence[Pair]) -> list[float]:
    """Return the first logit of each pair; equal pairs are computed once."""
    groups: dict[int, list[Pair]] = defaultdict(list)
    for pair in dict.fromkeys(pairs):
        groups[min(engine.bucket(len(pair)), loaded.max_tokens)].append(pair)
    rewards: dict[Pair, float] = {}
    for length, members in sorted(groups.items()):
        for first in range(0, len(members), _ROWS):
            part = members[first : first + _ROWS]
            rewards.update(zip(part, _pass(loaded, part, length), strict=True))
    return [rewards[pair] for pair in pairs]


def _pass(loaded: Classifier, pairs: Sequence[Pair], length: int) -> list[float]:
    torch = engine.torch_module()
    shape = (engine.PREFILL_ROWS, length)
    ids = torch.full(shape, loaded.pad_id, dtype=torch.long)
    kinds = torch.zeros(shape, dtype=torch.long)
    held = torch.zeros(shape, dtype=torch.long)
    held[:, 0] = 1
    for index, pair in enumerate(pairs):
        ids[index, : len(pair)] = torch.tensor(pair.ids)
        kinds[index, : len(pair)] = torch.tensor(pair.types)
        held[index, : len(pair)] = 1
    inputs = {"input_ids": ids, "attention_mask": held}
    if "token_type_ids" in loaded.tokenizer.model_input_names:
        inputs["token_type_ids"] = kinds
    with torch.inference_mode():
        logits = loaded.model(**{name: tensor.to(loaded.device) for name, tensor in inputs.items()}).logits
    return [float(logits[index, 0]) for index in range(len(pairs))]
