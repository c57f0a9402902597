"""The workloads and what is read off each: sizes, units, bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

KILOBYTE = 1_000
MEGABYTE = 1_000_000


class Peer(Protocol):
    """One system under test. Every call takes ``seed`` so that no result can be one of an earlier call."""

    def start(self) -> None:
        """Start brokers and two workers, and warm them up; not timed."""

    def independent(self, count: int, seed: int) -> float:
        """Run ``count`` independent no-ops; return seconds from submission to the last result."""

    def single(self, count: int, seed: int) -> list[float]:
        """Run one no-op ``count`` times, one after the other; return the seconds of each."""

    def chain(self, count: int, seed: int) -> float:
        """Run ``count`` no-ops, each after the one before; return seconds."""

    def fan(self, width: int, size_bytes: int, seed: int) -> float:
        """Run one operator, then ``width`` that each give ``size_bytes``, then one that takes them all; return seconds."""

    def gather(self, count: int, size_bytes: int, seed: int) -> float:
        """Run ``count`` operators that each give ``size_bytes``, and one that takes them all; return seconds."""

    def stop(self) -> None:
        """End every process that ``start`` began."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number read off one round of a workload."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload: what it is, and how one round of it is run on a peer."""

    name: str
    doc: str
    run: Callable[[Peer, float, int], list[Figure]]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0..1) of ``values`` lie, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _scaled(count: int, scale: float) -> int:
    return max(2, round(count * scale))


def _w1(peer: Peer, scale: float, seed: int) -> list[Figure]:
    count = _scaled(10_000, scale)
    return [Figure("w1.throughput", count / peer.independent(count, seed), "ops/s")]


def _w2(peer: Peer, scale: float, seed: int) -> list[Figure]:
    took_s = peer.single(_scaled(500, scale), seed)
    return [
        Figure("w2.latency_p50", median(took_s) * 1e3, "ms"),
        Figure("w2.latency_p99", percentile(took_s, 0.99) * 1e3, "ms"),
    ]


def _w3(peer: Peer, scale: float, seed: int) -> list[Figure]:
    count = _scaled(1_000, scale)
    return [Figure("w3.hop", peer.chain(count, seed) / count * 1e3, "ms")]


def _w4a(peer: Peer, scale: float, seed: int) -> list[Figure]:
    width = _scaled(2_000, scale)
    return [Figure("w4a.fan", (width + 2) / peer.fan(width, KILOBYTE, seed), "ops/s")]


def _w4b(peer: Peer, scale: float, seed: int) -> list[Figure]:
    count = _scaled(200, scale)
    return [Figure("w4b.gather", count / peer.gather(count, MEGABYTE, seed), "MB/s")]


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("w1", "10,000 independent no-op operators on 2 workers, submission to last result", _w1),
        Workload("w2", "one no-op on a warm, idle system, 500 times", _w2),
        Workload("w3", "1,000 operators, each after the one before", _w3),
        Workload("w4a", "1 operator, then 2,000 that each give 1 KB, then 1 that takes them all", _w4a),
        Workload("w4b", "200 operators that each give 1 MB, and 1 that takes them all", _w4b),
    )
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio that must hold: ours to ``peer``'s of the same figure, at least or at most ``limit``."""

    figure: str
    peer: str
    limit: float
    at_least: bool

    def holds(self, ratio: float) -> bool:
        """Tell whether ``ratio`` clears the bar."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def text(self) -> str:
        """Return the bar as it stands in records and tables."""
        return f"{'>=' if self.at_least else '<='} {self.limit:g}x {self.peer}"


BARS = (
    Bar("w1.throughput", "ray", 3.0, at_least=True),
    Bar("w2.latency_p50", "raw", 2.0, at_least=False),
    Bar("w3.hop", "ray", 2.0, at_least=False),
)
