"""What commands print: JSON documents, tables, sizes, times. Text of others is cleaned of control characters."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 240
"""Columns of a table that goes into a file or pipe."""

_CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}

STATE_STYLES = {
    "succeeded": "green",
    "done": "green",
    "accepted": "cyan",
    "assigned": "cyan",
    "ready": "blue",
    "failed": "red",
    "rejected": "red",
    "skipped": "yellow",
    "cancelled": "yellow",
    "active": "green",
    "cordoned": "red",
    "canary": "yellow",
}


def clean(text: Any) -> str:
    """Return text that cannot move the cursor or change colours: it may be what a model wrote."""
    return str(text).translate(_CONTROL)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    import json

    print(json.dumps(document, ensure_ascii=False, default=str))


def console() -> Console:
    """Return a console on stdout: as wide as the terminal, wide where there is none."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    return Console(
        width=None if is_terminal else PIPED_WIDTH, highlight=False, markup=False, emoji=False, soft_wrap=not is_terminal
    )


def cell(value: Any, style: str = "") -> Any:
    """Return a value as the text of a cell, coloured if it is a state."""
    from rich.text import Text

    text = clean(value).replace("\n", " ")
    return Text(text, style=style or STATE_STYLES.get(text, ""))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """Return a table of texts; column names that begin with '>' are set flush right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell(value) for value in row))
    return made


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout; no line ends in blanks, for those who cut and compare."""
    screen = console()
    if screen.is_terminal:
        screen.print(table(columns, rows))
        return
    with screen.capture() as captured:
        screen.print(table(columns, rows))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def size(size_bytes: Any) -> str:
    """Return a size for people: 0 B, 12.3 KiB, 4.0 GiB; empty for what is unknown."""
    if not isinstance(size_bytes, int | float) or size_bytes < 0:
        return ""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def span(span_us: Any) -> str:
    """Return a duration given in microseconds for people: 0.4 ms, 12.0 s, 3 min 20 s."""
    if not isinstance(span_us, int | float) or span_us < 0:
        return ""
    if span_us < 1_000_000:
        return f"{span_us / 1000:.1f} ms"
    seconds = span_us / 1e6
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min {rest} s"


def moment(at_us: Any) -> str:
    """Return a time in microseconds since the epoch as local date and time; empty for none."""
    if not isinstance(at_us, int | float) or at_us <= 0:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_us / 1e6))


def counts_text(counts: Any) -> str:
    """Return counts by state in the order in which an operator passes through them: ``3 done, 1 assigned``."""
    if not isinstance(counts, dict):
        return ""
    order = ("done", "assigned", "ready", "waiting", "failed", "skipped", "cancelled")
    names = [*(name for name in order if name in counts), *(name for name in counts if name not in order)]
    return ", ".join(f"{counts[name]} {name}" for name in names if counts[name])
