"""What feeds the input ports of an operator: references to other operators, or content that comes with the document."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmesh_cas.cid import cid_parse
from flowmesh_cas.errors import UsageError
from flowmesh_mesh.catalog import KINDS, OperatorType, Port, output_kind
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.names import is_identifier
from flowmesh_mesh.problems import Place, Problems, nearest, shown
from flowmesh_mesh.substitution import MISSING

FORMS = ("path", "rows", "value", "cid")
_PART = re.compile(r"([A-Za-z_]\w*)\[([0-9]{1,9})\]\Z", re.ASCII)
CID_KEYS = ("cid", "kind", "digest", "size", "rows")


@dataclass(frozen=True, slots=True)
class Edge:
    """An output port of a vertex (its number); ``item`` picks one part of it, -1 takes all."""

    vertex: int
    port: str
    item: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Content that comes with the document: its kind, and a path, rows, a value or a Ref."""

    kind: str
    form: str
    content: Any
    place: Place


Feed = Edge | Given


@dataclass(slots=True)
class Group:
    """What an operator of the document became: one vertex, or as many as its ``foreach`` has items.

    ``kind`` is None where it is not known; the problem is noted already.
    """

    kind: OperatorType | None
    vertices: list[int]
    is_many: bool = False


class FeedReader:
    """Reads ``inputs``; the same mapping (as an object) only once."""

    def __init__(
        self, problems: Problems, base: Path | None, groups: Mapping[str, Group], params: Callable[[int], Mapping[str, Any]]
    ) -> None:
        self._problems = problems
        self._base = base
        self._groups = groups
        self._params = params
        self._edges: dict[tuple[str, str], list[Edge]] = {}
        self._read: dict[tuple[str, int], dict[str, list[Feed]]] = {}

    def read(self, kind: OperatorType, inputs: Any, place: Place) -> dict[str, list[Feed]]:
        """Return the feeds of each port, which are shared and not to be changed; problems are noted.

        ``inputs`` must stay alive: the same object is read once.
        """
        key = kind.name, id(inputs)
        if key not in self._read:
            self._read[key] = self._ports(kind, {} if inputs is None else inputs, place)
        return self._read[key]

    def _ports(self, kind: OperatorType, inputs: Any, place: Place) -> dict[str, list[Feed]]:
        if not isinstance(inputs, dict):
            self._problems.add(
                place, f"'inputs' must be a mapping of ports, not {shown(inputs)}", "Write 'inputs: {port: operator.port}'."
            )
            return {}
        feeds: dict[str, list[Feed]] = {}
        for name, value in inputs.items():
            if not isinstance(name, str):
                continue  # noted where references were replaced
            port = self._port(kind, name, (*place, name))
            if port is not None:
                feeds[name] = self._feeds(port, name, value, (*place, name))
                if not port.is_many and len(feeds[name]) > 1:
                    self._problems.add(
                        (*place, name), f"the input port {name!r} takes one source, not {len(feeds[name])}", "Name one."
                    )
        for name, port in kind.inputs.items():
            if port.required and name not in inputs:
                example = f"Add '{name}: operator.port'" + (
                    f", or '{name}: {{path: ...}}'." if port.kind in ("file", "folder") else "."
                )
                self._problems.add(place[:-1], f"the input port {name!r} is not connected", example)
        if kind.open_inputs == "rows" and not feeds and not inputs:
            self._problems.add(
                place[:-1], "no input port is connected", "Add at least one table: 'inputs: {name: operator.rows}'."
            )
        return feeds

    def _port(self, kind: OperatorType, name: str, place: Place) -> Port | None:
        if name in kind.inputs:
            return kind.inputs[name]
        if not kind.open_inputs:
            self._problems.add(
                place, f"{kind.name} has no input port {shown(name)}", nearest(name, kind.inputs, "ports"), key=True
            )
            return None
        if not is_identifier(name):
            self._problems.add(place, f"{shown(name)} cannot name a port", "Use letters, digits and '_'.", key=True)
            return None
        return Port(kind.open_inputs)

    def _feeds(self, port: Port, name: str, value: Any, place: Place) -> list[Feed]:
        if not isinstance(value, list):
            return self._one(port, name, value, place)
        if not value:
            self._problems.add(place, f"the input port {name!r} has an empty list", "Name at least one source.")
        return [feed for number, item in enumerate(value) for feed in self._one(port, name, item, (*place, number))]

    def _one(self, port: Port, name: str, value: Any, place: Place) -> list[Feed]:
        if isinstance(value, str):
            return self._reference(port, name, value, place)
        if isinstance(value, dict):
            given = self._given(port, value, place)
            if given is None or not self._fits(port, name, given.kind, place):
                return []
            return [given]
        if value is not MISSING:
            forms = "'operator.port', {path: ...}, {rows: [...]}, {value: ...} or {cid: ...}"
            self._problems.add(place, f"{shown(value)} is no input", f"Write {forms}.")
        return []

    def reference(self, text: str, place: Place) -> list[Edge]:
        """Return what ``operator.port`` (or ``operator``, with one port) names; a shared list, empty with a problem noted."""
        target, _, output = text.partition(".")
        part = _PART.match(output)
        output = part.group(1) if part else output
        group = self._groups.get(target)
        if group is None:
            hint = "Write '{path: ...}' for a file." if "/" in text else nearest(target, self._groups, "operators")
            self._problems.add(place, f"there is no operator {shown(target)}", hint)
            return []
        if group.kind is None:
            return []
        outputs = group.kind.outputs
        if not output and len(outputs) == 1:
            output = next(iter(outputs))
        if output not in outputs:
            ports = [f"{target}.{key}" for key in outputs]
            message = (
                f"{target!r} ({group.kind.name}) has no output port {shown(output)}"
                if output
                else f"{target!r} has several output ports"
            )
            self._problems.add(place, message, nearest(f"{target}.{output}", ports, "ports"))
            return []
        known = self._edges.get((target, output))
        if known is None:
            known = self._edges[target, output] = [Edge(vertex, output) for vertex in group.vertices]
        if part:
            return self._part(group.kind, known, int(part.group(2)), text, place)
        return known

    def _kinds(self, kind: OperatorType, edges: list[Edge]) -> list[str]:
        """Return what kinds of content these outputs give; nothing for one whose parameters are wrong."""
        declared = {kind.outputs[edge.port].kind for edge in edges[:1]}
        if declared != {"any"}:
            return list(declared)
        known = [params for edge in edges if (params := self._params(edge.vertex))]
        return sorted({output_kind(kind, edges[0].port, params) for params in known})

    def _part(self, kind: OperatorType, edges: list[Edge], item: int, text: str, place: Place) -> list[Edge]:
        """Return one part of what was split (``split.parts[3]``)."""
        if kind.name != "data.split" or len(edges) != 1:
            self._problems.add(place, f"{text} has no parts to choose from", "Only the parts of one data.split are numbered.")
            return []
        if item >= self._params(edges[0].vertex).get("parts", item + 1):
            self._problems.add(place, f"there is no part {item} of {text.partition('[')[0]}", "Parts are numbered from 0.")
            return []
        return [Edge(edges[0].vertex, edges[0].port, item)]

    def _reference(self, port: Port, name: str, text: str, place: Place) -> list[Feed]:
        edges = self.reference(text, place)
        group = self._groups.get(text.partition(".")[0])
        if group is None or group.kind is None:
            return []
        kinds = self._kinds(group.kind, edges)
        wrong = [kind for kind in kinds if not self._fits(port, name, kind, place, text)]
        return [] if wrong else list(edges)

    def _fits(self, port: Port, name: str, kind: str, place: Place, source: str = "") -> bool:
        if port.kind in ("any", kind):
            return True
        hint = f"Connect something of kind {port.kind}."
        if port.kind == "rows" and kind == "file":
            hint = "Read the file with a data.load operator and connect its rows."
        elif port.kind == "rows" and kind == "value":
            hint = "Let python.call return rows ('with: {returns: rows}'), or give {rows: [...]}."
        elif port.kind == "value" and kind == "rows":
            hint = "Turn the rows into a value with a python.call operator."
        what = f"{source} gives {kind}" if source else f"this is {kind}"
        self._problems.add(place, f"the input port {name!r} takes {port.kind}, but {what}", hint)
        return False

    def _given(self, port: Port, value: dict[str, Any], place: Place) -> Given | None:
        forms = [form for form in FORMS if form in value]
        form = "cid" if "cid" in forms else forms[0] if len(forms) == 1 else ""
        if not form:
            self._problems.add(
                place, "an input needs one of path, rows, value, cid", nearest(next(iter(value), ""), FORMS, "forms")
            )
            return None
        for key in value:
            if key not in (CID_KEYS if form == "cid" else (form,)):
                self._problems.add((*place, key), f"unknown key {shown(key)}", f"Keep only {form!r} here.", key=True)
        content = value[form]
        if content is MISSING:
            return None
        if form == "path":
            return self._path(content, (*place, "path"))
        if form == "rows":
            return self._rows(content, (*place, "rows"))
        return Given("value", form, content, place) if form == "value" else self._content(value, place)

    def _path(self, text: Any, place: Place) -> Given | None:
        path = find_path(text, self._base, place, self._problems)
        if path is None:
            return None
        return Given("folder" if path.is_dir() else "file", "path", path, place)

    def _rows(self, rows: Any, place: Place) -> Given | None:
        if not isinstance(rows, list):
            self._problems.add(
                place, f"rows must be a list of mappings, not {shown(rows)}", "Write 'rows: [{column: value}, ...]'."
            )
            return None
        wrong = [number for number, row in enumerate(rows) if not isinstance(row, dict)]
        for number in wrong[:3]:
            self._problems.add(
                (*place, number), f"a row is a mapping of columns, not {shown(rows[number])}", "Write '{column: value}'."
            )
        return None if wrong else Given("rows", "rows", rows, place)

    def _content(self, value: dict[str, Any], place: Place) -> Given | None:
        before = self._problems.count
        kind, digest, size, rows = value.get("kind"), value.get("digest"), value.get("size"), value.get("rows", -1)
        if kind not in KINDS:
            self._problems.add(
                (*place, "kind"), f"kind must be one of {', '.join(KINDS)}, not {shown(kind)}", "Say what the content is."
            )
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            self._problems.add(
                (*place, "digest"), f"digest must be a SHA-256 in hex, not {shown(digest)}", "Copy it from 'flowmesh show'."
            )
        for key, number, low in (("size", size, 0), ("rows", rows, -1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < low:
                self._problems.add(
                    (*place, key), f"{key} must be a whole number, not {shown(number)}", "Copy it from 'flowmesh show'."
                )
        try:
            cid = cid_parse(value["cid"]) if isinstance(value["cid"], str) else b""
        except UsageError:
            cid = b""
        if not cid:
            self._problems.add(
                (*place, "cid"), f"not a CID: {shown(value['cid'])}", "A CID looks like bafy... or bafk... (CIDv1, base32)."
            )
        if self._problems.count != before or not isinstance(digest, str):
            return None
        return Given(str(kind), "cid", Ref(str(kind), cid, bytes.fromhex(digest), int(size or 0), int(rows)), place)


def find_path(text: Any, base: Path | None, place: Place, problems: Problems) -> Path | None:
    """Return the file or folder that a document names, relative to its own folder; None when a problem was noted."""
    if not isinstance(text, str | Path) or not str(text) or "\0" in str(text):
        problems.add(place, f"{shown(text)} is not a path", "Write the path of a file or folder.")
        return None
    if base is None:
        hint = "Submit with 'flowmesh submit', or give {rows: [...]}, {value: ...} or {cid: ...}."
        problems.add(place, "paths mean nothing to the mesh: the file is on the machine of the author", hint)
        return None
    try:
        path = base / Path(text).expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError:
        problems.add(place, f"there is no file or folder {text}", _look_around(base / Path(text)))
        return None
    except (OSError, RuntimeError) as error:
        problems.add(place, f"cannot read {text}: {getattr(error, 'strerror', None) or error}", "Name a file that you may read.")
        return None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        problems.add(place, f"{text} is neither a file nor a folder", "Name a regular file or a folder.")
        return None
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        problems.add(place, f"cannot read {text}: permission denied", "Name a file that you may read.")
        return None
    return path


def _look_around(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    import itertools

    try:
        names = [entry.name for entry in itertools.islice(os.scandir(path.parent), 1000)]
    except OSError:
        names = []
    hint = nearest(path.name, names)
    return (
        hint if hint.startswith("Did") else f"Paths stand from the folder of the document; {path.name!r} is not in {path.parent}."
    )
