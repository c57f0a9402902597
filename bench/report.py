"""Records and tables: medians over the rounds, bars, and ours as a ratio to each peer's where a bar asks for it."""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.workloads import BARS, Bar, Figure
from flowmesh_scheduler.sim.verdict import commit

OURS = "flowmesh"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of out/bench.jsonl. ``bar`` is empty and ``ok`` null where nothing is demanded."""

    name: str
    value: float
    unit: str
    bar: str
    ok: bool | None
    seed: int
    commit: str
    rounds: tuple[float, ...] = ()


def machine() -> str:
    """Return one line about the machine: processor, cores, memory, system, Python."""
    info = Path("/proc/cpuinfo")
    model = (
        next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), "?")
        if info.exists()
        else "?"
    )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{model}, {cores} cores, {memory_bytes / 2**30:.0f} GiB, {system}"


class Ledger:
    """Collects figures per peer and turns them into records."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._commit = commit()
        self._rounds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._units: dict[str, str] = {}

    def add(self, peer: str, figure: Figure) -> None:
        """Keep one round's figure."""
        self._rounds[peer, figure.name].append(figure.value)
        self._units[figure.name] = figure.unit

    def peers(self) -> list[str]:
        """Return the peers that have figures, in the order they came."""
        return list(dict.fromkeys(peer for peer, _ in self._rounds))

    def complete(self, peers: list[str], workloads: list[str], rounds: int) -> bool:
        """Tell whether every round of every workload gave its figures."""
        seen = {(peer, name.split(".")[0]) for (peer, name), values in self._rounds.items() if len(values) == rounds}
        return all((peer, workload) in seen for peer in peers for workload in workloads)

    def value(self, peer: str, figure: str) -> float | None:
        """Return the median over the rounds, or None."""
        values = self._rounds.get((peer, figure))
        return median(values) if values else None

    def measured(self, bar: Bar) -> float | None:
        """Return what a bar is held against, or None when a side of it was not measured."""
        ours = self.value(OURS, bar.figure)
        if not bar.peer:
            return ours
        theirs = self.value(bar.peer, bar.figure)
        return ours / theirs if ours and theirs else None

    def records(self) -> list[Record]:
        """Return a record per figure and peer, then one per bar whose sides were measured."""
        found = [
            Record(f"{figure}.{peer}", median(values), self._units[figure], "", None, self._seed, self._commit, tuple(values))
            for (peer, figure), values in self._rounds.items()
        ]
        for bar in BARS:
            value = self.measured(bar)
            if value is not None:
                name = f"{bar.figure}.{OURS}" + (f"/{bar.peer}" if bar.peer else "/bar")
                found.append(Record(name, value, bar.unit, bar.text(), bar.holds(value), self._seed, self._commit))
        return found

    def table(self) -> Table:
        """Return the medians as a table: a row per figure, a column per peer, the bar beside."""
        table = Table(title="medians over the rounds")
        table.add_column("figure")
        for peer in self.peers():
            table.add_column(peer, justify="right")
        table.add_column("bar", justify="right")
        for figure, unit in self._units.items():
            cells = [
                "-" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
                for value in (self.value(p, figure) for p in self.peers())
            ]
            verdicts = [self._verdict(bar) for bar in BARS if bar.figure == figure]
            table.add_row(f"{figure} ({unit})", *cells, "\n".join(verdicts))
        return table

    def _verdict(self, bar: Bar) -> str:
        value = self.measured(bar)
        if value is None:
            return bar.text()
        unit = bar.unit if bar.peer else f" {bar.unit}"
        return f"{bar.text()}: {value:.2f}{unit} {'ok' if bar.holds(value) else 'MISSED'}"


def write(records: list[Record], path: Path) -> None:
    """Append the records to ``path``, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


def show(ledger: Ledger, extra: list[Record]) -> None:
    """Print the tables for people."""
    console = Console()
    console.print(f"[dim]{machine()}[/dim]")
    if ledger.peers():
        console.print(ledger.table())
    if extra:
        table = Table(title="alone")
        for column in ("figure", "value", "bar"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        for record in extra:
            verdict = "" if record.ok is None else f"{record.bar} {'ok' if record.ok else 'MISSED'}"
            table.add_row(record.name, f"{record.value:,.3f} {record.unit}", verdict)
        console.print(table)
