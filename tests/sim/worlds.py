"""Small worlds for the tests of the simulator: few workflows, or one host that is known to the last digit."""

from __future__ import annotations

from dataclasses import replace

from flowmesh_mesh.manifest import Manifest
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.sim.documents import Author
from flowmesh_scheduler.sim.fleet import CLASSES, Offer
from flowmesh_scheduler.sim.language_models import MODELS
from flowmesh_scheduler.sim.workloads import WORKLOADS, Arrival, Scenario

CLASS = {kind.name.split()[-1]: kind for kind in CLASSES}
PATIENT = Settings(nodes_lost_limit=50)


def few(workload: str, seed: int, count: int, hazard_per_hour: float | None = None) -> Scenario:
    """Return the first workflows of a workload, on hosts with another hazard if that is given."""
    whole = WORKLOADS[workload](seed)
    hazard = whole.hazard_per_hour if hazard_per_hour is None else hazard_per_hour
    return replace(whole, arrivals=whole.arrivals[:count], hazard_per_hour=hazard, offers_count=40)


def host(name: str = "h", kind: str = "3090", price: float = 0.36, boot_s: float = 100.0, **fields: float) -> Offer:
    """Return a host without surprises: a link of 100 MB/s, a disk of 2 GB/s."""
    values = {"slowness": 1.0, "link_bytes_per_s": 100e6, "disk_bytes_per_s": 2e9, "hazard_per_hour": 0.0, **fields}
    return Offer(name, CLASS[kind], price, boot_s=boot_s, **values)


def short_document(own: str = "own") -> Manifest:
    """Return a workflow of two operators: a table of 32 rows of 180 tokens, and 100 tokens for each from a 3B model."""
    author = Author(own, "everyone")
    table = author.load(32)
    return author.close("short", [author.generate(MODELS["3b"], table, 100)])


def alone(manifest: Manifest, *hosts: Offer, at_s: float = 50.0) -> Scenario:
    """Return a scenario of one workflow."""
    return Scenario("alone", 1, (Arrival(at_s, "ada", "r0", manifest),), 0.0, 0, tuple(hosts))
