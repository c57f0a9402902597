"""A rented machine: what it holds, what it is doing, what its seconds cost. The same for every policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowmesh_mesh.manifest import Ref
from flowmesh_scheduler.sim import truth
from flowmesh_scheduler.sim.fleet import Offer
from flowmesh_scheduler.sim.language_models import LanguageModel
from flowmesh_scheduler.sim.truth import Demand, Spent

_FETCH_LATENCY_S = 0.02
HUB_BYTES_PER_S = 500e6
_LOAD_POWER = 0.15
_FETCH_POWER = 0.05
_CPU_WATTS = 15.0


@dataclass(slots=True)
class Machine:
    """``resident`` models in device memory, least recently used first; ``disk`` holds models, ``blocks`` contents by CID."""

    name: str
    offer: Offer
    rented_at_s: float
    ready_at_s: float
    resident: dict[str, int] = field(default_factory=dict)
    disk: set[str] = field(default_factory=set)
    blocks: set[bytes] = field(default_factory=set)
    released_at_s: float = -1.0
    busy_s: float = 0.0
    busy_joules: float = 0.0

    @property
    def is_gone(self) -> bool:
        return self.released_at_s >= 0

    def begin(
        self, demands: Sequence[Demand], inputs: Sequence[Mapping[str, Sequence[Ref]]], links: Mapping[bytes, float]
    ) -> Spent:
        """Fetch, load and run a batch, without noise; afterwards this machine holds what it fetched and loaded.

        ``links`` tells how fast the holder of each input sends; inputs that are not in it come from the hub.
        """
        model = demands[0].model
        fetch_s = self._fetch(inputs, links)
        load_s = 0.0
        room = 0.0
        if model is not None:
            # As on a node, where the process that loads a model also downloads it.
            load_s, room = self._load(model, demands)
            load_s += self._fetch_model(model)
        exec_s, power = truth.execution(self.offer.device, demands, room)
        return Spent(fetch_s, load_s, exec_s * self.offer.slowness, power)

    def _fetch(self, inputs: Sequence[Mapping[str, Sequence[Ref]]], links: Mapping[bytes, float]) -> float:
        seconds = 0.0
        for ports in inputs:
            for refs in ports.values():
                for ref in refs:
                    if ref.cid not in self.blocks:
                        self.blocks.add(ref.cid)
                        rate = min(self.offer.link_bytes_per_s, links.get(ref.cid, HUB_BYTES_PER_S))
                        seconds += _FETCH_LATENCY_S + max(0, ref.size) / rate
        return seconds

    def _fetch_model(self, model: LanguageModel) -> float:
        if model.digest in self.disk:
            return 0.0
        self.disk.add(model.digest)
        return model.weights_bytes / self.offer.link_bytes_per_s

    def _load(self, model: LanguageModel, demands: Sequence[Demand]) -> tuple[float, float]:
        """Return seconds to have the model in memory, and the memory left for contexts; others give way, oldest first.

        Training runs in a process of its own, which begins and ends with the batch.
        """
        usable = truth.memory_bytes(self.offer.device)
        seconds = truth.load_s(self.offer.disk_bytes_per_s, model.weights_bytes)
        if not demands[0].is_engine:
            self._make_room(usable - model.weights_bytes * 1.3, "")
            return seconds, 0.0
        if model.digest in self.resident:
            seconds = 0.0
            del self.resident[model.digest]
        wanted = truth.context_bytes(model, demands)
        self._make_room(usable - model.weights_bytes - wanted, model.digest)
        self.resident[model.digest] = model.weights_bytes
        return seconds, max(usable - sum(self.resident.values()), 0.05 * model.weights_bytes)

    def _make_room(self, left_bytes: float, kept: str) -> None:
        for digest in list(self.resident):
            if sum(self.resident.values()) <= max(0.0, left_bytes):
                return
            if digest != kept:
                del self.resident[digest]

    def joules(self, spent: Spent, *, is_gpu: bool) -> float:
        """Return what a batch draws beyond idling; work without the accelerator draws a little on any machine."""
        device = self.offer.device
        if not is_gpu:
            return _CPU_WATTS * spent.seconds
        share_s = spent.power_share * spent.exec_s + _LOAD_POWER * spent.load_s + _FETCH_POWER * spent.fetch_s
        return (device.watts - device.idle_watts) * share_s

    def paid_s(self) -> float:
        """Return the seconds that were paid: from renting, boot included, until it was given back or taken away."""
        assert self.is_gone
        return self.released_at_s - self.rented_at_s

    def dollars(self) -> float:
        return self.paid_s() * self.offer.price_per_hour / 3600

    def total_joules(self) -> float:
        device = self.offer.device
        return self.paid_s() * (device.idle_watts + device.host_watts) + self.busy_joules
