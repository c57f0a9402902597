"""What a machine is found to have, on trees that look like /proc and /sys of other machines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.messages import Device
from flowmesh_node.inventory import Drawn, _visible, find_gpus, take_inventory, usable_cpus, usable_memory_bytes
from flowmesh_node.operators.registry import REGISTRY, available

GIB = 2**30


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    root = _machine(tmp_path, {"proc/self/cgroup": "0::/\n"})
    cpus, why = usable_cpus({}, root)
    assert cpus == len(os.sched_getaffinity(0))
    assert "affinity" in why
    assert usable_memory_bytes(root)[0] == 64 * GIB


def test_the_tightest_limit_of_a_v2_cgroup_and_its_parents_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/machine/box"
    root = _machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/machine/box\n",
            f"{group}/cpu.max": "max 100000\n",
            f"{group}/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/machine/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/machine/memory.max": f"{4 * GIB}\n",
        },
    )
    cpus, why = usable_cpus({}, root)
    assert (cpus, "cgroup" in why) == (0.5, True)
    assert usable_memory_bytes(root)[0] == 4 * GIB


def test_the_path_of_the_host_inside_a_container_ends_at_the_mount(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}
    assert usable_memory_bytes(_machine(tmp_path, files))[0] == 2 * GIB


def test_v1_cgroups_are_read_and_no_limit_is_no_limit(tmp_path: Path) -> None:
    root = _machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "25000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
        },
    )
    assert usable_cpus({}, root)[0] == 0.25
    assert usable_memory_bytes(root)[0] == 64 * GIB


def test_the_price_comes_from_the_flag_first(tmp_path: Path) -> None:
    root = _machine(tmp_path, {})
    found = take_inventory(price_per_hour=0.2, environment={"FLOWMESH_PRICE": "0.5", "DPH_TOTAL": "0.9"}, root=root)
    assert (found.price_per_hour, found.price_source) == (0.2, "--price")
    found = take_inventory(environment={"FLOWMESH_PRICE": "0.5", "DPH_TOTAL": "0.9"}, root=root)
    assert (found.price_per_hour, found.price_source) == (0.5, "FLOWMESH_PRICE")
    found = take_inventory(environment={"VAST_DPH_TOTAL": "0.7", "VAST_CONTAINERLABEL": "C.123"}, root=root)
    assert (found.price_per_hour, found.price_source, found.site) == (0.7, "VAST_DPH_TOTAL", "C.123")
    assert take_inventory(environment={}, root=root).price_source == "not given"


@pytest.mark.parametrize("text", ["cheap", "-1", "nan", "inf", "1e9"])
def test_a_price_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="FLOWMESH_PRICE"):
        take_inventory(environment={"FLOWMESH_PRICE": text}, root=_machine(tmp_path, {}))


def test_only_visible_gpus_count_as_cuda_would_count_them() -> None:
    devices = [Device("cuda", f"gpu{n}", f"GPU-{n}{n}{n}", GIB) for n in range(3)]

    def names(wanted: str | None) -> list[str]:
        return [device.name for device in _visible(devices, wanted)]

    assert names(None) == ["gpu0", "gpu1", "gpu2"]
    assert names("2,0") == ["gpu2", "gpu0"]
    assert names("GPU-11") == ["gpu1"]
    assert names("0,7,1") == ["gpu0"]
    assert names("") == []
    assert names("-1") == []


def test_a_node_advertises_only_what_it_has_the_modules_for() -> None:
    found = available(lambda module: None if module in ("torch", "duckdb") else object())
    assert "flow.noop" in found.types
    assert "llm.generate" not in found.types
    assert found.missing["llm.generate"] == ("torch",)
    assert found.missing["data.sql"] == ("duckdb",)
    assert set(found.types) | set(found.missing) == set(REGISTRY)


def test_every_type_of_the_catalog_has_an_implementation() -> None:
    from flowmesh_mesh.catalog import CATALOG

    assert set(REGISTRY) == set(CATALOG)


# --- figures of devices


class _NVMLError(Exception):
    pass


class _Handle:
    def __init__(self, number: int) -> None:
        self.number = number


class _Driver:
    """As much of NVML as is asked for: two cards, of which the second tells little."""

    NVMLError = _NVMLError

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.1"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> _Handle:
        return _Handle(index)

    def nvmlDeviceGetName(self, handle: _Handle) -> bytes:
        return b"NVIDIA GeForce RTX 4090"

    def nvmlDeviceGetUUID(self, handle: _Handle) -> str:
        return f"GPU-{handle.number}"

    def nvmlDeviceGetMemoryInfo(self, handle: _Handle) -> SimpleNamespace:
        return SimpleNamespace(total=24 * GIB)

    def nvmlDeviceGetMemoryBusWidth(self, handle: _Handle) -> int:
        if handle.number == 1:
            raise _NVMLError("not supported")
        return 384

    def nvmlDeviceGetMaxClockInfo(self, handle: _Handle, kind: int) -> int:
        assert kind == 2, "the clock of the memory"
        return 10501

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: _Handle) -> int:
        return 400_000

    def nvmlDeviceGetPowerUsage(self, handle: _Handle) -> int:
        return 22_000

    def nvmlDeviceGetUtilizationRates(self, handle: _Handle) -> SimpleNamespace:
        return SimpleNamespace(gpu=50 * handle.number)


def test_what_the_driver_tells_of_a_device_is_told_and_what_it_does_not_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Driver())
    devices, note, drawn = find_gpus({})
    assert [device.bandwidth_bytes_per_s / 1e9 for device in devices] == [pytest.approx(1008, rel=0.001), 0]
    assert "2 GPUs" in note
    assert drawn == Drawn(800.0, 0.0), "a busy card does not tell what it draws idle"
    devices, _, drawn = find_gpus({"CUDA_VISIBLE_DEVICES": "0"})
    assert (len(devices), drawn) == (1, Drawn(400.0, 22.0))


def test_what_only_the_owner_knows_is_told_by_the_environment(tmp_path: Path) -> None:
    environment = {"FLOWMESH_WATTS": "300", "FLOWMESH_HAZARD_PER_HOUR": "0.05", "FLOWMESH_BANDWIDTH_MBIT_PER_S": "800"}
    found = take_inventory(environment=environment, root=_machine(tmp_path, {}))
    assert (found.watts, found.hazard_per_hour, found.bandwidth_bytes_per_s, found.egress_usd_per_gb) == (300, 0.05, 100e6, 0)
