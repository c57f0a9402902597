"""What a device can do, by its name: the prior of every cost until it has been measured.

Figures are the makers' public ones, dense and at 16 bits, with the maker's own limit of power. What a node says of its device
itself goes before them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from flowmesh_mesh.messages import Device, NodeRecord

_GB = 1e9
_GIB = 1024**3

_CORE_FLOPS = 30e9
_CORE_BANDWIDTH = 5e9
_SOCKET_BANDWIDTH = 40e9
_CORE_WATTS = 8.0
_HOST_WATTS = 60.0
_IDLE_SHARE = 0.15


class Figures(NamedTuple):
    """One device of a node: operations a second at 16 bits, memory. ``watts`` and ``idle_watts`` are the whole node's."""

    name: str
    flops: float
    bandwidth_bytes_per_s: float
    memory_bytes: int
    watts: float
    idle_watts: float


class _Card(NamedTuple):
    teraflops: float
    gigabytes_per_s: float
    gibibytes: int
    watts: float


_CARDS: dict[str, _Card] = {
    "RTX 3060": _Card(51, 360, 12, 170),
    "RTX 3070": _Card(81, 448, 8, 220),
    "RTX 3080": _Card(119, 760, 10, 320),
    "RTX 3090": _Card(142, 936, 24, 350),
    "RTX 4060": _Card(60, 272, 8, 115),
    "RTX 4070": _Card(117, 504, 12, 200),
    "RTX 4080": _Card(195, 717, 16, 320),
    "RTX 4090": _Card(330, 1008, 24, 450),
    "RTX 5070": _Card(124, 672, 12, 250),
    "RTX 5080": _Card(225, 960, 16, 360),
    "RTX 5090": _Card(419, 1792, 32, 575),
    "RTX 6000 ADA": _Card(364, 960, 48, 300),
    "RTX PRO 6000": _Card(503, 1792, 96, 600),
    "A2": _Card(18, 200, 16, 60),
    "A10": _Card(125, 600, 24, 150),
    "A10G": _Card(70, 600, 24, 300),
    "A16": _Card(18, 200, 16, 62),
    "A30": _Card(165, 933, 24, 165),
    "A40": _Card(150, 696, 48, 300),
    "A4000": _Card(77, 448, 16, 140),
    "A4500": _Card(95, 640, 20, 200),
    "A5000": _Card(111, 768, 24, 230),
    "A6000": _Card(155, 768, 48, 300),
    "A100 40GB": _Card(312, 1555, 40, 400),
    "A100 80GB": _Card(312, 2039, 80, 400),
    "A800": _Card(312, 2039, 80, 400),
    "B200": _Card(2250, 8000, 180, 1000),
    "GH200": _Card(989, 4000, 96, 900),
    "H100 PCIE": _Card(756, 2000, 80, 350),
    "H100": _Card(989, 3350, 80, 700),
    "H200": _Card(989, 4800, 141, 700),
    "H20": _Card(148, 4000, 96, 400),
    "L4": _Card(121, 300, 24, 72),
    "L40": _Card(181, 864, 48, 300),
    "L40S": _Card(362, 864, 48, 350),
    "P100": _Card(19, 732, 16, 250),
    "T4": _Card(65, 320, 16, 70),
    "V100": _Card(125, 900, 16, 300),
}
_UNKNOWN = _Card(60, 500, 16, 250)


def _words(name: str) -> list[str]:
    return re.split(r"[^A-Z0-9]+", name.upper())


_BY_WORDS = sorted(((_words(name), card) for name, card in _CARDS.items()), key=lambda each: -len(each[0]))


def _card(device: Device) -> _Card:
    """Return the figures of a card: the entry with the most words, all of which are in the device's name."""
    words = _words(device.name)
    if "A100" in words and device.memory_bytes:
        return _CARDS["A100 80GB" if device.memory_bytes > 60 * _GIB else "A100 40GB"]
    for wanted, card in _BY_WORDS:
        if all(word in words for word in wanted):
            return card
    return _UNKNOWN


def figures_of(record: NodeRecord) -> Figures:
    """Return what one device of this node can do: its first accelerator, or all its cores."""
    if record.devices:
        device = record.devices[0]
        card = _card(device)
        watts = record.watts or _HOST_WATTS + sum(_card(each).watts for each in record.devices)
        return Figures(
            device.name,
            device.flops or card.teraflops * 1e12,
            device.bandwidth_bytes_per_s or card.gigabytes_per_s * _GB,
            device.memory_bytes or card.gibibytes * _GIB,
            watts,
            record.idle_watts or watts * _IDLE_SHARE,
        )
    cores = max(record.cpus, 0.1)
    watts = record.watts or _HOST_WATTS + _CORE_WATTS * cores
    bandwidth = min(_SOCKET_BANDWIDTH, _CORE_BANDWIDTH * (1 + cores))
    return Figures("cpu", _CORE_FLOPS * cores, bandwidth, record.memory_bytes, watts, record.idle_watts or _HOST_WATTS)


def device_class(record: NodeRecord) -> str:
    """Return under what the costs of a node are learned: the name of its device and how many, or how many cores."""
    if record.devices:
        return f"{record.devices[0].name} x{len(record.devices)}"
    return f"cpu x{max(1, round(record.cpus))}"
