"""What people see: lines and bars while it runs, tables at the end."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from textwrap import shorten

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.tree import Tree

from demo.checks import Check, repeated, rewards
from demo.lineage import Lineage
from demo.story import Evidence, Story
from demo.watch import Watch

SILENCE_S = 15.0
"""After this long without a word people want to know that it is still at work."""


class Screen:
    """Lines with the time in front of them; on a terminal also one bar per run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began_s = self._told_s = time.monotonic()
        self._bars: dict[str, TaskID] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}"),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def say(self, text: str) -> None:
        """Print one line."""
        self._told_s = time.monotonic()
        self._progress.console.print(
            f"[dim]{time.monotonic() - self._began_s:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )

    async def follow(self, story: Story) -> None:
        """Show progress until cancelled."""
        told: set[tuple[str, str]] = set()
        with self._progress:
            while True:
                for watch in story.watches:
                    self._move_bar(watch)
                    self._tell(watch, told)
                if time.monotonic() - self._told_s > SILENCE_S:
                    self.say(", ".join(_summary(w) for w in story.watches if w.state == "accepted") or "waiting for the mesh")
                await asyncio.sleep(0.2)

    def _move_bar(self, watch: Watch) -> None:
        doing = defaultdict(list)
        for seen in watch.running():
            doing[seen.node].append(seen.name)
        text = "  ".join(f"{node}: {shorten(', '.join(names), 40)}" for node, names in sorted(doing.items()))
        if watch.title not in self._bars:
            self._bars[watch.title] = self._progress.add_task(watch.title, total=len(watch.operators), doing="")
        self._progress.update(self._bars[watch.title], completed=watch.done(), doing=text)

    def _tell(self, watch: Watch, told: set[tuple[str, str]]) -> None:
        """Say what is done, once."""
        news = [seen for seen in watch.operators if seen.state == "done" and (watch.title, seen.name) not in told]
        told.update((watch.title, seen.name) for seen in news)
        for seen in news:
            where = "[green](shared)[/green]" if seen.is_shared else f"[dim]on {seen.node}[/dim]"
            self.say(f"{watch.title}: {seen.name} done {where}")
        if watch.state != "accepted" and (watch.title, "") not in told:
            told.add((watch.title, ""))
            self.say(f"{watch.title}: run {watch.state} after {watch.ended_s - watch.began_s:.0f} s")


def _summary(watch: Watch) -> str:
    where = defaultdict(list)
    for seen in watch.running():
        where[seen.node or "waiting for the other run"].append(seen.name)
    text = "; ".join(f"{node}: {shorten(', '.join(names), 40)}" for node, names in sorted(where.items()))
    return f"{watch.title}: {watch.done()} of {len(watch.operators)} done [dim]({text or 'nothing assigned'})[/dim]"


def show(console: Console, evidence: Evidence, checks: list[Check]) -> None:
    """Print what came out of it."""
    _rewards(console, evidence)
    if evidence.lineage is not None:
        console.print(_lineage(evidence.adapter, evidence.lineage))
    _costs(console, evidence)
    table = Table(title="checked", show_header=False)
    for one in checks:
        table.add_row("[green]yes[/green]" if one.is_true else "[bold red]NO[/bold red]", one.text, one.figures)
    console.print(table)


def _rewards(console: Console, evidence: Evidence) -> None:
    if not evidence.comparison:
        return
    topics: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in evidence.comparison:
        topics[str(row["topic"])].append((row["reward_before"], row["reward_after"]))
    table = Table(title="mean reward of greedy answers, before and after train.dpo")
    for column in ("topic", "questions", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "topic" else "right")
    for topic, pairs in topics.items():
        before, after = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
        table.add_row(topic, str(len(pairs)), f"{before:+.2f}", f"{after:+.2f}", f"{after - before:+.2f}")
    before, after = rewards(evidence)
    table.add_section()
    table.add_row("all", str(len(evidence.comparison)), f"{before:+.2f}", f"{after:+.2f}", f"{after - before:+.2f}")
    console.print(table)
    example = max(evidence.comparison, key=lambda row: float(row["reward_after"] - row["reward_before"]))
    console.print(f"[dim]e.g.[/dim] {example['prompt']}", highlight=False)
    for side in ("before", "after"):
        console.print(
            f"[dim]{side:>7}:[/dim] {shorten(str(example[side]), 150)} [dim]({example['reward_' + side]:+.2f})[/dim]",
            highlight=False,
        )


def _lineage(adapter: str, lineage: Lineage) -> Tree:
    by_type: dict[str, list[str]] = defaultdict(list)
    for record in lineage.records:
        by_type[str(record["type"])].append(str(record["node"]))
    tree = Tree(f"lineage of the adapter {adapter}")
    for kind, nodes in by_type.items():
        tree.add(f"{kind} × {len(nodes)} [dim]on {', '.join(sorted(set(nodes)))}[/dim]")
    for reference, digest in lineage.models.items():
        tree.add(f"model {reference} [dim]{digest[:23]}…[/dim]")
    for cid in lineage.inputs:
        tree.add(f"given {cid}")
    return tree


def _costs(console: Console, evidence: Evidence) -> None:
    shared = sum(bool(row["shared"]) for ended in evidence.ended.values() for row in ended.rows)
    saved_s = sum(ended.saved_s for ended in evidence.ended.values())
    console.print(f"shared: {shared} operators of the two runs were run once for both, which saved {saved_s:.1f} s of work")
    kill = evidence.kill
    if kill is not None:
        again = repeated(evidence, kill)
        had = f"{kill.node} had {len(kill.running)} operators in flight, the oldest for {kill.cut_off_s:.1f} s"
        console.print(f"killed: {had}; {len(again)} ran again elsewhere, which took {sum(again.values()):.1f} s")
