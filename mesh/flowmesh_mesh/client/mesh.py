"""The mesh as a tenant sees it: submit workflows, ask questions, fetch contents."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from flowmesh_cas.cid import cid_parse, cid_text
from flowmesh_cas.errors import FlowmeshError, NotFoundError, UsageError
from flowmesh_mesh import subjects
from flowmesh_mesh.client import blocks, submission
from flowmesh_mesh.client.questions import ask
from flowmesh_mesh.client.run import Run, Unsubscribes
from flowmesh_mesh.client.scratch import scratch
from flowmesh_mesh.messages import INLINE_MAX_BYTES
from flowmesh_mesh.names import check_name
from flowmesh_mesh.results import plain_ref

if TYPE_CHECKING:
    from flowmesh_cas.store import BlockStore
    from flowmesh_mesh.bus import Bus, Delivery, Subscription
    from flowmesh_mesh.client.journal import Journal
    from flowmesh_mesh.context import Context
    from flowmesh_mesh.manifest import Ref

OWN_SUBSCRIPTIONS_MAX = 8
"""Runs that are followed each by a subscription of its own; a client with more hears all its tenant's runs at once."""

REMEMBER_AFTER_S = 0.5
"""A submission is written into the journal when its run has not ended by then, or this client leaves."""

SUBMIT_DEADLINE_S = 60.0
RUNS_LISTED = 1000
AUDIT_DEADLINE_S = 300.0
PLAN_DEADLINE_S = 60.0
"""How long a plan may take: the leader works on large ones between other things."""


class _Listener:
    """One run's place in the subscription to all of a tenant's."""

    def __init__(self, listeners: dict[str, Callable[[Delivery], None]], run: str) -> None:
        self._listeners = listeners
        self._run = run

    async def unsubscribe(self) -> None:
        self._listeners.pop(self._run, None)


