"""``train.sft`` and ``train.dpo``: a LoRA adapter by TRL, the same bits whatever the run, the folder and the thread count.

What leaves is the adapter's safetensors and a configuration written canonically: PEFT's own lists modules in the order of the
hash seed and names a path of this machine. Metrics hold nothing that a clock measured.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import ExecutionError, UsageError
from flowmesh_mesh.catalog import DpoParams, SftParams
from flowmesh_mesh.clock import monotonic_ns
from flowmesh_node.operators import checkpointing, engine
from flowmesh_node.operators.base import Batch, Content, Emit, Failed, Produced, Row, Saving, table
from flowmesh_node.operators.text import at_row, messages, params_of, prompt_tokens, template

Log = Callable[[str], None]
TrainParams = SftParams | DpoParams

_ADAPTER_KEYS = (
    "bias",
    "fan_in_fan_out",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "task_type",
    "use_dora",
    "use_rslora",
)


class Train:
    """Runs train.sft and train.dpo."""

    types: tuple[str, ...] = ("train.sft", "train.dpo")

    def __init__(self) -> None:
        self._saving: Saving | None = None

    def attach(self, saving: Saving) -> None:
        """Hand over checkpoints from now on; without, none are written."""
        self._saving = saving

    def load(self, batch: Batch) -> None:
        """Import what training needs and make the model ready; it is read anew for each training, which changes it."""
        engine.folder_of(batch.models["model"])
        engine.torch_module()
        for name in ("peft", "trl", "datasets"):
            importlib.import_module(name)

    def run(self, batch: Batch, emit: Emit, log: Log) -> None:
        """Train one adapter per item."""
        for index, item in enumerate(batch.items):
            began_ns = monotonic_ns()
            folder = Path(batch.scratch) / str(index)
            folder.mkdir(parents=True)
            try:
                outputs, tokens = _trained(batch, index, folder, self._saving, log)
            except ExecutionError as error:
                emit(index, Failed(error.reason, error.message))
                continue
            spent_us = (monotonic_ns() - began_ns) // 1000
            emit(index, Produced(outputs, rows=len(item.rows()), tokens_in=tokens, exec_us=spent_us))


def _trained(batch: Batch, index: int, folder: Path, saving: Saving | None, log: Log) -> tuple[dict[str, list[Content]], int]:
    item, model = batch.items[index], batch.models["model"]
    params: TrainParams = params_of(item, SftParams) if batch.type == "train.sft" else params_of(item, DpoParams)
    path = engine.folder_of(model)
    tokenizer = engine.read_tokenizer(path)
    examples = _examples(params, item.rows(), tokenizer)
    log(f"{len(examples)} examples, {params.steps} steps of {params.batch_size}")
    trainer = _trainer(params, examples, tokenizer, path, folder, log)
    began_at = checkpointing.go_on(trainer, batch, index, params.steps, folder, log)
    keeper = None
    if saving is not None:
        keeper = checkpointing.Keeper(batch, index, params.steps, folder / "checkpoints", saving, log)
        _keep(trainer, keeper)
    try:
        trainer.train(resume_from_checkpoint=began_at)
    except RuntimeError as error:
        reason = "oom" if "out of memory" in str(error).lower() else "user-error"
        raise ExecutionError(f"training failed: {error}", reason=reason) from error
    finally:
        if keeper is not None:
            keeper.finish()
    metrics = metric_rows(trainer.state.log_history)
    adapter = folder / "adapter"
    write_adapter(trainer.model, model.digest, adapter)
    tokens = int(metrics[-1].get("num_tokens", 0)) if metrics else 0
    # Trainer and model refer to each other; what stays would add up over trainings.
    del trainer
    gc.collect()
    return {"adapter": [Content("folder", path=str(adapter))], "metrics": [table(metrics)]}, tokens


def _examples(params: TrainParams, rows: list[Row], tokenizer: Any) -> list[dict[str, Any]]:
    """Return TRL's examples, chats as messages; raise ExecutionError naming the first row that cannot be one."""
    if not rows:
        raise ExecutionError("there are no rows to train on")
    if isinstance(params, SftParams):
        fields = {"completion": params.completion}
    else:
        fields = {"chosen": params.chosen, "rejected": params.rejected}
    prompt = template(params.prompt)
    answers = {name: template(source) for name, source in fields.items()}
    examples = []
    for number, row in enumerate(rows):
        with at_row(number):
            asked = prompt(row)
            size = len(prompt_tokens(tokenizer, asked, system=params.system, chat=params.chat))
            if size >= params.max_length:
                raise ExecutionError(f"prompt of {size} tokens leaves no room for a completion in max_length {params.max_length}")
            texts = {name: render(row) for name, render in answers.items()}
            if empty := [name for name, text in texts.items() if not text.strip()]:
                raise ExecutionError(f"'{empty[0]}' is empty")
        asking: Any = messages(params.system, asked) if params.chat else asked
        said = {name: [{"role": "assistant", "content": text}] if params.chat else text for name, text in texts.items()}
        examples.append({"prompt": asking, **said})
    return examples


