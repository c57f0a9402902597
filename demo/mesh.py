"""The mesh of the demo: three nodes on this machine, brought up and down by the same commands that users type."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowmesh_cas.errors import TransientError

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
NODES = 3


@contextmanager
def mesh(folder: Path) -> Iterator[dict[str, int]]:
    """Start a mesh on an empty ``folder`` and yield the process id of every node; stop it at the end."""
    if folder.exists():
        _flowmesh("down", folder, check=False)
        shutil.rmtree(folder)
    _flowmesh("up", folder, "--nodes", str(NODES))
    try:
        yield _pids(folder)
    finally:
        _flowmesh("down", folder, check=False)


def _pids(folder: Path) -> dict[str, int]:
    state = json.loads((folder / "supervisor.json").read_text())
    return {name: int(process["pid"]) for name, process in state["processes"].items() if name.startswith("node-")}


def _flowmesh(command: str, folder: Path, *arguments: str, check: bool = True) -> None:
    done = subprocess.run(
        [COMMAND, command, "--dir", str(folder), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    if check and done.returncode:
        raise TransientError(f"flowmesh {command} ended with {done.returncode}: {done.stderr[-1000:] or done.stdout[-1000:]}")
