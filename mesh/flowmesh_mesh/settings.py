"""What an operator asks of the mesh beside its work: resources, retries, time, priority, sharing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowmesh_mesh.manifest import Resources, Retry
from flowmesh_mesh.problems import Place, Problems, nearest, shown

RESOURCE_KEYS = ("gpus", "vram", "memory", "cpus")
RETRY_KEYS = ("attempts", "backoff")
SHARES = ("mesh", "private")
PRIORITY_MAX = 1000
DURATION_MAX_S = 366 * 86_400.0
SIZE_MAX_BYTES = 2**50

DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s|m|h|d)\Z")
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)\Z")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_NUMERIC = re.compile(r"any\Z|exact:[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one operator, those of the workflow filled in."""

    resources: Resources = field(default_factory=Resources)
    retry: Retry = field(default_factory=Retry)
    timeout_s: float = 0.0
    priority: int = 0
    deadline_s: float = 0.0
    share: str = ""
    numeric: str = "any"
    reusable: bool = False


def read_settings(entry: Mapping[str, Any], place: Place, problems: Problems, base: Settings) -> Settings:
    """Return the settings in the keys of an operator (or of the whole workflow), with ``base`` where there are none."""
    read = _Reader(problems)
    got: dict[str, Any] = {}
    if "resources" in entry:
        got["resources"] = read.resources(entry["resources"], (*place, "resources"))
    if "retry" in entry:
        got["retry"] = read.retry(entry["retry"], (*place, "retry"))
    if "timeout" in entry:
        got["timeout_s"] = read.duration(entry["timeout"], (*place, "timeout"))
    if "priority" in entry:
        got["priority"] = read.integer(entry["priority"], (*place, "priority"), -PRIORITY_MAX, PRIORITY_MAX)
    if "deadline_s" in entry:
        got["deadline_s"] = read.number(entry["deadline_s"], (*place, "deadline_s"), DURATION_MAX_S)
    if "share" in entry:
        got["share"] = read.choice(entry["share"], (*place, "share"), SHARES)
    if "numeric" in entry:
        got["numeric"] = read.numeric(entry["numeric"], (*place, "numeric"))
    if "reusable" in entry:
        got["reusable"] = read.boolean(entry["reusable"], (*place, "reusable"))
    known = {key: value for key, value in got.items() if value is not None}
    return Settings(**{**{name: getattr(base, name) for name in Settings.__slots__}, **known}) if known else base


class _Reader:
    """Reads values one by one; None where a problem was noted."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def resources(self, value: Any, place: Place) -> Resources | None:
        if not self._is_mapping(value, place, RESOURCE_KEYS, "{gpus: 1, vram: 8GiB}"):
            return None
        return Resources(
            gpus=self.integer(value.get("gpus", 0), (*place, "gpus"), 0, 1024) or 0,
            vram_bytes=self.size(value.get("vram", 0), (*place, "vram")) or 0,
            memory_bytes=self.size(value.get("memory", 0), (*place, "memory")) or 0,
            cpus=self.number(value.get("cpus", 0), (*place, "cpus"), 4096.0) or 0.0,
        )

    def retry(self, value: Any, place: Place) -> Retry | None:
        if not self._is_mapping(value, place, RETRY_KEYS, "{attempts: 3, backoff: 1s}"):
            return None
        base = Retry()
        attempts = self.integer(value.get("attempts", base.attempts), (*place, "attempts"), 1, 100)
        backoff_s = self.duration(value.get("backoff", base.backoff_s), (*place, "backoff"))
        return None if attempts is None or backoff_s is None else Retry(attempts, backoff_s)

    def _is_mapping(self, value: Any, place: Place, keys: tuple[str, ...], example: str) -> bool:
        if not isinstance(value, dict):
            self._problems.add(place, f"must be a mapping, not {shown(value)}", f"Write '{place[-1]}: {example}'.")
            return False
        for key in value:
            if key not in keys:
                self._problems.add((*place, key), f"unknown key {shown(key)}", nearest(str(key), keys, "keys"), key=True)
        return True

    def integer(self, value: Any, place: Place, low: int, high: int) -> int | None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._problems.add(place, f"must be an integer from {low} to {high}, not {shown(value)}", "Write a whole number.")
            return None
        return value

    def number(self, value: Any, place: Place, high: float) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            self._problems.add(place, f"must be a number from 0 to {high:g}, not {shown(value)}", "Write a number.")
            return None
        return float(value)

    def duration(self, value: Any, place: Place) -> float | None:
        match = DURATION.match(value) if isinstance(value, str) else None
        seconds = float(match.group(1)) * _SECONDS[match.group(2)] if match else value
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= DURATION_MAX_S:
            self._problems.add(
                place,
                f"must be a duration of at most 366 days, not {shown(value)}",
                "Write '500ms', '30s', '5m', '2h', '1d' or seconds.",
            )
            return None
        return round(float(seconds), 6)

    def size(self, value: Any, place: Place) -> int | None:
        match = SIZE.match(value) if isinstance(value, str) else None
        size = math.floor(float(match.group(1)) * _BYTES[match.group(2)]) if match else value
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= SIZE_MAX_BYTES:
            self._problems.add(place, f"must be a size, not {shown(value)}", "Write '8GiB', '512MiB', '2GB' or bytes.")
            return None
        return size

    def choice(self, value: Any, place: Place, known: tuple[str, ...]) -> str | None:
        if value not in known:
            self._problems.add(
                place, f"must be one of {', '.join(known)}, not {shown(value)}", nearest(str(value), known, "values")
            )
            return None
        return str(value)

    def numeric(self, value: Any, place: Place) -> str | None:
        if not isinstance(value, str) or not _NUMERIC.match(value):
            self._problems.add(
                place, f"must be 'any' or 'exact:<class>', not {shown(value)}", "Leave it out unless bits must agree."
            )
            return None
        return value

    def boolean(self, value: Any, place: Place) -> bool | None:
        if not isinstance(value, bool):
            self._problems.add(place, f"must be true or false, not {shown(value)}", "Write true or false.")
            return None
        return value
