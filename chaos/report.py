"""What chaos amounts to: records with their bars in out/chaos.jsonl, a table for people, and docs/fault-report.md."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.report import machine
from rich.console import Console
from rich.table import Table

from chaos.checker import DIED, DOUBLED, LOST, STALE, WRONG
from chaos.seed import HEAL_S, Outcome
from flowmesh_scheduler.sim.verdict import commit

SHOWN_VIOLATIONS = 20
SHOWN_COMPLAINTS = 12


@dataclass(frozen=True, slots=True)
class Record:
    """One line of out/chaos.jsonl. ``bar`` is empty and ``ok`` null where nothing is demanded."""

    name: str
    value: float
    unit: str
    bar: str
    ok: bool | None
    seed: int
    commit: str
    samples: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured figure. ``most`` and ``least`` are its bar, None where there is none; ``samples`` what it was made from."""

    name: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None
    samples: tuple[float, ...] = ()

    @property
    def bar(self) -> str:
        """Return the bar in words."""
        if self.most is not None and self.most == self.least:
            return f"= {self.most:g}"
        if self.most is not None:
            return f"<= {self.most:g}"
        return "" if self.least is None else f">= {self.least:g}"

    @property
    def ok(self) -> bool | None:
        """Tell whether the bar holds, None where there is none."""
        if self.most is None and self.least is None:
            return None
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    def record(self, seed: int) -> Record:
        """Return the figure as a line of the file."""
        return Record(self.name, self.value, self.unit, self.bar, self.ok, seed, commit(), self.samples)


def of_seeds(outcomes: list[Outcome]) -> list[Figure]:
    """Return the figures of all seeds together."""

    def count(kind: str) -> float:
        return float(sum(len(outcome.verdict.of(kind)) for outcome in outcomes))

    def total(name: str) -> float:
        return float(sum(outcome.verdict.counts[name] for outcome in outcomes))

    faults = sum(len(_faults(outcome)) and sum(_faults(outcome).values()) for outcome in outcomes)
    return [
        Figure("lost_workflows", count(LOST), "workflows", 0, 0),
        Figure("double_results", count(DOUBLED), "results", 0, 0),
        Figure("stale_effects", count(STALE), "writes", 0, 0),
        Figure("wrong_terminal_states", count(WRONG), "workflows", 0, 0),
        Figure("processes_died", count(DIED), "processes", 0, 0),
        Figure("seeds_failed_to_run", float(sum(bool(outcome.error) for outcome in outcomes)), "seeds", 0, 0),
        Figure("unknown_submissions", total("unknown"), "workflows"),
        Figure("workflows_accepted", total("accepted"), "workflows"),
        Figure("results_verified", total("verified"), "workflows"),
        Figure("faults", float(faults), "faults"),
        Figure("epochs", total("epochs"), "epochs"),
        Figure("tracebacks_in_logs", _tracebacks(outcomes), "tracebacks"),
        Figure("seeds", float(len(outcomes)), "seeds", None, 20),
        Figure("minutes", sum(outcome.window_s for outcome in outcomes) / 60, "min", None, 60),
    ]


def _tracebacks(outcomes: list[Outcome]) -> float:
    counts = [outcome.verdict.counts for outcome in outcomes]
    return float(sum(n for each in counts for name, n in each.items() if name.startswith("complaint ")))


def _faults(outcome: Outcome) -> Counter[str]:
    counts = outcome.verdict.counts
    return Counter({name.removeprefix("fault "): n for name, n in counts.items() if name.startswith("fault ")})


def write(figures: list[Figure], seed: int, path: Path) -> None:
    """Append the figures to ``path``, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for figure in figures:
            file.write(json.dumps(asdict(figure.record(seed))) + "\n")


def show(figures: list[Figure]) -> None:
    """Print the figures for people."""
    table = Table(title="chaos")
    for column in ("figure", "value", "bar"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for figure in figures:
        verdict = "" if figure.ok is None else f"{figure.bar} {'ok' if figure.ok else 'MISSED'}"
        table.add_row(figure.name, f"{figure.value:,.3g} {figure.unit}", verdict)
    Console().print(table)


def page(figures: list[Figure], outcomes: list[Outcome]) -> str:
    """Return docs/fault-report.md: what was run, how long, what was broken how often, what was found."""
    parts = [
        _head(outcomes),
        _figures(figures),
        _broken(outcomes),
        _asked(outcomes),
        _found(outcomes),
        _complaints(outcomes),
        _TAIL,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_TAIL = """\
