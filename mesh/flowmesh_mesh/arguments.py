"""The ``with`` of an operator, checked against the parameters of its type and made complete and canonical."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import inspect

from flowmesh_mesh.catalog import OperatorType, Params
from flowmesh_mesh.messages import PARAMETER_MAX_BYTES
from flowmesh_mesh.problems import Place, Problems, nearest, shown

_LOCATED = re.compile(r"(.*?)(?: - at `(?:key in )?\$(.*)`)?\Z", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")
_PLAIN_TEMPLATE = re.compile(r"(?:[^{]|\{\{ [A-Za-z_][A-Za-z0-9_]* \}\})*\Z")
"""Text that needs no parser to be known as a template."""
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")

_HINTS = {
    "bool": "Write true or false.",
    "str": "Write text; quote it if it looks like something else.",
    "int": "Write a whole number in that range.",
    "float": "Write a number in that range.",
    "dict": "Write a mapping.",
    "vartuple": "Write a list.",
}


class ArgumentChecker:
    """Checks arguments; identical ones only once."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._templates: set[str] = set()
        self._seen: dict[tuple[str, bytes], dict[str, Any] | None] = {}

    def check(self, kind: OperatorType, given: Any, place: Place) -> dict[str, Any] | None:
        """Return complete, canonical parameters (plain JSON, keys in DAG-CBOR order); None when problems were noted."""
        if given is None:
            given = {}
        if not isinstance(given, dict):
            self._problems.add(place, f"'with' must be a mapping, not {shown(given)}", "Write 'with: {parameter: value}'.")
            return None
        try:
            seen = kind.name, msgspec.json.encode(given)
        except (TypeError, ValueError, RecursionError):
            explain(kind.params, given, place, self._problems)  # what is not plain JSON is noted already
            return None
        if seen not in self._seen:
            if len(self._seen) > 4096:
                self._seen.clear()
            self._seen[seen] = self._complete(kind, given, place, len(seen[1]))
        return self._seen[seen]

    def _complete(self, kind: OperatorType, given: dict[str, Any], place: Place, size: int) -> dict[str, Any] | None:
        if size > PARAMETER_MAX_BYTES and self._is_too_large(given, place):
            return None
        try:
            record = msgspec.convert(given, kind.params)
        except msgspec.ValidationError:
            explain(kind.params, given, place, self._problems)
            return None
        complete: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(record))  # plain JSON types: lists, not tuples
        faults = kind.check(complete) if kind.check else []
        for fault in faults:
            self._problems.add(place, fault, f"See the parameters of {kind.name} in docs/workflows.md.")
        for name in kind.templates:
            self._check_templates(complete[name], (*place, name))
        return None if faults else canonical(complete)

    def _check_templates(self, value: Any, place: Place) -> None:
        if isinstance(value, dict):
            for key, text in value.items():
                self._check_templates(text, (*place, key))
        elif value not in self._templates:
            self._templates.add(value)
            if not _PLAIN_TEMPLATE.match(value):
                self._check_template(value, place)

    def _check_template(self, text: str, place: Place) -> None:
        from jinja2 import Environment, TemplateSyntaxError

        try:
            Environment().parse(text)
        except TemplateSyntaxError as error:
            self._problems.add(place, f"not a template: {error.message}", "Write '{{ column }}' where a column's text goes.")
        except RecursionError:
            self._problems.add(place, "not a template: nested too deeply", "Write '{{ column }}' where a column's text goes.")

    def _is_too_large(self, given: dict[str, Any], place: Place) -> bool:
        found = False
        for name, value in given.items():
            size = len(msgspec.json.encode(value))
            if size > PARAMETER_MAX_BYTES:
                message = f"the value of {name!r} has {size} bytes; at most {PARAMETER_MAX_BYTES} are allowed"
                self._problems.add((*place, name), message, "Put large data into an input: {path: ...} or {rows: [...]}.")
                found = True
        return found


def canonical(value: Any) -> Any:
    """Return plain JSON with the keys of its mappings in the order of DAG-CBOR, as they come out of a manifest."""
    if type(value) is dict:
        return {key: canonical(value[key]) for key in sorted(value, key=_key_order)}
    if type(value) is list:
        return [canonical(item) for item in value]
    return value


def _key_order(key: str) -> tuple[int, bytes]:
    encoded = key.encode()
    return len(encoded), encoded


def explain(params: type[Params], given: dict[str, Any], place: Place, problems: Problems) -> None:
    """Note everything that keeps ``given`` from being ``params``, field by field."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(params)}
    for name in given:
        if name not in fields:
            problems.add((*place, name), f"unknown parameter {shown(name)}", nearest(str(name), fields, "parameters"), key=True)
    for name, field in fields.items():
        if name not in given:
            if field.required:
                problems.add(place, f"the parameter {name!r} is missing", f"Add '{name}:'.")
        elif _is_json(given[name]):
            try:
                msgspec.convert(given[name], field.type)
            except msgspec.ValidationError as error:
                _note((*place, name), given[name], str(error), field.type, problems)


def _is_json(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _note(place: Place, value: Any, text: str, type_: Any, problems: Problems) -> None:
    """Note what msgspec says of a value, at the part of the value that it means."""
    located = _LOCATED.match(text)
    message, steps = (located.group(1), located.group(2) or "") if located else (text, "")
    at, inside, info = place, value, inspect.type_info(type_)
    for key, index in _STEP.findall(steps):
        step: Any = int(index) if index else key
        try:
            inside = inside[step]
        except (KeyError, IndexError, TypeError):
            break
        at, info = (*at, step), _part(info, step)
    unknown = _UNKNOWN.match(message)
    if unknown:
        fields = [field.encode_name for field in getattr(info, "fields", ())]
        hint = nearest(unknown.group(1), fields, "keys")
        problems.add((*at, unknown.group(1)), f"unknown key {unknown.group(1)!r}", hint, key=True)
        return
    message = message[:1].lower() + message[1:].replace("`", "'")
    if "got" in message:
        message += f" ({shown(inside)})"
    elif repr(inside) not in message and not isinstance(inside, dict | list):
        message += f", not {shown(inside)}"
    problems.add(at, message, _hint(info, inside))


def _part(info: Any, step: Any) -> Any:
    """Return what msgspec knows of a part of a type."""
    if isinstance(step, int):
        return getattr(info, "item_type", None)
    fields = {field.encode_name: field.type for field in getattr(info, "fields", ())}
    return fields.get(step, getattr(info, "value_type", None))


def _hint(info: Any, value: Any) -> str:
    if isinstance(info, inspect.LiteralType):
        return nearest(str(value), [str(choice) for choice in info.values], "values")
    kind = type(info).__name__.removesuffix("Type").lower()
    return _HINTS.get(kind, "See the type's parameters in docs/workflows.md.")
