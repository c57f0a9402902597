"""From one operator of a document to its vertices: ``foreach``, references, arguments, models, code."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmesh_mesh.arguments import ArgumentChecker
from flowmesh_mesh.catalog import CATALOG, OperatorType, operator_type
from flowmesh_mesh.document import OPERATOR_KEYS, OPERATORS_MAX, SETTING_KEYS
from flowmesh_mesh.feeds import Edge, Feed, Given, Group, find_path
from flowmesh_mesh.names import NAME_MAX_LENGTH, check_name, is_identifier, is_name
from flowmesh_mesh.problems import Place, Problems, nearest, shown
from flowmesh_mesh.references import check_model
from flowmesh_mesh.settings import Settings, read_settings
from flowmesh_mesh.source import check_call, check_source, read_source
from flowmesh_mesh.substitution import MISSING, Substitution, is_unicode, mentions_item

if TYPE_CHECKING:
    import ast

SHARDS_MAX = 100_000
FAULTY_ITEMS_MAX = 10
"""After this many problems, the other items of a ``foreach`` are not looked at."""

Rank = tuple[str, tuple[int, ...], str]


@dataclass(slots=True)
class Vertex:
    """One operator of the plan. ``rank`` orders what the graph leaves open; ``inputs`` are as written, ``feeds`` as connected."""

    name: str
    rank: Rank
    kind: OperatorType
    place: Place
    settings: Settings
    params: dict[str, Any]
    inputs: Any = None
    feeds: dict[str, list[Feed]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Given] = field(default_factory=dict)
    code: Given | None = None
    shards: int = 1
    share: str = ""
    is_share_explicit: bool = False


class Expander:
    """Expands operators one after the other into ``vertices`` and ``groups``."""

    def __init__(self, problems: Problems, substitution: Substitution, base: Path | None, settings: Settings) -> None:
        self.vertices: list[Vertex] = []
        self.groups: dict[str, Group] = {}
        self._problems = problems
        self._substitution = substitution
        self._base = base
        self._settings = settings
        self._arguments = ArgumentChecker(problems)
        self._codes: dict[str, tuple[str, Given]] = {}
        self._called: dict[tuple[str, str], ast.FunctionDef | None] = {}
        self._models: dict[str, Given | str | None] = {}
        self._count = 0

    def expand(self, name: Any, entry: Any) -> None:
        """Add the vertices of one operator."""
        place: Place = ("operators", str(name))
        if not is_name(name):
            self._refuse_name(name, place)
        if not isinstance(entry, dict):
            self._problems.add(
                place, f"an operator is a mapping, not {shown(entry)}", "Write '{type: ..., inputs: ..., with: ...}'."
            )
            self.groups.setdefault(str(name), Group(None, []))
            return
        for key in entry:
            if key not in OPERATOR_KEYS:
                self._problems.add((*place, str(key)), f"unknown key {shown(key)}", self._key_hint(str(key), entry), key=True)
        kind = self._kind(entry, place)
        group = self.groups[str(name)] = Group(kind, [])
        items = self._items(entry["foreach"], (*place, "foreach")) if "foreach" in entry else None
        if kind is None or items is MISSING:
            group.kind = None
            return
        group.is_many = items is not None
        self._add(str(name), entry, kind, group, items, place)

    def _add(self, name: str, entry: dict[str, Any], kind: OperatorType, group: Group, items: Any, place: Place) -> None:
        common = {key: entry[key] for key in (*SETTING_KEYS, "shards") if key in entry}
        own: dict[str, Any] = {key: entry[key] for key in ("with", "inputs", "function") if key in entry}
        moving = [key for key, value in own.items() if items is not None and mentions_item(value)]
        fixed = {key: self._substitution.apply(own[key], (*place, key)) for key in own if key not in moving}
        if items is None:
            settings, shards = self._common(common, kind, place)
            if self._has_room(1, shards, place):
                group.vertices.append(self._vertex(name, (name, (), ""), kind, settings, shards, entry, fixed, place))
            return
        same = None if mentions_item(common) else self._common(common, kind, place)
        if not self._has_room(len(items), same[1] if same else 1, place):
            return
        faults = self._problems.count
        for number, item in enumerate(items):
            self._substitution.bind(item=item, index=number)
            settings, shards = same or self._common(common, kind, place)
            values = {**fixed, **{key: self._substitution.apply(own[key], (*place, key)) for key in moving}} if moving else fixed
            rank = (name, (number,), "")
            vertex = self._vertex(f"{name}-{number}", rank, kind, settings, shards, entry, values, place)
            group.vertices.append(vertex)
            if self._problems.count - faults >= FAULTY_ITEMS_MAX:
                break
        self._substitution.unbind()
        self._name_items(kind, group)

    def _vertex(
        self,
        name: str,
        rank: Rank,
        kind: OperatorType,
        settings: Settings,
        shards: int,
        entry: dict[str, Any],
        values: dict[str, Any],
        place: Place,
    ) -> int:
        given, code = values.get("with"), None
        if kind.name == "python.call":
            given, code = self._call(entry, values, place)
        elif "function" in entry or "source" in entry:
            key = "function" if "function" in entry else "source"
            self._problems.add((*place, key), f"{kind.name} runs no function", "Use the type python.call.", key=True)
        params = None if given is MISSING else self._arguments.check(kind, given, (*place, "with"))
        vertex = Vertex(name, rank, kind, place, settings, params if params is not None else {}, values.get("inputs"))
        vertex.code, vertex.shards, vertex.share, vertex.is_share_explicit = code, shards, settings.share, "share" in entry
        if params is not None and kind.models:
            self._bind_models(vertex, place)
        self.vertices.append(vertex)
        return len(self.vertices) - 1

    def _has_room(self, items: int, shards: int, place: Place) -> bool:
        self._count += items * (shards + 2 if shards > 1 else 1)
        if self._count > OPERATORS_MAX:
            message = f"the workflow has more than {OPERATORS_MAX} operators"
            self._problems.add(place, message, "Give each operator more rows, or submit several workflows.")
        return self._count <= OPERATORS_MAX

    def _name_items(self, kind: OperatorType, group: Group) -> None:
        for vertex in group.vertices:
            self.groups.setdefault(self.vertices[vertex].name, Group(kind, [vertex]))

    def _refuse_name(self, name: Any, place: Place) -> None:
        try:
            check_name(str(name), "operator")
        except Exception as error:
            self._problems.add(place, str(error), getattr(error, "hint", ""), key=True)

    def _key_hint(self, key: str, entry: dict[str, Any]) -> str:
        kind = CATALOG.get(entry["type"]) if isinstance(entry.get("type"), str) else None
        if kind is not None and key in kind.params.__struct_fields__:
            return f"{key!r} is a parameter of {kind.name}: write it under 'with:'."
        if kind is not None and key in kind.inputs:
            return f"{key!r} is an input port of {kind.name}: write it under 'inputs:'."
        return nearest(key, OPERATOR_KEYS, "keys")

    def _kind(self, entry: dict[str, Any], place: Place) -> OperatorType | None:
        if "type" not in entry:
            self._problems.add(place, "the operator has no type", f"Add 'type:', one of {', '.join(sorted(CATALOG))}.")
            return None
        text = self._substitution.apply(entry["type"], (*place, "type"))
        if text is MISSING:
            return None
        if not isinstance(text, str) or text not in CATALOG:
            self._problems.add((*place, "type"), f"unknown operator type {shown(text)}", nearest(str(text), CATALOG, "types"))
            return None
        return operator_type(text)

    def _items(self, raw: Any, place: Place) -> Any:
        value = self._substitution.apply(raw, place)
        if value is MISSING:
            return MISSING
        if isinstance(value, dict) and len(value) == 1:
            (form, inner), place = next(iter(value.items())), (*place, next(iter(value)))
            if inner is MISSING:
                return MISSING
            if form == "range":
                return self._range(inner, place)
            if form != "item":
                self._problems.add(
                    place, f"unknown key {shown(form)}", "Write 'foreach: {item: [...]}' or 'foreach: {range: 10}'.", key=True
                )
                return MISSING
            value = inner
        if not isinstance(value, list | tuple):
            self._problems.add(
                place,
                f"foreach goes over a list, not {shown(value)}",
                "Write 'foreach: {item: [...]}' or 'foreach: {range: 10}'.",
            )
            return MISSING
        if not value:
            self._problems.add(place, "foreach has no items", "Give at least one.")
            return MISSING
        return value

    def _range(self, value: Any, place: Place) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._problems.add(place, f"range must be a whole number from 1, not {shown(value)}", "Write 'foreach: {range: 10}'.")
            return MISSING
        return range(value)

    def _common(self, common: Mapping[str, Any], kind: OperatorType, place: Place) -> tuple[Settings, int]:
        values = {key: self._substitution.apply(value, (*place, key)) for key, value in common.items()}
        values = {key: value for key, value in values.items() if value is not MISSING}
        shards = values.pop("shards", 1)
        settings = read_settings(values, place, self._problems, self._settings) if values else self._settings
        if isinstance(shards, bool) or not isinstance(shards, int) or not 1 <= shards <= SHARDS_MAX:
            self._problems.add(
                (*place, "shards"), f"must be an integer from 1 to {SHARDS_MAX}, not {shown(shards)}", "Write a whole number."
            )
            return settings, 1
        if shards > 1 and not kind.shards_by:
            able = ", ".join(sorted(name for name, other in CATALOG.items() if other.shards_by))
            self._problems.add((*place, "shards"), f"{kind.name} cannot be cut into shards", f"These can: {able}.", key=True)
            return settings, 1
        return settings, shards

    def _bind_models(self, vertex: Vertex, place: Place) -> None:
        for role, name in vertex.kind.models.items():
            reference = vertex.params.get(name)
            if not reference:
                continue
            if reference not in self._models:
                self._models[reference] = check_model(reference, self._base, (*place, "with", name), self._problems)
            found = self._models[reference]
            if isinstance(found, Given):
                vertex.folders[role] = found
            elif found is not None:
                vertex.models[role] = found

    def _call(self, entry: dict[str, Any], values: dict[str, Any], place: Place) -> tuple[Any, Given | None]:
        given = values.get("with") or {}
        if given is MISSING or not isinstance(given, dict):
            return given, None
        for name in ("function", "source"):
            if name in given:
                self._problems.add(
                    (*place, "with", name), f"{name!r} does not stand under 'with'", f"Write '{name}:' beside 'type:'.", key=True
                )
        if "function" not in entry:
            self._problems.add(place, "python.call has no function", "Add 'function: \"code.py:name\"'.")
            return MISSING, None
        text = values["function"]
        if text is MISSING:
            return MISSING, None
        found = self._code(text, entry.get("source"), place)
        if found is None:
            return MISSING, None
        function, code, definition = found
        ports = values.get("inputs") if isinstance(values.get("inputs"), dict) else {}
        arguments = given.get("args") if isinstance(given.get("args"), dict) else {}
        for name in sorted(set(ports or {}) & set(arguments or {})):
            self._problems.add((*place, "with", "args", name), f"{name!r} is an input port too", "Rename one of them.", key=True)
        if definition is not None:
            check_call(definition, [*(ports or {}), *(arguments or {})], (*place, "function"), self._problems)
        python = given.get("python") or f"{sys.version_info[0]}.{sys.version_info[1]}"
        return {**given, "function": function, "python": python}, code

    def _code(self, text: Any, source: Any, place: Place) -> tuple[str, Given, ast.FunctionDef | None] | None:
        at = (*place, "function")
        file, _, function = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        if not is_identifier(function) or bool(file) == (source is not None):
            if source is not None:
                self._problems.add(at, f"function must name a function of 'source', not {shown(text)}", "Write 'function: name'.")
            else:
                self._problems.add(
                    at, f"function must be 'file.py:name', not {shown(text)}", "Write 'function: \"code.py:name\"'."
                )
            return None
        if source is not None and (not isinstance(source, str) or not is_unicode(source)):
            self._problems.add(
                (*place, "source"), f"source must be text, not {shown(source)}", "Write 'source: |' and the code below."
            )
            return None
        key = file or "\0" + str(source)
        if key not in self._codes:
            read: str | None = source
            if source is None:
                path = find_path(file, self._base, at, self._problems)
                if path is None:
                    return None
                read = read_source(path, at, self._problems)
            if read is None:
                return None
            self._codes[key] = read, Given("file", "source", read, at)
        read, code = self._codes[key]
        if (key, function) not in self._called:
            self._called[key, function] = check_source(read, file or "source", function, at, self._problems)
        return function, code, self._called[key, function]


def cut_shards(vertices: list[Vertex]) -> None:
    """Cut each vertex with shards into a data.split, its shards and a data.concat, which takes the place of the vertex."""
    for number in range(len(vertices)):
        if vertices[number].shards > 1:
            _cut(vertices, number)


def _cut(vertices: list[Vertex], number: int) -> None:
    whole = vertices[number]
    port, count = whole.kind.shards_by, whole.shards
    group, numbers, _ = whole.rank
    split = Vertex(
        f"{whole.name}-split",
        (group, numbers, "split"),
        operator_type("data.split"),
        whole.place,
        _light(whole.settings),
        {"parts": count},
    )
    split.feeds = {port: whole.feeds.get(port, [])}
    split.share, split.is_share_explicit = whole.share, whole.is_share_explicit
    vertices.append(split)
    at = len(vertices) - 1
    for shard in range(count):
        part: list[Feed] = [Edge(at, "parts", shard)]
        vertices.append(
            Vertex(
                f"{whole.name}-{shard}",
                (group, (*numbers, shard), "shard"),
                whole.kind,
                whole.place,
                whole.settings,
                whole.params,
                None,
                {**whole.feeds, port: part},
                whole.models,
                whole.folders,
                whole.code,
                1,
                whole.share,
                whole.is_share_explicit,
            )
        )
    output = next(iter(whole.kind.outputs))
    whole.feeds = {"rows": [Edge(at + 1 + shard, output) for shard in range(count)]}
    whole.kind, whole.params, whole.settings = operator_type("data.concat"), {}, _light(whole.settings)
    whole.models, whole.folders, whole.code = {}, {}, None


def _light(settings: Settings) -> Settings:
    """Return the settings of the split and the concat: they need no devices of the operator they serve."""
    return Settings(retry=settings.retry, priority=settings.priority, deadline_s=settings.deadline_s, share=settings.share)


def check_names(vertices: Iterable[Vertex], documented: Mapping[Any, Any], problems: Problems) -> None:
    """Note names made for items and shards that are too long, or that something else has."""
    taken: set[str] = set()
    long: set[Place] = set()
    for vertex in vertices:
        name = vertex.name
        is_made = name != vertex.place[-1]
        key = "shards" if vertex.rank[2] else "foreach"
        if is_made and (name in taken or name in documented):
            problems.add(
                (*vertex.place, key), f"it needs the name {name!r}, which is taken", "Rename one of the two operators.", key=True
            )
        taken.add(name)
        if is_made and len(name) > NAME_MAX_LENGTH and vertex.place not in long and is_name(str(vertex.place[-1])):
            long.add(vertex.place)
            hint = f"Names have at most {NAME_MAX_LENGTH} characters; shorten that of the operator."
            problems.add((*vertex.place, key), f"it makes the name {name!r}, which is too long", hint, key=True)
