"""The JSON schema of the workflow document, made from the catalog: ``python -m flowmesh_mesh.schema`` writes it out.

It serves editors and authors in other languages. It says less than the compiler checks (references, cycles, files), and
refuses nothing that the compiler accepts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from flowmesh_mesh.catalog import CATALOG, KINDS, OperatorType
from flowmesh_mesh.document import API_VERSION
from flowmesh_mesh.names import NAME_MAX_LENGTH
from flowmesh_mesh.parameters import PARAMETER_TYPES
from flowmesh_mesh.settings import DURATION_MAX_S, PRIORITY_MAX, SHARES
from flowmesh_mesh.vertices import AUTO, SHARDS_MAX

SCHEMA_FILE = "docs/schema/workflow-v1.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

_NAME = {"type": "string", "pattern": f"^[A-Za-z0-9]([A-Za-z0-9_-]{{0,{NAME_MAX_LENGTH - 2}}}[A-Za-z0-9])?$"}
_IDENTIFIER = {"pattern": "^[A-Za-z_][A-Za-z0-9_]{0,62}$"}
_SUBSTITUTED = {"type": "string", "pattern": r"\$\{"}
_ANY: dict[str, Any] = {}


def document_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a workflow document."""
    return {
        "$schema": DIALECT,
        "$id": "urn:flowmesh:workflow:v1",
        "title": "FlowMesh workflow",
        "description": "Operators with typed ports, run by a mesh. Values may hold ${params.name}.",
        **_record(
            {
                "apiVersion": {"const": API_VERSION},
                "name": _or_substituted(_NAME),
                "doc": _ANY,
                "params": _or_null({"type": "object", "propertyNames": _IDENTIFIER, "additionalProperties": _parameter()}),
                **_common_settings(),
                "operators": {
                    "type": "object",
                    "minProperties": 1,
                    "propertyNames": _NAME,
                    "additionalProperties": {"$ref": "#/$defs/operator"},
                },
                "outputs": _or_null(
                    {"type": "object", "minProperties": 1, "propertyNames": _NAME, "additionalProperties": {"type": "string"}}
                ),
            },
            required=("apiVersion", "name", "operators"),
        ),
        "$defs": _definitions(),
    }


def _definitions() -> dict[str, Any]:
    _, components = msgspec.json.schema_components([kind.params for kind in CATALOG.values()], ref_template="#/$defs/{name}")
    return {
        "operator": _operator(),
        "input": _input(),
        "duration": {"anyOf": [{"type": "number", "minimum": 0}, _text("^[0-9]+(\\.[0-9]+)? ?(ms|s|m|h|d)$"), _SUBSTITUTED]},
        "size": {"anyOf": [{"type": "integer", "minimum": 0}, _text("^[0-9]+(\\.[0-9]+)? ?([kKMGT]?B|[KMGT]iB)$"), _SUBSTITUTED]},
        **{name: _with_substitution(component) for name, component in sorted(components.items()) if name != "CallParams"},
    }


def _operator() -> dict[str, Any]:
    number = {"type": "number", "minimum": 0}
    whole = {"type": "integer", "minimum": 0}
    schema = _record(
        {
            "type": {"enum": sorted(CATALOG)},
            "doc": _ANY,
            "inputs": _or_null({"type": "object", "additionalProperties": {"$ref": "#/$defs/input"}}),
            "with": _or_null({"type": "object"}),
            "function": {"type": "string"},
            "source": {"type": "string"},
            "foreach": _foreach(),
            "shards": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": SHARDS_MAX}, {"const": AUTO}, _SUBSTITUTED]},
            "rows": _or_substituted({"type": "integer", "minimum": 1}),
            "resources": _record(
                {
                    "gpus": _or_substituted(whole),
                    "vram": {"$ref": "#/$defs/size"},
                    "memory": {"$ref": "#/$defs/size"},
                    "cpus": _or_substituted(number),
                }
            ),
            "retry": _record(
                {
                    "attempts": _or_substituted({"type": "integer", "minimum": 1, "maximum": 100}),
                    "backoff": {"$ref": "#/$defs/duration"},
                }
            ),
            "timeout": {"$ref": "#/$defs/duration"},
            **_common_settings(),
            "numeric": _text(r"^(any|exact:[A-Za-z0-9][A-Za-z0-9._-]{0,62}|.*\$\{.*)$"),
            "reusable": _or_substituted({"type": "boolean"}),
        },
        required=("type",),
    )
    # A type that is a substitution matches no branch: the compiler tells about it.
    schema["properties"]["type"] = {"anyOf": [schema["properties"]["type"], _SUBSTITUTED]}
    schema["allOf"] = [_branch(kind) for _, kind in sorted(CATALOG.items())]
    return schema


