"""From outcomes to figures with confidence intervals, and whether the bars hold."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean

from flowmesh_scheduler.sim.metrics import Figures
from flowmesh_scheduler.sim.policies import ISOLATED
from flowmesh_scheduler.sim.study import OVERLAPS, Outcome
from flowmesh_scheduler.sim.workloads import OVERLAP, SPARSE, WORKLOADS

OURS = "ours"
SIMPLE = ("fifo", "random", "round-robin", "published")
_RESAMPLES = 1000
_WORST_ALLOWED = 1.02
_ABOVE_PUBLISHED = ("mix", "agents", "preempt", "hot-model")

Key = tuple[str, str, float, str]
"""Workload, policy, overlap, ablation."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of out/sim.jsonl; ``low`` and ``high`` bound the 95 % confidence interval over the seeds."""

    name: str
    value: float
    unit: str
    bar: str
    ok: bool | None
    seed: int
    commit: str
    low: float | None = None
    high: float | None = None
    seeds: int = 1


class Table:
    """Outcomes by workload, policy, overlap and ablation, seed by seed."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._found: dict[Key, dict[int, Outcome]] = {}
        for outcome in outcomes:
            job = outcome.job
            self._found.setdefault((job.workload, job.policy, job.overlap, job.ablate), {})[job.seed] = outcome

    def rows(self) -> list[Key]:
        return list(self._found)

    def has(self, workload: str, policy: str, overlap: float = OVERLAP, ablate: str = "") -> bool:
        return (workload, policy, overlap, ablate) in self._found

    def outcomes(self, workload: str, policy: str, overlap: float = OVERLAP, ablate: str = "") -> dict[int, Outcome]:
        return self._found[workload, policy, overlap, ablate]

    def mean(self, figure: str, workload: str, policy: str, overlap: float = OVERLAP, ablate: str = "") -> float:
        """Return the mean over the seeds."""
        return fmean(getattr(o.figures, figure) for o in self.outcomes(workload, policy, overlap, ablate).values())

    def ratio(self, figure: str, above: Key, below: Key) -> tuple[float, float, float, int]:
        """Return the ratio of two means with its 95 % interval (bootstrap over the seeds, drawn in pairs), and how many seeds."""
        upper, lower = self.outcomes(*above), self.outcomes(*below)
        seeds = sorted(upper.keys() & lower.keys())
        pairs = [(_figure(upper[seed].figures, figure), _figure(lower[seed].figures, figure)) for seed in seeds]
        return *ratio_of(pairs), len(seeds)


def _figure(figures: Figures, name: str) -> float:
    return float(getattr(figures, name))


def ratio_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return mean over mean of pairs, with the bounds that hold 95 % of resampled ones."""
    draw = Random(len(pairs))
    found = sorted(_ratio([pairs[draw.randrange(len(pairs))] for _ in pairs]) for _ in range(_RESAMPLES))
    return _ratio(pairs), found[int(0.025 * _RESAMPLES)], found[int(0.975 * _RESAMPLES) - 1]


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    below = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / below if below else float("inf")


