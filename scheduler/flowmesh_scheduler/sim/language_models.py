"""The models of the simulated workloads: sizes as published for dense decoder models with grouped-query attention."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """``kv_bytes`` per token of context; weights are kept in bf16. ``adapter_bytes`` of a LoRA adapter as trained here."""

    reference: str
    parameters: float
    kv_bytes: int

    @property
    def digest(self) -> str:
        return "sha256:" + sha256(self.reference.encode()).hexdigest()

    @property
    def weights_bytes(self) -> int:
        return int(self.parameters * 2)

    @property
    def adapter_bytes(self) -> int:
        return int(self.parameters * 0.004)


def _family(name: str, billions: float, kv_bytes: int) -> LanguageModel:
    return LanguageModel(f"hf:sim/{name}", billions * 1e9, kv_bytes)


MODELS = {
    "1b": _family("base-1b", 1.2, 32_768),
    "3b": _family("base-3b", 3.2, 114_688),
    "7b": _family("base-7b", 7.6, 57_344),
    "8b": _family("base-8b", 8.0, 131_072),
    "14b": _family("base-14b", 14.8, 196_608),
    "reward-1b": _family("reward-1b", 1.2, 32_768),
    "reward-3b": _family("reward-3b", 3.2, 114_688),
    "chat-3b": _family("chat-3b", 3.2, 114_688),
    "chat-8b": _family("chat-8b", 8.0, 131_072),
    "judge-7b": _family("judge-7b", 7.6, 57_344),
    "coder-7b": _family("coder-7b", 7.6, 57_344),
}
BY_REFERENCE = {model.reference: model for model in MODELS.values()}
BY_DIGEST = {model.digest: model for model in MODELS.values()}
PINNED = {model.reference: model.digest for model in MODELS.values()}
SIZES = {model.digest: model.weights_bytes for model in MODELS.values()}


def vram_need_bytes(model: LanguageModel, *, trains: bool) -> int:
    """Return the memory that an author asks for: weights with room for contexts, or for activations and adapter states."""
    room = max(4e9, 0.5 * model.weights_bytes) if trains else max(1.5e9, 0.15 * model.weights_bytes)
    return int(model.weights_bytes + room)
