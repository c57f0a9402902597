"""The market: machines are rented on demand and paid from then on until they are given back. One rule for every policy.

The rule. Every ``review_s``, look at the ready work that has waited for ``patience_s``, kind by kind, the oldest first. Each
machine that fits and is free or on its way covers ``backlog_s`` seconds of it, counted as full batches take on such a machine by its
public figures. For what is not covered, the offers with the fewest dollars per throughput (by public figures) are rented. A machine
that had nothing to do for ``idle_release_s`` is given back. What is on its disk is lost then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flowmesh_mesh.catalog import CATALOG
from flowmesh_scheduler.sim.draws import lognormal
from flowmesh_scheduler.sim.fleet import DeviceClass, Offer, lifetime_s
from flowmesh_scheduler.sim.machine import Machine
from flowmesh_scheduler.sim.truth import Demand, execution

_AWAY_S = 1800.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How renting works, the same for all policies of a comparison; seconds."""

    patience_s: float = 20.0
    backlog_s: float = 150.0
    idle_release_s: float = 180.0
    review_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Need:
    """What a kind of work asks of a machine. ``trains``: bound by arithmetic, else by memory bandwidth."""

    vram_bytes: int
    trains: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.vram_bytes > 0

    def fits(self, offer: Offer) -> bool:
        return self.vram_bytes <= offer.device.vram_bytes and (offer.device.is_gpu or not self.is_gpu)

    def price(self, offer: Offer) -> tuple[float, str]:
        """Return dollars per throughput by public specification; the name decides between equals."""
        device = offer.device
        rate = 1.0 if not self.vram_bytes else device.flops if self.trains else device.bandwidth_bytes_per_s
        return (offer.price_per_hour / rate if rate else float("inf"), offer.name)


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

    def best(self, need: Need, now_s: float, besides: Sequence[Offer] = ()) -> Offer | None:
        """Return the offer with the fewest dollars per throughput that fits, ``besides`` those that are taken already."""
        return min((o for o in self.available(now_s) if need.fits(o) and o not in besides), key=need.price, default=None)

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
            self._away_until_s[machine.offer.name] = now_s + _AWAY_S


Kind = tuple[str, str, int]
"""What is rented for together: kind of executor, model, device memory."""


@dataclass(slots=True)
class Backlog:
    """Work of one kind that has waited too long."""

    need: Need
    since_us: int
    demands: list[Demand] = field(default_factory=list)

    def seconds(self, device: DeviceClass, limit: int) -> float:
        """Return how long a machine of this class would take, in full batches."""
        room = max(0.0, 0.9 * device.vram_bytes - self.need.vram_bytes) + 2e9
        chunks = range(0, len(self.demands), limit)
        return sum(execution(device, self.demands[i : i + limit], room)[0] for i in chunks)


def backlog_of(late: dict[Kind, Backlog], type: str, vram_bytes: int, digests: Mapping[str, str]) -> Backlog:
    """Return the backlog that an operator belongs to."""
    executor = CATALOG[type].executor
    kind = (executor, next(iter(digests.values()), ""), vram_bytes)
    found = late.get(kind)
    if found is None:
        found = late[kind] = Backlog(Need(vram_bytes, executor == "train"), 1 << 62)
    return found


def wanted(
    late: Mapping[Kind, Backlog],
    supply: Sequence[Machine],
    market: Market,
    terms: Terms,
    limits: Mapping[str, int],
    now_s: float,
) -> list[Offer]:
    """Return the offers to rent for what has waited too long, given the machines that are free or on their way."""
    cover = [(machine.offer, terms.backlog_s) for machine in sorted(supply, key=lambda m: (m.offer.device.vram_bytes, m.name))]
    rented: list[Offer] = []
    for (executor, _, _), backlog in sorted(late.items(), key=lambda entry: (entry[1].since_us, entry[0])):
        share = 1.0
        while share > 1e-9:
            index = next((i for i, (offer, left) in enumerate(cover) if left > 0 and backlog.need.fits(offer)), -1)
            if index < 0:
                best = market.best(backlog.need, now_s, rented)
                if best is None:
                    break
                rented.append(best)
                cover.append((best, terms.backlog_s))
                index = len(cover) - 1
            offer, left = cover[index]
            seconds = max(1e-6, backlog.seconds(offer.device, limits[executor]))
            used = min(left, share * seconds)
            cover[index] = (offer, left - used)
            share -= used / seconds
    return rented
