"""Single positive numbers that are learned, and how the nodes of a class compare with each other."""

from __future__ import annotations

import math
from statistics import median
from typing import TypeVar

K = TypeVar("K")

FACTORS_MAX = 4096
"""Factors kept of one kind; the oldest goes."""

_FEW_NODES = 8
_MIDDLES_EVERY = 64


class Factor:
    """A positive number, learned as the mean of its logarithm; a measurement that is far off moves it a bounded way."""

    __slots__ = ("log", "samples")

    def __init__(self, log: float = 0.0, samples: int = 0) -> None:
        self.log = log
        self.samples = samples

    @property
    def value(self) -> float:
        return math.exp(self.log)

    def note(self, value: float, begins_at: int = 0, gain: float = 0.1, far: float = 0.7, weight: float = 1.0) -> None:
        """Learn from a measurement; ``begins_at`` counts as many measurements of what it is at first."""
        error = math.log(max(value, 1e-12)) - self.log
        if self.samples + begins_at > 0:
            error = max(-far, min(far, error))
        self.samples += 1
        self.log += max(1 / (self.samples + begins_at), gain) * weight * error


def factor_of(held: dict[K, Factor], key: K) -> Factor:
    """Return the factor under ``key``, a new one if there is none; of too many the oldest goes."""
    factor = held.get(key)
    if factor is None:
        factor = held[key] = Factor()
        if len(held) > FACTORS_MAX:
            del held[next(iter(held))]
    return factor


class Peers:
    """How many times longer each node takes than the middle one of its class."""

    def __init__(self) -> None:
        self.factors: dict[str, Factor] = {}
        self.device_of: dict[str, str] = {}
        self._classes: dict[str, dict[str, Factor]] = {}
        self._middles: dict[str, float] = {}
        self._until_middles = 0

    def ratio(self, node: str) -> float:
        """Return how a node compares with its class; 1 while that is unknown."""
        factor = self.factors.get(node)
        return math.exp(factor.log - self._middle(self.device_of[node])) if factor else 1.0

    def _middle(self, device: str) -> float:
        """Return the median of a class: what all its nodes have in common is not theirs, but an error of the lines."""
        middle = self._middles.get(device)
        if middle is None:
            middle = self._middles[device] = median(factor.log for factor in self._classes[device].values())
        return middle

    def note(self, node: str, device: str, ratio: float, weight: float) -> None:
        """Learn from one batch; of a large class the middle is found anew only now and then."""
        factor = self.place(node, device, self.factors.get(node) or Factor())
        factor.note(ratio, begins_at=2, gain=0.05, weight=weight)
        self._until_middles -= 1
        if self._until_middles <= 0 or len(self._classes[device]) <= _FEW_NODES:
            self._until_middles = _MIDDLES_EVERY
            self._middles.clear()

    def place(self, node: str, device: str, factor: Factor) -> Factor:
        """Hold the factor of a node as one of a class, and of no other any more."""
        before = self.device_of.get(node)
        if before != device:
            self._drop(node)
            self._middles.clear()
        self.device_of[node] = device
        self.factors[node] = self._classes.setdefault(device, {})[node] = factor
        if len(self.factors) > FACTORS_MAX:
            self._drop(next(iter(self.factors)))
        return factor

    def _drop(self, node: str) -> None:
        device = self.device_of.pop(node, None)
        if device is not None:
            del self.factors[node], self._classes[device][node]