def records(table: Table, seed: int) -> list[Record]:
    """Return every ratio that something is demanded of, and those that are only reported."""
    name = commit()

    def record(
        label: str, figure: str, above: Key, below: Key, bar: str = "", holds: Callable[[float], bool] | None = None
    ) -> Record:
        value, low, high, seeds = table.ratio(figure, above, below)
        return Record(label, value, "x", bar, holds(value) if holds is not None else None, seed, name, low, high, seeds)

    found: list[Record] = []
    if table.has("mix", OURS) and table.has("mix", ISOLATED):
        pair = (("mix", ISOLATED, OVERLAP, ""), ("mix", OURS, OVERLAP, ""))
        found.append(record("mix_cost_ratio_vs_isolated", "cost_usd", *pair, ">= 3.8", lambda x: x >= 3.8))
        found.append(record("mix_energy_ratio_vs_isolated", "energy_kwh", *pair, ">= 2.0", lambda x: x >= 2.0))
        found.append(record("mix_p95_ratio_vs_isolated", "response_p95_s", *pair, ">= 1.0", lambda x: x >= 1.0))
    for overlap in OVERLAPS:
        if not (table.has("mix", OURS, overlap) and table.has("mix", ISOLATED, overlap)):
            continue
        pair = (("mix", ISOLATED, overlap, ""), ("mix", OURS, overlap, ""))
        is_least = overlap == 0.0
        found.append(
            record(
                f"mix_cost_ratio_vs_isolated.overlap_{overlap * 100:.0f}",
                "cost_usd",
                *pair,
                ">= 1.5" if is_least else "",
                (lambda x: x >= 1.5) if is_least else None,
            )
        )
        found.append(record(f"mix_energy_ratio_vs_isolated.overlap_{overlap * 100:.0f}", "energy_kwh", *pair))
        found.append(record(f"mix_p95_ratio_vs_isolated.overlap_{overlap * 100:.0f}", "response_p95_s", *pair))
        found.append(_measured(table, overlap, seed, name))
    if table.has(SPARSE, OURS) and table.has(SPARSE, ISOLATED):
        pair = ((SPARSE, ISOLATED, OVERLAP, ""), (SPARSE, OURS, OVERLAP, ""))
        for short, figure in (("cost", "cost_usd"), ("energy", "energy_kwh"), ("p95", "response_p95_s")):
            found.append(record(f"mix_{short}_ratio_vs_isolated.sparse", figure, *pair))
    worst: list[tuple[float, str]] = []
    for workload in WORKLOADS:
        if not table.has(workload, OURS):
            continue
        rival = best_simple(table, workload)
        ours = (workload, OURS, OVERLAP, "")
        if rival:
            found.append(record(f"cost_vs_best_simple.{workload}.{rival}", "cost_usd", ours, (workload, rival, OVERLAP, "")))
            worst.append((found[-1].value, workload))
        if table.has(workload, "published"):
            bar = (">= 1.3", lambda x: x >= 1.3) if workload in _ABOVE_PUBLISHED else ("", None)
            found.append(
                record(f"cost_ratio_vs_published.{workload}", "cost_usd", (workload, "published", OVERLAP, ""), ours, *bar)
            )
    if worst:
        value, _ = max(worst)
        found.append(Record("worst_cost_vs_best_simple", value, "x", f"<= {_WORST_ALLOWED}", value <= _WORST_ALLOWED, seed, name))
    for workload, policy, overlap, ablate in table.rows():
        if ablate and table.has(workload, policy, overlap):
            key = (workload, policy, overlap, "")
            found.append(record(f"cost_without_{ablate}.{workload}", "cost_usd", (workload, policy, overlap, ablate), key))
    return found


def _measured(table: Table, overlap: float, seed: int, name: str) -> Record:
    outcomes = table.outcomes("mix", OURS, overlap)
    value = fmean(o.shared.between_tenants for o in outcomes.values())
    return Record(f"mix_overlap_measured.overlap_{overlap * 100:.0f}", value, "share", "", None, seed, name, seeds=len(outcomes))


def best_simple(table: Table, workload: str) -> str:
    """Return the cheapest simple policy of which the p95 response is no worse than ours; empty if there is none."""
    ours = table.mean("response_p95_s", workload, OURS)
    rivals = [p for p in SIMPLE if table.has(workload, p) and table.mean("response_p95_s", workload, p) <= ours]
    return min(rivals, key=lambda p: table.mean("cost_usd", workload, p), default="")


def commit() -> str:
    """Return the short name of the commit that is measured, with ``+`` when the tree has changes."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed.strip() else "")


def write(found: Sequence[Record], path: Path) -> None:
    """Append the records to a file, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in found:
            file.write(json.dumps(asdict(record)) + "\n")
