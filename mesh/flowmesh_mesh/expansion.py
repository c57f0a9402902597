"""From one operator of a document to its vertices: ``foreach``, references, arguments, models, code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmesh_mesh.arguments import ArgumentChecker
from flowmesh_mesh.calls import CallReader
from flowmesh_mesh.catalog import CATALOG, OperatorType, operator_type
from flowmesh_mesh.document import OPERATOR_KEYS, OPERATORS_MAX, SETTING_KEYS
from flowmesh_mesh.feeds import Given, Group
from flowmesh_mesh.names import check_name, is_name
from flowmesh_mesh.problems import Place, Problems, nearest, shown
from flowmesh_mesh.references import check_model
from flowmesh_mesh.settings import Settings, read_settings
from flowmesh_mesh.substitution import MISSING, Substitution, mentions_item
from flowmesh_mesh.vertices import AUTO, SHARDS_MAX, Rank, Shards, Vertex

FAULTY_ITEMS_MAX = 10
"""After this many problems, the other items of a ``foreach`` are not looked at."""


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
        self._calls = CallReader(problems, base)
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
        common = {key: entry[key] for key in (*SETTING_KEYS, "shards", "rows") if key in entry}
        own: dict[str, Any] = {key: entry[key] for key in ("with", "inputs", "function") if key in entry}
        moving = [key for key, value in own.items() if items is not None and mentions_item(value)]
        fixed = {key: self._substitution.apply(own[key], (*place, key)) for key in own if key not in moving}
        if items is None:
            settings, shards = self._common(common, kind, place)
            if self._has_room(1, shards, place):
                group.vertices.append(self._vertex(name, (name, (), ""), kind, settings, shards, entry, fixed, place))
            return
        same = None if mentions_item(common) else self._common(common, kind, place)
        if not self._has_room(len(items), same[1] if same else Shards(), place):
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
        shards: Shards,
        entry: dict[str, Any],
        values: dict[str, Any],
        place: Place,
    ) -> int:
        given, code = values.get("with"), None
        if kind.name == "python.call":
            given, code = self._calls.read(entry, values, place)
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

    def _has_room(self, items: int, shards: Shards, place: Place) -> bool:
        self._count += items * (shards.number + 2 if shards.number > 1 else 1)
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

    def _common(self, common: Mapping[str, Any], kind: OperatorType, place: Place) -> tuple[Settings, Shards]:
        values = {key: self._substitution.apply(value, (*place, key)) for key, value in common.items()}
        values = {key: value for key, value in values.items() if value is not MISSING}
        shards, rows = values.pop("shards", 1), values.pop("rows", None)
        settings = read_settings(values, place, self._problems, self._settings) if values else self._settings
        return settings, self._shards(shards, rows, kind, place, is_cut="shards" in common)

    def _shards(self, shards: Any, rows: Any, kind: OperatorType, place: Place, *, is_cut: bool) -> Shards:
        if rows is not None:
            self._check_rows(rows, kind, place, is_cut=is_cut)
        if shards == AUTO and isinstance(shards, str) and kind.shards_by:
            is_number = isinstance(rows, int) and not isinstance(rows, bool)
            return Shards(1, True, rows if is_number else -1)
        if shards == AUTO:
            shards = 2  # refused below, as any number of shards is
        if isinstance(shards, bool) or not isinstance(shards, int) or not 1 <= shards <= SHARDS_MAX:
            self._problems.add(
                (*place, "shards"),
                f"must be an integer from 1 to {SHARDS_MAX} or 'auto', not {shown(shards)}",
                "Write a whole number, or 'auto'.",
            )
            return Shards()
        if shards > 1 and not kind.shards_by:
            able = ", ".join(sorted(name for name, other in CATALOG.items() if other.shards_by))
            self._problems.add((*place, "shards"), f"{kind.name} cannot be cut into shards", f"These can: {able}.", key=True)
            return Shards()
        return Shards(shards)

    def _check_rows(self, rows: Any, kind: OperatorType, place: Place, *, is_cut: bool) -> None:
        place = (*place, "rows")
        if isinstance(rows, bool) or not isinstance(rows, int):
            hint = "Write about how many rows it will get, beside 'shards: auto'."
            if "rows" in kind.inputs:
                hint = f"'rows' is an input port of {kind.name}: write it under 'inputs:'."
            self._problems.add(place, f"unknown key 'rows', unless it is a number of rows, not {shown(rows)}", hint, key=True)
        elif rows < 1:
            self._problems.add(place, f"must be at least 1, not {rows}", "Write about how many rows it will get.")
        elif not is_cut:
            hint = "Write 'shards: auto' beside it, or leave it out."
            self._problems.add(place, "a number of rows is only a hint for 'shards: auto'", hint, key=True)

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