## What this does not show

Everything runs on one machine: its kernel, its clock and its disk are shared, so what only separate machines suffer (a
switch that drops one direction for one rack, disks that lie about syncs) is modelled or missing. A power loss is modelled for the
stores of nodes and schedulers alone (`chaos/disk.py` says exactly how); the brokers' files are protected by three copies, which
on machines that fail together are one. A clean run shows that nothing was found, not that nothing is there.

`make chaos SEED=n` repeats one seed: the same faults in the same order, though no two runs of real processes are alike. The
checker is tested with planted violations of every kind (`tests/chaos/`)."""


def _head(outcomes: list[Outcome]) -> str:
    when = datetime.now(UTC).date().isoformat()
    minutes = sum(outcome.window_s for outcome in outcomes) / 60
    return f"""\
# Fault report

Written by `make chaos` on {when}, at commit `{commit()}`. Machine: {machine()}.

{len(outcomes)} seeds, {minutes:.0f} minutes of faults. In each seed a fresh mesh of real processes (three brokers with
replicated streams, three schedulers, five nodes) works for two tenants while it is broken; then everything is mended, every
accepted run has {HEAL_S:.0f} s to end in, and the checker reads clients' histories, the guarded streams as the broker stored
them, the ledger, the nodes' logs and the effects outside. How the mesh answers faults stands in [recovery.md](recovery.md)."""


def _figures(figures: list[Figure]) -> str:
    rows = ["## Figures", "", "| figure | value | unit | bar | |", "|---|---|---|---|---|"]
    for each in figures:
        verdict = "" if each.ok is None else "holds" if each.ok else "**missed**"
        rows.append(f"| `{each.name}` | {each.value:,.4g} | {each.unit} | {each.bar} | {verdict} |")
    return "\n".join(rows)


def _broken(outcomes: list[Outcome]) -> str:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total += _faults(outcome)
    left_out: Counter[str] = Counter()
    for outcome in outcomes:
        left_out.update(outcome.left_out)
    rows = ["## What was broken", "", "| fault | times |", "|---|---|"]
    rows += [f"| {name} | {count} |" for name, count in sorted(total.items())]
    if left_out:
        text = ", ".join(f"{name} {count} times" for name, count in sorted(left_out.items()))
        rows += ["", f"Left out because whom it would have hit was broken already, or for want of rights on the machine: {text}."]
    return "\n".join(rows)


def _asked(outcomes: list[Outcome]) -> str:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update(outcome.verdict.counts)
    rows = ["## What was asked for, and how it ended", "", "| workflows of kind | submitted |", "|---|---|"]
    rows += [f"| {name.removeprefix('kind ')} | {count} |" for name, count in sorted(total.items()) if name.startswith("kind ")]
    rows += ["", "| ended with reason | runs |", "|---|---|"]
    rows += [f"| {name.removeprefix('ended ')} | {count} |" for name, count in sorted(total.items()) if name.startswith("ended ")]
    return "\n".join(rows)


def _complaints(outcomes: list[Outcome]) -> str:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update({name: n for name, n in outcome.verdict.counts.items() if name.startswith("complaint ")})
    if not total:
        return ""
    rows = ["## What processes complained of", "", "Last lines of tracebacks in logs. None of them broke a promise.", ""]
    return "\n".join(
        [*rows, *(f"- {n} times: `{name.removeprefix('complaint ')}`" for name, n in total.most_common(SHOWN_COMPLAINTS))]
    )


def _found(outcomes: list[Outcome]) -> str:
    rows = ["## What was found", ""]
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    if not bad:
        return "\n".join([*rows, "Nothing: no promise was seen broken."])
    for outcome in bad:
        rows.append(f"- seed {outcome.seed}" + (f": it could not be run to its end: {outcome.error}" if outcome.error else ""))
        for violation in outcome.verdict.violations[:SHOWN_VIOLATIONS]:
            rows.append(f"  - {violation.kind}: {violation.subject}: {violation.what}")
    return "\n".join(rows)
