"""The vertices of a plan, and how one with shards is cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from flowmesh_mesh.catalog import OperatorType, operator_type
from flowmesh_mesh.feeds import Edge, Feed, Given
from flowmesh_mesh.names import NAME_MAX_LENGTH, is_name
from flowmesh_mesh.problems import Place, Problems
from flowmesh_mesh.settings import Settings

Rank = tuple[str, tuple[int, ...], str]

SHARDS_MAX = 100_000

AUTO = "auto"
"""In place of a number of shards: it is settled at submission, by what the rows are predicted to cost."""


class Shards(NamedTuple):
    """How an operator is to be cut; with ``is_auto`` the number is yet to be settled. ``rows`` is a hint, -1 for none."""

    number: int = 1
    is_auto: bool = False
    rows: int = -1


WHOLE = Shards()


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
    shards: Shards = WHOLE
    share: str = ""
    is_share_explicit: bool = False


def cut_shards(vertices: list[Vertex]) -> None:
    """Cut each vertex with shards into a data.split, its shards and a data.concat, which takes the place of the vertex."""
    for number in range(len(vertices)):
        if vertices[number].shards.number > 1:
            _cut(vertices, number)


def settled(vertices: Iterable[Vertex], counts: Mapping[str, int]) -> list[Vertex]:
    """Return copies of vertices in which ``shards: auto`` has become a number, by name; 1 where there is none."""
    return [
        replace(vertex, shards=Shards(counts.get(vertex.name, 1)) if vertex.shards.is_auto else vertex.shards)
        for vertex in vertices
    ]


def _cut(vertices: list[Vertex], number: int) -> None:
    whole = vertices[number]
    port, count = whole.kind.shards_by, whole.shards.number
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
        rank = (group, (*numbers, shard), "shard")
        feeds = {**whole.feeds, port: part}
        vertices.append(replace(whole, name=f"{whole.name}-{shard}", rank=rank, feeds=feeds, shards=Shards()))
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
