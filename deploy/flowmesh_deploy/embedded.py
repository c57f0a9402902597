"""A whole mesh for tests, benchmarks and the demo: real processes that end with the block that uses them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_deploy.control import is_up, launch, preparing, reload, stop, wait_ready
from flowmesh_deploy.layout import DEFAULT_TENANTS, Layout, Urls, add_node, hold, kind_of, prepare, read_json, remove_node
from flowmesh_deploy.ports import read_port
from flowmesh_deploy.process import is_running, signal_process, wait_gone
from flowmesh_mesh.context import Context, load_context


class EmbeddedMesh(Context, frozen=True):
    """The context of a running embedded mesh, with ways to hurt and mend it."""

    @property
    def layout(self) -> Layout:
        return Layout(self.dir)

    def process(self, name: str) -> dict[str, int]:
        """Return pid and start of a process by name; raise NotFoundError when it does not run.

        Names are ``broker``, ``broker-2``, ``scheduler``, ``scheduler-2`` and so on, and those of the nodes.
        """
        record = read_json(self.layout.state).get("processes", {}).get(name, {})
        if record.get("state") != "running":
            raise NotFoundError(f"no process {name!r} runs in this mesh")
        return {"pid": int(record["pid"]), "started_ticks": int(record["started_ticks"])}

    def process_names(self, kind: str) -> list[str]:
        """Return the names of the processes of a kind that run: ``broker``, ``scheduler`` or ``node``."""
        processes = read_json(self.layout.state).get("processes", {})
        return [name for name, record in processes.items() if kind_of(name) == kind and record["state"] == "running"]

    def node_names(self) -> list[str]:
        """Return the names of the nodes that run."""
        return self.process_names("node")

    def broker_url(self, name: str = "broker") -> str:
        """Return the address of one broker itself, whatever addresses processes were told."""
        return broker_url(self.layout, name)

    def signal(self, name: str, number: int) -> int:
        """Send a signal to a process by name; return its pid."""
        record = self.process(name)
        if not signal_process(record, number):
            raise NotFoundError(f"process {name!r} has ended")
        return record["pid"]

    def stop_process(self, name: str) -> int:
        """Freeze a process (SIGSTOP) until :meth:`continue_process`; return its pid."""
        return self.signal(name, signal.SIGSTOP)

    def continue_process(self, name: str) -> int:
        """Let a frozen process go on; return its pid."""
        return self.signal(name, signal.SIGCONT)

    def hold(self, name: str) -> None:
        """From now on a broker or scheduler that ends is not started again, until :meth:`start` says so."""
        with preparing(self.layout):
            hold(self.layout, name, True)

    def kill(self, name: str, *, is_held: bool = False) -> int:
        """Kill a process with SIGKILL and see it gone; return the pid it had.

        A broker or scheduler is started again at once by its supervisor, or, when it is held, by :meth:`start` only. A node
        stays gone until :meth:`start`.
        """
        if kind_of(name) == "node":
            return self.kill_node(name)
        if is_held:
            self.hold(name)
        record = self.process(name)
        self.signal(name, signal.SIGKILL)
        wait_gone([record], 5.0)
        return record["pid"]

    async def start(self, name: str, timeout_s: float = 60.0) -> int:
        """Start a process that was killed or held, and see it run; return its pid. A node is also counted by the leader then."""
        if kind_of(name) == "node":
            return await self.start_node(name, timeout_s)
        with preparing(self.layout):
            hold(self.layout, name, False)
        return await self._begun(name, {}, timeout_s)

    async def restart(self, name: str, timeout_s: float = 60.0) -> int:
        """End a broker or scheduler with SIGTERM and see its supervisor start it again; return the new pid."""
        before = self.process(name)
        self.signal(name, signal.SIGTERM)
        return await self._begun(name, before, timeout_s)

    async def _begun(self, name: str, before: Mapping[str, Any], timeout_s: float) -> int:
        """Wait until the process ``name`` runs and is another than ``before``; return its pid."""
        async with asyncio.timeout(timeout_s):
            while True:
                record = read_json(self.layout.state).get("processes", {}).get(name, {})
                if is_running(record) and record.get("state") == "running" and record["pid"] != before.get("pid"):
                    return int(record["pid"])
                if not before:
                    await reload(self.layout)
                await asyncio.sleep(0.01)

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


def broker_url(layout: Layout, name: str = "broker") -> str:
    """Return the address of one broker of a folder that was prepared; empty while its port is not known.

    It can be asked for before the mesh is up, and again when the broker is: a port that was taken meanwhile is another then.
    """
    port = read_port(layout.broker_folder(name) / "port")
    return f"nats://127.0.0.1:{port}" if port != -1 else ""


@asynccontextmanager
async def embedded_mesh(
    folder: str | os.PathLike[str],
    *,
    nodes: int = 1,
    tenants: Sequence[str] = DEFAULT_TENANTS,
    is_recorded: bool | None = None,
    timeout_s: float = 60.0,
    brokers: int | None = None,
    schedulers: int | None = None,
    urls: Urls | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
) -> AsyncIterator[EmbeddedMesh]:
    """Run brokers, schedulers and ``nodes`` nodes on ``folder`` for the length of the block; what they stored stays there.

    ``urls`` tells single processes by name (and ``client``: the context) other addresses than those of the brokers, such as those
    of proxies. ``environment`` gives single schedulers and nodes variables of their own. The processes also end when this process
    is killed. Raise TransientError when the mesh is not ready in ``timeout_s``.
    """
    layout = Layout(folder)
    with preparing(layout):
        if is_up(layout):
            raise UsageError(f"a mesh is up in {layout.folder}", hint="Stop it with `flowmesh down`, or use another folder.")
        prepare(
            layout,
            nodes=nodes,
            tenants=list(tenants),
            is_recorded=is_recorded,
            brokers=brokers,
            schedulers=schedulers,
            urls=urls,
            environment=environment,
        )
        supervisor = launch(layout, is_attached=True)
    try:
        await wait_ready(layout, expect=list(read_json(layout.desired)["nodes"]), supervisor=supervisor, timeout_s=timeout_s)
        yield EmbeddedMesh(**msgspec.structs.asdict(load_context(layout.context)))
    finally:
        supervisor.terminate()
        await asyncio.to_thread(supervisor.wait)
        await asyncio.to_thread(stop, layout)
