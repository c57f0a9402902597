"""The operator types that the mesh knows: ports, parameters, determinism, what batches.

This is the contract between the compiler (checks documents against it), the scheduler (identity, batch keys) and the
nodes (which implement it). Code that runs an operator lives in ``flowmesh_node.operators``; nothing here imports it.

Kinds of port: ``rows`` (a table as canonical JSON lines), ``value`` (one JSON value), ``file``, ``folder``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from flowmesh_cas.errors import UsageError

KINDS = ("rows", "value", "file", "folder")

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=64 * 1024)]
Column = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
ModelReference = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of parameter records. Field order does not matter; defaults are written out into the manifest."""


@dataclass(frozen=True, slots=True)
class Port:
    """One port: its kind, whether it must be connected, what people should know about it, whether several sources may feed it."""

    kind: str
    required: bool = True
    doc: str = ""
    is_many: bool = True


@dataclass(frozen=True, slots=True)
class OperatorType:
    """One operator type.

    ``executor`` names where it runs on a node: ``inline`` (in the agent, only what cannot block), ``data``, ``user`` (a fresh
    process for a user's code), ``engine`` (a process that keeps a model loaded), ``train``.
    ``determinism`` is one of the classes of identity, or a function of the parameters.
    ``models`` maps a role to the parameter that holds its reference. ``open_inputs`` is the kind of ports with names of
    the author's choosing. ``shards_by`` is the rows port along which the operator may be cut.
    ``batch_params`` and ``batch_ports`` must agree within a batch. ``templates`` are the parameters whose text (or each text
    of a mapping) is a Jinja2 template.
    """

    name: str
    doc: str
    params: type[Params]
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    executor: str
    version: int = 1
    determinism: str | Callable[[Mapping[str, Any]], str] = "pure"
    open_inputs: str = ""
    models: Mapping[str, str] = field(default_factory=dict)
    batches: bool = False
    batch_params: tuple[str, ...] = ()
    batch_ports: tuple[str, ...] = ()
    shards_by: str = ""
    check: Callable[[Mapping[str, Any]], list[str]] | None = None
    templates: tuple[str, ...] = ()

    def determinism_of(self, params: Mapping[str, Any]) -> str:
        """Return pure, seeded, sampled or effect for these parameters."""
        return self.determinism(params) if callable(self.determinism) else self.determinism


class NoopParams(Params, frozen=True, kw_only=True):
    """``nonce`` makes operators differ; ``bytes`` is the size of the value produced; ``sleep_s`` holds the slot that long."""

    nonce: Seed = 0
    bytes: Annotated[int, msgspec.Meta(ge=0, le=64 * 1024 * 1024)] = 0
    sleep_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0


class DelayParams(Params, frozen=True, kw_only=True):
    """``nonce`` makes operators differ; a batch of n takes ``batch_s`` + n · ``item_s`` seconds."""

    nonce: Seed = 0
    batch_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    item_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0


class LoadParams(Params, frozen=True, kw_only=True):
    """``format`` auto goes by the file's name; ``limit`` keeps the first rows, 0 means all."""

    format: Literal["auto", "jsonl", "csv", "parquet"] = "auto"
    limit: Natural = 0
    columns: tuple[Column, ...] = ()


class SplitParams(Params, frozen=True, kw_only=True):
    """``parts`` tables of nearly equal length, in order."""

    parts: Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class ConcatParams(Params, frozen=True, kw_only=True):
    """Tables one after the other, in the order of the port."""


class SqlParams(Params, frozen=True, kw_only=True):
    """One SELECT over the input ports, each a table of the port's name. Rows come out in the query's order."""

    query: Text


class MapParams(Params, frozen=True, kw_only=True):
    """``columns`` maps a new column to a Jinja2 template over the row; ``keep`` names the old columns that stay (empty: all)."""

    columns: dict[Column, Text] = {}
    keep: tuple[Column, ...] = ()
    drop: tuple[Column, ...] = ()


class GenerateParams(Params, frozen=True, kw_only=True):
    """Completions for each row. ``prompt`` is a template over the row; with ``chat`` it goes through the model's chat template.

    ``samples`` completions per row; ``temperature`` 0 is greedy. Each row draws from its own generator, seeded by ``seed``,
    the row's content and the sample's number. Output rows: the input row, ``sample`` (number), ``column`` (text).
    """

    model: ModelReference
    prompt: Text = "{{ prompt }}"
    system: Annotated[str, msgspec.Meta(max_length=64 * 1024)] = ""
    chat: bool = True
    column: Column = "completion"
    samples: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    max_new_tokens: Annotated[int, msgspec.Meta(ge=1, le=32_768)] = 64
    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


