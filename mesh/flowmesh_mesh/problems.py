"""What is wrong with a document, and where: all of it is told at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from flowmesh_cas.errors import UsageError

Step = str | int
Place = tuple[Step, ...]

SHOWN_MAX = 200
"""Largest number of problems told at once; a document with more has one cause repeated."""


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong. ``path`` is the place in the document (``operators.a.with.samples``).

    ``line`` and ``column`` count from 1 and are 0 where there is no text (a dict, JSON from the wire).
    """

    path: str
    line: int = 0
    column: int = 0
    message: str = ""
    hint: str = ""
    file: str = ""


class DocumentError(UsageError):
    """A document that cannot be compiled; ``problems`` holds everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        message = first.message if first.path == "" else f"{first.path}: {first.message}"
        if len(problems) > 1:
            message = f"{len(problems)} problems in the workflow, the first: {message}"
        super().__init__(message, hint=first.hint)
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n" + render_problems(self.problems)


class Locator(Protocol):
    """Knows where in a text the parts of a document stand."""

    file: str

    def locate(self, place: Place, *, key: bool = False) -> tuple[int, int]:
        """Return line and column from 1 of a value, or of its key; of the nearest part around it where it has none."""


class Problems:
    """Collects problems, each once, and finds their places in the text."""

    def __init__(self, locator: Locator | None = None) -> None:
        self._locator = locator
        self._found: dict[tuple[str, str], Problem] = {}
        self.count = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, place: Place, message: str, hint: str = "", *, key: bool = False) -> None:
        """Note a problem at ``place``; with ``key`` it is the key there that is wrong, not its value."""
        path = place_text(place)
        self.count += 1
        if (path, message) in self._found or len(self._found) >= SHOWN_MAX:
            return
        line, column = self._locator.locate(place, key=key) if self._locator else (0, 0)
        file = self._locator.file if self._locator else ""
        self._found[path, message] = Problem(path, line, column, message, hint, file)

    def list(self) -> list[Problem]:
        """Return the problems in the order of the text."""
        return sorted(self._found.values(), key=lambda found: (found.line, found.column))

    def check(self) -> None:
        """Raise DocumentError if there are any."""
        if self._found:
            raise DocumentError(self.list())


def place_text(place: Iterable[Step]) -> str:
    """Return a place as people write it: ``operators.a.inputs.rows[0]``."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.replace("-", "_").isidentifier():
            text += f".{step}" if text else step
        else:
            shown = step if len(step) <= 80 else step[:77] + "..."
            text += f"[{shown!r}]"
    return text


def nearest(word: str, known: Iterable[str], what: str = "") -> str:
    """Return a hint: the known word that ``word`` may have meant, else the list of them."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(word[:100], names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    if not names:
        return f"There are no {what}." if what else ""
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"Known {what}: {listed}." if what else f"Known: {listed}."


def shown(value: object) -> str:
    """Return a value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def render_problems(problems: Sequence[Problem]) -> str:
    """Return problems as plain text for a terminal: place, message, hint."""
    lines = []
    for problem in problems:
        where = problem.file
        if problem.line:
            where = f"{where or 'line '}{':' if where else ''}{problem.line}:{problem.column}"
        lines.append("  ".join(part for part in (where, problem.path) if part) or "workflow")
        lines.append(f"    {problem.message}")
        if problem.hint:
            lines.append(f"    hint: {problem.hint}")
    return "\n".join(lines)
