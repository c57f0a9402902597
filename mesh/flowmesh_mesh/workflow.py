"""The Python form of a workflow: builds the same document that one would write by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmesh_cas.cid import cid_text
from flowmesh_cas.errors import UsageError
from flowmesh_mesh.catalog import CATALOG, OperatorType
from flowmesh_mesh.document import API_VERSION, OPERATOR_KEYS
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.problems import nearest

OPTIONS = tuple(key for key in OPERATOR_KEYS if key not in ("type", "with"))
"""Keyword arguments of :meth:`Workflow.add` that are keys of the operator, not ports or parameters."""


class PortReference:
    """An output port of an operator; connect it by giving it to another."""

    __slots__ = ("operator", "port")

    def __init__(self, operator: str, port: str) -> None:
        self.operator, self.port = operator, port

    def __str__(self) -> str:
        return f"{self.operator}.{self.port}"

    def __repr__(self) -> str:
        return f"PortReference({str(self)!r})"


class Handle:
    """An operator that was added; its attributes are its output ports (``handle.rows``)."""

    __slots__ = ("_kind", "_name")

    def __init__(self, name: str, kind: OperatorType | None) -> None:
        self._name, self._kind = name, kind

    def __getattr__(self, port: str) -> PortReference:
        if port.startswith("_"):
            raise AttributeError(port)
        if self._kind is not None and port not in self._kind.outputs:
            hint = nearest(port, self._kind.outputs, "ports")
            raise AttributeError(f"{self._name!r} ({self._kind.name}) has no output port {port!r}. {hint}")
        return PortReference(self._name, port)

    def __getitem__(self, port: str) -> PortReference:
        return self.__getattr__(port)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a handle is not a list; name one of its ports")

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"Handle({self._name!r})"


Connectable = PortReference | Handle


class Workflow:
    """A workflow under construction. Nothing is checked until it is compiled, so that all problems are told at once."""

    def __init__(
        self,
        name: str,
        *,
        params: Mapping[str, Mapping[str, Any]] | None = None,
        share: str | None = None,
        priority: int | None = None,
        deadline_s: float | None = None,
        doc: str | None = None,
    ) -> None:
        self._head: dict[str, Any] = {"apiVersion": API_VERSION, "name": name}
        given = {"doc": doc, "share": share, "priority": priority, "deadline_s": deadline_s}
        self._head |= {key: value for key, value in given.items() if value is not None}
        if params:
            self._head["params"] = {key: dict(value) for key, value in params.items()}
        self._operators: dict[str, dict[str, Any]] = {}
        self._outputs: dict[str, str] = {}

    def add(self, name: str, type: str, /, **given: Any) -> Handle:
        """Add an operator and return its handle.

        Keyword arguments that are keys of an operator (inputs, shards, resources, retry, timeout, ...) are taken as such,
        ``rows`` where it is a number; those that name an input port connect it; the others are parameters. ``with_`` and
        ``inputs`` take mappings.
        """
        if name in self._operators:
            raise UsageError(f"there is an operator {name!r} already", hint="Choose another name.")
        kind = CATALOG.get(type)
        entry: dict[str, Any] = {"type": type}
        inputs = {port: _plain_input(value) for port, value in dict(given.pop("inputs", None) or {}).items()}
        params = dict(given.pop("with_", None) or {})
        for key, value in given.items():
            if key in OPTIONS and not _is_rows_port(key, value):
                entry[key] = value
            elif _is_port(kind, key, value):
                inputs[key] = _plain_input(value)
            else:
                params[key] = _plain(value)
        if inputs:
            entry["inputs"] = inputs
        if params:
            entry["with"] = params
        self._operators[name] = entry
        return Handle(name, kind)

    def call(
        self,
        function: Callable[..., Any],
        /,
        *,
        name: str | None = None,
        args: Mapping[str, Any] | None = None,
        returns: str | None = None,
        requires: Sequence[str] | None = None,
        effect: bool | None = None,
        options: Mapping[str, Any] | None = None,
        **ports: Any,
    ) -> Handle:
        """Add a ``python.call`` of a function, whose source travels with the workflow.

        Keyword arguments connect input ports when they are ports, and are arguments of the function else. ``options`` are
        keys of the operator (timeout, resources, ...). Raise UsageError for a function that cannot be pinned down.
        """
        from flowmesh_mesh.capture import capture_function

        source = capture_function(function)
        connected = {key: value for key, value in ports.items() if _is_connection(value)}
        arguments = {**(args or {}), **{key: value for key, value in ports.items() if key not in connected}}
        given = {
            "args": arguments or None,
            "returns": returns,
            "requires": list(requires) if requires else None,
            "effect": effect,
        }
        return self.add(
            name or function.__name__.replace("_", "-").strip("-"),
            "python.call",
            function=function.__name__,
            source=source,
            inputs=connected,
            with_={key: _plain(value) for key, value in given.items() if value is not None},
            **(options or {}),
        )

    def output(self, name: str, port: Connectable | str) -> None:
        """Name an output port as a result of the workflow; without any, all ports that nobody consumes are results."""
        self._outputs[name] = str(port)

    def to_document(self) -> dict[str, Any]:
        """Return the plain document, as it could stand in a YAML or JSON file."""
        document = {**self._head, "operators": self._operators}
        if self._outputs:
            document["outputs"] = self._outputs
        return document


def _is_rows_port(key: str, value: Any) -> bool:
    """Tell whether ``rows`` is meant as the port of that name, not as the number beside ``shards="auto"``."""
    return key == "rows" and not (isinstance(value, int) or (isinstance(value, str) and value.startswith("${")))


def _is_port(kind: OperatorType | None, key: str, value: Any) -> bool:
    if kind is not None and key in kind.inputs:
        return True
    if kind is not None and key in kind.params.__struct_fields__:
        return False
    return _is_connection(value)


def _is_connection(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_connection(item) for item in value)
    return isinstance(value, PortReference | Handle | Path | Ref)


def _plain_input(value: Any) -> Any:
    """Return an input in the form of a document."""
    if isinstance(value, PortReference | Handle):
        return str(value)
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, Ref):
        known = {"cid": cid_text(value.cid), "kind": value.kind, "digest": value.digest.hex(), "size": value.size}
        return {**known, "rows": value.rows} if value.rows >= 0 else known
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, dict) for item in value) and not any(_is_form(item) for item in value):
            return {"rows": list(value)}
        return [_plain_input(item) for item in value]
    return value


def _is_form(item: Mapping[str, Any]) -> bool:
    return (bool({"path", "rows", "value", "cid"} & set(item)) and len(item) == 1) or {"cid", "kind", "digest"} <= set(item)


def _plain(value: Any) -> Any:
    """Return a parameter with paths as text and tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
