"""The leader's hands: each command of the core, carried out. Writes go out at once; their answers come back as events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh import subjects
from flowmesh_mesh.manifest import encode_record, record_cid
from flowmesh_mesh.messages import encode
from flowmesh_scheduler.asks import plain_end
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

KEEP_DEADLINE_S = 120.0
ENDS_GATHERED_S = 0.25


class Hands:
    """Carries out commands for a leader."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._ending: dict[tuple[str, str], bytes] = {}
        self.failing: set[tuple[str, str]] = set()
        """Runs whose end is no success and not in the ledger yet: another leader could still end them otherwise."""

    def carry_out(self, command: c.Command) -> None:
        """Do what one command says."""
        _CARRY_OUT[type(command)](self, command)

    def _accept(self, command: c.Accept) -> None:
        acceptance = command.acceptance
        pair = (acceptance.tenant, acceptance.run)
        inline = self._leader.inline.pop(pair, [])
        record = encode_record(msgspec.structs.replace(acceptance, blocks=inline))
        feed = self._leader.feeds.feed(*pair, acceptance.encoding)

        def accepted(_: int) -> None:
            self._leader.feeds.send(feed, "accepted", {"name": command.name, "operators": command.operators})
            self._leader.feeds.open(feed)
            self._leader.requests.settle(pair, True)
            self._leader.keepers.accepted(pair, record)

        self._leader.ledger.write(subjects.ledger_accepted(*pair), record, accepted)

    def _assign(self, command: c.Assign) -> None:
        if not command.may_run_in_vain and (waiting := self._unaccepted(command.assignment.id)):
            self._leader.spawn(self._assign_later(command, waiting))
            return
        self._leader.queue.hand_over(command.assignment, may_run_in_vain=command.may_run_in_vain)

    def _unaccepted(self, assignment: str) -> list[asyncio.Future[bool]]:
        """Return what tells that the ledger shows the runs of an assignment; nothing for those that it shows already."""
        outstanding = self._leader.state.assignments.get(assignment)
        works = outstanding.open.values() if outstanding is not None else ()
        runs = {vertex.run.id_pair for work in works for vertex in work.waiters}
        return [future for pair in runs if (future := self._leader.requests.accepting(pair)) is not None]

    async def _assign_later(self, command: c.Assign, waiting: list[asyncio.Future[bool]]) -> None:
        """Give out what has effects once its run is accepted: another leader, who knows no run, would give it out again."""
        await asyncio.wait(waiting)
        if command.assignment.id in self._leader.state.assignments:
            self._leader.queue.hand_over(command.assignment, may_run_in_vain=False)

    def _commit(self, command: c.CommitResults) -> None:
        records = [(key, record_cid(block)) for key, _, block in command.records]
        remaining = len(records)

        def stored(_: int) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                self._leader.apply(e.Committed(records))

        for key, generation, block in command.records:
            self._leader.ledger.write(subjects.ledger_result(key.hex(), generation), block, stored)

    def _tell(self, command: c.Tell) -> None:
        message = command.message
        self._leader.bus.post(subjects.node_control(command.node), encode(message))
        if getattr(message, "closed", False):
            self._leader.queue.settle(command.node, message.assignment)

    def _release(self, command: c.Release) -> None:
        sequence = self._leader.queue.settle(command.node, command.assignment)
        if sequence:
            self._leader.spawn(self._leader.queue.delete(sequence))

    def _locate(self, command: c.Locate) -> None:
        self._leader.spawn(self._locate_now(command))

    async def _locate_now(self, command: c.Locate) -> None:
        """Ask; whatever goes wrong counts as an answer: the work that waits must hear something."""
        nodes = [n.name for n in self._leader.state.nodes.values() if n.state != "gone"]
        found: dict[bytes, list[str]] = {root: [] for root in command.roots}
        try:
            found = await self._leader.hub.locate(command.roots, nodes)
            for root in await self._leader.keepers.returning.fetch_lost(root for root, holders in found.items() if not holders):
                found[root] = [subjects.HUB]
        except Exception:
            log.exception("cannot ask who holds %d roots", len(command.roots))
        self._leader.apply(e.Located(found))

    def _keep(self, command: c.Keep) -> None:
        self._leader.spawn(self._keep_now(command))

    async def _keep_now(self, command: c.Keep) -> None:
        """Fetch outputs to the hub, so that they outlive the nodes that made them."""
        from flowmesh_mesh.transfer import fetch

        missing: list[bytes] = []
        limit = asyncio.Semaphore(8)

        async def one(root: bytes, holders: list[str]) -> None:
            async with limit:
                try:
                    await fetch(self._leader.bus, self._leader.hub.store, root, holders, deadline_s=KEEP_DEADLINE_S)
                except Exception as error:
                    log.warning("an output cannot be had: %s", error)
                    missing.append(root)

        await asyncio.gather(*(one(root, list(holders)) for root, holders in command.roots.items()))
        self._leader.apply(e.Kept(command.tenant, command.run, missing))

    def _record_cancel(self, command: c.RecordCancel) -> None:
        cancellation = command.cancellation
        pair = (cancellation.tenant, cancellation.run)
        self._leader.requests.recording(pair)
        recorded = partial(self._leader.requests.cancelled, pair)
        self._leader.ledger.write(subjects.ledger_cancelled(*pair), encode_record(cancellation), lambda _: recorded())
        self._leader.feeds.tell(*pair, "cancelling", {"actor": cancellation.actor})

    def _record_health(self, command: c.RecordHealth) -> None:
        self._leader.spawn(self._record_health_now(command))

    async def _record_health_now(self, command: c.RecordHealth) -> None:
        health = command.health
        log.info("node %s is %s by %s: %s", health.node, health.state, health.by, health.reason or "no reason given")
        try:
            await self._leader.bus.store(subjects.node_health(health.node), encode(health))
        except FlowmeshError as error:
            log.warning("the next leader may not know that node %s is %s: %s", health.node, health.state, error)

    def _end(self, command: c.EndRun) -> None:
        end = command.end
        pair = (end.tenant, end.run)
        if command.state != "succeeded":
            self.failing.add(pair)

            def written(_: int) -> None:
                self.failing.discard(pair)
                self._leader.feeds.tell(*pair, "ended", plain_end(end))
                self._leader.keepers.ended(pair)
                self._leader.apply(e.Ended(*pair))

            self._leader.ledger.write(subjects.ledger_ended(*pair), encode_record(end), written)
            return
        # a success follows from results that are in the ledger already: nobody has to wait for its record
        self._leader.feeds.tell(*pair, "ended", plain_end(end))
        if not self._ending:
            asyncio.get_running_loop().call_later(ENDS_GATHERED_S, self.write_ends)
        self._ending[pair] = encode_record(end)

    def write_ends(self) -> None:
        """Write the successes of a moment together."""
        ending, self._ending = self._ending, {}
        for pair, record in ending.items():
            self._leader.ledger.write(subjects.ledger_ended(*pair), record, partial(self._ended, pair))

    def _ended(self, pair: tuple[str, str], _: int) -> None:
        self._leader.keepers.ended(pair)
        self._leader.apply(e.Ended(*pair))

    def _change(self, command: c.Change) -> None:
        self._leader.feeds.tell_changes(command.tenant, command.run, list(command.changes), command.counts)

    def _drop_checkpoint(self, command: c.DropCheckpoint) -> None:
        self._leader.checkpoints.drop(command.key)


_CARRY_OUT: dict[type, Callable[[Hands, Any], None]] = {
    c.Accept: Hands._accept,
    c.Assign: Hands._assign,
    c.CommitResults: Hands._commit,
    c.Tell: Hands._tell,
    c.Release: Hands._release,
    c.Locate: Hands._locate,
    c.Keep: Hands._keep,
    c.RecordCancel: Hands._record_cancel,
    c.RecordHealth: Hands._record_health,
    c.EndRun: Hands._end,
    c.Change: Hands._change,
    c.DropCheckpoint: Hands._drop_checkpoint,
}
