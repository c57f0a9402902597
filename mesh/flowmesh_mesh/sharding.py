"""``shards: auto``: what the mesh is asked before a number stands in the manifest, and what it answers.

The number is settled once, by whoever submits, so that a manifest says all and is the same by every road.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from flowmesh_mesh.feeds import Edge, Feed, Given
from flowmesh_mesh.manifest import Ref, Resources
from flowmesh_mesh.vertices import Vertex

UNKNOWN = -1

_KEEPS_ROWS = ("data.map", "llm.score", "reward.score")
_LINES = ("jsonl", "csv")


class Wish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operator whose number of shards the mesh is asked for. ``rows`` and ``size_bytes`` of its table are -1 where unknown.

    ``params`` are the numbers among its parameters but for the seed: the rest says nothing of costs. ``model_bytes`` is the size
    of a model that comes with the workflow, by reference.
    """

    type: str
    params: dict[str, Any] = {}
    models: dict[str, str] = {}
    model_bytes: dict[str, int] = {}
    resources: Resources = Resources()
    numeric: str = "any"
    rows: int = UNKNOWN
    size_bytes: int = UNKNOWN


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The number of shards that the mesh would choose, and why.

    ``shard_s`` is what one shard is predicted to take, ``overhead`` which part of all the time is spent on no row; ``samples`` 0
    means that the costs are a prior, ``places`` how many shards can run at a time.
    """

    shards: int
    rows: int = UNKNOWN
    shard_s: float = 0.0
    overhead: float = 0.0
    places: int = 0
    samples: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Settled:
    """A number of shards that was settled for an operator of a workflow."""

    operator: str
    choice: Choice

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"operator": self.operator, **msgspec.to_builtins(self.choice)}

    @property
    def text(self) -> str:
        """Return it in words."""
        choice = self.choice
        if choice.shards == 1:
            return f"{self.operator}: 1 shard" + (f", {choice.note}" if choice.note else "")
        rows = -(-choice.rows // choice.shards)
        basis = f"{choice.samples} batches measured" if choice.samples else "by a prior, never measured"
        words = [
            f"{self.operator}: {choice.shards} shards of {rows} row{'s' if rows > 1 else ''}",
            f"{choice.shard_s:.3g} s each",
            f"{100 * choice.overhead:.2g} % overhead",
            f"{choice.places} at a time",
            basis,
        ]
        return ", ".join([*words, choice.note] if choice.note else words)


class _Table(NamedTuple):
    """What is known of rows beforehand."""

    rows: int = UNKNOWN
    size_bytes: int = UNKNOWN


def wishes(vertices: Sequence[Vertex], order: Iterable[int], ref_of: Callable[[Given], Ref | None]) -> dict[str, Wish]:
    """Return what to ask for, by the name of the vertex; equal operators get the same object.

    ``vertices`` are those of the drawing, ``order`` puts sources before their users, ``ref_of`` tells what given content is.
    """
    tables: dict[int, _Table] = {}
    found: dict[str, Wish] = {}
    same: dict[bytes, Wish] = {}
    files: dict[Path, _Table] = {}
    for number in order:
        if number >= len(vertices):
            continue
        vertex = vertices[number]
        taken = _sum([_read(feed, vertices, tables, ref_of) for feed in vertex.feeds.get("rows", ())])
        if taken.rows < 0:
            taken = _Table(vertex.shards.rows, taken.size_bytes)
        tables[number] = _load(vertex, files) if vertex.kind.name == "data.load" else _given_out(vertex, taken)
        if vertex.shards.is_auto:
            wish = _wish(vertex, taken, ref_of)
            found[vertex.name] = same.setdefault(msgspec.msgpack.encode(wish), wish)
    return found


def _wish(vertex: Vertex, taken: _Table, ref_of: Callable[[Given], Ref | None]) -> Wish:
    models, sizes = dict(vertex.models), {}
    for role, given in vertex.folders.items():
        if (ref := ref_of(given)) is not None:
            models[role] = reference_of(ref)
            sizes[models[role]] = ref.size
    return Wish(
        type=vertex.kind.name,
        params={name: value for name, value in vertex.params.items() if isinstance(value, int | float) and name != "seed"},
        models=models,
        model_bytes=sizes,
        resources=vertex.settings.resources,
        numeric=vertex.settings.numeric,
        rows=taken.rows,
        size_bytes=taken.size_bytes,
    )


def reference_of(ref: Ref) -> str:
    """Return the reference of a model that is given by content."""
    from flowmesh_mesh.references import content_reference

    return content_reference(ref.cid)


# --- how many rows


def _read(feed: Feed, vertices: Sequence[Vertex], tables: Mapping[int, _Table], ref_of: Callable[[Given], Ref | None]) -> _Table:
    """Return what one source of a port gives."""
    if isinstance(feed, Given):
        ref = ref_of(feed)
        return _Table() if ref is None else _Table(ref.rows, ref.size)
    return _part(feed, vertices[feed.vertex], tables.get(feed.vertex, _Table()))


def _part(edge: Edge, source: Vertex, whole: _Table) -> _Table:
    if edge.item < 0:
        return whole
    return _times(whole, 1 / max(1, source.params.get("parts", 1)))


def _given_out(vertex: Vertex, taken: _Table) -> _Table:
    """Return what an operator makes of its table, where that is certain beforehand."""
    name = vertex.kind.name
    if name in _KEEPS_ROWS or name in ("data.concat", "data.split"):
        return taken
    return _times(taken, vertex.params.get("samples", 1)) if name == "llm.generate" else _Table()


def _times(table: _Table, factor: float) -> _Table:
    return _Table(*(value if value < 0 else -int(-value * factor // 1) for value in table))


def _sum(tables: Sequence[_Table]) -> _Table:
    """Return tables one after the other; unknown where one of them is."""
    rows, sizes = [table.rows for table in tables], [table.size_bytes for table in tables]
    return _Table(*(UNKNOWN if not each or min(each) < 0 else sum(each) for each in (rows, sizes)))


def _load(vertex: Vertex, files: dict[Path, _Table]) -> _Table:
    """Count the rows of the files of a data.load that are on this machine; unknown where one is not, or is no text."""
    found = []
    for feed in vertex.feeds.get("file", ()):
        if not isinstance(feed, Given) or not isinstance(feed.content, Path) or vertex.params.get("format") not in _LINES:
            return _Table()
        if feed.content not in files:
            files[feed.content] = _count(feed.content, is_csv=vertex.params["format"] == "csv")
        found.append(files[feed.content])
    whole, limit = _sum(found), vertex.params.get("limit", 0)
    return _times(whole, limit / whole.rows) if limit and whole.rows > limit else whole


def _count(path: Path, *, is_csv: bool) -> _Table:
    """Return how many rows a file has: lines that are not empty, in CSV without the header and with quoted ends of lines."""
    rows, is_quoted = 0, False
    try:
        with path.open("rb") as file:
            for line in file:
                if is_csv and line.count(b'"') % 2:
                    is_quoted = not is_quoted
                rows += not is_quoted and not line.isspace()
        size_bytes = path.stat().st_size
    except OSError:
        return _Table()  # told where the file is stored
    return _Table(max(0, rows - is_csv), size_bytes)
