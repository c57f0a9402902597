"""What a run of the simulator is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from flowmesh_scheduler.sim.machine import Machine


@dataclass(slots=True)
class RunTimes:
    """When workflows were submitted and ended, in virtual microseconds."""

    submitted_us: dict[str, int] = field(default_factory=dict)
    ended_us: dict[str, int] = field(default_factory=dict)
    failed: int = 0

    def submitted(self, run: str, at_us: int) -> None:
        self.submitted_us[run] = at_us

    def ended(self, run: str, at_us: int, reason: str) -> None:
        self.ended_us[run] = at_us
        self.failed += reason != "succeeded"

    def responses_s(self) -> list[float]:
        """Return the seconds from submission to end of every workflow, shortest first."""
        return sorted((self.ended_us[run] - at_us) / 1e6 for run, at_us in self.submitted_us.items())


@dataclass(frozen=True, slots=True)
class Figures:
    """Dollars, kilowatt hours, seconds and counts of one run.

    ``goodput``: seconds of execution that led to results, per paid second.
    """

    cost_usd: float
    energy_kwh: float
    makespan_s: float
    response_p50_s: float
    response_p95_s: float
    cost_delay_usd_s: float
    energy_delay_kwh_s: float
    goodput: float
    operators: int
    hits: int
    batches: int
    repeated_s: float
    preemptions: int
    failed: int
    machines: int
    paid_s: float
    busy_s: float
    digest: str

    @classmethod
    def of(
        cls,
        machines: Sequence[Machine],
        times: RunTimes,
        *,
        operators: int,
        hits: int,
        batches: int,
        useful_s: float,
        lost_s: float,
        preemptions: int,
        digest: str,
    ) -> Figures:
        """Add up the machines' bills and the workflows' times."""
        responses = times.responses_s()
        cost = sum(machine.dollars() for machine in machines)
        energy = sum(machine.total_joules() for machine in machines) / 3.6e6
        paid_s = sum(machine.paid_s() for machine in machines)
        mean_s = sum(responses) / len(responses)
        return cls(
            cost,
            energy,
            (max(times.ended_us.values()) - min(times.submitted_us.values())) / 1e6,
            percentile(responses, 0.5),
            percentile(responses, 0.95),
            cost * mean_s,
            energy * mean_s,
            useful_s / paid_s if paid_s else 0.0,
            operators,
            hits,
            batches,
            lost_s,
            preemptions,
            times.failed,
            len(machines),
            paid_s,
            sum(machine.busy_s for machine in machines),
            digest,
        )

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the sorted values lies (nearest rank)."""
    return values[max(0, ceil(share * len(values)) - 1)]
