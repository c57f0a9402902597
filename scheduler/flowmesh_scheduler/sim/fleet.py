"""What can be rented: device classes with public specifications and typical spot prices, and hosts that differ.

Figures of a class are the maker's (dense bf16 with fp32 accumulation, memory bandwidth, power). ``host_watts`` is what a rented
machine draws around its card; it counts whether the card is busy or not. Prices are what such machines cost on spot markets.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.messages import Device, NodeRecord
from flowmesh_scheduler.sim.draws import between, exponential, lognormal, uniform

GB = 1e9
GIB = 1 << 30
CPU_TYPES = tuple(sorted(name for name, kind in CATALOG.items() if kind.executor in ("inline", "data", "user")))
ALL_TYPES = tuple(sorted(CATALOG))


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """One kind of machine on the market. ``flops`` 0: no accelerator."""

    name: str
    flops: float
    bandwidth_bytes_per_s: float
    vram_bytes: int
    watts: float
    idle_watts: float
    price_per_hour: float
    host_watts: float
    cpus: float
    memory_bytes: int
    share: float

    @property
    def is_gpu(self) -> bool:
        return self.flops > 0


CLASSES = (
    DeviceClass("CPU", 0.0, 0.0, 0, 90.0, 40.0, 0.04, 0.0, 8.0, 32 * GIB, 0.0),
    DeviceClass("NVIDIA GeForce RTX 3090", 71e12, 936 * GB, 24 * GIB, 350.0, 25.0, 0.20, 60.0, 8.0, 48 * GIB, 0.26),
    DeviceClass("NVIDIA GeForce RTX 4090", 165e12, 1008 * GB, 24 * GIB, 450.0, 22.0, 0.35, 60.0, 12.0, 64 * GIB, 0.26),
    DeviceClass("NVIDIA RTX A6000", 155e12, 768 * GB, 48 * GIB, 300.0, 25.0, 0.45, 70.0, 12.0, 64 * GIB, 0.16),
    DeviceClass("NVIDIA L40S", 362e12, 864 * GB, 48 * GIB, 350.0, 33.0, 0.80, 80.0, 16.0, 96 * GIB, 0.12),
    DeviceClass("NVIDIA A100-SXM4-80GB", 312e12, 2039 * GB, 80 * GIB, 400.0, 55.0, 1.30, 100.0, 16.0, 128 * GIB, 0.12),
    DeviceClass("NVIDIA H100 80GB HBM3", 989e12, 3350 * GB, 80 * GIB, 700.0, 70.0, 2.20, 120.0, 24.0, 192 * GIB, 0.08),
)
"""Of each class a market offers some (``share`` of the accelerated offers); machines without accelerator are always to be had."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One host that may be rented: its class, and in what it differs from others of the class.

    ``slowness`` multiplies the true seconds on it. ``lifetime_s`` after renting it is taken away (see :func:`lifetime_s`).
    """

    name: str
    device: DeviceClass
    price_per_hour: float
    slowness: float
    link_bytes_per_s: float
    disk_bytes_per_s: float
    boot_s: float
    hazard_per_hour: float


def market(seed: int, count: int, hazard_per_hour: float) -> list[Offer]:
    """Return ``count`` offers with accelerators and as many without as anybody wants, cheapest kinds first."""
    offers = []
    for index in range(count):
        kind = _class_at(uniform("class", seed, index))
        offers.append(_offer(f"h{index:02d}", kind, seed, hazard_per_hour))
    offers.extend(_offer(f"c{index:02d}", CLASSES[0], seed, hazard_per_hour) for index in range(count // 4 + 2))
    return offers


def _class_at(point: float) -> DeviceClass:
    for kind in CLASSES[1:]:
        if point < kind.share:
            return kind
        point -= kind.share
    return CLASSES[-1]


def _offer(name: str, kind: DeviceClass, seed: int, hazard_per_hour: float) -> Offer:
    spread = lognormal(0.5, "hazard", seed, name)
    return Offer(
        name,
        kind,
        round(kind.price_per_hour * lognormal(0.12, "price", seed, name), 4),
        lognormal(0.10, "slowness", seed, name),
        min(600e6, 100e6 * lognormal(0.6, "link", seed, name)),
        min(6e9, 1.8e9 * lognormal(0.4, "disk", seed, name)),
        (25.0 if not kind.is_gpu else 120.0) * lognormal(0.35, "boot", seed, name),
        round(hazard_per_hour * spread, 4),
    )


def lifetime_s(offer: Offer, seed: int, rental: int) -> float:
    """Return after how many seconds the owner takes this rental away; the same for every policy."""
    if not offer.hazard_per_hour:
        return float("inf")
    return exponential(3600 / offer.hazard_per_hour, "life", seed, offer.name, rental)


def told_link(offer: Offer) -> float:
    """Return the rate of a host's link as its owner tells it: not quite what it is."""
    return offer.link_bytes_per_s * between(0.8, 1.2, "told", offer.name)


def node_record(offer: Offer, name: str, started_at_us: int) -> NodeRecord:
    """Return what a node on this host says of itself: what it can know, not its slowness."""
    kind = offer.device
    device = Device("cuda", kind.name, f"{name}-0", kind.vram_bytes, kind.flops, kind.bandwidth_bytes_per_s)
    return NodeRecord(
        name,
        f"U{name}",
        started_at_us,
        ALL_TYPES if kind.is_gpu else CPU_TYPES,
        "3.11",
        kind.cpus,
        kind.memory_bytes,
        (device,) if kind.is_gpu else (),
        offer.price_per_hour,
        slots=1 if kind.is_gpu else 4,
        hazard_per_hour=offer.hazard_per_hour,
        watts=kind.watts + kind.host_watts,
        idle_watts=kind.idle_watts + kind.host_watts,
        bandwidth_bytes_per_s=round(told_link(offer)),
    )