class LlmScoreParams(Params, frozen=True, kw_only=True):
    """Log-probability of ``completion`` after ``prompt`` (templates over the row): columns ``column`` (sum, nats) and
    ``column``_tokens (how many tokens)."""

    model: ModelReference
    prompt: Text = "{{ prompt }}"
    completion: Text = "{{ completion }}"
    system: Annotated[str, msgspec.Meta(max_length=64 * 1024)] = ""
    chat: bool = True
    column: Column = "logprob"
    dtype: Literal["float32", "bfloat16"] = "float32"


class Rule(Params, frozen=True, kw_only=True):
    """One term of a rule-based reward, on the text of column ``on``.

    ``kind``: length (−|words − target| / target, at least −1), contains / matches (1 when the text holds ``pattern`` /
    the regular expression), ends (1 when it ends in one of the characters of ``pattern``), repeats (minus the share of
    repeated word triples).
    """

    kind: Literal["length", "contains", "matches", "ends", "repeats"]
    weight: float = 1.0
    pattern: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    target: Natural = 0


class RewardParams(Params, frozen=True, kw_only=True):
    """Reward of each row in ``column``: a weighted sum of ``rules``, or the first logit of a sequence classifier ``model``."""

    model: str = ""
    rules: tuple[Rule, ...] = ()
    prompt: Text = "{{ prompt }}"
    completion: Text = "{{ completion }}"
    column: Column = "reward"


class LoraParams(Params, frozen=True, kw_only=True):
    """Low-rank adapter: rank, scale, modules."""

    r: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    alpha: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    target_modules: tuple[Column, ...] = ("q_proj", "v_proj")


class _TrainParams(Params, frozen=True, kw_only=True):
    model: ModelReference
    steps: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 20
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 4
    learning_rate: Positive = 1e-4
    max_length: Annotated[int, msgspec.Meta(ge=8, le=131_072)] = 256
    lora: LoraParams = LoraParams()
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


class SftParams(_TrainParams, frozen=True, kw_only=True):
    """Supervised fine-tuning on columns ``prompt`` and ``completion`` (templates over the row)."""

    prompt: Text = "{{ prompt }}"
    completion: Text = "{{ completion }}"
    system: Annotated[str, msgspec.Meta(max_length=64 * 1024)] = ""
    chat: bool = True


class DpoParams(_TrainParams, frozen=True, kw_only=True):
    """Direct preference optimisation on rows with a prompt, a chosen and a rejected completion (templates over the row)."""

    beta: Positive = 0.1
    prompt: Text = "{{ prompt }}"
    chosen: Text = "{{ chosen }}"
    rejected: Text = "{{ rejected }}"
    system: Annotated[str, msgspec.Meta(max_length=64 * 1024)] = ""
    chat: bool = True


class CallParams(Params, frozen=True, kw_only=True):
    """A user's function: ``function`` is its name in the source that travels with the workflow.

    It is called with one keyword argument per input port (rows as a list of dicts, a value as itself, a file or folder as
    a path) and per entry of ``args``. What it returns goes to ``returns``: rows or value. ``requires`` pins distributions
    that the source imports (``name==version``); ``effect`` says that running it twice is not the same as once.
    """

    function: Column
    args: dict[str, Any] = {}
    returns: Literal["rows", "value"] = "value"
    requires: tuple[str, ...] = ()
    python: str = ""
    effect: bool = False


def _generate_determinism(params: Mapping[str, Any]) -> str:
    return "seeded" if params.get("temperature") else "pure"


def _call_determinism(params: Mapping[str, Any]) -> str:
    return "effect" if params.get("effect") else "pure"


def _check_reward(params: Mapping[str, Any]) -> list[str]:
    if bool(params.get("model")) == bool(params.get("rules")):
        return ["give either 'rules' or 'model', and only one of them"]
    return [fault for rule in params.get("rules", ()) for fault in _check_rule(rule)]


def _check_rule(rule: Mapping[str, Any]) -> list[str]:
    kind, pattern = rule["kind"], rule["pattern"]
    if kind in ("contains", "matches", "ends") and not pattern:
        return [f"a rule of kind {kind!r} needs a 'pattern'"]
    if kind == "length" and not rule["target"]:
        return ["a rule of kind 'length' needs a 'target' above 0"]
    if kind == "matches":
        try:
            re.compile(pattern)
        except re.error as error:
            return [f"the pattern {pattern[:60]!r} is no regular expression: {error}"]
    return []


def _check_call(params: Mapping[str, Any]) -> list[str]:
    faults = [
        f"'requires' pins distributions as name==version, not {text[:60]!r}"
        for text in params.get("requires", ())
        if not _REQUIREMENT.match(text)
    ]
    if not _PYTHON.match(params.get("python", "")):
        faults.append(f"'python' is a version such as 3.11, not {params['python'][:20]!r}")
    return faults


def _check_generate(params: Mapping[str, Any]) -> list[str]:
    if params.get("samples", 1) > 1 and not params.get("temperature"):
        return ["'samples' above 1 needs a 'temperature' above 0: greedy completions would all be the same"]
    return []


