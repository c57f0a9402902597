"""One seed of many: run in a process of its own, its history kept if it broke a promise."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tests.faults.simulation import Report, simulate

OUT = Path("out")


def run_one(seed: int, minutes: float, kinds: tuple[str, ...] | None) -> Report:
    """Run one seed in a process of its own; write its history if it broke a promise."""
    logging.disable(logging.CRITICAL)
    report = simulate(seed, minutes, kinds)
    if report.problems:
        write_history(report, OUT)
    report.history = None
    return report


def line_of(report: Report) -> str:
    """Return what came of a seed, and the command that repeats it if something broke."""
    faults = " ".join(f"{kind}:{count}" for kind, count in sorted(report.faults.items()))
    head = (
        f"seed {report.seed}: {report.digest[:12]}, {report.orders} runs, {report.executions} executions, "
        f"{report.epochs} epochs, {report.cpu_s:.1f} s [{faults}]"
    )
    if not report.problems:
        return head
    again = f"  again: {Path(sys.executable).name} -m tests.faults --seed {report.seed} --minutes {report.minutes:g}"
    return "\n".join([head, *(f"  {problem}" for problem in report.problems[:20]), again])


def write_history(report: Report, folder: Path) -> None:
    """Write down everything that was noted of a seed."""
    if report.history is None:
        return
    folder.mkdir(exist_ok=True)
    path = folder / f"sim-faults-{report.seed}.txt"
    path.write_text("\n".join([line_of(report), *report.history.notes]) + "\n")
