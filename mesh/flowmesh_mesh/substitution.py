"""``${...}`` in the values of a document, and the check that a value is plain JSON.

A string that is one whole ``${...}`` becomes the value with its type; inside other text it becomes text. ``$${`` stands
for a literal ``${``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from flowmesh_mesh.positions import DEPTH_MAX
from flowmesh_mesh.problems import Place, Problems, nearest, shown

_REFERENCE = re.compile(r"(\$?)\$\{([^{}]*)\}")
_WHOLE = re.compile(r"\$\{([^{}]*)\}\Z")
INTEGER_MIN = -(2**63)
INTEGER_MAX = 2**63 - 1

MISSING: Any = object()
"""Stands for a value that could not be had; the problem is noted already."""


class Substitution:
    """Replaces references in values by what they name; notes what cannot be replaced."""

    def __init__(self, problems: Problems, params: Mapping[str, Any], broken: frozenset[str] = frozenset()) -> None:
        self._problems = problems
        self._names: dict[str, Any] = {"params": params}
        self._broken = broken

    def bind(self, **names: Any) -> None:
        """Give names to the item at hand (``item``, ``index``)."""
        self._names.update(names)

    def unbind(self) -> None:
        """Forget the item."""
        self._names = {"params": self._names["params"]}

    def apply(self, value: Any, place: Place, depth: int = 0) -> Any:
        """Return ``value`` with references replaced; the same object when there are none."""
        kind = type(value)
        if kind is str:
            if not is_unicode(value):
                self._problems.add(place, "the text holds half a character (a lone surrogate)", "Remove it.")
                return ""
            return self._text(value, place) if "${" in value else value
        if kind is int:
            if not INTEGER_MIN <= value <= INTEGER_MAX:
                self._problems.add(place, f"the number {shown(value)} does not fit into 64 bits", "Write it as text.")
            return value
        if kind is bool or value is None:
            return value
        if kind is float:
            if not math.isfinite(value):
                self._problems.add(place, f"{value} is not a number that can be kept", "Leave it out or write a finite number.")
            return value
        if depth >= DEPTH_MAX:
            self._problems.add(place, f"nested more than {DEPTH_MAX} deep", "Flatten the value.")
            return None
        if kind is dict:
            return self._record(value, place, depth)
        if kind is list or kind is tuple:
            changed = [self.apply(item, (*place, number), depth + 1) for number, item in enumerate(value)]
            return changed if kind is tuple or any(a is not b for a, b in zip(changed, value, strict=True)) else value
        if isinstance(value, str):
            return self.apply(str.__str__(value), place, depth)
        self._problems.add(
            place, f"a {kind.__name__} is not a JSON value", "Use text, numbers, true, false, null, lists and mappings."
        )
        return None

    def _record(self, value: dict[Any, Any], place: Place, depth: int) -> dict[str, Any]:
        changed: dict[str, Any] | None = None
        for key, item in value.items():
            if type(key) is not str or not is_unicode(key):
                self._problems.add(place, f"the key {shown(key)} is not text", "Use text as keys.")
                continue
            new = self.apply(item, (*place, key), depth + 1)
            if new is not item:
                if changed is None:
                    changed = dict(value)
                changed[key] = new
        return value if changed is None else changed

    def _text(self, text: str, place: Place) -> Any:
        whole = _WHOLE.match(text)
        if whole:
            return self._named(whole.group(1), place)

        def replace(match: re.Match[str]) -> str:
            if match.group(1):
                return match.group(0)[1:]
            found = self._named(match.group(2), place)
            if found is MISSING:
                return ""
            return found if isinstance(found, str) else msgspec.json.encode(found).decode()

        return _REFERENCE.sub(replace, text)

    def _named(self, name: str, place: Place) -> Any:
        at: Any = self._names
        for number, step in enumerate(name.strip().split(".")):
            if isinstance(at, Mapping) and step in at:
                at = at[step]
                continue
            if number == 1 and at is self._names["params"] and step in self._broken:
                return MISSING
            known = [".".join([*name.strip().split(".")[:number], key]) for key in at] if isinstance(at, Mapping) else []
            if number == 0:
                known = [key for key in known if key != "params"] + [f"params.{key}" for key in self._names["params"]]
            hint = nearest(name.strip(), known, "names") + " Write $${ for a literal ${."
            self._problems.add(place, f"${{{name}}} names nothing", hint)
            return MISSING
        return at


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written as UTF-8; JSON may hold halves of characters, which cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mentions_item(value: Any) -> bool:
    """Tell whether a value refers to the item of a ``foreach``."""
    if isinstance(value, str):
        return "${" in value and any(name.strip().split(".")[0] in ("item", "index") for _, name in _REFERENCE.findall(value))
    if isinstance(value, dict):
        return any(mentions_item(item) for item in value.values())
    return isinstance(value, list | tuple) and any(mentions_item(item) for item in value)