class Mesh:
    """A connection to a mesh as one tenant. Open it with ``async with connect() as mesh``."""

    def __init__(self, context: Context | str | Path | None = None, tenant: str | None = None) -> None:
        self._context = context
        self._tenant = tenant
        self._bus: Bus | None = None
        self._runs: dict[str, Run] = {}
        self._listeners: dict[str, Callable[[Delivery], None]] = {}
        self._listened = 0
        self._tenant_wide: Subscription | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.journal: Journal | None = None
        self._is_closing = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect; raise TransientError when no mesh answers, UsageError when the tenant is unknown here."""
        from flowmesh_mesh.client.entry import connect_tenant
        from flowmesh_mesh.client.journal import journal_of

        self._is_closing.clear()
        self._bus = await connect_tenant(self._context, self._tenant)
        with contextlib.suppress(FlowmeshError, OSError):
            self.journal = journal_of(self._context, self._tenant)

    async def close(self) -> None:
        """Disconnect, after what is being published has been acknowledged and remembered; runs go on."""
        self._is_closing.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=submission.STORE_TIMEOUT_S)
        for run in list(self._runs.values()):
            await run.close()
        self._runs.clear()
        bus, self._bus = self._bus, None
        if bus is not None:
            await bus.close()

    @property
    def bus(self) -> Bus:
        """Return the open connection; raise UsageError when there is none."""
        if self._bus is None:
            raise UsageError("the mesh is not connected", hint="Use it as `async with connect() as mesh:`.")
        return self._bus

    async def listen(self, run: str, receive: Callable[[Delivery], None]) -> Unsubscribes:
        """Deliver a run's events to ``receive``: by its own subscription, or, for who follows many runs, by one for all."""
        self._listened += 1
        if self._listened <= OWN_SUBSCRIPTIONS_MAX:
            return await self.bus.subscribe(subjects.tenant_run_event(run), receive)
        if self._tenant_wide is None:
            self._tenant_wide = await self.bus.subscribe(subjects.tenant_run_event("*"), self._dispatch)
        self._listeners[run] = receive
        return _Listener(self._listeners, run)

    def _dispatch(self, message: Delivery) -> None:
        receive = self._listeners.get(message.subject.rpartition(".")[2])
        if receive is not None:
            receive(message)

    def keep(self, run: Run, publication: asyncio.Task[None]) -> None:
        """Hold a run and its publication until they are over or the mesh is closed."""
        self._runs[run.id] = run
        self._track(publication)

    async def remember(self, run: str, payload: bytes, store: BlockStore | None) -> None:
        """Keep a submission in the journal until its end is seen; ``store`` holds what was put before it, and is read now."""
        if self.journal is None:
            return
        self.journal.expect(run)
        keeping = asyncio.get_running_loop().create_task(self._remember(self.journal, run, payload, store))
        self._track(keeping)
        if store is not None:
            await asyncio.wait({keeping})

    async def _remember(self, journal: Journal, run: str, payload: bytes, store: BlockStore | None) -> None:
        """Write a submission down; one that ends within a moment costs no file, unless this client leaves before."""
        if store is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_closing.wait(), REMEMBER_AFTER_S)
        if journal.is_expected(run):
            await asyncio.to_thread(journal.keep, run, payload, store)

    def forget(self, run: Run) -> None:
        """Let go of a run that has ended; called from the read loop."""
        if self.journal is not None:
            self.journal.drop(run.id)
        if self._runs.pop(run.id, None) is not None:
            self._track(asyncio.get_running_loop().create_task(run.close()))

    def _track(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._settled)

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the run is accepted: a lost acknowledgement means nothing

    # --- runs

    async def submit(
        self,
        workflow: Any,
        *,
        params: Mapping[str, Any] | None = None,
        run: str | None = None,
        deadline_s: float = SUBMIT_DEADLINE_S,
    ) -> Run:
        """Submit a workflow (path of a document, dict, builder) and return its run once it is accepted.

        Everything is checked before anything is sent: DocumentError lists all problems. ``run`` makes the submission idempotent.
        """
        with scratch() as store:
            if isinstance(workflow, (str, os.PathLike)):  # reading and hashing files must not stop the loop
                prepared = await asyncio.to_thread(submission.prepare, workflow, params, store)
            else:
                prepared = submission.prepare(workflow, params, store)
            return await submission.submit(self, prepared, run, deadline_s)

    async def settle(self, prepared: submission.Prepared) -> submission.Prepared:
        """Ask how many shards each operator with ``shards: auto`` is best cut into; ``settled`` of what is returned tells why."""
        return await submission.settle(self.bus, prepared)

    async def submit_prepared(
        self, prepared: submission.Prepared, run: str | None = None, deadline_s: float = SUBMIT_DEADLINE_S
    ) -> Run:
        """Submit what :func:`flowmesh_mesh.client.submission.prepare` made."""
        return await submission.submit(self, prepared, run, deadline_s)

    async def run(self, name: str) -> Run:
        """Return a run by its id or a prefix that only one run has; raise NotFoundError or UsageError."""
        check_name(name, "run")
        if name in self._runs:
            return self._runs[name]
        run = Run(self, await self._full_id(name))
        self._runs[run.id] = run
        return run

    async def _full_id(self, name: str) -> str:
        try:
            return str((await ask(self.bus, "run", {"run": name, "limit": 1}))["run"])
        except NotFoundError:
            found = [str(row["run"]) for row in await self.runs() if str(row["run"]).startswith(name)]
        if not found:
            again = await self.journal.submit_again(self.bus, name) if self.journal is not None else ""
            if again:
                return again
            raise NotFoundError(f"no run {name!r}", hint="List the runs with `flowmesh ls`.")
        if len(found) > 1:
            raise UsageError(f"{len(found)} runs begin with {name!r}", hint=f"Give more of the id: {', '.join(found[:5])}.")
        return found[0]

    async def runs(self, limit: int = RUNS_LISTED) -> list[dict[str, Any]]:
        """Return the tenant's runs, newest first, at most ``limit``."""
        return cast("list[dict[str, Any]]", await ask(self.bus, "runs", {"limit": limit}))

    # --- the mesh

    async def status(self) -> dict[str, Any]:
        """Return leader, nodes, queues, runs and totals (docs/protocol.md, question ``status``)."""
        return cast("dict[str, Any]", await ask(self.bus, "status"))

    async def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes with devices, load and resident models."""
        return cast("list[dict[str, Any]]", await ask(self.bus, "nodes"))

    async def cordon(self, node: str, reason: str = "") -> dict[str, Any]:
        """Let a node get no new work; what runs on it goes on. Not every tenant may."""
        return cast("dict[str, Any]", await ask(self.bus, "cordon", {"node": node, "reason": reason}))

    async def uncordon(self, node: str) -> dict[str, Any]:
        """Let a node get work again."""
        return cast("dict[str, Any]", await ask(self.bus, "uncordon", {"node": node}))

    async def audit(self, *, is_repairing: bool = False, is_thorough: bool = False) -> dict[str, Any]:
        """Compare what the mesh should have with what it has; repair it where asked to (docs/recovery.md).

        Everybody may look at what is his; repairing is for those who may do what concerns every tenant. Submissions of this
        client that the mesh does not know are offered to it in any case, if asked to repair.
        """
        own = await self.journal.offer(self.bus, is_repairing=is_repairing) if self.journal is not None else []
        args = {"repair": is_repairing, "thorough": is_thorough}
        found = await ask(self.bus, "audit", args, deadline_s=AUDIT_DEADLINE_S, timeout_s=AUDIT_DEADLINE_S)
        return {**found, "findings": [*own, *found["findings"]]}

    async def unquarantine(self, key: str) -> dict[str, Any]:
        """Let an operator (its key in hex) be tried again although it took nodes with it."""
        return cast("dict[str, Any]", await ask(self.bus, "unquarantine", {"key": key}))

    async def costs(self) -> dict[str, Any]:
        """Return what was learned about costs, predicted against measured (docs/protocol.md, question ``costs``)."""
        return cast("dict[str, Any]", await ask(self.bus, "costs"))

    async def why(self, run: str = "", operator: str = "", *, key: str = "") -> dict[str, Any]:
        """Return why an operator runs, ran or waits as it does; by run and name, or by the beginning of its key."""
        if key:
            return cast("dict[str, Any]", await ask(self.bus, "why", {"key": key}))
        return cast("dict[str, Any]", await ask(self.bus, "why", {"run": await self._full_id(run), "operator": operator}))

    async def plan(self, workflow: Any, *, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what a workflow would share, and take in seconds and dollars, if it were submitted now."""
        with scratch() as store:
            return await self.plan_prepared(await asyncio.to_thread(submission.prepare, workflow, params, store))

    async def plan_prepared(self, prepared: submission.Prepared) -> dict[str, Any]:
        """Plan what :func:`flowmesh_mesh.client.submission.prepare` made; only its manifest is sent."""
        prepared = await self.settle(prepared)
        cid = prepared.compiled.cid
        block = prepared.store.get(cid)
        is_inline = len(block) <= INLINE_MAX_BYTES
        if not is_inline:
            await blocks.put_blocks(self.bus, prepared.store, [cid])
        args = {"manifest": cid, "blocks": [block] if is_inline else []}
        found = await ask(self.bus, "plan", args, deadline_s=PLAN_DEADLINE_S, timeout_s=PLAN_DEADLINE_S)
        return {**found, "shards": [each.plain() for each in prepared.settled]}

    async def lineage(self, subject: str) -> dict[str, Any]:
        """Return the lineage of a run (id or prefix) or of a content (CID text): records, inputs, models."""
        try:
            cid = cid_text(cid_parse(subject))
        except UsageError:
            return await (await self.run(subject)).lineage()
        return cast("dict[str, Any]", await ask(self.bus, "lineage", {"cid": cid}))

    # --- contents

    async def fetch(self, cid: str | bytes, store: BlockStore) -> int:
        """Bring the DAG under ``cid`` into ``store``, every block verified; return the bytes received."""
        return await blocks.fetch(self.bus, store, cid_parse(cid) if isinstance(cid, str) else cid)

    @asynccontextmanager
    async def local(self, ref: Ref) -> AsyncIterator[BlockStore]:
        """Fetch a content into a store that lives as long as the context."""
        with scratch() as store:
            await self.fetch(ref.cid, store)
            yield store

    async def get(self, cid: str, target: str | Path) -> Path:
        """Write the content behind a CID under the folder ``target``, named by the CID; return the path.

        A file or folder is written as itself, a record (DAG-CBOR) as JSON. Every block is verified.
        """
        from flowmesh_mesh.client.exports import export_cid

        root = cid_parse(cid)
        with scratch() as store:
            await self.fetch(root, store)
            return export_cid(store, root, Path(target))

    async def text_lines(self, plain: Mapping[str, Any]) -> list[str]:
        """Return the lines of a log given by its plain reference."""
        from flowmesh_cas.unixfs import read_bytes

        ref = plain_ref(plain)
        async with self.local(ref) as store:
            return read_bytes(store, ref.cid).decode("utf-8", "replace").splitlines()


def connect(context: Context | str | Path | None = None, tenant: str | None = None) -> Mesh:
    """Return the mesh of a context (by default the nearest), as ``tenant`` sees it (by default the context's own)."""
    return Mesh(context, tenant)
