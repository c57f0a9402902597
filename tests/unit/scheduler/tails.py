"""How the nodes of the tests run what follows in a chain: the same sums as a real node does, and no more."""

from __future__ import annotations

from flowmesh_mesh.hops import inputs_after, key_of
from flowmesh_mesh.messages import Assignment, Hop, Item, Located, Outcome
from flowmesh_mesh.subjects import HUB


class Tail:
    """What follows one item: hops still to come, and the keys run so far."""

    def __init__(self, item: Item, hops: tuple[Hop, ...]) -> None:
        self.hops = list(hops)
        self.keys = [item.key]

    def next(self, outcome: Outcome, node: str) -> tuple[Item, str] | None:
        """Return the item that follows on this outcome, and its type."""
        if outcome.reason != "succeeded" or not self.hops:
            return None
        hop = self.hops.pop(0)
        inputs = inputs_after(hop.operator, outcome.outputs)
        key = key_of(hop, inputs)
        self.keys.append(key)
        located = {port: tuple(Located(ref, (HUB, node)) for ref in refs) for port, refs in inputs.items()}
        return Item(key, 0, 1, hop.operator.params, located, hop.operator.name), hop.operator.type


class Tails:
    """The tails of an assignment on a node, and the outcomes that it has gathered and not yet sent."""

    def __init__(self, assignment: Assignment) -> None:
        pairs = zip(assignment.items, assignment.tails, strict=True) if assignment.tails else ()
        self._tails = [Tail(item, hops) for item, hops in pairs]
        self.unsent: list[tuple[Outcome, dict[bytes, bytes]]] = []

    def of(self, key: bytes) -> Tail | None:
        """Return the tail that a key belongs to."""
        return next((tail for tail in self._tails if key in tail.keys), None)

    def meant(self, keys: tuple[bytes, ...]) -> set[bytes]:
        """Return all that stops with these keys, and let nothing follow on them."""
        found = set(keys)
        for tail in self._tails:
            if found.intersection(tail.keys):
                tail.hops.clear()
                found.update(tail.keys)
        return found
