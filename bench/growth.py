"""The growth of what a decision costs, measured in processes of their own: records with bars, and a plot."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import log10
from pathlib import Path
from statistics import median

from bench.report import Record
from bench.workloads import Figure
from flowmesh_scheduler.sim.verdict import commit

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
SMALL, SMALL_ROUNDS = 10_000, 5
TIMEOUT_S = 1_800.0
BARS = {
    "decision.10000.time": 25.0,
    "decision.1000000.time": 50.0,
    "decision.1000000.memory": 1_500.0,
}
"""The most that may be spent on an operator, in the unit of the figure."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 360, 64, 300, 40


def figures(counts: Sequence[int] = COUNTS) -> tuple[list[Figure], bool]:
    """Measure each size, small ones several times; return medians, and whether every round gave its figures."""
    found: list[Figure] = []
    is_complete = True
    for count in counts:
        print(f"decisions: {count:,} ready operators", file=sys.stderr, flush=True)
        rounds = [_round(count) for _ in range(SMALL_ROUNDS if count <= SMALL else 1)]
        is_complete = is_complete and all(rounds)
        for same in zip(*(figures for figures in rounds if figures), strict=True):
            found.append(Figure(same[0].name, median(figure.value for figure in same), same[0].unit))
    return found, is_complete


def _round(count: int) -> list[Figure]:
    """Measure one size once, in a process of its own; return nothing where that failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.jsonl"
        command = [sys.executable, "-m", "bench.decision", str(count), str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            error = done.stderr[-3000:]
        except subprocess.TimeoutExpired:
            error = f"not done after {TIMEOUT_S:g} s"
        if path.exists():
            return [Figure(**json.loads(line)) for line in path.read_text().splitlines()]
        print(f"deciding over {count:,} operators failed:\n{error}", file=sys.stderr)
        return []


def records(found: Sequence[Figure], seed: int) -> list[Record]:
    """Return a record for each figure, held against its bar if it has one."""
    name = commit()
    return [_record(figure, BARS.get(figure.name), seed, name) for figure in found]


def _record(figure: Figure, bar: float | None, seed: int, name: str) -> Record:
    text, is_held = ("", None) if bar is None else (f"<= {bar:g} {figure.unit}", figure.value <= bar)
    return Record(figure.name, figure.value, figure.unit, text, is_held, seed, name, (figure.value,))


def write_plot(found: Sequence[Figure], path: Path) -> None:
    """Write what a decision takes over how many operators are ready, as SVG; dashes are the bars."""
    points = sorted((int(count), figure.value) for figure in found for count in _count_of(figure.name))
    if not points:
        return
    top = 1.15 * max([value for _, value in points] + [BARS["decision.1000000.time"]])
    first, last = log10(points[0][0]), max(log10(points[-1][0]), log10(points[0][0]) + 1)

    def x(count: int) -> float:
        return _LEFT + (log10(count) - first) / (last - first) * (_WIDTH - _LEFT - 40)

    def y(value: float) -> float:
        return _BOTTOM - value / top * (_BOTTOM - _TOP)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*_frame(points, x, y, top), *_bars(x, y, points), *_line(points, x, y), "</svg>"]) + "\n")


def _count_of(name: str) -> list[str]:
    parts = name.split(".")
    return [parts[1]] if parts[0] == "decision" and parts[2] == "time" else []


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _frame(points: Sequence[tuple[int, float]], x: Callable[[int], float], y: Callable[[float], float], top: float) -> list[str]:
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_WIDTH / 2, 22, "Time of a decision, by ready operators (1,000 nodes, 200 batch keys)"),
        _text(_WIDTH / 2, _HEIGHT - 12, "ready operators"),
        _text(_LEFT - 8, _TOP - 8, "us/operator", "start"),
    ]
    for value in range(0, int(top) + 1, 10):
        found.append(f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - 40}" stroke="#ddd"/>')
        found.append(_text(_LEFT - 8, y(value) + 4, str(value), "end"))
    return found + [_text(x(count), _BOTTOM + 20, f"{count:,}") for count, _ in points]


def _bars(x: Callable[[int], float], y: Callable[[float], float], points: Sequence[tuple[int, float]]) -> list[str]:
    found = []
    for count, _ in points:
        bar = BARS.get(f"decision.{count}.time")
        if bar is not None:
            left, right = x(count) - 24, x(count) + 24
            found.append(f'<path d="M{left:.1f} {y(bar):.1f}H{right:.1f}" stroke="#c33" stroke-dasharray="5 3" fill="none"/>')
    return found


def _line(points: Sequence[tuple[int, float]], x: Callable[[int], float], y: Callable[[float], float]) -> list[str]:
    path = "L".join(f"{x(count):.1f} {y(value):.1f}" for count, value in points)
    found = [f'<path d="M{path}" stroke="#25c" stroke-width="2" fill="none"/>']
    for count, value in points:
        found.append(f'<circle cx="{x(count):.1f}" cy="{y(value):.1f}" r="4" fill="#25c"/>')
        found.append(_text(x(count), y(value) - 10, f"{value:.1f}"))
    return found
