"""Two builds of FlowMesh: this one, and the previous release made anew from the history."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPONENTS = ("mesh", "scheduler", "node", "cas", "deploy")

PREVIOUS = "66c74833f4d2"
"""Commit of the previous release. With every release it moves to the commit of the one before: the versions that are promised to
work together are always this one and the last. What is older must only be refused clearly."""


@dataclass(frozen=True)
class Build:
    """One build: a name for people, and where its components lie."""

    name: str
    root: Path
    patch: Path | None = None
    """A folder with a module that Python runs first: what makes this build pretend to be a later one."""

    def environment(self) -> dict[str, str]:
        """Return the environment in which a Python process runs this build and nothing of another."""
        paths = [str(self.root / component) for component in COMPONENTS]
        first = [str(self.patch)] if self.patch is not None else []
        return {**os.environ, "PYTHONPATH": os.pathsep.join(first + paths), "PYTHONDONTWRITEBYTECODE": "1"}

    def python(self, *arguments: str) -> list[str]:
        """Return the command of a Python process of this build."""
        return [sys.executable, "-P", *arguments]


THIS = Build("new", ROOT)


def why_no_previous() -> str:
    """Return why the previous release cannot be made from this clone, empty when it can."""
    found = subprocess.run(["git", "cat-file", "-e", f"{PREVIOUS}^{{commit}}"], cwd=ROOT, capture_output=True, check=False)
    return "" if found.returncode == 0 else f"this clone does not hold the previous release ({PREVIOUS}): fetch its history"


def make_previous(folder: Path) -> Build:
    """Put the previous release into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", PREVIOUS, *COMPONENTS], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return Build("old", folder)


def pretend(folder: Path, wire: int, oldest: int, records: int = 1) -> Build:
    """Return this build as if it spoke another version of the wire, and its records needed a reader of version ``records``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "from flowmesh_mesh import messages\n"
        f"messages.WIRE_VERSION, messages.WIRE_OLDEST = {wire}, {oldest}\n"
        "from flowmesh_mesh import wire\n"
        f"wire.RECORDS_NEED = {records}\n"
    )
    return Build(f"wire{wire}", ROOT, folder)
