"""Random draws named by what they are for: the same names give the same draw, in whatever order they are asked for.

So two policies meet the same luck (a slow host, a straggling batch of the same operator), and nothing depends on hash seeds.
"""

from __future__ import annotations

from hashlib import blake2b
from math import exp, log
from statistics import NormalDist

_NORMAL = NormalDist()
_SPAN = float(1 << 64)


def uniform(*names: object) -> float:
    """Return a number in (0, 1)."""
    told = "\0".join(map(str, names)).encode()
    return (int.from_bytes(blake2b(told, digest_size=8).digest(), "big") + 0.5) / (_SPAN + 1)


def between(low: float, high: float, *names: object) -> float:
    """Return a number between ``low`` and ``high``."""
    return low + (high - low) * uniform(*names)


def lognormal(sigma: float, *names: object) -> float:
    """Return a positive number with mean 1; ``sigma`` is the standard deviation of its logarithm."""
    return exp(sigma * _NORMAL.inv_cdf(uniform(*names)) - sigma * sigma / 2)


def exponential(mean: float, *names: object) -> float:
    """Return a waiting time with this mean."""
    return -mean * log(uniform(*names))


def pick(count: int, *names: object) -> int:
    """Return an index below ``count``."""
    return int(uniform(*names) * count)
