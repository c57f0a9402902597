"""What a tenant sees of its run while it goes on: the state, node and time of every operator, from the run's events."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field

from flowmesh_mesh.client import Run
from flowmesh_mesh.manifest import Manifest
from flowmesh_mesh.messages import RunEvent


@dataclass(slots=True)
class Seen:
    """One operator as last heard of; times on this machine's monotonic clock, in seconds."""

    name: str
    type: str
    state: str = "waiting"
    node: str = ""
    is_shared: bool = False
    since_s: float = 0.0
    nodes: list[str] = field(default_factory=list)
    """Every node that it was assigned to, in order."""


class Watch:
    """Follows one run. ``operators`` are in the order of the manifest."""

    def __init__(self, title: str, run: Run, manifest: Manifest) -> None:
        self.title = title
        self.run = run
        self.operators = [Seen(operator.name, operator.type) for operator in manifest.operators]
        self.state = "accepted"
        self.began_s = time.monotonic()
        self.ended_s = 0.0
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._follow(), name=f"watch-{title}")

    async def _follow(self) -> None:
        async for event in self.run.events():
            self._take(event)
            self._changed.set()
            self._changed = asyncio.Event()

    def _take(self, event: RunEvent) -> None:
        if event.kind == "operators":
            for index, state, node, _, is_shared in event.body["changes"]:
                self._change(self.operators[index], str(state), str(node or ""), bool(is_shared))
        elif event.kind == "state":
            for row in event.body.get("operators") or ():
                self._change(self.operators[row["index"]], str(row["state"]), str(row.get("node") or ""), bool(row.get("shared")))
        elif event.kind == "ended":
            self.state = str(event.body.get("state"))
            self.ended_s = time.monotonic()

    def _change(self, seen: Seen, state: str, node: str, is_shared: bool) -> None:
        if (state, node) != (seen.state, seen.node):
            seen.since_s = time.monotonic()
            if state == "assigned" and node:
                seen.nodes.append(node)
        seen.state, seen.node, seen.is_shared = state, node or seen.node, is_shared

    def done(self) -> int:
        """Return how many operators are done."""
        return sum(seen.state == "done" for seen in self.operators)

    def running(self) -> list[Seen]:
        """Return the operators that nodes are working on."""
        return [seen for seen in self.operators if seen.state == "assigned"]

    async def changed(self, timeout_s: float) -> None:
        """Wait for the next event, at most ``timeout_s`` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def end(self) -> None:
        """Wait until the run has ended."""
        while self.state == "accepted":
            await self.changed(1.0)

    async def close(self) -> None:
        """Stop following."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
