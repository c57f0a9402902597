"""How long people wait: ``flowmesh --help``, and a cold ``flowmesh up`` to the first result, as typed in a shell."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
DOCUMENT = """\
apiVersion: flowmesh/v1
name: first
operators:
  one:
    type: flow.noop
    with: {nonce: 1}
outputs: {one: one.out}
"""


def _timed(arguments: list[str], folder: Path, timeout_s: float) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "FLOWMESH_CONTEXT"}
    began = time.perf_counter()
    done = subprocess.run(
        [COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    took_s = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(
            f"flowmesh {' '.join(arguments)} ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}"
        )
    return took_s


def help_s(times: int) -> list[float]:
    """Return the seconds that ``flowmesh --help`` takes, ``times`` over; the first run, which fills caches, is left out."""
    with tempfile.TemporaryDirectory() as name:
        return [_timed(["--help"], Path(name), 30) for _ in range(times + 1)][1:]


def cold_s() -> float:
    """Return the seconds from typing ``flowmesh up`` in an empty folder to holding the first result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "first.yaml").write_text(DOCUMENT)
        try:
            return _timed(["up", "--nodes", "1"], folder, 60) + _timed(["submit", "first.yaml", "--watch"], folder, 60)
        finally:
            _timed(["down"], folder, 60)


def typical(values: list[float]) -> float:
    """Return the median."""
    return median(values)
