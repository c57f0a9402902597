"""The nodes by what they are: classes of nodes that are alike in all that a choice depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowmesh_mesh.messages import NodeRecord

if TYPE_CHECKING:
    from flowmesh_scheduler.core.state import Node

MARKETS = {"inline": "inline", "data": "data", "user": "user", "engine": "engine", "train": "engine"}
"""Kinds of executor that compete for the same slots have one market."""

ORDER = ("inline", "data", "user", "engine")
"""The markets, the quickest work first."""


@dataclass(slots=True, eq=False)
class NodeClass:
    """Nodes that are alike in all that a choice depends on, but for what they hold.

    ``idle`` holds, by market, the usable nodes with a free slot, in the order in which they became idle; ``warm`` the usable
    nodes by the model that they have loaded; ``ends`` a heap of when what runs is predicted to end.
    """

    number: int
    sample: NodeRecord
    device: str
    nodes: dict[str, Node] = field(default_factory=dict)
    idle: dict[str, dict[str, Node]] = field(default_factory=lambda: {market: {} for market in MARKETS.values()})
    warm: dict[str, dict[str, Node]] = field(default_factory=dict)
    memory_bytes: int = 0
    ends: list[tuple[int, str]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Fleet:
    """The classes, and the nodes whose place in them has to be looked at again."""

    classes: dict[object, NodeClass] = field(default_factory=dict)
    stale: dict[Node, None] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    """Markets in which a node became idle or a class came up since the last placement."""

    reference: NodeClass | None = None
    """The class with the most nodes: what work is worth is told in its seconds."""
