"""How often a training writes a checkpoint: as often as pays, given what one costs and how often such a node is taken away.

What is lost with a node is on average half an interval, what checkpoints cost is one stall per interval: the sum is least at
√(2·δ·M), with δ the stall and M the mean time between losses (Young 1974).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

HAZARD_PER_HOUR = 1.0
"""Assumed of a node whose record tells nothing: rented machines are taken away at any time, and a stall is cheap."""

FIRST_S = 10.0
"""When the first checkpoint of an attempt is written: what one costs is not known before."""

LEAST_S = 5.0
OVERHEAD_MAX = 0.05
"""Most of the time that training may stand still for checkpoints."""

BESIDE_MAX = 0.25
"""Most of the time that files may be on their way to the disk and the hub, beside the training."""

_NEW_SHARE = 0.3


@dataclass(slots=True)
class Cadence:
    """When the next checkpoint is due. ``fixed_s`` above 0 sets the interval; else it follows from what was measured.

    ``behind_s`` is how long a checkpoint takes until the mesh holds it. It is taken off the interval, because what is lost with a
    node counts from the last one that the mesh holds.
    """

    fixed_s: float = 0.0
    hazard_per_hour: float = 0.0
    stall_s: float = 0.0
    behind_s: float = 0.0

    @property
    def interval_s(self) -> float:
        """Return the seconds from one checkpoint that the mesh holds to the next."""
        if self.fixed_s:
            return self.fixed_s
        if not self.stall_s:
            return FIRST_S
        between_losses_s = 3600 / (self.hazard_per_hour or HAZARD_PER_HOUR)
        best_s = sqrt(2 * self.stall_s * between_losses_s)
        return max(best_s, self.stall_s / OVERHEAD_MAX, self.behind_s / BESIDE_MAX, LEAST_S)

    @property
    def pause_s(self) -> float:
        """Return the seconds from the end of one checkpoint to the beginning of the next."""
        return max(self.interval_s - self.behind_s, self.interval_s / 2)

    def note_stall(self, stall_s: float) -> None:
        """Learn how long training stood still for one."""
        self.stall_s = _mixed(self.stall_s, stall_s)

    def note_kept(self, behind_s: float) -> None:
        """Learn how long one took from the stall until the mesh held it. What takes longer is believed at once."""
        self.behind_s = max(behind_s, _mixed(self.behind_s, behind_s))


def _mixed(known: float, new: float) -> float:
    return new if not known else (1 - _NEW_SHARE) * known + _NEW_SHARE * new