def _branch(kind: OperatorType) -> dict[str, Any]:
    """Return what holds for operators of one type: its parameters and its ports."""
    arguments: dict[str, Any] = {"$ref": f"#/$defs/{kind.params.__name__}"}
    then: dict[str, Any] = {"properties": {"with": _or_null(arguments)}, "description": kind.doc}
    required = [port for port, declared in kind.inputs.items() if declared.required]
    if kind.open_inputs:
        then["properties"]["inputs"] = {"propertyNames": _IDENTIFIER}
    else:
        ports = {port: {"description": declared.doc or declared.kind} for port, declared in kind.inputs.items()}
        then["properties"]["inputs"] = {"properties": ports, "required": required, "additionalProperties": {"not": {}}}
    needed = ["inputs"] if required or kind.open_inputs == "rows" else []
    if kind.name == "python.call":
        needed.append("function")
        call = {name: value for name, value in _call_properties().items() if name != "function"}
        then["properties"]["with"] = _or_null({"type": "object", "properties": call, "additionalProperties": False})
    else:
        then["properties"] |= {"function": {"not": {}}, "source": {"not": {}}}
        needed += ["with"] if any(field.required for field in msgspec.structs.fields(kind.params)) else []
    if not kind.shards_by:
        then["properties"]["shards"] = {"anyOf": [{"const": 1}, _SUBSTITUTED]}
    return {"if": {"properties": {"type": {"const": kind.name}}}, "then": {**then, "required": needed} if needed else then}


def _call_properties() -> dict[str, Any]:
    _, components = msgspec.json.schema_components([CATALOG["python.call"].params], ref_template="#/$defs/{name}")
    properties: dict[str, Any] = _with_substitution(components["CallParams"])["properties"]
    return properties


def _with_substitution(component: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter record whose values may also be text with ``${...}``."""
    properties = {name: _or_substituted(_inner(value)) for name, value in component.get("properties", {}).items()}
    described = {**component, "properties": properties}
    if "description" in component:
        described["description"] = " ".join(component["description"].replace("``", "'").split())
    return described


def _inner(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter with its parts open to ``${...}``; lengths of text hold after substitution only."""
    schema = {key: value for key, value in schema.items() if key not in ("minLength", "maxLength")}
    if isinstance(schema.get("items"), dict):
        schema["items"] = _or_substituted(_inner(schema["items"]))
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = _or_substituted(_inner(schema["additionalProperties"]))
    return schema


def _common_settings() -> dict[str, Any]:
    return {
        "share": _or_substituted({"enum": list(SHARES)}),
        "priority": _or_substituted({"type": "integer", "minimum": -PRIORITY_MAX, "maximum": PRIORITY_MAX}),
        "deadline_s": _or_substituted({"type": "number", "minimum": 0, "maximum": DURATION_MAX_S}),
    }


def _parameter() -> dict[str, Any]:
    return _record({"type": {"enum": list(PARAMETER_TYPES)}, "default": _ANY, "doc": _ANY}, required=("type",))


def _foreach() -> dict[str, Any]:
    items = {"type": "array", "minItems": 1}
    return {
        "anyOf": [
            items,
            _SUBSTITUTED,
            _record({"item": {"anyOf": [items, _SUBSTITUTED]}}, required=("item",)),
            _record({"range": _or_substituted({"type": "integer", "minimum": 1})}, required=("range",)),
        ]
    }


def _input() -> dict[str, Any]:
    one = [
        {"type": "string", "description": "operator.port"},
        _record({"path": {"type": "string"}}, required=("path",)),
        _record(
            {"rows": {"anyOf": [{"type": "array", "items": {"anyOf": [{"type": "object"}, _SUBSTITUTED]}}, _SUBSTITUTED]}},
            required=("rows",),
        ),
        _record({"value": _ANY}, required=("value",)),
        _record(
            {
                "cid": {"type": "string"},
                "kind": _or_substituted({"enum": list(KINDS)}),
                "digest": {"type": "string"},
                "size": _or_substituted({"type": "integer", "minimum": 0}),
                "rows": _or_substituted({"type": "integer", "minimum": -1}),
            },
            required=("cid", "kind", "digest", "size"),
        ),
    ]
    return {"anyOf": [*one, {"type": "array", "minItems": 1, "items": {"anyOf": one}}]}


def _record(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


def _or_substituted(schema: dict[str, Any]) -> dict[str, Any]:
    is_open = not schema or (schema.get("type") == "string" and "pattern" not in schema)
    return schema if is_open else {"anyOf": [schema, _SUBSTITUTED]}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that also takes a key with nothing behind it, as YAML may have."""
    return {"anyOf": [schema, {"type": "null"}]}


def _text(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


def schema_text() -> str:
    """Return the schema as it is published."""
    return json.dumps(document_schema(), indent=2, sort_keys=True) + "\n"


def main(arguments: list[str]) -> int:
    """Write the schema to a file (default: where it is published, from the repository's root) or, with ``-``, to the output."""
    target = arguments[0] if arguments else SCHEMA_FILE
    if target == "-":
        sys.stdout.write(schema_text())
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(schema_text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