def _trainer(params: TrainParams, examples: list[dict[str, Any]], tokenizer: Any, path: str, folder: Path, log: Log) -> Any:
    torch = engine.torch_module()
    import transformers
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig

    disable_progress_bars()
    # The adapter's first weights are drawn when the trainer wraps the model.
    transformers.set_seed(params.seed % 2**32)
    lora = LoraConfig(
        r=params.lora.r,
        lora_alpha=params.lora.alpha,
        lora_dropout=params.lora.dropout,
        target_modules=sorted(params.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    common: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "max_steps": params.steps,
        "per_device_train_batch_size": params.batch_size,
        "learning_rate": params.learning_rate,
        "max_length": params.max_length,
        "seed": params.seed % 2**32,
        "data_seed": params.seed % 2**32,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "fp16": False,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    loaded = engine.read_model(path, params.dtype).model
    handed: dict[str, Any] = {
        "model": loaded,
        "train_dataset": Dataset.from_list(examples),
        "processing_class": tokenizer,
        "peft_config": lora,
        "callbacks": [_callback(transformers, params.steps, log)],
    }
    try:
        if isinstance(params, SftParams):
            from trl import SFTConfig, SFTTrainer

            trainer = SFTTrainer(args=SFTConfig(**common), **handed)
        else:
            from trl import DPOConfig, DPOTrainer

            trainer = DPOTrainer(args=DPOConfig(beta=params.beta, **common), **handed)
    except (ValueError, KeyError) as error:
        raise ExecutionError(f"cannot set up training: {error}") from error
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _callback(transformers: Any, steps: int, log: Log) -> Any:
    class Progress(transformers.TrainerCallback):  # type: ignore[misc]
        """Tell of each step; stop at once when the loss is no number any more."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            if not math.isfinite(float(logs["loss"])):
                raise ExecutionError(f"training diverged at step {state.global_step}: the loss is {logs['loss']}")
            margin = f", reward margin {float(logs['rewards/margins']):.3f}" if "rewards/margins" in logs else ""
            log(f"step {state.global_step} of {steps}: loss {float(logs['loss']):.4f}{margin}")

    return Progress()


def _keep(trainer: Any, keeper: checkpointing.Keeper) -> None:
    """Let a trainer hand itself to ``keeper`` after a step, when that wants it; what it logged of the step is included."""
    import transformers

    class Due(transformers.TrainerCallback):  # type: ignore[misc]
        """Ask for a checkpoint when one is due."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            keeper.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = keeper.is_due(state.global_step)

    trainer.add_callback(Due())
    trainer._save_checkpoint = lambda model, trial: keeper.keep(trainer)


def metric_rows(history: list[dict[str, Any]]) -> list[Row]:
    """Return one row per step from the trainer's log, without what depends on the clock."""
    rows = []
    for entry in history:
        if "loss" not in entry:
            continue
        timed = ("runtime", "per_second", "time")
        kept = {name: entry[name] for name in sorted(entry) if name != "step" and not any(word in name for word in timed)}
        rows.append({"step": entry["step"], **kept})
    return rows


def write_adapter(model: Any, base_digest: str, folder: Path) -> None:
    """Write a PEFT folder of exactly two files, the same bytes for the same adapter."""
    raw = folder.with_name("peft")
    # Otherwise PEFT asks the hub whether the vocabulary has changed.
    model.save_pretrained(str(raw), save_embedding_layers=False)
    written = json.loads((raw / "adapter_config.json").read_text(encoding="utf-8"))
    config = {key: written[key] for key in _ADAPTER_KEYS}
    config["target_modules"] = sorted(written["target_modules"])
    config["base_model_name_or_path"] = base_digest
    config["inference_mode"] = True
    folder.mkdir()
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    weights = raw / "adapter_model.safetensors"
    if not weights.is_file():
        raise UsageError("the adapter has no safetensors")
    weights.rename(folder / "adapter_model.safetensors")
    shutil.rmtree(raw)