_ROWS = Port("rows")
_ADAPTER = Port("folder", required=False, doc="LoRA adapter to apply", is_many=False)
_REQUIREMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9.+!_-]*\Z")
_PYTHON = re.compile(r"(?:3\.[0-9]{1,3})?\Z")

_TYPES = (
    OperatorType(
        "flow.noop",
        "Nothing, quickly: for measuring the mesh itself.",
        NoopParams,
        {"after": Port("value", required=False, doc="anything that must come first")},
        {"out": Port("value")},
        "inline",
        batches=True,
    ),
    OperatorType(
        "flow.delay",
        "Holds its node for a set time, as an engine does that runs many operators at once: for measuring batching.",
        DelayParams,
        {"after": Port("value", required=False, doc="anything that must come first")},
        {"out": Port("value")},
        "engine",
        batches=True,
        batch_params=("batch_s", "item_s"),
    ),
    OperatorType(
        "data.load", "Read a file into rows.", LoadParams, {"file": Port("file")}, {"rows": _ROWS}, "data", batches=True
    ),
    OperatorType(
        "data.split",
        "Cut a table into parts, each with an identity of its own.",
        SplitParams,
        {"rows": _ROWS},
        {"parts": Port("rows", doc="one table per part")},
        "data",
        batches=True,
    ),
    OperatorType("data.concat", "Join tables end to end.", ConcatParams, {"rows": _ROWS}, {"rows": _ROWS}, "data", batches=True),
    OperatorType(
        "data.sql",
        "One SELECT (DuckDB) over the input ports.",
        SqlParams,
        {},
        {"rows": _ROWS},
        "data",
        open_inputs="rows",
        batches=True,
    ),
    OperatorType(
        "data.map",
        "New columns from templates.",
        MapParams,
        {"rows": _ROWS},
        {"rows": _ROWS},
        "data",
        batches=True,
        shards_by="rows",
        templates=("columns",),
    ),
    OperatorType(
        "llm.generate",
        "Completions from a causal language model.",
        GenerateParams,
        {"rows": _ROWS, "adapter": _ADAPTER},
        {"rows": _ROWS},
        "engine",
        determinism=_generate_determinism,
        models={"model": "model"},
        batches=True,
        batch_params=("dtype",),
        batch_ports=("adapter",),
        shards_by="rows",
        check=_check_generate,
        templates=("prompt",),
    ),
    OperatorType(
        "llm.score",
        "Log-probability of a completion after a prompt.",
        LlmScoreParams,
        {"rows": _ROWS, "adapter": _ADAPTER},
        {"rows": _ROWS},
        "engine",
        models={"model": "model"},
        batches=True,
        batch_params=("dtype",),
        batch_ports=("adapter",),
        shards_by="rows",
        templates=("prompt", "completion"),
    ),
    OperatorType(
        "reward.score",
        "A reward for each row, from rules or a sequence classifier.",
        RewardParams,
        {"rows": _ROWS},
        {"rows": _ROWS},
        "engine",
        models={"model": "model"},
        batches=True,
        shards_by="rows",
        check=_check_reward,
        templates=("prompt", "completion"),
    ),
    OperatorType(
        "train.sft",
        "Supervised fine-tuning of a LoRA adapter.",
        SftParams,
        {"rows": _ROWS},
        {"adapter": Port("folder"), "metrics": _ROWS},
        "train",
        determinism="seeded",
        models={"model": "model"},
        templates=("prompt", "completion"),
    ),
    OperatorType(
        "train.dpo",
        "Direct preference optimisation of a LoRA adapter.",
        DpoParams,
        {"rows": _ROWS},
        {"adapter": Port("folder"), "metrics": _ROWS},
        "train",
        determinism="seeded",
        models={"model": "model"},
        templates=("prompt", "chosen", "rejected"),
    ),
    OperatorType(
        "python.call",
        "A user's function, in a process of its own.",
        CallParams,
        {},
        {"out": Port("any", doc="rows or a value, as 'returns' says")},
        "user",
        determinism=_call_determinism,
        open_inputs="any",
        check=_check_call,
    ),
)

CATALOG: Mapping[str, OperatorType] = {kind.name: kind for kind in _TYPES}


def operator_type(name: str) -> OperatorType:
    """Return the type of that name; raise UsageError with the nearest known names."""
    kind = CATALOG.get(name)
    if kind is None:
        raise UsageError(f"unknown operator type {name!r}", hint=f"Known types: {', '.join(sorted(CATALOG))}.")
    return kind


def output_kind(kind: OperatorType, port: str, params: Mapping[str, Any]) -> str:
    """Return the kind of an output port; ``python.call`` decides by its parameters."""
    declared = kind.outputs[port].kind
    return str(params.get("returns", "value")) if declared == "any" else declared
