"""The market: machines are rented on demand and paid from then on until they are given back. One rule for every policy.

The rule. Every ``review_s``, look at the ready work that has waited for ``patience_s``, kind by kind, the oldest first. Each
machine that fits and is free or on its way covers ``backlog_s`` seconds of it, counted as full batches take on such a machine by
its public figures. For what is not covered, the offer is rented on which it would cost the fewest dollars by public figures: a
typical boot, the model over the link as told, the batches. A machine that had nothing to do for ``idle_release_s`` is given back.
What is on its disk is lost then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flowmesh_mesh.catalog import CATALOG
from flowmesh_scheduler.core.state import Work
from flowmesh_scheduler.sim.draws import lognormal
from flowmesh_scheduler.sim.fleet import CLASSES, DeviceClass, Offer, lifetime_s, told_link
from flowmesh_scheduler.sim.language_models import SIZES
from flowmesh_scheduler.sim.machine import Machine
from flowmesh_scheduler.sim.truth import Demand, execution

AWAY_S = 1800.0
"""For so long a host that its owner took away is not on offer."""

_TYPICAL_BOOT_S = 120.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How renting works, the same for all policies of a comparison; seconds."""

    patience_s: float = 10.0
    backlog_s: float = 200.0
    idle_release_s: float = 180.0
    review_s: float = 5.0


@dataclass(slots=True)
class Market:
    """Offers that nobody has rented, and every machine that was ever rented."""

    offers: list[Offer]
    seed: int
    machines: list[Machine] = field(default_factory=list)
    _rentals: dict[str, int] = field(default_factory=dict)
    _rented: set[str] = field(default_factory=set)
    _away_until_s: dict[str, float] = field(default_factory=dict)

    def available(self, now_s: float) -> Iterable[Offer]:
        """Yield what can be rented now."""
        for offer in self.offers:
            if offer.name not in self._rented and self._away_until_s.get(offer.name, 0.0) <= now_s:
                yield offer

    def rent(self, offer: Offer, now_s: float) -> tuple[Machine, float]:
        """Rent a host; return the machine, and after how many seconds its owner will take it away."""
        count = self._rentals[offer.name] = self._rentals.get(offer.name, 0) + 1
        self._rented.add(offer.name)
        boot_s = offer.boot_s * lognormal(0.1, "boots", self.seed, offer.name, count)
        machine = Machine(f"{offer.name}-{count}", offer, now_s, now_s + boot_s)
        self.machines.append(machine)
        return machine, lifetime_s(offer, self.seed, count)

    def give_back(self, machine: Machine, now_s: float, *, is_taken: bool = False) -> None:
        """End a rental; a host that its owner took away comes back to the market later."""
        assert not machine.is_gone
        machine.released_at_s = now_s
        self._rented.discard(machine.offer.name)
        if is_taken:
            self._away_until_s[machine.offer.name] = now_s + AWAY_S


Kind = tuple[str, str, int]
"""What is rented for together: kind of executor, model, device memory."""


@dataclass(slots=True)
class Backlog:
    """Work of one kind that has waited too long; ``limit`` is the most that goes into a batch."""

    vram_bytes: int
    model_bytes: int
    limit: int
    since_us: int = 1 << 62
    demands: list[Demand] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)

    def fits(self, offer: Offer) -> bool:
        return self.vram_bytes <= offer.device.vram_bytes and (offer.device.is_gpu or not self.vram_bytes)

    def seconds(self, device: DeviceClass) -> float:
        """Return how long a machine of this class would take, in full batches."""
        known = self._seconds.get(device.name)
        if known is None:
            room = max(0.0, 0.9 * device.vram_bytes - self.vram_bytes) + 2e9
            chunks = range(0, len(self.demands), self.limit)
            known = sum(execution(device, self.demands[i : i + self.limit], room)[0] for i in chunks)
            self._seconds[device.name] = known = max(1e-6, known)
        return known

    def dollars(self, offer: Offer, terms: Terms) -> tuple[float, str]:
        """Return what this work, or as much as one machine is rented for, would cost there; the name decides between equals."""
        seconds = self.seconds(offer.device)
        work_s = seconds * min(1.0, terms.backlog_s / self.seconds(CLASSES[1] if self.vram_bytes else offer.device))
        fetch_s = self.model_bytes / told_link(offer)
        return (offer.price_per_hour * (_TYPICAL_BOOT_S + fetch_s + work_s), offer.name)


def backlog_of(late: dict[Kind, Backlog], work: Work, limits: Mapping[str, int]) -> Backlog:
    """Return the backlog that ready work belongs to."""
    kind = CATALOG[work.operator.type]
    digest = next(iter(work.model_digests.values()), "")
    vram_bytes = work.operator.resources.vram_bytes
    found = late.get((kind.executor, digest, vram_bytes))
    if found is None:
        size = SIZES.get(digest, 0)
        found = late[kind.executor, digest, vram_bytes] = Backlog(vram_bytes, size, limits[kind.executor] if kind.batches else 1)
    return found


def wanted(late: Mapping[Kind, Backlog], supply: Sequence[Machine], market: Market, terms: Terms, now_s: float) -> list[Offer]:
    """Return the offers to rent for what has waited too long, given the machines that are free or on their way."""
    cover = [(machine.offer, terms.backlog_s) for machine in sorted(supply, key=lambda m: (m.offer.device.vram_bytes, m.name))]
    rented: list[Offer] = []
    for _, backlog in sorted(late.items(), key=lambda entry: (entry[1].since_us, entry[0])):
        share = 1.0
        while share > 1e-9:
            index = next((i for i, (offer, left) in enumerate(cover) if left > 0 and backlog.fits(offer)), -1)
            if index < 0:
                fitting = (o for o in market.available(now_s) if backlog.fits(o) and o not in rented)
                best = min(fitting, key=lambda o: backlog.dollars(o, terms), default=None)
                if best is None:
                    break
                rented.append(best)
                cover.append((best, terms.backlog_s))
                index = len(cover) - 1
            offer, left = cover[index]
            seconds = backlog.seconds(offer.device)
            used = min(left, share * seconds)
            cover[index] = (offer, left - used)
            share -= used / seconds
    return rented
