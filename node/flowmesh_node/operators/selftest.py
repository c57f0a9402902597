"""The numeric class of this process's engine: a name for how it computes, given only when it proves repeatable.

Two nodes of one class may check each other's results bit by bit; the name holds all that is known to change bits.
"""

from __future__ import annotations

import hashlib
import platform
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flowmesh_node.operators import engine, generate, sampling

_PROMPTS = 12
_NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Whether company changed a bit, and the digest of what came out (equal on every engine of one class)."""

    passed: bool
    digest: str


@lru_cache(maxsize=4)
def numeric_class(dtype: str = "float32") -> str:
    """Return the class of this engine, or an empty text when it failed its self-test. Takes seconds, once."""
    return class_name(dtype) if self_test(dtype).passed else ""


def class_name(dtype: str = "float32") -> str:
    """Return the name of the class: engine, versions, dtype, device, instruction set, kernels, shapes."""
    torch = engine.torch_module()
    import transformers

    if torch.cuda.is_available():
        where = f"cuda-{torch.cuda.get_device_name(0)}".replace(" ", "-")
    else:
        where = "-".join(("cpu", platform.machine(), torch.backends.cpu.get_cpu_capability().lower(), *_modes(dtype)))
    version = torch.__version__.replace("+", "-")
    shapes = f"{engine.PREFILL_ROWS}x{engine.DECODE_ROWS}"
    return f"transformers-{transformers.__version__}/torch-{version}/{dtype}/{where}/{shapes}"


def _modes(dtype: str) -> list[str]:
    import os

    torch = engine.torch_module()
    strict = os.environ.get("MKL_CBWR", "")
    modes = ["mkl." + strict.lower().replace(",", ".")] if "STRICT" in strict else ["mkl.default", "threads.1"]
    if dtype == "bfloat16":
        # Matrices of this type go to oneDNN, which looks at the processor itself.
        modes.append("onednn." + ("avx512bf16" if torch.cpu._is_avx512_bf16_supported() else "emulated"))
    return modes


def self_test(dtype: str = "float32") -> SelfTest:
    """Complete fixed prompts in order and then in shuffled company; compare logits and tokens bit by bit."""
    loaded = _small_model(dtype)
    source = random.Random(20)
    prompts = [tuple(source.randrange(3, 512) for _ in range(3 + 5 * number % 27)) for number in range(_PROMPTS)]
    expected = _prints(loaded, prompts)
    passed = True
    for count in (1, 5, 8, 12):
        company = source.sample(prompts, count)
        passed = passed and all(expected[prompt] == print_ for prompt, print_ in _prints(loaded, company).items())
    return SelfTest(passed, hashlib.sha256("".join(expected[prompt] for prompt in prompts).encode()).hexdigest())


def _prints(loaded: engine.Loaded, prompts: list[tuple[int, ...]]) -> dict[tuple[int, ...], str]:
    """Return a digest per prompt, over the logits of a pass and the tokens of a completion."""
    found = {}
    for first in range(0, len(prompts), engine.PREFILL_ROWS):
        part = prompts[first : first + engine.PREFILL_ROWS]
        prefixes = engine.prefill(loaded, part, 32)
        decoding = engine.Decoding(loaded, prefixes, [len(prompt) for prompt in part], 32)
        after = decoding.step([prompt[0] for prompt in part])
        for row, (prompt, prefix) in enumerate(zip(part, prefixes, strict=True)):
            found[prompt] = hashlib.sha256(prefix.logits.tobytes() + after[row].tobytes()).hexdigest()
    requests = {prompt: generate.Request(prompt, _NEW_TOKENS, 1.0, 0.9, sampling.stream(1, prompt, 0)) for prompt in prompts}
    for group in generate.complete(loaded, requests.values()):
        for request, tokens in group.of.items():
            found[request.tokens] += repr(tokens)
    return found


def _small_model(dtype: str) -> engine.Loaded:
    """Return a model of real layer widths with fixed random weights: made here, so that the test needs no files."""
    torch = engine.torch_module()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model: Any = LlamaForCausalLM(config)
    device = engine.device_name()
    return engine.Loaded(model.to(getattr(torch, dtype)).to(device).eval(), None, device, 0, frozenset(), 2048)
