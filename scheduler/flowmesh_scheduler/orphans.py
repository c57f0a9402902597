"""Orphans in the hub: pins of what is over, blocks that nothing refers to. Collected by a repair alone, past a grace period."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from flowmesh_mesh import subjects
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.keeping import owner_of
from flowmesh_mesh.manifest import Acceptance, Ref, ResultRecord, decode_record
from flowmesh_scheduler.findings import Finding

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

OWNER = "audit"
PIN_S = 3600
GRACE_S = 24 * 3600
"""A block that nothing refers to is removed once it was found so by an audit this long ago, and was not used since."""

GUARD_PREFIX = "guard-"


class Orphans:
    """One look through the hub's store."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader

    async def look(self, *, is_repairing: bool) -> list[Finding]:
        """Return what is found; remove it if that is wanted and its grace is over."""
        found = await self._pins(is_repairing)
        if is_repairing:
            found += await self._blocks()
        return found

    async def _pins(self, is_repairing: bool) -> list[Finding]:
        """Look for pins that keep contents for runs which this scheduler does not keep any more."""
        leader, store = self._leader, self._leader.hub.store
        kept = {owner_of(pair) for pair in (leader.memory.keeper.runs if leader.memory is not None else ())}
        pins = await asyncio.to_thread(store.all_pins)
        found: list[Finding] = []
        for pin in pins:
            if not pin.owner.startswith(GUARD_PREFIX) or pin.owner in kept:
                continue
            if is_repairing:
                await asyncio.to_thread(store.unpin, pin.root, pin.owner)
            what = f"the hub pins contents for {pin.owner.removeprefix(GUARD_PREFIX)}, which it does not keep"
            why = "the process ended between the two, or the run is over"
            found.append(Finding("pin-orphan", what, why, "remove the pin", repaired=is_repairing))
        return found

    async def _blocks(self) -> list[Finding]:
        """Remove blocks that nothing refers to: all that something refers to is pinned while the store sweeps."""
        store = self._leader.hub.store
        roots = await self._roots()
        at_us = now_us()
        await asyncio.to_thread(store.pin_many, list(roots), OWNER, at_us + PIN_S * 1_000_000)
        swept = await asyncio.to_thread(store.sweep, at_us, GRACE_S * 1_000_000)
        if not swept.removed_blocks:
            return []
        what = f"{swept.removed_blocks} blocks ({swept.removed_bytes} bytes) in the hub belonged to nothing"
        why = f"put and never submitted, or left over; nobody used them for {GRACE_S // 3600} h"
        return [Finding("blocks-orphaned", what, why, "remove them", repaired=True)]

    async def _roots(self) -> set[bytes]:
        """Return everything that the ledger and memory refer to: ended runs and earlier generations of results included."""
        leader = self._leader
        roots: set[bytes] = set()
        async for message in leader.bus.read_stream(subjects.LEDGER):
            kind = message.subject.split(".", 2)[1]
            if kind == "accepted":
                roots.add(decode_record(message.data, Acceptance).manifest)
            elif kind == "result":
                record = decode_record(message.data, ResultRecord)
                roots |= {record.result, *_cids(record.outputs), *([record.log.cid] if record.log is not None else [])}
        for run in leader.state.runs.values():
            for vertex in run.vertices:
                roots |= {*_cids(vertex.outputs or {}), *([vertex.log.cid] if vertex.log is not None else [])}
        for tenant_roots in leader.tenant_roots.values():
            roots |= tenant_roots
        return roots


def _cids(outputs: Mapping[str, list[Ref]]) -> Iterator[bytes]:
    for refs in outputs.values():
        for ref in refs:
            yield ref.cid
