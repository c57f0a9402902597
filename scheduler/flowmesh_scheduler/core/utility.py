"""The utility of giving a batch to a node: one number in dollars, and the terms that it is the sum of.

U = value - delay - price - load - fetch - energy - egress - risk - opportunity, with T = load + fetch + exec. Everything that a
choice depends on stands in :class:`Factors`, so that a choice can be explained, and made again with one of them changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import NamedTuple


class Factors(NamedTuple):
    """What the utility of one candidate depends on: dollars, seconds, watts."""

    value_usd: float
    """What the work is worth: its seconds and the wait that it ends at the usual price, raised by weight, priority, urgency."""

    delay_usd_per_s: float
    """What one more second until the results costs the runs that wait for them."""

    price_usd_per_s: float
    wait_s: float
    """Until the node can begin; 0 for one that is idle."""

    load_s: float
    load_share: float
    """The part of the load that this batch is charged with; the rest falls to the work that will find the model there."""

    fetch_s: float
    exec_s: float
    egress_usd: float = 0.0
    watts: float = 0.0
    energy_usd_per_j: float = 0.0
    hazard_per_s: float = 0.0
    redo_usd: float = 0.0
    """What beginning again elsewhere would cost if the node were taken away."""

    opportunity_usd_per_s: float = 0.0
    """What a second of a scarce node costs those who wait for it."""

    @property
    def seconds(self) -> float:
        """Seconds from the beginning on the node until the results."""
        return self.load_s + self.fetch_s + self.exec_s


def score(f: Factors) -> float:
    """Return the utility in dollars: the sum of the terms, without naming them."""
    took_s = f[4] + f[6] + f[7]
    charged_s = f[4] * f[5] + f[6] + f[7]
    found = f[0] - f[1] * (f[3] + took_s) - f[2] * charged_s - f[8] - (f[9] * f[10] + f[13]) * took_s
    if f[11]:
        found -= (1.0 - exp(-f[11] * took_s)) * f[12]
    return found


def terms(f: Factors) -> Mapping[str, float]:
    """Return the terms of the utility, in dollars with sign; their sum is the score."""
    took_s = f.seconds
    return {
        "value": f.value_usd,
        "delay": -f.delay_usd_per_s * (f.wait_s + took_s),
        "price": -f.price_usd_per_s * f.exec_s,
        "load": -f.price_usd_per_s * f.load_s * f.load_share,
        "fetch": -f.price_usd_per_s * f.fetch_s,
        "energy": -f.watts * f.energy_usd_per_j * took_s,
        "egress": -f.egress_usd,
        "risk": -(1.0 - exp(-f.hazard_per_s * took_s)) * f.redo_usd,
        "opportunity": -f.opportunity_usd_per_s * took_s,
    }
