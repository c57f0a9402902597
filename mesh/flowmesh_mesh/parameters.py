"""Parameters of a workflow: declared in the document, given by whoever submits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flowmesh_mesh.document import PARAMETER_KEYS
from flowmesh_mesh.messages import PARAMETER_MAX_BYTES
from flowmesh_mesh.names import is_identifier
from flowmesh_mesh.problems import Problems, nearest, shown

PARAMETER_TYPES = ("int", "float", "str", "bool", "path", "list")


def bind_parameters(declared: Any, given: Mapping[str, Any], problems: Problems) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the value of each parameter, and the names of those whose problem is noted already.

    Text is taken for any type (the command line gives nothing else). A relative path that is given stands from the
    current folder, a default from the folder of the document.
    """
    values: dict[str, Any] = {}
    if declared is None:
        declared = {}
    if not isinstance(declared, dict):
        problems.add(
            ("params",), f"params must be a mapping, not {shown(declared)}", "Write 'params: {n: {type: int, default: 8}}'."
        )
        declared = {}
    for name, entry in declared.items():
        if not is_identifier(name):
            problems.add(("params", name), f"{shown(name)} cannot name a parameter", "Use letters, digits and '_'.", key=True)
        elif _is_declaration(name, entry, problems):
            values |= _bind(name, entry, given, problems)
    for name in given:
        if name not in declared:
            problems.add(
                ("params", str(name)), f"the workflow has no parameter {shown(name)}", nearest(str(name), declared, "parameters")
            )
    return values, frozenset(set(declared) - set(values))


def _is_declaration(name: str, entry: Any, problems: Problems) -> bool:
    place = ("params", name)
    if not isinstance(entry, dict):
        problems.add(
            place, f"a parameter is a mapping with a type, not {shown(entry)}", f"Write '{name}: {{type: int, default: 8}}'."
        )
        return False
    for key in entry:
        if key not in PARAMETER_KEYS:
            problems.add((*place, key), f"unknown key {shown(key)}", nearest(str(key), PARAMETER_KEYS, "keys"), key=True)
    if "type" not in entry:
        problems.add(place, "the parameter has no type", f"Add 'type:', one of {', '.join(PARAMETER_TYPES)}.")
        return False
    if entry["type"] not in PARAMETER_TYPES:
        problems.add(
            (*place, "type"), f"unknown type {shown(entry['type'])}", nearest(str(entry["type"]), PARAMETER_TYPES, "types")
        )
        return False
    return True


def _bind(name: str, entry: dict[str, Any], given: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    is_given = name in given
    place = ("params", name) if is_given else ("params", name, "default")
    if not is_given and "default" not in entry:
        problems.add(
            ("params", name), f"the parameter {name!r} needs a value", f"Give it with '--param {name}=...', or add a 'default:'."
        )
        return {}
    raw = given[name] if is_given else entry["default"]
    try:
        value = _CONVERT[entry["type"]](raw)
        if entry["type"] == "path" and is_given:
            value = str(Path(value).expanduser().absolute())
        size = len(msgspec.json.encode(value))
    except (ValueError, TypeError, RecursionError, msgspec.DecodeError):
        problems.add(
            place, f"the parameter {name!r} must be {_ARTICLE[entry['type']]}, not {shown(raw)}", "Give a value of that type."
        )
        return {}
    if size > PARAMETER_MAX_BYTES:
        limit = f"at most {PARAMETER_MAX_BYTES} are allowed"
        problems.add(place, f"the parameter {name!r} has {size} bytes; {limit}", "Put large data into a file and give its path.")
        return {}
    return {name: value}


def _integer(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise ValueError("not an integer")
    value = int(raw)
    if not -(2**63) <= value < 2**63:
        raise ValueError("does not fit into 64 bits")
    return value


def _number(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError("not a number")
    value = float(raw)
    if value - value != 0:
        raise ValueError("not finite")
    return value


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("not text")
    return str(raw)


def _boolean(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    return {"true": True, "false": False}[raw.lower()] if raw in ("true", "false", "True", "False") else _refuse()


def _refuse() -> bool:
    raise ValueError("not true or false")


def _path(raw: Any) -> str:
    if not isinstance(raw, str | Path) or str(raw) == "" or "\0" in str(raw):
        raise ValueError("not a path")
    return str(raw)


def _list(raw: Any) -> list[Any]:
    value = msgspec.json.decode(raw) if isinstance(raw, str) else raw
    if not isinstance(value, list | tuple):
        raise ValueError("not a list")
    return list(value)


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "int": _integer,
    "float": _number,
    "str": _text,
    "bool": _boolean,
    "path": _path,
    "list": _list,
}
_ARTICLE = {
    "int": "an integer of 64 bits",
    "float": "a finite number",
    "str": "text",
    "bool": "true or false",
    "path": "a path",
    "list": "a list (JSON)",
}
