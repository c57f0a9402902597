"""What happens in the demo: two runs, a kill in the middle, and the evidence of how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.lineage import Lineage, trace
from demo.overlap import Overlap, overlap
from demo.watch import Seen, Watch
from flowmesh_cas.store import MemoryStore
from flowmesh_deploy.embedded import EmbeddedMesh
from flowmesh_mesh.client import Mesh, connect
from flowmesh_mesh.compiler import compile_file
from flowmesh_mesh.manifest import Manifest

WORKFLOWS = Path(__file__).with_name("workflows")
DEADLINE_S = 400.0
MIDDLE_S = 1.0
"""How long an operator must have run before the kill, so that there is something to lose."""
PATIENCE_S = 15.0
"""After this long any running operator is the middle of something."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Kill:
    """One node gone: what was running there, and for how long, in seconds."""

    node: str
    at_s: float
    running: tuple[str, ...]
    cut_off_s: float
    done_before: frozenset[tuple[str, str]]
    """(tenant, operator) of what was done before, none of which may run again."""


@dataclass(frozen=True, slots=True)
class Ended:
    """One run as it ended: its final rows (docs/protocol.md, question ``run``) and what its events told."""

    tenant: str
    run: str
    state: str
    took_s: float
    saved_s: float
    rows: list[dict[str, Any]]
    seen: tuple[Seen, ...]


@dataclass(slots=True)
class Evidence:
    """All that the report shows and the checks judge."""

    overlap: Overlap
    ended: dict[str, Ended] = field(default_factory=dict)
    kill: Kill | None = None
    comparison: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    adapter: str = ""
    lineage: Lineage | None = None


class Story:
    """Plays the demo on a mesh that is up; ``say`` tells people what happens."""

    def __init__(self, mesh: EmbeddedMesh, say: Say, *, is_killing: bool = True) -> None:
        self._mesh = mesh
        self._results = Path(mesh.dir) / "results"
        self._say = say
        self._is_killing = is_killing
        self.began_s = time.monotonic()
        self.watches: list[Watch] = []

    async def play(self) -> Evidence:
        """Run everything; raise FlowmeshError or TimeoutError when the mesh does not answer."""
        async with (
            asyncio.timeout(DEADLINE_S),
            connect(self._mesh, "team-a") as mesh_a,
            connect(self._mesh, "team-b") as mesh_b,
        ):
            manifest_a, manifest_b = _manifest("team-a"), _manifest("team-b")
            evidence = Evidence(overlap(manifest_a, manifest_b))
            watch_a = await self._submit("team-a", mesh_a, manifest_a)
            await self._until(lambda: _is_sampling(watch_a) or watch_a.state != "accepted")
            watch_b = await self._submit("team-b", mesh_b, manifest_b)
            if self._is_killing:
                evidence.kill = await self._kill_one(watch_a)
            for watch in (watch_a, watch_b):
                await watch.end()
                evidence.ended[watch.title] = await _ended(watch)
            await self._collect(evidence, mesh_a, watch_a, watch_b)
            return evidence

    async def close(self) -> None:
        """Stop watching."""
        for watch in self.watches:
            await watch.close()

    async def _submit(self, tenant: str, mesh: Mesh, manifest: Manifest) -> Watch:
        run = await mesh.submit(WORKFLOWS / f"{tenant}.yaml")
        watch = Watch(tenant, run, manifest)
        self.watches.append(watch)
        self._say(f"{tenant}: submitted {manifest.name} ({len(manifest.operators)} operators) as run {run.id}")
        return watch

    async def _until(self, is_reached: Callable[[], bool]) -> None:
        while not is_reached():
            await self.watches[0].changed(0.2)

    async def _kill_one(self, watch: Watch) -> Kill | None:
        """Wait until a node is in the middle of something, end it with SIGKILL, and return what it was doing."""
        began_s = time.monotonic()
        while watch.state == "accepted":
            node = _busy_node(watch.running(), watch.operators, time.monotonic() - began_s > PATIENCE_S)
            if node:
                return await self._kill(node, watch)
            await watch.changed(0.1)
        return None

    async def _kill(self, node: str, watch: Watch) -> Kill:
        now_s = time.monotonic()
        running = [seen for seen in watch.running() if seen.node == node]
        done = frozenset((other.title, seen.name) for other in self.watches for seen in other.operators if seen.state == "done")
        await asyncio.to_thread(self._mesh.kill_node, node)
        names = tuple(seen.name for seen in running)
        cut_off_s = max(now_s - seen.since_s for seen in running)
        self._say(f"{node}: killed with SIGKILL while it ran {', '.join(names)} (since {cut_off_s:.1f} s)")
        return Kill(node, now_s - self.began_s, names, cut_off_s, done)

    async def _collect(self, evidence: Evidence, mesh: Mesh, watch_a: Watch, watch_b: Watch) -> None:
        if watch_b.state == "succeeded":
            await watch_b.run.get(target=self._results / "team-b")
            evidence.best = await (await watch_b.run.result())["best"].rows()
        if watch_a.state == "succeeded":
            await watch_a.run.get(target=self._results / "team-a")
            results = await watch_a.run.result()
            evidence.comparison = await results["comparison"].rows()
            evidence.adapter = results["adapter"].cid
            evidence.lineage = await trace(mesh, evidence.adapter)


def _manifest(tenant: str) -> Manifest:
    return compile_file(WORKFLOWS / f"{tenant}.yaml", store=MemoryStore()).manifest


def _is_sampling(watch: Watch) -> bool:
    return any(seen.state in ("assigned", "done") and seen.type == "llm.generate" for seen in watch.operators)


def _busy_node(running: list[Seen], operators: list[Seen], is_late: bool) -> str:
    """Return the node to lose: one that has given a completion already and works on the next, or when late, any that works."""
    now_s = time.monotonic()
    for seen in running:
        has_given = any(other.node == seen.node and other.state == "done" and other.type == seen.type for other in operators)
        is_middle = seen.type == "llm.generate" and has_given and now_s - seen.since_s >= MIDDLE_S
        if is_middle or (is_late and now_s - seen.since_s >= MIDDLE_S and seen.type.startswith(("llm.", "train."))):
            return seen.node
    return ""


async def _ended(watch: Watch) -> Ended:
    rows = await watch.run.operators()
    results = await watch.run.wait(30)
    return Ended(
        watch.title,
        watch.run.id,
        watch.state,
        watch.ended_s - watch.began_s,
        results.saved_us / 1e6,
        rows,
        tuple(watch.operators),
    )
