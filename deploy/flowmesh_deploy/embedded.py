"""A whole mesh for tests, benchmarks and the demo: real processes that end with the block that uses them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_deploy.control import is_up, launch, preparing, reload, stop, wait_ready
from flowmesh_deploy.layout import DEFAULT_TENANTS, Layout, add_node, prepare, read_json, remove_node
from flowmesh_deploy.process import is_running, signal_process, wait_gone
from flowmesh_mesh.context import Context, load_context


class EmbeddedMesh(Context, frozen=True):
    """The context of a running embedded mesh, with ways to hurt and mend it."""

    @property
    def layout(self) -> Layout:
        return Layout(self.dir)

    def process(self, name: str) -> dict[str, int]:
        """Return pid and start of ``broker``, ``scheduler`` or a node; raise NotFoundError when it does not run."""
        record = read_json(self.layout.state).get("processes", {}).get(name, {})
        if record.get("state") != "running":
            raise NotFoundError(f"no process {name!r} runs in this mesh")
        return {"pid": int(record["pid"]), "started_ticks": int(record["started_ticks"])}

    def node_names(self) -> list[str]:
        """Return the names of the nodes that run."""
        processes = read_json(self.layout.state).get("processes", {})
        return [
            name for name, record in processes.items() if name not in ("broker", "scheduler") and record["state"] == "running"
        ]

    def signal(self, name: str, number: int) -> int:
        """Send a signal to a process by name; return its pid."""
        record = self.process(name)
        if not signal_process(record, number):
            raise NotFoundError(f"process {name!r} has ended")
        return record["pid"]

    def kill_node(self, name: str) -> int:
        """Kill a node with SIGKILL and see it gone; return the pid it had. It stays gone until :meth:`start_node`."""
        record = self.process(name)
        with preparing(self.layout):
            remove_node(self.layout, name)
        self.signal(name, signal.SIGKILL)
        wait_gone([record], 5.0)
        return record["pid"]

    async def start_node(self, name: str, timeout_s: float = 60.0) -> int:
        """Start a node (again, or a new one) and wait until the leader counts it; return its pid."""
        before = read_json(self.layout.state).get("processes", {}).get(name, {})
        with preparing(self.layout):
            add_node(self.layout, name)
        async with asyncio.timeout(timeout_s):
            while True:
                await reload(self.layout)
                await asyncio.sleep(0.01)
                if self._has_begun(name, before):
                    break
        await wait_ready(self.layout, expect=[name], timeout_s=timeout_s)
        return self.process(name)["pid"]

    def _has_begun(self, name: str, before: dict[str, Any]) -> bool:
        """Tell whether a node's process runs: a new one, or the one of ``before`` if it never ended."""
        record = read_json(self.layout.state).get("processes", {}).get(name, {"state": "stopped"})
        return record["state"] == "running" and (record["pid"] != before.get("pid") or is_running(record))


@asynccontextmanager
async def embedded_mesh(
    folder: str | os.PathLike[str],
    *,
    nodes: int = 1,
    tenants: Sequence[str] = DEFAULT_TENANTS,
    is_recorded: bool | None = None,
    timeout_s: float = 60.0,
) -> AsyncIterator[EmbeddedMesh]:
    """Run broker, scheduler and ``nodes`` nodes on ``folder`` for the length of the block; what they stored stays there.

    The processes also end when this process is killed. Raise TransientError when the mesh is not ready in ``timeout_s``.
    """
    layout = Layout(folder)
    with preparing(layout):
        if is_up(layout):
            raise UsageError(f"a mesh is up in {layout.folder}", hint="Stop it with `flowmesh down`, or use another folder.")
        prepare(layout, nodes=nodes, tenants=list(tenants), is_recorded=is_recorded)
        supervisor = launch(layout, is_attached=True)
    try:
        await wait_ready(layout, expect=list(read_json(layout.desired)["nodes"]), supervisor=supervisor, timeout_s=timeout_s)
        yield EmbeddedMesh(**msgspec.structs.asdict(load_context(layout.context)))
    finally:
        supervisor.terminate()
        await asyncio.to_thread(supervisor.wait)
        await asyncio.to_thread(stop, layout)
