"""The published schema: current, valid, and never stricter than the compiler."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest

from flowmesh_mesh.compiler import check_file
from flowmesh_mesh.document import load_document
from flowmesh_mesh.reference import REFERENCE_FILE, reference_text
from flowmesh_mesh.schema import SCHEMA_FILE, document_schema, schema_text

from .conftest import WORKFLOW, operators

jsonschema: Any = importlib.import_module("jsonschema")  # it has no types
ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml")) + sorted((ROOT / "demo" / "workflows").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = document_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_published_schema_is_current() -> None:
    published = (ROOT / SCHEMA_FILE).read_text(encoding="utf-8")
    assert published == schema_text(), "run: python -m flowmesh_mesh.schema"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_compiles_and_fits_the_schema(path: Path, validator: Any) -> None:
    assert check_file(path).operators > 0
    assert [error.message for error in validator.iter_errors(load_document(path)[0])] == []


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize(
    "document",
    [
        WORKFLOW,
        operators(a={"type": "flow.noop", "with": None, "inputs": None}),
        operators(a={"type": "flow.noop", "foreach": {"range": "${params.n}"}, "with": {"nonce": "${item}"}}),
        operators(a={"type": "python.call", "function": "f", "source": "def f(): ...", "timeout": 5, "reusable": True}),
        operators(
            a={"type": "data.concat", "inputs": {"rows": [{"rows": [{}]}, "b"]}}, b={"type": "data.map", "inputs": {"rows": "c"}}
        ),
    ],
)
def test_the_schema_takes_what_the_compiler_takes(document: dict[str, Any], validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(document)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"apiVersion": "v2"},
        {"opertors": {}},
        {"operators": {"a": {"type": "nothing"}}},
        {"operators": {"a": {"type": "flow.noop", "with": {"nonce": -1}}}},
        {"operators": {"a": {"type": "flow.noop", "with": {"nonse": 1}}}},
        {"operators": {"a": {"type": "flow.noop", "function": "a.py:f"}}},
        {"operators": {"a": {"type": "flow.noop", "shards": 2}}},
        {"operators": {"a": {"type": "data.concat"}}},
        {"operators": {"a": {"type": "data.concat", "inputs": {"row": "b"}}}},
        {"operators": {"a.b": {"type": "flow.noop"}}},
        {"operators": {"a": {"type": "flow.noop", "timeout": "5 minutes"}}},
    ],
)
def test_the_schema_refuses_plain_mistakes(change: dict[str, Any], validator: Any) -> None:
    assert list(validator.iter_errors(copy.deepcopy(operators(a={"type": "flow.noop"})) | change))


def test_the_published_reference_is_current() -> None:
    assert (ROOT / REFERENCE_FILE).read_text(encoding="utf-8") == reference_text(), "run: python -m flowmesh_mesh.reference"
