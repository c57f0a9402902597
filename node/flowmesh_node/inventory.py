"""What this machine has: GPUs by NVML, CPUs and memory by affinity and cgroup limits, price by environment.

What cannot be measured is said to be so, never reported as zero.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flowmesh_mesh.messages import Device
from flowmesh_node.settings import number_from

PRICE_VARIABLES = ("FLOWMESH_PRICE", "DPH_TOTAL", "VAST_DPH_TOTAL")
"""Dollars per hour; the last two are what Vast.ai's instances carry (its field is called ``dph_total``)."""

SITE_VARIABLES = ("FLOWMESH_SITE", "VAST_CONTAINERLABEL")

TOLD_VARIABLES = (
    "FLOWMESH_WATTS",
    "FLOWMESH_IDLE_WATTS",
    "FLOWMESH_HAZARD_PER_HOUR",
    "FLOWMESH_BANDWIDTH_MBIT_PER_S",
    "FLOWMESH_EGRESS_USD_PER_GB",
)
"""What only its owner knows: what it draws busy and idle, how often an hour it is taken away, its link, what sending costs."""

_UNLIMITED_BYTES = 1 << 60


class Drawn(NamedTuple):
    """What the GPUs draw: at most, and while they do nothing. 0 where one of them does not tell."""

    watts: float = 0.0
    idle_watts: float = 0.0


@dataclass(frozen=True, slots=True)
class Inventory:
    """What was found; ``notes`` are sentences for people. Of what the last five say, 0 is unknown."""

    cpus: float
    memory_bytes: int
    devices: tuple[Device, ...] = ()
    price_per_hour: float = 0.0
    price_source: str = "not given"
    site: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)
    watts: float = 0.0
    idle_watts: float = 0.0
    hazard_per_hour: float = 0.0
    bandwidth_bytes_per_s: float = 0.0
    egress_usd_per_gb: float = 0.0


def take_inventory(
    *,
    price_per_hour: float | None = None,
    site: str = "",
    environment: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
) -> Inventory:
    """Look at this machine; ``root`` is where /proc and /sys stand. Raise UsageError for a price that is no number."""
    cpus, cpu_note = usable_cpus(environment, root)
    memory_bytes, memory_note = usable_memory_bytes(root)
    devices, gpu_note, drawn = find_gpus(environment)
    price, source = 0.0, "not given"
    if price_per_hour is not None:
        price, source = price_per_hour, "--price"
    elif found := number_from(environment, PRICE_VARIABLES):
        price, source = found
    site = site or next((environment[name] for name in SITE_VARIABLES if environment.get(name)), "")
    told = [(number_from(environment, (name,)) or (0.0, ""))[0] for name in TOLD_VARIABLES]
    return Inventory(
        cpus,
        memory_bytes,
        devices,
        price,
        source,
        site,
        (cpu_note, memory_note, gpu_note),
        watts=told[0] or drawn.watts,
        idle_watts=told[1] or drawn.idle_watts,
        hazard_per_hour=told[2],
        bandwidth_bytes_per_s=told[3] * 1e6 / 8,
        egress_usd_per_gb=told[4],
    )


def usable_cpus(environment: Mapping[str, str], root: Path) -> tuple[float, str]:
    """Return how many CPUs this process may use, and by which limit."""
    affinity = float(len(os.sched_getaffinity(0)))
    limits = {"CPU affinity": affinity}
    if quotas := list(_cpu_quotas(root)):
        limits["cgroup quota"] = min(quotas)
    if given := number_from(environment, ("FLOWMESH_CPUS",)):
        limits["FLOWMESH_CPUS"] = max(given[0], 0.01)
    cpus, why = min((value, name) for name, value in limits.items())
    return cpus, f"{cpus:g} CPUs (by {why})"


def usable_memory_bytes(root: Path) -> tuple[int, str]:
    """Return how much memory this process may use, and by which limit."""
    total = _meminfo_bytes(root)
    limit = min(_memory_limits(root), default=_UNLIMITED_BYTES)
    chosen, why = (limit, "cgroup limit") if limit < total else (total, "machine")
    return chosen, f"{chosen / 2**30:.1f} GiB of memory (by {why})"


