"""Which class runs which operator type here, and what must be installed for it.

What is missing is found without importing anything heavy, so that the agent stays small and a node advertises only
the types that it can really run.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flowmesh_cas.errors import ExecutionError
from flowmesh_node.operators.base import Implementation


@dataclass(frozen=True, slots=True)
class Registered:
    """``target`` is ``module:Class``; ``needs`` are the import names of the distributions that it uses."""

    target: str
    needs: tuple[str, ...] = ()


_TORCH = ("torch", "transformers", "safetensors")
_TRAIN = (*_TORCH, "peft", "trl", "datasets", "accelerate")
_HERE = "flowmesh_node.operators."

REGISTRY: Mapping[str, Registered] = {
    "flow.noop": Registered(_HERE + "noop:Noop"),
    "flow.delay": Registered(_HERE + "delay:Delay"),
    "data.load": Registered(_HERE + "data:Load", ("duckdb",)),
    "data.split": Registered(_HERE + "data:Split"),
    "data.concat": Registered(_HERE + "data:Concat"),
    "data.sql": Registered(_HERE + "data:Sql", ("duckdb",)),
    "data.map": Registered(_HERE + "data:Map", ("jinja2",)),
    "llm.generate": Registered(_HERE + "generate:Generate", _TORCH),
    "llm.score": Registered(_HERE + "score:Score", _TORCH),
    "reward.score": Registered(_HERE + "reward:Reward"),
    "train.sft": Registered(_HERE + "train:Train", _TRAIN),
    "train.dpo": Registered(_HERE + "train:Train", _TRAIN),
    "python.call": Registered(_HERE + "call:Call"),
}


@dataclass(frozen=True, slots=True)
class Available:
    """``types`` can run here; ``missing`` maps the others to what they lack."""

    types: tuple[str, ...]
    missing: Mapping[str, tuple[str, ...]]


def available(find: Callable[[str], object | None] = importlib.util.find_spec) -> Available:
    """Tell what can run on this machine, without importing it."""
    missing: dict[str, tuple[str, ...]] = {}
    for name, entry in REGISTRY.items():
        lacks = tuple(module for module in (entry.target.partition(":")[0], *entry.needs) if find(module) is None)
        if lacks:
            missing[name] = lacks
    return Available(tuple(name for name in REGISTRY if name not in missing), missing)


def implementation(name: str) -> Implementation:
    """Return a new instance of the class that runs ``name``; raise ExecutionError when it cannot be had here."""
    entry = REGISTRY.get(name)
    if entry is None:
        raise ExecutionError(f"this node does not know the operator type {name!r}", reason="unsatisfiable")
    module, _, attribute = entry.target.partition(":")
    try:
        made: Implementation = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        raise ExecutionError(
            f"{name} cannot run here: {error}",
            reason="unsatisfiable",
            hint="Install the node extra: pip install 'flowmesh-nats[node]'.",
        ) from error
    return made
