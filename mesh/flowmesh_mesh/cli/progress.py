"""A run while it goes on: what is known of each operator, drawn live on a terminal or told in lines."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowmesh_mesh.cli.output import cell, clean, counts_text

if TYPE_CHECKING:
    from flowmesh_mesh.client import Run
    from flowmesh_mesh.messages import RunEvent

ROWS_SHOWN = 24
REFRESH_PER_SECOND = 8

_ENDED = frozenset({"done", "failed", "skipped", "cancelled"})
_ORDER = {"failed": 0, "assigned": 1, "ready": 2, "waiting": 3, "done": 4, "skipped": 5, "cancelled": 6}


@dataclass(slots=True)
class Row:
    """One operator as last heard of."""

    name: str
    type: str = ""
    state: str = "waiting"
    node: str = ""
    reason: str = ""
    is_shared: bool = False


@dataclass(slots=True)
class Progress:
    """State of a run, folded from its events."""

    run: str
    name: str = ""
    state: str = "received"
    rows: dict[int, Row] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def name_operators(self, operators: list[dict[str, Any]]) -> None:
        """Take names and types from the rows of the leader's answer; states come with the events."""
        for row in operators:
            self.rows.setdefault(int(row["index"]), Row(str(row["name"]), str(row.get("type") or "")))

    def apply(self, event: RunEvent) -> list[str]:
        """Fold one event in; return what to tell of it, line by line."""
        body = event.body
        if event.kind == "operators":
            self.state = "accepted" if self.state == "received" else self.state
            self.counts = body.get("counts") or self.counts
            return [self._change(change) for change in body.get("changes") or ()]
        if event.kind == "log":
            return [f"{clean(body.get('name'))} | {clean(line)}" for line in body.get("lines") or ()]
        self.name = str(body.get("name") or self.name)
        self.counts = body.get("counts") or self.counts
        self.state = str(body.get("state") or event.kind)
        if event.kind == "state":
            return self.settle(body.get("operators") or [])
        return [] if event.kind == "received" else [self._headline(event)]

    def settle(self, operators: list[dict[str, Any]]) -> list[str]:
        """Take rows of the leader's answer; return what to tell of those whose last change was not heard."""
        self.name_operators(operators)
        return [
            self._change([row["index"], row["state"], row.get("node"), row.get("reason"), row.get("shared")])
            for row in operators
            if self.rows[int(row["index"])].state != row["state"]
        ]

    @property
    def is_settled(self) -> bool:
        """Tell whether every operator is known to have ended."""
        return all(row.state in _ENDED for row in self.rows.values())

    def _change(self, change: list[Any]) -> str:
        index, state, node, reason, shared = [*change, None, None, None][:5]
        row = self.rows.setdefault(int(index), Row(f"#{index}"))
        row.state, row.node, row.reason = str(state), str(node or ""), str(reason or "")
        row.is_shared = bool(shared) or row.is_shared
        text = f"{row.name} {row.state}"
        if row.node:
            text += f" on {row.node}"
        if row.reason and row.reason != "succeeded":
            text += f" ({row.reason})"
        return clean(text + (", shared" if row.is_shared else ""))

    def _headline(self, event: RunEvent) -> str:
        body = event.body
        if event.kind == "accepted":
            return clean(f"run {self.run} accepted: {self.name}, {body.get('operators')} operators")
        if event.kind in ("ended", "rejected"):
            detail = f": {body['detail']}" if body.get("detail") else ""
            actor = f" by {body['actor']}" if body.get("actor") and body.get("state") == "cancelled" else ""
            return clean(f"run {self.run} {body.get('state')}{actor}{detail}")
        return clean(f"run {self.run} {event.kind}")


def render(progress: Progress, height: int = ROWS_SHOWN) -> Any:
    """Return the picture of a run: the operators that matter most now, and the counts of all."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = sorted(progress.rows.items(), key=lambda item: (_ORDER.get(item[1].state, 9), item[0]))[:height]
    table = Table.grid(padding=(0, 2))
    for _, row in sorted(shown):
        note = ", ".join(
            part for part in (row.reason if row.reason != "succeeded" else "", "shared" if row.is_shared else "") if part
        )
        table.add_row(cell(row.name), cell(row.type, "dim"), cell(row.state), cell(row.node), cell(note, "dim"))
    hidden = len(progress.rows) - len(shown)
    parts: list[Any] = [Text(clean(f"run {progress.run}  {progress.name}"), style="bold"), table]
    if hidden > 0:
        parts.append(Text(f"... and {hidden} more", style="dim"))
    parts += [Text(clean(line), style="dim") for line in progress.lines[-5:]]
    parts.append(Text.assemble(cell(progress.state), "  ", counts_text(progress.counts)))
    return Group(*parts)


async def follow(run: Run, *, is_quiet: bool = False) -> Progress:
    """Show a run until it ends: live on a terminal, as lines elsewhere, not at all when ``is_quiet``."""
    progress = Progress(run.id)
    if is_quiet:
        async for event in run.events():
            progress.apply(event)
        return progress
    progress.name_operators(await run.operators())
    events = _settled(run, progress)
    if sys.stdout.isatty():
        await _live(progress, events)
    else:
        await _plain(events)
    return progress


async def _settled(run: Run, progress: Progress) -> AsyncIterator[tuple[str, list[str]]]:
    """Yield kind and lines of each event; before the end, the changes that no event told."""
    async for event in run.events():
        if event.kind == "ended" and not progress.is_settled:
            yield "operators", progress.settle(await run.operators())
        yield event.kind, progress.apply(event)


async def _plain(events: AsyncIterator[tuple[str, list[str]]]) -> None:
    async for _, lines in events:
        for line in lines:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


async def _live(progress: Progress, events: AsyncIterator[tuple[str, list[str]]]) -> None:
    from rich.live import Live

    from flowmesh_mesh.cli.output import console

    screen = console()
    height = max(4, min(ROWS_SHOWN, screen.height - 10))
    with Live(console=screen, get_renderable=lambda: render(progress, height), refresh_per_second=REFRESH_PER_SECOND):
        async for kind, lines in events:
            if kind == "log":
                progress.lines = (progress.lines + lines)[-5:]
