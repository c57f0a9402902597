"""From a document to a plan: every operator expanded, checked and connected, in the order of the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmesh_mesh.document import API_VERSION, DOCUMENT_KEYS, OPERATORS_MAX
from flowmesh_mesh.expansion import Expander
from flowmesh_mesh.feeds import Edge, FeedReader, Given, Group
from flowmesh_mesh.names import check_name, is_name
from flowmesh_mesh.ordering import order_vertices, spread_privacy
from flowmesh_mesh.parameters import bind_parameters
from flowmesh_mesh.problems import Problems, nearest, shown
from flowmesh_mesh.settings import Settings, read_settings
from flowmesh_mesh.substitution import MISSING, Substitution
from flowmesh_mesh.vertices import Vertex, check_names, cut_shards, settled

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked document. ``order`` lists vertices so that sources come before their users; ``outputs`` name ports."""

    name: str
    vertices: list[Vertex]
    order: list[int]
    outputs: dict[str, Edge]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A document whose operators are expanded and connected, but not yet cut into shards nor put into order."""

    name: str
    vertices: list[Vertex]
    outputs: dict[str, Edge]
    documented: Mapping[Any, Any]
    """The operators as the document names them."""

    @property
    def has_auto(self) -> bool:
        """Tell whether a number of shards is yet to be settled."""
        return any(vertex.shards.is_auto for vertex in self.vertices)


def draw_document(data: Any, base: Path | None, given: Mapping[str, Any], problems: Problems) -> Drawing | None:
    """Expand and connect the operators of a document; what must not be used, or None, where problems were noted."""
    if not isinstance(data, Mapping):
        problems.add((), f"a workflow is a mapping, not {shown(data)}", "Begin with 'apiVersion: flowmesh/v1'.")
        return None
    _check_envelope(data, problems)
    values, broken = bind_parameters(data.get("params"), given, problems)
    substitution = Substitution(problems, values, broken)
    name = substitution.apply(data.get("name"), ("name",))
    _check_workflow_name(name, data, problems)
    common = {key: substitution.apply(data[key], (key,)) for key in ("share", "priority", "deadline_s") if key in data}
    common = {key: value for key, value in common.items() if value is not MISSING}
    expander = Expander(problems, substitution, base, read_settings(common, (), problems, Settings()))
    operators = data.get("operators")
    if not isinstance(operators, dict) or not operators:
        hint = "Write 'operators: {name: {type: ...}}'."
        problems.add(
            ("operators",) if "operators" in data else (), "operators must be a mapping with at least one operator", hint
        )
        return None
    for key, entry in operators.items():
        expander.expand(key, entry)
    outputs = _connect(expander, data.get("outputs"), substitution, base, problems)
    return Drawing(str(name), expander.vertices, outputs, operators)


def lay_out(drawing: Drawing, counts: Mapping[str, int], problems: Problems) -> Plan:
    """Cut shards and put everything into order; ``counts`` settles ``shards: auto`` by name, 1 where it says nothing.

    A drawing in which something was to be settled stays as it is and may be laid out again with other numbers.
    """
    vertices = settled(drawing.vertices, counts) if drawing.has_auto else drawing.vertices
    cut_shards(vertices)
    if len(vertices) > OPERATORS_MAX:
        message = f"the workflow has more than {OPERATORS_MAX} operators"
        problems.add(("operators",), message, "Write smaller numbers of shards, or submit several workflows.")
    check_names(vertices, drawing.documented, problems)
    order = order_vertices(vertices, problems)
    spread_privacy(vertices, order, problems)
    return Plan(drawing.name, vertices, order, drawing.outputs)


def _check_envelope(data: Mapping[str, Any], problems: Problems) -> None:
    for key in data:
        if key not in DOCUMENT_KEYS:
            problems.add((str(key),), f"unknown key {shown(key)}", nearest(str(key), DOCUMENT_KEYS, "keys"), key=True)
    if "apiVersion" not in data:
        problems.add((), "apiVersion is missing", f"Begin with 'apiVersion: {API_VERSION}'.")
    elif data["apiVersion"] != API_VERSION:
        problems.add(("apiVersion",), f"unknown version {shown(data['apiVersion'])}", f"This build reads {API_VERSION!r}.")


def _check_workflow_name(name: Any, data: Mapping[str, Any], problems: Problems) -> None:
    if "name" not in data:
        problems.add((), "the workflow has no name", "Add 'name:'.")
    elif name is not MISSING and not is_name(name):
        try:
            check_name(str(name), "workflow")
            problems.add(("name",), f"the name must be text, not {shown(name)}", "Quote it.")
        except Exception as error:
            problems.add(("name",), str(error), getattr(error, "hint", ""))


def _connect(
    expander: Expander, outputs: Any, substitution: Substitution, base: Path | None, problems: Problems
) -> dict[str, Edge]:
    vertices = expander.vertices

    reader = FeedReader(problems, base, expander.groups, lambda number: vertices[number].params)
    for vertex in vertices:
        vertex.feeds = reader.read(vertex.kind, vertex.inputs, (*vertex.place, "inputs"))
        if vertex.kind.name == "data.load":
            _settle_format(vertex, problems)
    if outputs is None:
        return _loose_ends(vertices, expander.groups)
    return _named_outputs(substitution.apply(outputs, ("outputs",)), reader, expander, problems)


def _settle_format(vertex: Vertex, problems: Problems) -> None:
    """Decide ``format: auto`` by the name of the file, which does not travel."""
    files = [feed for feed in vertex.feeds.get("file", []) if isinstance(feed, Given) and isinstance(feed.content, Path)]
    if vertex.params.get("format") != "auto" or not files:
        return
    formats = {_FORMATS.get(file.content.suffix.lower(), "") for file in files}
    if len(formats) == 1 and "" not in formats:
        vertex.params = {**vertex.params, "format": formats.pop()}
        return
    shown_names = ", ".join(file.content.name for file in files[:3])
    message = f"cannot tell the format of {shown_names} by its name"
    problems.add((*vertex.place, "inputs", "file"), message, "Say it with 'with: {format: jsonl}' (or csv, parquet).")


def _loose_ends(vertices: list[Vertex], groups: Mapping[str, Group]) -> dict[str, Edge]:
    """Return every output port that nobody consumes, by operator, or operator.port where it has several."""
    used: set[tuple[int, str]] = set()
    for feeds in {id(feeds): feeds for vertex in vertices for feeds in vertex.feeds.values()}.values():
        used.update((feed.vertex, feed.port) for feed in feeds if isinstance(feed, Edge))
    ends: dict[str, Edge] = {}
    for number, vertex in enumerate(vertices):
        ports = vertex.kind.outputs
        for port in ports:
            if (number, port) not in used:
                ends[vertex.name if len(ports) == 1 else f"{vertex.name}.{port}"] = Edge(number, port)
    return ends


def _named_outputs(outputs: Any, reader: FeedReader, expander: Expander, problems: Problems) -> dict[str, Edge]:
    if not isinstance(outputs, dict) or not outputs:
        problems.add(
            ("outputs",),
            "outputs must be a mapping of names to ports",
            "Write 'outputs: {name: operator.port}', or leave it out.",
        )
        return {}
    named: dict[str, Edge] = {}
    for name, target in outputs.items():
        place = ("outputs", str(name))
        if not is_name(name):
            try:
                check_name(str(name), "output")
            except Exception as error:
                problems.add(place, str(error), getattr(error, "hint", ""), key=True)
        if not isinstance(target, str):
            if target is not MISSING:
                problems.add(place, f"an output names a port, not {shown(target)}", "Write 'operator.port'.")
            continue
        edges = reader.reference(target, place)
        group = expander.groups.get(target.partition(".")[0])
        if group is not None and group.is_many:
            named |= {f"{name}-{number}": edge for number, edge in enumerate(edges)}
        elif edges and edges[0].item >= 0:
            problems.add(place, f"an output names a whole port, not {shown(target)}", "Leave the number out.")
        elif edges:
            named[str(name)] = edges[0]
    return named
