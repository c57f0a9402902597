"""The workflow document: reading it, and the keys that it may have.

The form is described in docs/workflows.md and published as a JSON schema (docs/schema/workflow-v1.json).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_mesh.positions import TEXT_MAX_BYTES, Positions, parse_json, parse_yaml, read_text
from flowmesh_mesh.problems import DocumentError, Problem, render_problems

__all__ = ["API_VERSION", "DocumentError", "Positions", "Problem", "load_document", "load_text", "render_problems"]

API_VERSION = "flowmesh/v1"
OPERATORS_MAX = 1_000_000
EDGES_MAX = 10_000_000

DOCUMENT_KEYS = ("apiVersion", "name", "doc", "params", "share", "priority", "deadline_s", "operators", "outputs")
PARAMETER_KEYS = ("type", "default", "doc")
SETTING_KEYS = ("resources", "retry", "timeout", "priority", "deadline_s", "share", "numeric", "reusable")
OPERATOR_KEYS = ("type", "doc", "inputs", "with", "function", "source", "foreach", "shards", "rows", *SETTING_KEYS)


def load_document(path: str | Path) -> tuple[Any, Positions]:
    """Read a workflow file (``.json`` as JSON, everything else as YAML); return its data and the places in its text.

    Raise NotFoundError or UsageError when it cannot be read, DocumentError when it is not YAML or JSON.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > TEXT_MAX_BYTES:
            raise UsageError(f"{path} is larger than {TEXT_MAX_BYTES} bytes", hint="Put data into input files.")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no workflow file {path}", hint="Check the path.") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="Name a file that you may read.") from error
    return load_text(read_text(data, str(path)), str(path))


def load_text(text: str, filename: str = "") -> tuple[Any, Positions]:
    """Read a workflow from text; JSON when ``filename`` ends so, else YAML (which also reads JSON)."""
    return parse_json(text, filename) if filename.lower().endswith(".json") else parse_yaml(text, filename)
