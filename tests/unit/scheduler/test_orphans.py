"""What the audit collects from the hub: only what nothing refers to, and only after a day in which nobody used it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.unit.scheduler.flows import chain

from flowmesh_cas.cid import DAG_CBOR, RAW
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import subjects
from flowmesh_mesh.keeping import owner_of
from flowmesh_mesh.manifest import Acceptance, Receipt, Ref, ResultRecord, encode_record
from flowmesh_scheduler import orphans
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.orphans import GRACE_S, Orphans

DAY_US = 24 * 3600 * 1_000_000


@dataclass
class LedgerOnly:
    """A bus that reads one ledger and does nothing else."""

    entries: dict[str, bytes] = field(default_factory=dict)

    async def read_stream(self, stream: str) -> AsyncIterator[Any]:
        assert stream == subjects.LEDGER
        for subject, data in self.entries.items():
            yield SimpleNamespace(subject=subject, data=data)


@dataclass
class Hubbed:
    """What the audit of orphans sees of a leader."""

    store: MemoryStore = field(default_factory=MemoryStore)
    bus: LedgerOnly = field(default_factory=LedgerOnly)
    kept: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self.state = State(Settings())
        self.hub = SimpleNamespace(store=self.store)
        self.tenant_roots: dict[str, set[bytes]] = {}

    @property
    def memory(self) -> Any:
        return SimpleNamespace(keeper=SimpleNamespace(runs=self.kept))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [10 * DAY_US]
    monkeypatch.setattr(orphans, "now_us", lambda: now[0])
    return now


async def collect(leader: Hubbed, *, is_repairing: bool = True) -> list[str]:
    return [each.kind for each in await Orphans(cast("Any", leader)).look(is_repairing=is_repairing)]


def ref(cid: bytes) -> Ref:
    return Ref("value", cid, b"d" * 32, 1)


async def test_only_blocks_that_nothing_refers_to_go_and_only_after_a_day(clock: list[int]) -> None:
    leader = Hubbed()
    store = leader.store
    manifest = store.put(DAG_CBOR, encode_record(chain(1)))
    output, result, log = (store.put(RAW, word) for word in (b"output", b"result", b"log"))
    uploaded, pinned, orphan = (store.put(RAW, word) for word in (b"uploaded", b"pinned", b"orphan"))
    leader.tenant_roots["ta"] = {uploaded}
    store.pin(pinned, "checkpoint:abc")
    receipt = Receipt("n1", "U", 1, "a", b"r", b"s", 0, 1)
    record = ResultRecord(manifest, 0, 1, result, {"out": [ref(output)]}, receipt, log=ref(log))
    leader.bus.entries = {
        subjects.ledger_accepted("ta", "r"): encode_record(Acceptance("ta", "r", manifest, 1)),
        subjects.ledger_result("00", 0): encode_record(record),
        subjects.ledger_epoch(7): b"not a record",
    }
    assert await collect(leader) == []
    clock[0] += (GRACE_S - 60) * 1_000_000
    assert await collect(leader) == []
    assert store.has(orphan)  # asking is using: it has another day
    clock[0] += (GRACE_S + 60) * 1_000_000
    await collect(leader)
    clock[0] += (GRACE_S + 60) * 1_000_000
    assert await collect(leader) == ["blocks-orphaned"]
    assert not store.has(orphan)
    assert all(store.has(cid) for cid in (manifest, output, result, log, uploaded, pinned))


async def test_pins_of_runs_that_are_not_kept_are_found_and_removed_by_a_repair_alone(clock: list[int]) -> None:
    leader = Hubbed(kept=(("ta", "kept"),))
    root = leader.store.put(RAW, b"contents")
    for run in ("kept", "over"):
        leader.store.pin(root, owner_of(("ta", run)))
    assert await collect(leader, is_repairing=False) == ["pin-orphan"]
    assert len(leader.store.pins(root)) == 2
    assert await collect(leader) == ["pin-orphan"]
    assert owner_of(("ta", "over")) not in {pin.owner for pin in leader.store.pins(root)}
    assert await collect(leader) == []
