"""Reading YAML and JSON into plain data while keeping where everything stands.

YAML is read with the types of JSON only (the core schema of YAML 1.2: ``on``, ``yes`` and dates are text, keys are
always text), from the parser's events and without recursion, so that depth and expansion are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.problems import Place, Problems

TEXT_MAX_BYTES = 64 * 1024 * 1024
DEPTH_MAX = 100
EXPANDED_MAX = 1_000_000
"""Largest number of values that aliases and merges may stand for in one document."""

_INTEGER = re.compile(r"[-+]?[0-9]{1,64}\Z|0o[0-7]{1,64}\Z|0x[0-9a-fA-F]{1,64}\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_TAG = "tag:yaml.org,2002:"
_TAGS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq"))

Mark = tuple[int, int, int, int]
"""Line and column from 1 of a key, then of its value."""


class Positions:
    """Where the parts of one document stand in its text."""

    def __init__(self, file: str = "") -> None:
        self.file = file
        self.root: Any = None
        self._marks: dict[int, dict[Any, Mark]] = {}

    def note(self, container: Any, key: Any, mark: Mark) -> None:
        """Keep the mark of one entry of a container, which must stay alive as part of ``root``."""
        self._marks.setdefault(id(container), {})[key] = mark

    def mark(self, container: Any, key: Any) -> Mark | None:
        """Return the mark of one entry of a container."""
        return self._marks.get(id(container), {}).get(key)

    def locate(self, place: Place, *, key: bool = False) -> tuple[int, int]:
        """Return line and column from 1; of the nearest part around ``place`` where it has none; (0, 0) without a text."""
        found, at = (0, 0), self.root
        for number, step in enumerate(place):
            mark = self.mark(at, step)
            if mark is None:
                break
            is_key = key and number == len(place) - 1
            found = mark[:2] if is_key else mark[2:]
            at = at[step]
        return found


def parse_json(text: str, file: str = "") -> tuple[Any, Positions]:
    """Return the data of a JSON text; raise DocumentError with the line of what is wrong."""
    import json

    positions = Positions(file)
    problems = Problems(_Fixed(file))

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(entries)
        if len(record) != len(entries):
            keys = [key for key, _ in entries]
            for key in sorted({key for key in keys if keys.count(key) > 1}):
                problems.add((key,), f"the key {key!r} stands twice in one object", "Remove one of them.")
        return record

    try:
        positions.root = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        broken = Problems(_Fixed(file, error.lineno, error.colno))
        broken.add((), f"not JSON: {error.msg}", "Mend the syntax at this place.")
        broken.check()
    except (RecursionError, ValueError) as error:
        problems.add((), f"not JSON that can be read: {error}", f"Nest at most {DEPTH_MAX} deep.")
    problems.check()
    return positions.root, positions


def parse_yaml(text: str, file: str = "") -> tuple[Any, Positions]:
    """Return the data of a YAML text and the places in it; raise DocumentError with the line of what is wrong."""
    import yaml

    builder = _Builder(file)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        for event in yaml.parse(text, Loader=loader):
            builder.take(event)
    except _TooMuch:
        pass
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        begun = f" begun on line {error.context_mark.line + 1}" if error.context and error.context_mark else ""
        what = ", ".join(part for part in (f"{error.context}{begun}" if error.context else "", error.problem) if part)
        builder.broken(line, column, f"not YAML: {what}", "Mend the syntax at this place; quote text that holds ': ' or '#'.")
    except yaml.YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0) or 0) + 1
        reason = getattr(error, "reason", None) or str(error).splitlines()[0]
        builder.broken(line, 1, f"not YAML: {reason}", "Remove characters that are not text.")
    return builder.finish()


class _TooMuch(Exception):
    """Stops the parser at a limit; the problem is noted already."""


class _Fixed:
    """Locates everything at one place."""

    def __init__(self, file: str, line: int = 0, column: int = 0) -> None:
        self.file, self.line, self.column = file, line, column

    def locate(self, place: Place, *, key: bool = False) -> tuple[int, int]:
        return self.line, self.column


class _Frame:
    """A container that is still open."""

    __slots__ = ("anchor", "column", "container", "key", "key_column", "key_line", "line", "merges", "weight")

    def __init__(self, container: Any, anchor: str | None, line: int, column: int) -> None:
        self.container, self.anchor, self.line, self.column = container, anchor, line, column
        self.key: Any = None
        self.key_line = self.key_column = 0
        self.merges: list[dict[str, Any]] = []
        self.weight = 1


class _Builder:
    """Builds plain data from the events of a YAML parser."""

    def __init__(self, file: str) -> None:
        self._positions = Positions(file)
        self._problems: list[tuple[int, int, Place, str, str]] = []
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._open: set[str] = set()
        self._expanded = 0
        self._documents = 0

    def broken(self, line: int, column: int, message: str, hint: str) -> None:
        """Note a problem at a line and column from 1."""
        self._problems.append((line, column, tuple(self._path()), message, hint))

    def finish(self) -> tuple[Any, Positions]:
        """Return data and positions; raise DocumentError when problems were noted."""
        found = []
        for line, column, place, message, hint in self._problems:
            problems = Problems(_Fixed(self._positions.file, line, column))
            problems.add(place, message, hint)
            found += problems.list()
        if found:
            from flowmesh_mesh.problems import DocumentError

            raise DocumentError(found)
        return self._positions.root, self._positions

    def take(self, event: Any) -> None:
        """Take the next event of the parser."""
        kind = type(event).__name__
        if kind == "ScalarEvent":
            self._scalar(event)
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            self._begin(event, {} if kind == "MappingStartEvent" else [])
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            self._end()
        elif kind == "AliasEvent":
            self._alias(event)
        elif kind == "DocumentStartEvent":
            self._documents += 1
            if self._documents > 1:
                self._stop(event, "a second document begins here", "Keep one workflow per file; remove the '---'.")

    def _path(self) -> Iterator[str | int]:
        for frame in self._stack:
            if isinstance(frame.container, list):
                yield len(frame.container)
            elif frame.key is not None:
                yield frame.key

    def _stop(self, event: Any, message: str, hint: str) -> None:
        self.broken(event.start_mark.line + 1, event.start_mark.column + 1, message, hint)
        raise _TooMuch

    def _begin(self, event: Any, container: Any) -> None:
        mark = event.start_mark
        if len(self._stack) >= DEPTH_MAX:
            self._stop(event, f"nested more than {DEPTH_MAX} deep", "Flatten the document.")
        if self._expects_key():
            self._stop(event, "a key must be text", "Write keys as plain words.")
        self._check_tag(event)
        if event.anchor:
            self._open.add(event.anchor)
        self._stack.append(_Frame(container, event.anchor, mark.line + 1, mark.column + 1))

    def _end(self) -> None:
        frame = self._stack.pop()
        for merged in frame.merges:
            for key, value in merged.items():
                if key not in frame.container:
                    frame.container[key] = value
                    mark = self._positions.mark(merged, key)
                    if mark:
                        self._positions.note(frame.container, key, mark)
        if frame.anchor:
            self._open.discard(frame.anchor)
            self._anchors[frame.anchor] = (frame.container, frame.weight)
        self._attach(frame.container, frame.line, frame.column, frame.weight)

    def _alias(self, event: Any) -> None:
        if event.anchor in self._open:
            self._stop(event, f"the alias *{event.anchor} stands inside of what it names", "Write the value out instead.")
        if event.anchor not in self._anchors:
            self._stop(event, f"the alias *{event.anchor} names nothing", f"Put &{event.anchor} before the value that it names.")
        if self._expects_key():
            self._stop(event, "a key must be text", "Write keys as plain words.")
        value, weight = self._anchors[event.anchor]
        self._expanded += weight
        if self._expanded > EXPANDED_MAX:
            self._stop(event, f"aliases stand for more than {EXPANDED_MAX} values", "Write fewer aliases of aliases.")
        self._attach(value, event.start_mark.line + 1, event.start_mark.column + 1, weight)

    def _scalar(self, event: Any) -> None:
        mark = event.start_mark
        line, column, text = mark.line + 1, mark.column + 1, event.value
        if self._expects_key():
            self._key(event, text, line, column)
            return
        value: Any = text
        tag = event.tag
        if tag is None and event.implicit[0]:
            value = _plain(text)
        elif tag is not None and tag != "!":
            self._check_tag(event)
            value = _tagged(tag, text)
        if event.anchor:
            self._anchors[event.anchor] = (value, 1)
        self._attach(value, line, column, 1)

    def _check_tag(self, event: Any) -> None:
        if event.tag not in (None, "!") and event.tag not in _TAGS:
            mark = event.start_mark
            self.broken(mark.line + 1, mark.column + 1, f"the tag {event.tag!r} is not allowed", "Write plain values only.")

    def _expects_key(self) -> bool:
        return bool(self._stack) and isinstance(self._stack[-1].container, dict) and self._stack[-1].key is None

    def _key(self, event: Any, text: str, line: int, column: int) -> None:
        frame = self._stack[-1]
        frame.key, frame.key_line, frame.key_column = text, line, column
        if event.anchor:
            self._anchors[event.anchor] = (text, 1)
        if text in frame.container:
            first = self._positions.mark(frame.container, text)
            where = f" (first on line {first[0]})" if first else ""
            self.broken(line, column, f"the key {text!r} stands twice{where}", "Remove one of them.")

    def _attach(self, value: Any, line: int, column: int, weight: int) -> None:
        if not self._stack:
            self._positions.root = value
            return
        frame = self._stack[-1]
        frame.weight += weight
        if isinstance(frame.container, list):
            self._positions.note(frame.container, len(frame.container), (line, column, line, column))
            frame.container.append(value)
            return
        key, frame_key = frame.key, None
        if key == "<<":
            self._merge(frame, value, line, column)
        else:
            self._positions.note(frame.container, key, (frame.key_line, frame.key_column, line, column))
            frame.container[key] = value
        frame.key = frame_key

    def _merge(self, frame: _Frame, value: Any, line: int, column: int) -> None:
        sources = value if isinstance(value, list) else [value]
        if not all(isinstance(source, dict) for source in sources):
            self.broken(line, column, "'<<' merges mappings only", "Name a mapping: '<<: *anchor'.")
            return
        self._expanded += sum(len(source) for source in sources)
        if self._expanded > EXPANDED_MAX:
            self.broken(line, column, f"merges stand for more than {EXPANDED_MAX} values", "Write fewer merges.")
            raise _TooMuch
        frame.merges += sources


def _plain(text: str) -> Any:
    first = text[:1]
    if first.isalpha() and first not in "tTfFnN":
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.match(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(text) if _FLOAT.match(text) else text


def _tagged(tag: str, text: str) -> Any:
    if tag == _TAG + "str":
        return text
    value = _plain(text)
    return float(value) if tag == _TAG + "float" and isinstance(value, int) else value


def read_text(data: bytes, file: str) -> str:
    """Return the text of a document; raise UsageError when it is too large or not UTF-8."""
    if len(data) > TEXT_MAX_BYTES:
        raise UsageError(
            f"{file} has {len(data)} bytes", hint=f"A workflow has at most {TEXT_MAX_BYTES} bytes; put data into inputs."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{file}:{line} is not UTF-8 text", hint="Save the workflow as UTF-8.") from error
