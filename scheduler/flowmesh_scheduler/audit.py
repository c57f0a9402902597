"""The audit: what the mesh should have against what it has. Manifests, ledger, streams, stores, keepers.

The leader audits itself after each take-over and every few minutes, with questions that cost little, and repairs what can only
be right: a run that the ledger has and memory has not is planned. Whoever operates the mesh may ask for more: every result looked
up, orphans collected. It promises what holders still have, and says what is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas.cid import cid_text
from flowmesh_cas.errors import FlowmeshError, IntegrityError
from flowmesh_mesh import subjects
from flowmesh_mesh.clock import monotonic_s, now_us
from flowmesh_mesh.keeping import Pair
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.reinstating import adrift
from flowmesh_scheduler.core.state import Run
from flowmesh_scheduler.findings import Finding
from flowmesh_scheduler.orphans import Orphans

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

FIRST_S = 10.0
EVERY_S = 300.0
GIVE_UP_S = 600.0
"""How long a run may wait for its manifest before it is ended for want of it, unless somebody asks for repair sooner."""

LISTED_MAX = 50_000
"""Most runs of which the ledger's subjects are listed without being asked: the broker lists 100,000 in two seconds."""

LEFT_S = 60.0
KEEPERS_GRACE_S = 60.0
STEP_VERTICES = 2000
"""Operators looked at before others get their turn."""

ROOTS_AT_ONCE = 2000
SHOWN_MAX = 1000


class _Subjects(msgspec.Struct, frozen=True):
    """A page of the subjects of a stream, as the broker words it."""

    subjects: dict[str, int] | None = None


class _Page(msgspec.Struct, frozen=True):
    state: _Subjects = _Subjects()
    total: int = 0


