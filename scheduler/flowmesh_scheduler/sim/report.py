"""The tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table as Drawn

from flowmesh_scheduler.sim.verdict import Record, Table
from flowmesh_scheduler.sim.workloads import OVERLAP

_COLUMNS = (
    ("cost $", "cost_usd", "{:.2f}"),
    ("energy kWh", "energy_kwh", "{:.2f}"),
    ("makespan s", "makespan_s", "{:,.0f}"),
    ("p50 s", "response_p50_s", "{:,.0f}"),
    ("p95 s", "response_p95_s", "{:,.0f}"),
    ("$·s", "cost_delay_usd_s", "{:,.0f}"),
    ("kWh·s", "energy_delay_kwh_s", "{:,.0f}"),
    ("goodput", "goodput", "{:.2f}"),
    ("run", "operators", "{:,.0f}"),
    ("hits", "hits", "{:,.0f}"),
    ("batches", "batches", "{:,.0f}"),
    ("repeated s", "repeated_s", "{:,.0f}"),
    ("machines", "machines", "{:.0f}"),
)


def label_of(workload: str, overlap: float, ablate: str) -> str:
    """Return how a row of the table is called."""
    name = workload if overlap == OVERLAP else f"{workload} at {overlap:.0%}"
    return f"{name} without {ablate}" if ablate else name


def show(table: Table, found: Sequence[Record], console: Console) -> None:
    """Print means over the seeds, then what is demanded and whether it holds."""
    drawn = Drawn(title="means over the seeds")
    for name in ("workload", "policy"):
        drawn.add_column(name)
    for name, _, _ in _COLUMNS:
        drawn.add_column(name, justify="right")
    last = ""
    for key in table.rows():
        workload, policy, overlap, ablate = key
        label = label_of(workload, overlap, ablate)
        if last and label != last:
            drawn.add_section()
        cells = [form.format(table.mean(figure, *key)) for _, figure, form in _COLUMNS]
        drawn.add_row(label if label != last else "", policy, *cells)
        last = label
    console.print(drawn)
    if not found:
        return
    bars = Drawn(title="ratios, with the 95 % interval over the seeds")
    for name in ("figure", "value", "interval", "bar"):
        bars.add_column(name, justify="left" if name == "figure" else "right")
    for record in found:
        interval = "" if record.low is None or record.high is None else f"{record.low:.3f} to {record.high:.3f}"
        verdict = "" if record.ok is None else f"{record.bar} {'ok' if record.ok else 'MISSED'}"
        bars.add_row(record.name, f"{record.value:.3f}", interval, verdict)
    console.print(bars)


def shares(table: Table) -> list[str]:
    """Return a line per workload on what its documents have in common."""
    lines = []
    for key in table.rows():
        workload, policy, overlap, ablate = key
        if policy == "ours" and not ablate:
            outcomes = table.outcomes(*key).values()
            between = fmean(o.shared.between_tenants for o in outcomes)
            within = fmean(o.shared.within_tenant for o in outcomes)
            told = f"{between:.1%} of the operators are in another tenant's documents too"
            lines.append(f"{label_of(workload, overlap, ablate)}: {told}, {within:.1%} only in another of the same tenant's")
    return lines
