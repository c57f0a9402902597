"""Plots as SVG, written by hand: bars of cost and energy by policy, lines of the ratio over the overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from flowmesh_scheduler.sim.policies import ISOLATED, NAMES
from flowmesh_scheduler.sim.verdict import Table
from flowmesh_scheduler.sim.workloads import OVERLAP, WORKLOADS

_COLOURS = ("#1b6ca8", "#8fb339", "#e0a030", "#c05746", "#7a5c99", "#5b8e7d", "#888888")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 900, 360, 60, 60, 40


def draw(table: Table, folder: Path) -> list[Path]:
    """Write the plots that there are figures for; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for figure, title in (("cost_usd", "cost, relative to ours"), ("energy_kwh", "energy, relative to ours"),
                          ("response_p95_s", "p95 response, relative to ours")):  # fmt: skip
        groups = {name: _relative(table, name, figure) for name in WORKLOADS if table.has(name, "ours")}
        if groups:
            path = folder / f"sim_{figure}.svg"
            path.write_text(bars(title, groups), encoding="utf-8")
            found.append(path)
    overlaps = sorted(
        key[2] for key in table.rows() if key[:2] == ("mix", "ours") and not key[3] and table.has("mix", ISOLATED, key[2])
    )
    if len(overlaps) > 1:
        lines = {
            name: [(x, table.ratio(figure, ("mix", ISOLATED, x, ""), ("mix", "ours", x, ""))[0]) for x in overlaps]
            for name, figure in (("cost", "cost_usd"), ("energy", "energy_kwh"), ("p95 response", "response_p95_s"))
        }
        path = folder / "sim_overlap.svg"
        path.write_text(curves("one pipeline per GPU against ours, over the overlap between tenants", lines), encoding="utf-8")
        found.append(path)
    return found


def _relative(table: Table, workload: str, figure: str) -> dict[str, float]:
    ours = table.mean(figure, workload, "ours", OVERLAP)
    return {policy: table.mean(figure, workload, policy) / ours for policy in NAMES if table.has(workload, policy)}


def bars(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Return groups of bars, one colour per name."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    top = max((value for group in groups.values() for value in group.values()), default=1.0)
    parts = _frame(title, top)
    width = (_WIDTH - _LEFT - 20) / max(1, len(groups))
    bar = 0.8 * width / max(1, len(names))
    for index, (label, group) in enumerate(groups.items()):
        left = _LEFT + index * width
        parts.append(_text(left + width * 0.45, _HEIGHT - _BOTTOM + 18, label, "middle"))
        for name, value in group.items():
            at = names.index(name)
            height = (_HEIGHT - _BOTTOM - _TOP) * value / top
            parts.append(
                f'<rect x="{left + at * bar:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" width="{bar * 0.9:.1f}" '
                f'height="{height:.1f}" fill="{_COLOURS[at % len(_COLOURS)]}"><title>{escape(name)}: {value:.2f}</title></rect>'
            )
    return _close(parts, names)


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return lines over x from 0 to 1."""
    top = max((y for line in lines.values() for _, y in line), default=1.0)
    parts = _frame(title, top)
    for index, line in enumerate(lines.values()):
        points = " ".join(f"{_x(x):.1f},{_y(y, top):.1f}" for x, y in line)
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in line:
            parts.append(f'<circle cx="{_x(x):.1f}" cy="{_y(y, top):.1f}" r="3" fill="{colour}"/>')
            parts.append(_text(_x(x), _y(y, top) - 7, f"{y:.2f}", "middle"))
    for x in sorted({x for line in lines.values() for x, _ in line}):
        parts.append(_text(_x(x), _HEIGHT - _BOTTOM + 18, f"{x:.0%}", "middle"))
    return _close(parts, list(lines))


def _x(share: float) -> float:
    return _LEFT + 30 + share * (_WIDTH - _LEFT - 100)


def _y(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value / top


def _frame(title: str, top: float) -> list[str]:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_WIDTH / 2, 20, title, "middle"),
    ]
    for part in range(5):
        value = top * part / 4
        y = _y(value, top)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 10}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:.2g}", "end"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _close(parts: list[str], names: Sequence[str]) -> str:
    for index, name in enumerate(names):
        x = _LEFT + index * 115
        parts.append(f'<rect x="{x}" y="{_HEIGHT - 24}" width="12" height="12" fill="{_COLOURS[index % len(_COLOURS)]}"/>')
        parts.append(_text(x + 16, _HEIGHT - 14, name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"