async def answer(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Audit for a tenant: all of the mesh for who may do what concerns everybody, his own runs for any other."""
    from flowmesh_scheduler.cordons import may_act_for_all

    is_operator = may_act_for_all(leader, tenant)
    if args.get("repair"):
        from flowmesh_scheduler.cordons import authorised

        authorised(leader, tenant)
    findings = await leader.audit.look(is_repairing=bool(args.get("repair")), is_thorough=bool(args.get("thorough")))
    shown = [each for each in findings if is_operator or each.tenant == tenant]
    return {
        "at_us": now_us(),
        "runs": len(leader.state.runs),
        "findings": [each.plain() for each in shown[:SHOWN_MAX]],
        "total": len(shown),
        "left": sum(not each.repaired for each in shown),
    }


class Audit:
    """Looks for what does not fit together."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._since_s = monotonic_s()
        self._one_at_a_time = asyncio.Lock()
        self._seen: dict[str, tuple[int, float]] = {}
        self._told_restored: set[Pair] = set()
        self.last: dict[str, Any] = {}

    async def run(self) -> None:
        """Audit once after the take-over and then every few minutes, for ever."""
        await asyncio.sleep(FIRST_S)
        while True:
            try:
                for finding in await self.look(is_asked=False):
                    log.warning("audit: %s: %s (%s)%s", finding.kind, finding.what, finding.why, _done(finding))
            except FlowmeshError as error:
                log.info("no audit: %s", error)
            await asyncio.sleep(EVERY_S)

    async def look(self, *, is_asked: bool = True, is_repairing: bool = False, is_thorough: bool = False) -> list[Finding]:
        """Return what is found. Without ``is_repairing`` only what can do no harm is repaired."""
        async with self._one_at_a_time:
            if is_repairing:
                self._leader.keepers.ask_again()
                await asyncio.sleep(1.0)
            found: list[Finding] = list(self._restored())
            found += [each async for each in self._runs(is_asked)]
            found += [each async for each in self._manifests(is_repairing)]
            found += [each async for each in self._inputs()]
            found += [each async for each in self._operators()]
            found += [each async for each in self._assignments(is_repairing)]
            found += [each async for each in self._left(is_repairing)]
            found += list(self._keepers())
            if is_thorough or is_repairing:
                found += [each async for each in self._results()]
                found += await Orphans(self._leader).look(is_repairing=is_repairing)
        self.last = {"at_us": now_us(), "found": len(found), "left": sum(not each.repaired for each in found)}
        return found

    # --- runs

    def _restored(self) -> Iterator[Finding]:
        for pair, holder in self._leader.keepers.returning.restored.items():
            if pair not in self._told_restored:
                self._told_restored.add(pair)
                why = f"the broker lost it; {holder} kept its acceptance"
                repair = "write the acceptance back and plan the run"
                yield Finding("acceptance-lost", f"the ledger had lost run {pair[1]}", why, repair, pair[1], pair[0], True)

    async def _runs(self, is_asked: bool) -> AsyncIterator[Finding]:
        state, returning = self._leader.state, self._leader.keepers.returning
        if not is_asked and len(state.runs) + len(state.ended) > LISTED_MAX:
            return
        accepted = {_pair(subject) for subject in await self._subjects(subjects.LEDGER, "led.accepted.>")}
        ended = {_pair(subject) for subject in await self._subjects(subjects.LEDGER, "led.ended.>")}
        for pair in sorted(accepted - ended):
            if pair in state.runs or pair in state.ended or pair in returning.lost or pair in returning.restoring:
                continue
            repaired = await returning.plan_from_ledger(pair)
            why = "its acceptance came into the ledger without this leader, or could not be read when it took over"
            what = f"run {pair[1]} is accepted and was not planned"
            yield Finding("run-unknown", what, why, "plan it", pair[1], pair[0], repaired)
        for pair in sorted(ended - accepted):
            why = "the acceptance was lost, and no keeper had it any more when the run ended; nothing depends on it"
            what = f"run {pair[1]} has ended and was never accepted"
            yield Finding("end-unfounded", what, why, "nothing: its end is what counts", pair[1], pair[0], True)

    async def _manifests(self, is_repairing: bool) -> AsyncIterator[Finding]:
        returning = self._leader.keepers.returning
        if returning.lost:
            await returning.seek_lost()
        for pair, lost in list(returning.lost.items()):
            waited_s = returning.waited_s(pair)
            what = f"the manifest {cid_text(lost.acceptance.manifest)} of run {pair[1]} is nowhere"
            why = f"neither the hub nor any keeper has had it for {waited_s:.0f} s"
            is_over = is_repairing or waited_s > GIVE_UP_S
            if is_over:
                returning.give_up(pair)
            yield Finding("manifest-gone", what, why, "end the run, with that reason, by audit", pair[1], pair[0], is_over)

    async def _inputs(self) -> AsyncIterator[Finding]:
        """Look for given contents of live runs that the hub lacks, and bring them from whoever has them."""
        leader = self._leader
        for pair, run in list(leader.state.runs.items()):
            roots = sorted(_given(run)) if run.end is None and run.unfinished else []
            if not roots:
                continue
            held = await asyncio.to_thread(leader.hub.store.has_many, roots)
            absent = [root for root, is_held in zip(roots, held, strict=True) if not is_held]
            if not absent:
                continue
            gone = await leader.keepers.returning.bring_inputs(absent)
            for root in absent:
                what = f"the hub lacks input {cid_text(root)} of run {pair[1]}"
                why = "the hub's store was lost" + (", and nobody else has it" if root in gone else "")
                repair = "fetch it from whoever holds it; its operators fail if nobody does"
                yield Finding("inputs-gone", what, why, repair, pair[1], pair[0], root not in gone)

    async def _operators(self) -> AsyncIterator[Finding]:
        leader, looked = self._leader, 0
        for pair, run in list(leader.state.runs.items()):
            if run.end is not None:
                continue
            wrong: dict[int, str] = {}
            for vertex in run.vertices:
                looked += 1
                if looked % STEP_VERTICES == 0:
                    await asyncio.sleep(0)
                if not vertex.state.is_final and (why := adrift(leader.state, vertex)):
                    wrong[vertex.index] = why
            wrong = {index: why for index, why in wrong.items() if adrift(leader.state, run.vertices[index])}
            if wrong:
                leader.apply(e.Replanned(*pair, list(wrong)))
            for index, why in wrong.items():
                what = f"operator {run.vertices[index].operator.name} of run {pair[1]} neither runs nor waits"
                is_mended = not adrift(leader.state, run.vertices[index])
                yield Finding("operator-adrift", what, why, "plan it again", pair[1], pair[0], is_mended)

    # --- streams

    async def _assignments(self, is_repairing: bool) -> AsyncIterator[Finding]:
        leader = self._leader
        for subject in sorted(await self._subjects(subjects.ASSIGN, "asg.node.>")):
            _, _, node, assignment = subject.split(".", 3)
            if leader.queue.knows(node) or assignment in leader.state.assignments:
                continue
            repaired = False
            if is_repairing:
                last = await leader.bus.last_message(subjects.ASSIGN, subject)
                repaired = last is None or await leader.bus.delete_message(subjects.ASSIGN, last.seq)
            what = f"assignment {assignment} for {node} is not known to the leader"
            yield Finding("assignment-astray", what, "it was written by nobody who leads", "remove it", repaired=repaired)

    async def _left(self, is_repairing: bool) -> AsyncIterator[Finding]:
        """Look for requests and reports that have stood first in their streams since the last audit."""
        sweeps = {subjects.SUBMIT: self._leader.requests.sweep, subjects.DONE: self._leader.reports.sweep}
        for stream, sweep in sweeps.items():
            found = await self._leader.bus.stream_state(stream)
            if found is None or not found.messages:
                self._seen.pop(stream, None)
                continue
            first, since_s = self._seen.setdefault(stream, (found.first_seq, monotonic_s()))
            if first != found.first_seq:
                self._seen[stream] = (found.first_seq, monotonic_s())
            elif monotonic_s() - since_s > LEFT_S:
                if is_repairing:
                    await sweep()
                    await sweep()
                after = await self._leader.bus.stream_state(stream)
                repaired = after is None or not after.messages or after.first_seq > first
                what = f"{found.messages} messages lie in {stream} since message {first}"
                why = "one of them is not settled, such as a submission whose model no node can name yet"
                yield Finding("request-left", what, why, "settle them", repaired=repaired)

    # --- contents

    async def _results(self) -> AsyncIterator[Finding]:
        """Look for results of the ledger whose contents nobody holds: the next use of them computes them anew."""
        leader = self._leader
        roots: dict[bytes, bytes] = {}
        for key, result in list(leader.state.results.items()):
            for refs in result.outputs.values():
                for ref in refs:
                    roots.setdefault(ref.cid, key)
        every = list(roots)
        nodes = [node.name for node in leader.state.nodes.values() if node.state != "gone"]
        for start in range(0, len(every), ROOTS_AT_ONCE):
            part = every[start : start + ROOTS_AT_ONCE]
            held = await asyncio.to_thread(leader.hub.store.has_many, part)
            asked = {root: leader.state.holders(root) for root, is_held in zip(part, held, strict=True) if not is_held}
            located = await leader.hub.locate(asked, nodes) if asked else {}
            for root, holders in located.items():
                if holders:
                    continue
                what = f"nobody holds {cid_text(root)}, output of operator key {roots[root].hex()[:16]}"
                why = "its holders are gone, or lost their disks"
                yield Finding("result-dangling", what, why, "count it as a miss: its next use computes it anew", repaired=True)

    def _keepers(self) -> Iterator[Finding]:
        keepers, leader = self._leader.keepers, self._leader
        grace_us = int(KEEPERS_GRACE_S * 1e6)
        if monotonic_s() - self._since_s < KEEPERS_GRACE_S:
            return
        for pair, run in leader.state.runs.items():
            have = len(keepers.guards_of(pair))
            is_young = now_us() - run.acceptance.accepted_at_us < grace_us
            if run.end is not None or is_young or have >= leader.config.keepers:
                continue
            possible = keepers.possible(pair)
            if have < possible:
                what = f"run {pair[1]} has {have} keepers of {possible}"
                why = "those that were asked failed, or are still fetching its contents"
                yield Finding("keepers-missing", what, why, "nothing: others are asked all the time", pair[1], pair[0])

    async def _subjects(self, stream: str, subject_filter: str) -> list[str]:
        """Return the subjects of a stream, however many pages that takes."""
        found: list[str] = []
        while True:
            body = msgspec.json.encode({"subjects_filter": subject_filter, "offset": len(found)})
            data = await self._leader.bus.request(f"$JS.API.STREAM.INFO.{stream}", body, timeout_s=30.0)
            try:
                page = msgspec.json.decode(data, type=_Page)
            except msgspec.DecodeError as error:
                raise IntegrityError(f"the broker's answer about {stream} cannot be read: {error}") from error
            names = list(page.state.subjects or ())
            found += names
            if not names or len(found) >= page.total:
                return found


def _pair(subject: str) -> Pair:
    _, _, tenant, run = subject.split(".", 3)
    return tenant, run


def _given(run: Run) -> set[bytes]:
    """Return the given contents that operators of a run may still need."""
    found: set[bytes] = set()
    for vertex in run.vertices:
        if vertex.state.is_final:
            continue
        operator = vertex.operator
        found |= {s.ref.cid for sources in operator.inputs.values() for s in sources if s.ref is not None}
        if operator.code is not None:
            found.add(operator.code.cid)
    return found


def _done(finding: Finding) -> str:
    return f"; repaired: {finding.repair}" if finding.repaired else ""