def _meminfo_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED_BYTES


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and its parents, nearest first; an empty ``controller`` is version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"] if not controller else [f"sys/fs/cgroup/{controller}"]
            for mount in mounts:
                # Inside a container the path may be that of the host, which is not mounted: the walk up ends at the mount.
                here = root / mount / path.lstrip("/")
                while here != root / mount and here != here.parent:
                    yield here
                    here = here.parent
                yield root / mount


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpu_quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, ""):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
    for group in _groups(root, "cpu"):
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    names = [(group / "memory.max") for group in _groups(root, "")]
    names += [(group / "memory.limit_in_bytes") for group in _groups(root, "memory")]
    for name in names:
        text = _read(name)
        if text.isdigit() and 0 < int(text) < _UNLIMITED_BYTES:
            yield int(text)


def find_gpus(environment: Mapping[str, str] = os.environ) -> tuple[tuple[Device, ...], str, Drawn]:
    """Return the GPUs that this process may use (NVML, CUDA_VISIBLE_DEVICES), a sentence about them, and what they draw."""
    try:
        import pynvml
    except ImportError:
        return (), "no GPUs looked for: nvidia-ml-py is not installed", Drawn()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        hint = " (no NVIDIA driver)" if "NotFound" in type(error).__name__ else ""
        return (), f"no GPUs: {error}{hint}", Drawn()
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        if "SIMULATED" in driver and not environment.get("FLOWMESH_ALLOW_SIMULATED"):
            return (), f"no GPUs: the driver {driver} is a simulation, which is not advertised", Drawn()
        found, lost = _devices(pynvml)
        devices = _visible([device for device, _ in found], environment.get("CUDA_VISIBLE_DEVICES"))
        drawn = _drawn(pynvml, [handle for device, handle in found if device in devices])
    except pynvml.NVMLError as error:
        return (), f"no GPUs: NVML failed ({error})", Drawn()
    finally:
        pynvml.nvmlShutdown()
    names = ", ".join(f"{device.name} {device.memory_bytes / 2**30:.0f} GiB" for device in devices)
    note = f"{len(devices)} GPUs: {names} (driver {driver})" if devices else "no GPUs are visible to this process"
    return devices, "; ".join([note, *lost]), drawn


def _devices(pynvml: Any) -> tuple[list[tuple[Device, Any]], list[str]]:
    """Return the GPUs that answer with their handles, and a sentence about each that does not."""
    found: list[tuple[Device, Any]] = []
    lost: list[str] = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            found.append((_device(pynvml, handle), handle))
        except pynvml.NVMLError as error:
            lost.append(f"GPU {index} does not answer: {error}")
    return found, lost


def _device(pynvml: Any, handle: Any) -> Device:
    return Device(
        kind="cuda",
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        bandwidth_bytes_per_s=_bandwidth(pynvml, handle),
    )


def _bandwidth(pynvml: Any, handle: Any) -> float:
    """Return what the memory can deliver: two transfers a clock, as wide as its bus. 0 where the driver does not tell."""
    width_bits = _told(pynvml, "nvmlDeviceGetMemoryBusWidth", handle)
    clock_mhz = _told(pynvml, "nvmlDeviceGetMaxClockInfo", handle, 2)
    return 2 * clock_mhz * 1e6 * width_bits / 8


def _drawn(pynvml: Any, handles: list[Any]) -> Drawn:
    limits = [_told(pynvml, "nvmlDeviceGetEnforcedPowerLimit", handle) / 1000 for handle in handles]
    idle = [_told(pynvml, "nvmlDeviceGetPowerUsage", handle) / 1000 if _is_idle(pynvml, handle) else 0.0 for handle in handles]
    return Drawn(sum(limits) if all(limits) else 0.0, sum(idle) if all(idle) else 0.0)


def _is_idle(pynvml: Any, handle: Any) -> bool:
    try:
        return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) == 0
    except (pynvml.NVMLError, AttributeError):
        return False


def _told(pynvml: Any, question: str, handle: Any, *arguments: int) -> float:
    """Return a number that not every device or driver tells; 0 then."""
    try:
        return float(getattr(pynvml, question)(handle, *arguments))
    except (pynvml.NVMLError, AttributeError):
        return 0.0


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _visible(devices: list[Device], wanted: str | None) -> tuple[Device, ...]:
    """Return the devices named by CUDA_VISIBLE_DEVICES; like CUDA, stop at the first name that fits none."""
    if wanted is None:
        return tuple(devices)
    chosen: list[Device] = []
    for name in (part.strip() for part in wanted.split(",")):
        by_index = devices[int(name)] if name.isdigit() and int(name) < len(devices) else None
        device = by_index or next((each for each in devices if name and each.uuid.startswith(name)), None)
        if device is None:
            break
        chosen.append(device)
    return tuple(chosen)
