"""The workloads and what is read off each: sizes, units, bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

KILOBYTE = 1_000
MEGABYTE = 1_000_000
BATCH_S = 0.05
ITEM_S = 0.002
"""W7: a batch of n requests takes BATCH_S + n · ITEM_S."""


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

    def batched(self, count: int, seed: int) -> list[float]:
        """Run ``count`` requests of which n together take BATCH_S + n · ITEM_S; return the seconds of each timed round.

        A peer that learns how to batch may run two rounds before that are not timed.
        """

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


def _w7(peer: Peer, scale: float, seed: int) -> list[Figure]:
    return [Figure("w7.makespan", median(peer.batched(_scaled(256, scale), seed)), "s")]


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("w1", "10,000 independent no-op operators on 2 workers, submission to last result", _w1),
        Workload("w2", "one no-op on a warm, idle system, 500 times", _w2),
        Workload("w3", "1,000 operators, each after the one before", _w3),
        Workload("w4a", "1 operator, then 2,000 that each give 1 KB, then 1 that takes them all", _w4a),
        Workload("w4b", "200 operators that each give 1 MB, and 1 that takes them all", _w4b),
        Workload("w7", "256 requests whose batch of n takes 50 ms + 2 ms x n, on 2 workers", _w7),
    )
}


@dataclass(frozen=True, slots=True)
class Bar:
    """What must hold of ours, at least or at most ``limit``: the ratio to ``peer``'s same figure, or in ``unit`` itself."""

    figure: str
    limit: float
    at_least: bool = False
    peer: str = ""
    unit: str = "x"

    def holds(self, value: float) -> bool:
        """Tell whether ``value``, a ratio or a figure, clears the bar."""
        return value >= self.limit if self.at_least else value <= self.limit

    def text(self) -> str:
        """Return the bar as it stands in records and tables."""
        sign = ">=" if self.at_least else "<="
        return f"{sign} {self.limit:g}x {self.peer}" if self.peer else f"{sign} {self.limit:g} {self.unit}"


BARS = (
    Bar("w1.throughput", 5.0, at_least=True, peer="ray"),
    Bar("w1.throughput", 1.5, at_least=True, peer="ray-actor"),
    Bar("w2.latency_p50", 2.0, peer="raw"),
    Bar("w3.hop", 1.0, peer="ray"),
    Bar("w7.makespan", 0.4, unit="s"),
)
