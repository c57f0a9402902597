"""Unpack a GGUF file into a model folder (config, tokenizer, float32 safetensors), tensor by tensor, without torch.

float32 keeps every dequantised value exactly; narrower types are a matter of loading. The bytes written depend on the
file alone. Only what is known to come out right is accepted: Llama architecture with a byte-level BPE vocabulary.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from flowmesh_cas.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Array = numpy.typing.NDArray[numpy.float32]

LAYOUT = 1
"""Counts up whenever the same file would be unpacked differently."""

_CONTROL = 3
_USER_DEFINED = 4

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# How vocabularies cut text into words before merging; both cut digits one by one or not.
_SINGLE_DIGITS = {"gpt-2": False, "default": False, "smollm": True, "starcoder": True, "refact": True}


def unpack_gguf(source: Path, target: Path) -> None:
    """Write the model folder ``target`` (about four bytes per weight) from a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise NotFoundError("GGUF weights need the package gguf", hint="Install the 'node' extra on this node.") from error
    try:
        reader = GGUFReader(str(source))
    except (ValueError, KeyError, IndexError) as error:
        raise UsageError(f"{source.name} is not a readable GGUF file: {error}") from error
    fields = dict(reader.fields)
    config = _config({name: _plain(field) for name, field in fields.items() if name.startswith(("general.", "llama.", "tok"))})
    target.mkdir(parents=True)
    config["vocab_size"] = len(fields["tokenizer.ggml.tokens"].data)
    _write_tokenizer(target, fields, config)
    _write_json(target / "config.json", config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(target / "generation_config.json", generation)
    _write_weights(target / "model.safetensors", reader.tensors, config)


def _plain(field: Any) -> Any:
    return field.contents() if len(field.data) == 1 else None


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    if meta.get("general.architecture") != "llama" or meta.get("llama.rope.scaling.type") not in (None, "none"):
        raise UsageError(
            f"GGUF of architecture {meta.get('general.architecture')!r} cannot be unpacked",
            hint="Convert the model to safetensors first and give its folder.",
        )
    heads = meta["llama.attention.head_count"]
    width = meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id", meta.get("tokenizer.ggml.eos_token_id")),
        "dtype": "float32",
        "head_dim": meta.get("llama.attention.key_length", width // heads),
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": meta.get("llama.rope.freq_base", 10000.0), "rope_type": "default"},
        "use_cache": True,
    }


def _write_tokenizer(target: Path, fields: dict[str, Any], config: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields["tokenizer.ggml.model"].contents()
    style = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "default"
    if kind != "gpt2" or style not in _SINGLE_DIGITS:
        raise UsageError(f"GGUF vocabulary {kind}/{style} cannot be unpacked", hint="Give the model as a folder of safetensors.")
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _SINGLE_DIGITS[style] else []
    words = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True) for i, t in enumerate(types) if t == _CONTROL])
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i, t in enumerate(types) if t == _USER_DEFINED])
    tokenizer.save(str(target / "tokenizer.json"))
    names = {
        f"{role}_token": tokens[config[f"{role}_token_id"]]
        for role in ("bos", "eos", "pad")
        if config[f"{role}_token_id"] is not None
    }
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **names,
    }
    _write_json(target / "tokenizer_config.json", described)
    if "tokenizer.chat_template" in fields:
        (target / "chat_template.jinja").write_text(fields["tokenizer.chat_template"].contents(), encoding="utf-8")


def _write_weights(path: Path, tensors: list[Any], config: dict[str, Any]) -> None:
    """Write the safetensors file, one tensor in memory at a time."""
    named = sorted(((_name(tensor.name), tensor) for tensor in tensors), key=lambda pair: pair[0])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in named:
        shape = [int(n) for n in reversed(tensor.shape)]
        size = 4 * int(tensor.n_elements)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    config["tie_word_embeddings"] = "lm_head.weight" not in header
    _write_json(path.with_name("config.json"), config)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, tensor in named:
            _write_tensor(file, name, tensor, config)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, name: str, tensor: Any, config: dict[str, Any]) -> None:
    import numpy
    from gguf.quants import dequantize

    values: Array = numpy.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype="<f4")
    if name.endswith("q_proj.weight"):
        values = _unpaired(values, config["num_attention_heads"])
    elif name.endswith("k_proj.weight"):
        values = _unpaired(values, config["num_key_value_heads"])
    file.write(values.tobytes())


def _unpaired(values: Array, heads: int) -> Array:
    """Return rows ``(heads * width, hidden)`` with the two halves of each head apart.

    GGUF stores the rows of a rotary pair next to each other; transformers wants first halves, then second halves.
    """
    rows, hidden = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def _name(name: str) -> str:
    """Return transformers' name of a GGUF tensor; raise UsageError for one that a plain Llama does not have."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "weight" and stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    parts = stem.split(".")
    if suffix == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    raise UsageError(f"GGUF tensor {name!r} has no place in a Llama model", hint="Give the model as a folder of safetensors.")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
