"""How nodes have done lately, and what was spent on second attempts: records without rules; ``health`` and ``speculation`` rule.

Everything is bounded: so many samples per node and class of work, none older than the window, an hour of spending by minutes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

SAMPLES_MAX = 24
"""Assignments remembered per node and class of work: the last ones tell how it does now."""

GROUPS_MAX = 1024
"""Groups, and classes of failures, that are remembered."""

MINUTES = 60

Group = tuple[str, str, str]
"""Who may be compared in speed: operator type, model digest, class of device."""

FailureClass = tuple[str, str, str]
"""Who may be compared in failures: operator type, model digest, digest of the code."""

OK, CORDONED, CANARY = "ok", "cordoned", "canary"
SCHEDULER = "scheduler"


@dataclass(slots=True)
class Health:
    """How far a node is trusted.

    ``ok`` takes work; ``cordoned`` none; ``canary`` one small assignment at a time until ``good`` of them in a row are enough.
    ``until_us`` is when a cordon of the scheduler's own ends in canaries; 0 for one that somebody asked for. ``strikes`` counts
    how often in a row it was found sick, ``kind`` is the operator type on which.
    """

    state: str = OK
    reason: str = ""
    by: str = ""
    since_us: int = 0
    until_us: int = 0
    strikes: int = 0
    good: int = 0
    canary: str = ""
    kind: str = ""

    def plain(self) -> dict[str, object]:
        """Return what people are shown."""
        return {
            "state": self.state,
            "reason": self.reason,
            "by": self.by,
            "since_us": self.since_us,
            "until_us": self.until_us,
        }


@dataclass(slots=True)
class Samples:
    """The last logarithms of actual over predicted seconds of one node in one group."""

    values: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))
    _middle: float | None = None

    def add(self, at_us: int, value: float) -> None:
        self.values.append((at_us, value))
        self._middle = None

    def forget_before(self, at_us: int) -> None:
        while self.values and self.values[0][0] < at_us:
            self.values.popleft()
            self._middle = None

    def middle(self) -> float:
        """Return the median; there must be a sample."""
        if self._middle is None:
            self._middle = median(value for _, value in self.values)
        return self._middle


@dataclass(slots=True)
class Marks:
    """The last reports of one node in one class of failures: when, and whether the node failed."""

    values: deque[tuple[int, bool]] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))

    def forget_before(self, at_us: int) -> None:
        while self.values and self.values[0][0] < at_us:
            self.values.popleft()

    def bad(self) -> int:
        return sum(is_bad for _, is_bad in self.values)


@dataclass(slots=True)
class Quarantine:
    """An operator key that is not run for a while: it took nodes with it."""

    key: bytes
    until_us: int
    nodes: tuple[str, ...]
    operator: str


@dataclass(slots=True)
class Ward:
    """What is known of all nodes: samples by group, marks by class, who is not trusted, which operators are quarantined.

    ``verdicts`` are those of canaries since the last look: what was wrong, empty for a node that is to be trusted again.
    """

    speeds: dict[Group, dict[str, Samples]] = field(default_factory=dict)
    failures: dict[FailureClass, dict[str, Marks]] = field(default_factory=dict)
    new_speeds: dict[Group, None] = field(default_factory=dict)
    new_failures: dict[FailureClass, None] = field(default_factory=dict)
    patients: dict[str, None] = field(default_factory=dict)
    inherited: dict[str, Health] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    quarantine: dict[bytes, Quarantine] = field(default_factory=dict)
    looked_at_us: int = 0

    def forget_old(self, now_us: int) -> None:
        """Drop the groups that were compared longest ago, of too many, and quarantines that are over."""
        while len(self.speeds) > GROUPS_MAX:
            del self.speeds[next(iter(self.speeds))]
        while len(self.failures) > GROUPS_MAX:
            del self.failures[next(iter(self.failures))]
        for key in [key for key, held in self.quarantine.items() if held.until_us <= now_us]:
            del self.quarantine[key]

    def forget_node(self, name: str) -> None:
        """Drop what is known of a node: it begins anew."""
        for samples in self.speeds.values():
            samples.pop(name, None)
        for marks in self.failures.values():
            marks.pop(name, None)


@dataclass(slots=True)
class Copy:
    """A second attempt beside a straggler: what it costs a second, and how much of that has been booked."""

    begun_us: int
    usd_per_s: float
    booked_usd: float

    def cost_usd(self, now_us: int) -> float:
        return max(0, now_us - self.begun_us) / 1e6 * self.usd_per_s


@dataclass(slots=True)
class Copies:
    """Assignments to look at when they are late (a heap by time), copies under way, and the spending of the last hour."""

    due: list[tuple[int, str]] = field(default_factory=list)
    running: dict[str, Copy] = field(default_factory=dict)
    minutes: deque[list[float]] = field(default_factory=lambda: deque(maxlen=MINUTES))
    accrued_at_us: int = 0
    total_usd: float = 0.0

    def accrue(self, rent_usd_per_s: float, now_us: int) -> None:
        """Note what the nodes have cost since the last call; open a new minute when it is time."""
        minute = now_us // 60_000_000
        if not self.minutes or self.minutes[-1][0] != minute:
            self.minutes.append([minute, 0.0, 0.0])
            while self.minutes[0][0] <= minute - MINUTES:
                self.minutes.popleft()
        if self.accrued_at_us:
            self.minutes[-1][1] += rent_usd_per_s * max(0, now_us - self.accrued_at_us) / 1e6
        self.accrued_at_us = now_us

    def rent_usd(self) -> float:
        """Return what the nodes cost in the last hour."""
        return sum(rent for _, rent, _ in self.minutes)

    def spent_usd(self) -> float:
        """Return what copies cost in the last hour, with what is booked for those that run."""
        return sum(spent for _, _, spent in self.minutes)

    def book(self, amount_usd: float) -> None:
        """Spend, or give back what was booked and not used."""
        self.minutes[-1][2] += amount_usd
        self.total_usd += amount_usd


def spread_of(values: Iterable[float], middle: float) -> float:
    """Return the robust standard deviation of values around their median."""
    return 1.4826 * median(abs(value - middle) for value in values)
