"""One run, seen by the tenant that submitted it: its events, its state, its results."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from flowmesh_cas.errors import ExecutionError, NotFoundError, TransientError
from flowmesh_mesh import subjects
from flowmesh_mesh.client.events import ENDS, Feed
from flowmesh_mesh.client.questions import ask
from flowmesh_mesh.messages import Cancel, RunEvent, encode
from flowmesh_mesh.results import Output, Results, plain_outputs, plain_results

if TYPE_CHECKING:
    from flowmesh_mesh.bus import Delivery
    from flowmesh_mesh.client.mesh import Mesh

CANCEL_TIMEOUT_S = 30.0


class Unsubscribes(Protocol):
    """Whatever delivers a run's events until it is told to stop."""

    async def unsubscribe(self) -> None: ...


class Run:
    """One execution of a workflow. Made by :meth:`Mesh.submit` or :meth:`Mesh.run`."""

    def __init__(self, mesh: Mesh, run: str) -> None:
        self.id = run
        self._mesh = mesh
        self._feed = Feed(run, self._state, self._ended)
        self._subscription: Unsubscribes | None = None

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    async def follow(self, *, from_start: bool = False) -> Feed:
        """Subscribe to the events, once; unless the run is only now submitted, begin with its present state."""
        if self._subscription is None and self._feed.end is None:
            self._subscription = await self._mesh.listen(self.id, self._receive)
            if not from_start:
                await self._mesh.bus.flush()
                self._feed.heal()
        return self._feed

    def _receive(self, message: Delivery) -> None:
        self._feed.receive(message.data)

    def _ended(self) -> None:
        self._mesh.forget(self)

    async def close(self) -> None:
        """Stop following; the run itself goes on."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()
        await self._feed.close()

    async def _state(self) -> dict[str, Any]:
        """Return the state for the feed; a run that was accepted, and that the mesh has lost since, is submitted again."""
        from flowmesh_mesh.client.journal import is_unknown_run

        try:
            return await self.status()
        except NotFoundError as error:
            if self._mesh.journal is not None and is_unknown_run(error):
                await self._mesh.journal.submit_again(self._mesh.bus, self.id)
            raise

    async def status(self, *, offset: int = 0, limit: int | None = None) -> dict[str, Any]:
        """Return what the leader knows of the run, its operators included (docs/protocol.md, question ``run``)."""
        args: dict[str, Any] = {"run": self.id}
        if offset:
            args["offset"] = offset
        if limit is not None:
            args["limit"] = limit
        return cast("dict[str, Any]", await ask(self._mesh.bus, "run", args))

    async def operators(self) -> list[dict[str, Any]]:
        """Return the rows of all operators, however many questions that takes."""
        rows: list[dict[str, Any]] = []
        while True:
            state = await self.status(offset=len(rows))
            page = state.get("operators") or []
            rows.extend(page)
            if not page or len(rows) >= int(state.get("total") or 0):
                return rows

    async def events(self) -> AsyncIterator[RunEvent]:
        """Yield events in order up to ``ended``; after a gap comes one of kind ``state`` that stands for what was missed."""
        feed = await self.follow()
        async for event in feed.events():
            yield event

    async def wait(self, timeout_s: float | None = None) -> Results:
        """Return how the run ended, well or not; raise TransientError if it has not by ``timeout_s`` seconds."""
        feed = await self.follow()
        if not await feed.until(lambda: feed.end is not None, timeout_s):
            raise TransientError(
                f"run {self.id} has not ended within {timeout_s:g} s",
                hint=f"It goes on: see `flowmesh watch {self.id}`, or wait longer.",
            )
        assert feed.end is not None
        return plain_results(self.id, feed.end.body, self._mesh)

    async def result(self, timeout_s: float | None = None) -> Results:
        """Return the results of a run that succeeded; raise ExecutionError with the reason when it did not."""
        results = await self.wait(timeout_s)
        if results.state != "succeeded":
            raise failure(results)
        return results

    async def cancel(self, actor: str = "") -> Results:
        """End the run and return how it ended: it may have succeeded before the request arrived."""
        await self.follow()
        state = await self.status()
        if state.get("state") not in ENDS:
            message = encode(Cancel(self.id, actor))
            await self._mesh.bus.store(subjects.TENANT_CANCEL, message, message_id=f"cancel-{self.id}")
        return await self.wait(CANCEL_TIMEOUT_S)

    async def operator(self, name: str) -> dict[str, Any]:
        """Return the row of one operator by name or index; raise NotFoundError with the names there are."""
        rows = await self.operators()
        for row in rows:
            if row["name"] == name or str(row["index"]) == name:
                return row
        known = ", ".join(str(row["name"]) for row in rows[:20]) + (", ..." if len(rows) > 20 else "")
        raise NotFoundError(f"run {self.id} has no operator {name!r}", hint=f"Its operators: {known}.")

    async def logs(self, operator: str | None = None, *, follow: bool = False) -> AsyncIterator[tuple[str, str]]:
        """Yield (operator, line) of what was printed so far; with ``follow`` also what comes, until the run ends."""
        feed = await self.follow() if follow else None
        rows = [await self.operator(operator)] if operator else await self.operators()
        read_to: dict[str, int] = {}
        for row in rows:
            lines = await self._log(row)
            read_to[str(row["name"])] = feed.position if feed else 0  # what came before is in these lines
            for line in lines:
                yield str(row["name"]), line
        if feed is None:
            return
        async for position, event in feed.numbered(min(read_to.values(), default=0)):
            name = str(event.body.get("name"))
            if event.kind == "log" and position >= read_to.get(name, position + 1):
                for line in event.body.get("lines") or ():
                    yield name, str(line)

    async def _log(self, row: dict[str, Any]) -> list[str]:
        body = await ask(self._mesh.bus, "log", {"run": self.id, "operator": row["name"]})
        found: list[str] = []
        for each in body.get("earlier") or ():
            found += map(str, each["lines"])
            found.append(f"[attempt {each['attempt']} on {each['node']} ended here: {each['reason'] or 'it gave no result'}]")
        if body.get("log"):
            return found + await self._mesh.text_lines(body["log"])
        return found + list(body.get("lines") or ())

    async def outputs(self, name: str | None = None) -> dict[str, Output]:
        """Return the outputs to be had now: all that the workflow names, one of them, or the ports of one operator."""
        if name is None:
            return plain_outputs(await self._declared(), self._mesh)
        body = await ask(self._mesh.bus, "outputs", {"run": self.id, "name": name})
        if body["outputs"]:
            return plain_outputs(body["outputs"], self._mesh)
        row = await self.operator(name)
        ports: dict[str, Any] = row.get("outputs") or {}
        if not ports:
            raise self._without_result(row)
        single = len(ports) == 1
        return plain_outputs(
            {row["name"] if single else f"{row['name']}.{port}": refs for port, refs in ports.items()}, self._mesh
        )

    async def _declared(self) -> dict[str, Any]:
        """Return every output that the workflow names, page by page."""
        found: dict[str, Any] = {}
        while True:
            body = await ask(self._mesh.bus, "outputs", {"run": self.id, "offset": len(found)})
            found.update(body["outputs"])
            if not body["outputs"] or len(found) >= body["total"]:
                return found

    def _without_result(self, row: dict[str, Any]) -> Exception:
        name = f"operator {row['name']!r} of run {self.id}"
        if row["state"] in ("failed", "skipped", "cancelled"):
            return ExecutionError(
                f"{name} has no result: {row['state']}, {row.get('error') or row.get('reason')}", reason=row.get("reason") or ""
            )
        return TransientError(f"{name} has no result yet: it is {row['state']}", hint=f"Wait: `flowmesh watch {self.id}`.")

    async def get(self, name: str | None = None, target: str | Path = ".") -> list[Path]:
        """Write outputs (or those of one output or operator) under the folder ``target``; return the paths."""
        paths: list[Path] = []
        for output in (await self.outputs(name)).values():
            paths.extend(await output.export(target))
        return paths

    async def lineage(self) -> dict[str, Any]:
        """Return every record, input and model that led to the run's results."""
        return cast("dict[str, Any]", await ask(self._mesh.bus, "lineage", {"run": self.id}))

    async def accepted(self, deadline_s: float) -> bool:
        """Wait until the mesh has accepted or rejected the run; return False at the deadline."""
        return await self._feed.until(lambda: self._feed.state not in ("", "received"), deadline_s)

    @property
    def end(self) -> RunEvent | None:
        """Return the event that ended the run, if it has arrived."""
        return self._feed.end


def failure(results: Results) -> ExecutionError:
    """Return the error that stands for a run which did not succeed."""
    detail = f": {results.detail}" if results.detail else ""
    by = f" by {results.actor}" if results.actor else ""
    if results.state == "cancelled":
        return ExecutionError(
            f"run {results.run} was cancelled{by}{detail}", reason=results.reason, hint="Submit it again to run it anew."
        )
    return ExecutionError(
        f"run {results.run} {results.state or 'failed'} ({results.reason}){detail}",
        reason=results.reason,
        hint=f"See `flowmesh show {results.run}` for what failed, `flowmesh logs {results.run}` for what it printed.",
    )
