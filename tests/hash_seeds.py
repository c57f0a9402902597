"""The same code under several seeds of the hash function: what it tells must not depend on the order of sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def told_under(seeds: Sequence[str], code: str, timeout_s: float) -> list[list[str]]:
    """Return the words that ``code`` prints, once for each seed, each time in a process of its own."""
    found = []
    for seed in seeds:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=timeout_s)
        found.append(done.stdout.splitlines())
    return found
