"""Into how many batches ready work is cut when several nodes are idle: what another node costs against the wait that it saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_TRIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)


class Place(NamedTuple):
    """Idle nodes that are alike for a batch: how many, what each batch there pays once, and for each operator."""

    nodes: int
    once_s: float
    each_s: float
    usd_per_s: float


def batches_of(ready: int, delay_usd_per_s: float, places: Iterable[Place]) -> int:
    """Return into how many equal batches ``ready`` operators are best cut.

    With j batches the nodes are paid for once + each * ready / j seconds each, and whoever waits waits for as long. The cheapest
    places are taken first. ``delay_usd_per_s`` is what a second of waiting for all of it costs.
    """
    half = max(1, ready // 2)
    ordered = sorted(places, key=lambda p: (p.usd_per_s + delay_usd_per_s / 2) * (p.once_s + p.each_s * half))
    most = min(ready, sum(place.nodes for place in ordered))
    best, least = 1, float("inf")
    for count in _TRIED:
        if count > most:
            break
        cost = _cost(count, ready / count, delay_usd_per_s / count, ordered)
        if cost >= least:
            break
        best, least = count, cost
    return best


def _cost(count: int, size: float, delay_usd_per_s: float, places: Sequence[Place]) -> float:
    cost, left = 0.0, count
    for place in places:
        taken = min(left, place.nodes)
        cost += taken * (place.usd_per_s + delay_usd_per_s) * (place.once_s + place.each_s * size)
        left -= taken
        if not left:
            break
    return cost
