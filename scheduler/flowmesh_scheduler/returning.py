"""Runs that come back: keepers, clients or the ledger have them, and the leader has not; and those whose manifest is gone.

What comes from a keeper counts by its seal. A run is planned once its acceptance stands in the ledger and its manifest is here.
One whose manifest nobody has is sought again and again, and ended with a reason if an audit gives it up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowmesh_cas.errors import FlowmeshError, IntegrityError, NotFoundError, TransientError, UsageError
from flowmesh_mesh import seals, subjects
from flowmesh_mesh.keeping import Pair
from flowmesh_mesh.manifest import Acceptance, Cancellation, Manifest, decode_record
from flowmesh_mesh.messages import Submit, decode
from flowmesh_mesh.transfer import fetch_many
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.hub import name_blocks

if TYPE_CHECKING:
    from flowmesh_scheduler.keepers import Keepers
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

FETCH_DEADLINE_S = 120.0


@dataclass(slots=True)
class Lost:
    """An accepted run that the leader cannot plan: nobody has given its manifest yet."""

    acceptance: Acceptance
    since_s: float
    cancelled_by: str = ""
    why: str = ""


class Returning:
    """Brings back what this leader lacks. ``lost`` are runs without a manifest, ``restoring`` those that are on their way."""

    def __init__(self, leader: Leader, keepers: Keepers) -> None:
        self._leader = leader
        self._keepers = keepers
        self._loop = asyncio.get_running_loop()
        self.restoring: set[Pair] = set()
        self.lost: dict[Pair, Lost] = {}
        self.restored: dict[Pair, str] = {}
        """Runs that keepers had and the ledger had not, since this leader took over, and who had them."""

    async def restore(self, record: bytes, seal: bytes, holder: str, *, only: set[Pair] | None = None) -> bool:
        """Write an acceptance that the ledger lacks back into it and plan its run; tell whether it was one."""
        if not seals.is_sealed(self._leader.secret, record, seal):
            log.warning("%s offers an acceptance whose seal is not ours", holder)
            return False
        acceptance = decode_record(record, Acceptance)
        pair = (acceptance.tenant, acceptance.run)
        if (only is not None and pair not in only) or self.is_known(pair) or self._leader.requests.is_accepting(pair):
            return False
        self.restoring.add(pair)
        try:
            manifest = await self._bring(acceptance, [holder])
            known = await self._leader.bus.last_message(subjects.LEDGER, subjects.ledger_accepted(*pair))
            if known is None:
                await self._write(subjects.ledger_accepted(*pair), record)
            self.restored[pair] = holder
            log.warning("run %s was lost to the ledger; %s had its acceptance", acceptance.run, holder)
            if manifest is None:
                self.lost[pair] = Lost(acceptance, self._loop.time())
            else:
                self._reinstate(acceptance, manifest)
        finally:
            self.restoring.discard(pair)
        if manifest is not None:
            self._keepers.note_kept(pair, holder)
        return True

    def is_known(self, pair: Pair) -> bool:
        """Tell whether a run is known here, or on its way back."""
        state = self._leader.state
        return pair in state.runs or pair in state.ended or pair in self.lost or pair in self.restoring

    async def _write(self, subject: str, record: bytes) -> None:
        written = self._loop.create_future()
        self._leader.ledger.write(subject, record, lambda _: None if written.done() else written.set_result(None))
        await asyncio.wait({written, self._leader.lost}, return_when=asyncio.FIRST_COMPLETED)
        if not written.done():
            raise TransientError("the leadership ended")

    def _reinstate(self, acceptance: Acceptance, manifest: Manifest, cancelled_by: str = "") -> None:
        pair = (acceptance.tenant, acceptance.run)
        self.lost.pop(pair, None)
        roots = {
            source.ref.cid
            for operator in manifest.operators
            for sources in operator.inputs.values()
            for source in sources
            if source.ref is not None
        }
        roots |= {operator.code.cid for operator in manifest.operators if operator.code is not None}
        self._leader.hub_holds(root for root in roots if self._leader.hub.holds(root))
        self._leader.apply(e.Reinstated([e.RecoveredRun(acceptance, manifest, cancelled_by)]))
        self._leader.feeds.open(self._leader.feeds.feed(*pair, acceptance.encoding))
        self._keepers.wanted(pair)

    def take(self, pair: Pair, data: bytes) -> bool:
        """Take a submission of a run that is being restored, or whose manifest is sought; tell whether it is one."""
        if pair not in self.lost:
            return pair in self.restoring
        try:
            message = decode(data, Submit)
        except UsageError:
            return True
        if message.manifest == self.lost[pair].acceptance.manifest:
            self._leader.hub.put_soon(name_blocks([message.manifest], message.blocks)[0])
            self._leader.spawn(self.seek_lost())
        return True

    # --- contents from others

    async def _bring(self, acceptance: Acceptance, holders: Sequence[str]) -> Manifest | None:
        """Bring the manifest and all given contents of a run to the hub; None where nobody has the manifest."""
        hub = self._leader.hub
        if acceptance.blocks:
            named, _ = name_blocks([acceptance.manifest], acceptance.blocks)
            hub.put_soon(named)
        if not await asyncio.to_thread(hub.holds, acceptance.manifest):
            everyone = [*holders, *(holder.name for holder in (*self._keepers.standbys(), *self._keepers.nodes()))]
            sources = list(dict.fromkeys(everyone))
            try:
                wanted = {acceptance.manifest: sources}
                await fetch_many(self._leader.bus, hub.store, wanted, deadline_s=FETCH_DEADLINE_S)
            except FlowmeshError as error:
                log.info("run %s: not all of its contents can be had: %s", acceptance.run, error)
        try:
            return decode_record(hub.get(acceptance.manifest), Manifest)
        except (NotFoundError, IntegrityError):
            return None

    async def fetch_lost(self, roots: Iterable[bytes]) -> list[bytes]:
        """Bring contents to the hub that neither it nor any node has, from schedulers that stand by; return what came."""
        names = [holder.name for holder in self._keepers.standbys()]
        found: list[bytes] = []
        for root in roots if names else ():
            try:
                await fetch_many(self._leader.bus, self._leader.hub.store, {root: names}, deadline_s=FETCH_DEADLINE_S)
                found.append(root)
            except FlowmeshError as error:
                log.info("no standby has a lost content: %s", error)
        return found

    async def seek_lost(self) -> int:
        """Look once more for the manifests of runs that cannot be planned; return how many were found."""
        found = 0
        for lost in list(self.lost.values()):
            manifest = await self._bring(lost.acceptance, [])
            if manifest is not None and (lost.acceptance.tenant, lost.acceptance.run) in self.lost:
                self._reinstate(lost.acceptance, manifest, lost.cancelled_by)
                found += 1
        return found

    async def plan_from_ledger(self, pair: Pair) -> bool:
        """Plan a run that the ledger has and memory has not; tell whether it is planned now."""
        found = await self._leader.bus.last_message(subjects.LEDGER, subjects.ledger_accepted(*pair))
        if found is None or self.is_known(pair) or self._leader.requests.is_accepting(pair):
            return False
        cancelled = await self._leader.bus.last_message(subjects.LEDGER, subjects.ledger_cancelled(*pair))
        actor = decode_record(cancelled.data, Cancellation).actor if cancelled is not None else ""
        acceptance = decode_record(found.data, Acceptance)
        self.restoring.add(pair)
        try:
            manifest = await self._bring(acceptance, [])
        finally:
            self.restoring.discard(pair)
        if manifest is None:
            self.lost[pair] = Lost(acceptance, self._loop.time(), actor)
            return False
        self._reinstate(acceptance, manifest, actor)
        return True

    async def bring_inputs(self, roots: Sequence[bytes]) -> set[bytes]:
        """Bring contents to the hub from whoever has them; return those that nobody has."""
        sources = [holder.name for holder in (*self._keepers.standbys(), *self._keepers.nodes())]
        gone: set[bytes] = set()
        for root in roots:
            try:
                await fetch_many(self._leader.bus, self._leader.hub.store, {root: sources}, deadline_s=FETCH_DEADLINE_S)
                self._leader.hub_holds([root])
            except FlowmeshError as error:
                log.info("an input cannot be had: %s", error)
                gone.add(root)
        return gone

    def waited_s(self, pair: Pair) -> float:
        """Return for how long the manifest of a run has been sought."""
        return self._loop.time() - self.lost[pair].since_s

    def give_up(self, pair: Pair) -> None:
        """End a run of which nobody has the manifest, and say so."""
        lost = self.lost.pop(pair)
        asked = len(self._keepers.standbys()) + len(self._keepers.nodes())
        waited_s = self._loop.time() - lost.since_s
        detail = f"its manifest is gone: neither the hub nor {asked} other holders have had it for {waited_s:.0f} s"
        self._leader.apply(e.GivenUp(lost.acceptance, detail))
