"""Keepers: others than the leader that hold each accepted run, so that losing the broker's store, or the leader's, loses none.

An acceptance that has lasted a moment is given, sealed, to some holders: schedulers that stand by first, then nodes. They fetch
what its manifest needs, pin it, and answer once all of it is on their disks. Whoever is lost is replaced. When the ledger shows
the end of a run, they let it go. A keeper that comes, or comes back, is asked which runs it keeps: what has ended since, it may
forget; what nobody knows any more comes back into the ledger, if its seal is good.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import FlowmeshError, IntegrityError
from flowmesh_mesh import seals, subjects
from flowmesh_mesh.keeping import Keeper, Pair
from flowmesh_mesh.manifest import Acceptance, decode_record
from flowmesh_mesh.messages import Guard, Guarded, Recall, Recalled, Sealed, Unguard, decode, encode
from flowmesh_scheduler.hub import name_blocks
from flowmesh_scheduler.restoring import Restoring
from flowmesh_scheduler.returning import Lost, Returning

if TYPE_CHECKING:
    from flowmesh_scheduler.journal import Journal
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

SETTLE_S = 1.0
"""A run that ends sooner is guarded by nobody: it would be over before anybody had it."""

RECOVERED_SETTLE_S = 4.0
"""The same for the runs that a new leader finds: its keepers tell first whom they have already."""

TICK_S = 0.5
BATCH_RUNS = 256
BATCH_BYTES = 512 * 1024
GUARD_TIMEOUT_S = 310.0
STRUCK_S = 15.0
"""How long a holder that failed to keep something is not asked again."""

SEEK_S = 5.0
"""Pause between two tries to find manifests that nobody had."""

RENEW_FIRST_S = 3600.0
RENEW_EVERY_S = 24 * 3600.0
"""How often keepers are asked again for what they have: they let go what nobody asks for in two weeks."""

RENEWED_AT_ONCE = 16
FOLLOW_AFTER_S = 5.0
RECALL_TIMEOUT_S = 10.0
RECALLS_AT_ONCE = 8
PAGES_MAX = 100_000
"""Most pages that are taken from one keeper: a node may be hostile."""

FETCH_DEADLINE_S = 120.0
COPY_DEADLINE_S = 60.0
"""How long a large submission waits for its second holder before it is accepted with one."""

WIRE_OF_KEEPERS = 2
"""Oldest version of the wire that knows how to keep."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who can keep: ``name`` is that of its blocks, ``subject`` where it hears the leader, ``life`` when it started."""

    name: str
    subject: str
    life: int


@dataclass(slots=True)
class Pending:
    """A run that wants keepers: when it is due, its record while that is at hand, whether all who could keep it do so already."""

    due_s: float
    record: bytes = b""
    has_nobody: bool = False


class Keepers:
    """The leader's side of keeping."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._loop = asyncio.get_running_loop()
        self._pending: dict[Pair, Pending] = {}
        self._guards: dict[Pair, set[str]] = {}
        self._by_holder: dict[str, set[Pair]] = {}
        self._let_go: dict[str, list[Pair]] = {}
        self._struck_until: dict[str, float] = {}
        self._busy: set[str] = set()
        self._asked: dict[str, int] = {}
        self._single: dict[Pair, str] = {}
        self._seek_at_s = 0.0
        self._renew_at_s = self._loop.time() + RENEW_FIRST_S
        self._recalling = asyncio.Semaphore(RECALLS_AT_ONCE)
        self.returning = Returning(leader, self)

    # --- who there is

    def standbys(self) -> list[Holder]:
        """Return the schedulers that stand by and can keep."""
        presence = self._leader.presence
        beats = [presence.others[name].beat for name in presence.standbys()]
        return [
            Holder(subjects.hub_of(beat.scheduler), subjects.scheduler_control(beat.scheduler), beat.started_at_us)
            for beat in beats
            if beat.wire >= WIRE_OF_KEEPERS
        ]

    def nodes(self) -> list[Holder]:
        """Return the nodes that can keep."""
        return [
            Holder(node.name, subjects.node_control(node.name), node.record.started_at_us)
            for _, node in sorted(self._leader.state.nodes.items())
            if node.is_usable and node.record.wire >= WIRE_OF_KEEPERS
        ]

    def _choose(self, pair: Pair, standbys: Sequence[Holder], nodes: Sequence[Holder]) -> list[Holder]:
        """Return who is to keep a run beside those who do: standbys first, then nodes, spread by the run's name."""
        have = self._guards.get(pair, set())
        wanted = self._leader.config.keepers - len(have)
        now_s, found = self._loop.time(), list[Holder]()
        for group in (standbys, () if standbys and self._is_private(pair) else nodes):
            start = int.from_bytes(sha256(f"{pair[0]}\0{pair[1]}".encode()).digest()[:4], "big") % max(1, len(group))
            for offset in range(len(group)):
                if len(found) >= wanted:
                    return found
                holder = group[(start + offset) % len(group)]
                if holder.name not in have and self._struck_until.get(holder.name, 0.0) <= now_s:
                    found.append(holder)
        return found

    def _is_private(self, pair: Pair) -> bool:
        """Tell whether nodes should not read a run's document without need: they keep it only if no scheduler stands by."""
        run = self._leader.state.runs.get(pair)
        return run is not None and (run.acceptance.share == "private" or any(vertex.is_private for vertex in run.vertices))

    def possible(self, pair: Pair) -> int:
        """Return how many could keep a run now, up to as many as should."""
        standbys = len(self.standbys())
        others = 0 if standbys and self._is_private(pair) else len(self.nodes())
        return min(self._leader.config.keepers, standbys + others)

    # --- what comes and goes

    def accepted(self, pair: Pair, record: bytes) -> None:
        """The ledger shows an acceptance: unless its run ends at once, it is to be kept."""
        self._pending[pair] = Pending(self._loop.time() + SETTLE_S, record)

    def wanted(self, pair: Pair) -> None:
        """A run has come back: it is to be kept."""
        self._pending[pair] = Pending(self._loop.time() + SETTLE_S)

    def ended(self, pair: Pair) -> None:
        """The ledger shows the end of a run: whoever keeps it may forget it."""
        self._pending.pop(pair, None)
        self._single.pop(pair, None)
        for name in sorted(self._guards.pop(pair, ())):
            self._by_holder[name].discard(pair)
            self._let_go.setdefault(name, []).append(pair)

    async def restore_ledger(self) -> None:
        """Bring back what the ledger lacks of what schedulers know; from here on, note what is written into it."""
        memory = self._leader.memory
        journal = memory.journal if memory is not None else None
        await Restoring(self._leader.bus, self._leader.ledger, journal, self._leader.lost).run(self._leader.state.epoch)
        if journal is not None:
            self._leader.spawn(self._follow(journal, journal.last_seq + 1))
            self._leader.ledger.noted = journal.note

    async def _follow(self, journal: Journal, from_seq: int) -> None:
        """Note what earlier leaders wrote, once the take-over is over; then write down what is noted, for ever."""
        await asyncio.sleep(FOLLOW_AFTER_S)
        try:
            await journal.follow(self._leader.bus, from_seq)
        except FlowmeshError as error:
            log.warning("the journal lacks what earlier leaders wrote: %s", error)
        await journal.run()

    def begin(self, lost: Iterable[tuple[Acceptance, str]] = ()) -> None:
        """Take up the runs that the ledger has, at take-over; ``lost`` are those without a manifest, with who cancelled them."""
        due_s = self._loop.time() + RECOVERED_SETTLE_S
        for pair, run in self._leader.state.runs.items():
            if run.end is None and pair not in self._pending:
                self._pending[pair] = Pending(due_s)
        for acceptance, cancelled_by in lost:
            pair = (acceptance.tenant, acceptance.run)
            self.returning.lost[pair] = Lost(acceptance, self._loop.time(), cancelled_by)
            self._pending.pop(pair, None)
        memory = self._leader.memory
        if memory is not None:
            self._leader.spawn(self._tell_own(memory.keeper))
        self._leader.spawn(self.run())

    async def _tell_own(self, keeper: Keeper) -> None:
        """Take back what this scheduler kept itself while it stood by."""
        ended = [pair for pair in keeper.runs if pair in self._leader.state.ended]
        unknown = [pair for pair in keeper.runs if not self.returning.is_known(pair)]
        for kept in (await asyncio.to_thread(keeper.kept)).values() if unknown else ():
            await self.returning.restore(kept.acceptance, kept.seal, subjects.HUB, only=set(unknown))
        await keeper.forget(ended)

    async def run(self) -> None:
        """Look after keepers, for ever."""
        while True:
            try:
                self._look()
                if self.returning.lost and self._loop.time() >= self._seek_at_s:
                    self._seek_at_s = self._loop.time() + SEEK_S
                    self._leader.spawn(self.returning.seek_lost())
            except FlowmeshError as error:
                log.warning("keepers: %s", error)
            await asyncio.sleep(TICK_S * random.uniform(0.8, 1.2))

    def _look(self) -> None:
        standbys, nodes = self.standbys(), self.nodes()
        present = {holder.name: holder for holder in (*standbys, *nodes)}
        for name in [name for name in self._by_holder if name not in present]:
            self._holder_lost(name)
        for name in [name for name in self._asked if name not in present]:
            del self._asked[name]  # it may miss what it is told: it is asked again when it is back
        for holder in present.values():
            if self._asked.get(holder.name) != holder.life:
                self._asked[holder.name] = holder.life
                self._leader.spawn(self._recall(holder))
        self._send_let_go(present)
        if self._leader.state.is_cut_off:
            return
        if self._loop.time() >= self._renew_at_s:
            self._renew_at_s = self._loop.time() + RENEW_EVERY_S
            for name, kept in self._by_holder.items():
                self._leader.spawn(self._renew(present[name], sorted(kept)))
        for holder, pairs in self._due(standbys, nodes).values():
            self._busy.add(holder.name)
            self._leader.spawn(self._guard(holder, pairs))

    async def _renew(self, holder: Holder, pairs: list[Pair]) -> None:
        """Ask a holder again for what it keeps, so that it does not take it for forgotten."""
        for start in range(0, len(pairs), RENEWED_AT_ONCE):
            await self._guard(holder, pairs[start : start + RENEWED_AT_ONCE])

    def _holder_lost(self, name: str) -> None:
        due_s = self._loop.time() + SETTLE_S
        for pair in self._by_holder.pop(name):
            holders = self._guards.get(pair)
            if holders is not None:
                holders.discard(name)
                self._pending.setdefault(pair, Pending(due_s))

    def _send_let_go(self, present: Mapping[str, Holder]) -> None:
        let_go, self._let_go = self._let_go, {}
        for name, pairs in let_go.items():
            if name in present:  # who is away is told when it is back
                for start in range(0, len(pairs), BATCH_RUNS):
                    message = Unguard(self._leader.state.epoch, tuple(pairs[start : start + BATCH_RUNS]))
                    self._leader.bus.post(present[name].subject, encode(message))

    def _due(self, standbys: Sequence[Holder], nodes: Sequence[Holder]) -> dict[str, tuple[Holder, list[Pair]]]:
        """Return the runs that are due, by who shall keep them."""
        now_s, found = self._loop.time(), dict[str, tuple[Holder, list[Pair]]]()
        for pair, pending in list(self._pending.items()):
            if pending.due_s > now_s:
                continue
            run = self._leader.state.runs.get(pair)
            if run is None or run.end is not None or len(self._guards.get(pair, ())) >= self._leader.config.keepers:
                del self._pending[pair]
                continue
            chosen = self._choose(pair, standbys, nodes)
            if not chosen:
                pending.due_s, pending.record = now_s + STRUCK_S / 3, b""
            pending.has_nobody = not chosen
            for holder in chosen:
                pairs = found.setdefault(holder.name, (holder, []))[1]
                if holder.name not in self._busy and len(pairs) < BATCH_RUNS:
                    pairs.append(pair)
        return {name: each for name, each in found.items() if each[1]}

    # --- guarding

    async def _guard(self, holder: Holder, pairs: list[Pair]) -> None:
        try:
            entries = await self._entries(pairs)
            if not entries:
                return
            first, *others = entries.values()
            sources = (subjects.HUB, *(name for pair in entries for name in sorted(self._guards.get(pair, ()))))
            message = Guard(
                self._leader.state.epoch,
                first.acceptance,
                first.seal,
                first.roots,
                tuple(dict.fromkeys(sources)),
                tuple(others),
            )
            data = await self._leader.bus.request(holder.subject, encode(message), timeout_s=GUARD_TIMEOUT_S)
            answer = decode(data, Guarded)
            kept = set(answer.runs) if answer.error else set(entries)
            if answer.error:
                log.info("%s does not keep everything: %s", holder.name, answer.error)
                self._struck_until[holder.name] = self._loop.time() + STRUCK_S
            for pair in sorted(kept & set(entries)):
                self.note_kept(pair, holder.name)
        except FlowmeshError as error:
            log.info("%s keeps nothing: %s", holder.name, error)
            self._struck_until[holder.name] = self._loop.time() + STRUCK_S
        finally:
            self._busy.discard(holder.name)

    def note_kept(self, pair: Pair, name: str) -> None:
        """A holder has all that a run needs."""
        run = self._leader.state.runs.get(pair)
        if run is None or run.end is not None:
            self._let_go.setdefault(name, []).append(pair)
            return
        self._guards.setdefault(pair, set()).add(name)
        self._by_holder.setdefault(name, set()).add(pair)
        pending = self._pending.get(pair)
        if pending is not None:
            pending.record = b""

    async def _entries(self, pairs: Sequence[Pair]) -> dict[Pair, Sealed]:
        """Return the sealed acceptances of runs, up to what one message carries."""
        found: dict[Pair, Sealed] = {}
        size = 0
        for pair in pairs:
            record = await self._record(pair)
            if record is None:
                continue
            size += len(record)
            if found and size > BATCH_BYTES:
                break
            acceptance = decode_record(record, Acceptance)
            roots: tuple[bytes, ...] = ()
            if not acceptance.blocks or name_blocks([acceptance.manifest], acceptance.blocks)[1]:
                roots = (acceptance.manifest,)
            found[pair] = Sealed(record, seals.seal(self._leader.secret, record), roots)
        return found

    async def _record(self, pair: Pair) -> bytes | None:
        pending = self._pending.get(pair)
        if pending is not None and pending.record:
            return pending.record
        found = await self._leader.bus.last_message(subjects.LEDGER, subjects.ledger_accepted(*pair))
        return found.data if found is not None else None

    # --- two holders before an acceptance

    @property
    def wants_copies(self) -> bool:
        """Tell whether this mesh is replicated, so that nothing large is accepted with one holder."""
        return self._leader.config.replicas > 1 or bool(self.standbys())

    async def copied(self, pair: Pair, roots: Sequence[bytes]) -> bool:
        """Wait until somebody beside the leader holds contents that came before their run is accepted, on a replicated mesh.

        There is a deadline: a mesh that has lost its other holders goes on accepting, and says so in its status. Tell whether
        there are as many holders as there should be.
        """
        if not self.wants_copies:
            return True
        why = "nobody beside the leader can hold it"
        until_s = self._loop.time() + COPY_DEADLINE_S
        for holder in [*self.standbys(), *self.nodes()]:
            message = Guard(self._leader.state.epoch, b"", b"", tuple(roots), (subjects.HUB,))
            left_s = until_s - self._loop.time()
            if left_s <= 0:
                break
            try:
                data = await self._leader.bus.request(holder.subject, encode(message), timeout_s=left_s)
                answer = decode(data, Guarded)
            except FlowmeshError as error:
                why = f"{holder.name}: {error.message}"
                continue
            if not answer.error:
                return True
            why = f"{holder.name}: {answer.error}"
        log.warning("run %s is accepted with one holder of its contents: %s", pair[1], why)
        self._single[pair] = why
        return False

    # --- what keepers tell

    async def _recall(self, holder: Holder) -> None:
        """Ask a keeper which runs it has, and get back those that nobody knows any more."""
        async with self._recalling:
            try:
                unknown: set[Pair] = set()
                async for answer in self._pages(holder, "runs"):
                    for pair in answer.runs:
                        if not self._note_recalled(pair, holder.name):
                            unknown.add(pair)
                if not unknown:
                    return
                async for answer in self._pages(holder, "acceptances"):
                    for record, seal in answer.acceptances:
                        await self.returning.restore(record, seal, holder.name, only=unknown)
            except FlowmeshError as error:
                log.info("%s does not tell what it keeps: %s", holder.name, error)
                if not isinstance(error, IntegrityError):
                    self._asked.pop(holder.name, None)

    def _note_recalled(self, pair: Pair, holder: str) -> bool:
        """Note that a keeper has a run; tell whether the run is known here."""
        if pair in self._leader.state.ended:
            self._let_go.setdefault(holder, []).append(pair)
            return True
        if pair in self._leader.state.runs:
            self.note_kept(pair, holder)
            return True
        return False

    async def _pages(self, holder: Holder, what: str) -> Any:
        cursor = 0
        for _ in range(PAGES_MAX):
            question = encode(Recall(cursor, what))
            answer = decode(await self._leader.bus.request(holder.subject, question, timeout_s=RECALL_TIMEOUT_S), Recalled)
            yield answer
            if 0 <= answer.cursor <= cursor:
                raise IntegrityError(f"{holder.name} makes no progress in what it tells")
            cursor = answer.cursor
            if cursor < 0:
                return

    # --- what people see

    def plain(self) -> dict[str, Any]:
        """Return who keeps how much, for the status."""
        return {
            "wanted": self._leader.config.keepers,
            "holders": {name: len(pairs) for name, pairs in sorted(self._by_holder.items()) if pairs},
            "guarded": len(self._guards),
            "waiting": sum(not pending.has_nobody for pending in self._pending.values()),
            "lost": len(self.returning.lost),
            "restored": len(self.returning.restored),
        }

    def ask_again(self) -> None:
        """Let every keeper be asked anew which runs it has."""
        self._asked.clear()

    def guards_of(self, pair: Pair) -> set[str]:
        """Return the names of those who keep a run."""
        return self._guards.get(pair, set())

    def warnings(self) -> list[str]:
        """Return what an operator of the mesh should know."""
        for pair in [pair for pair in self._single if pair not in self._leader.state.runs]:
            del self._single[pair]
        found = [f"run {pair[1]} has one holder of its contents: {why}" for pair, why in self._single.items()]
        return [*found, *(f"run {pair[1]} waits for its manifest: nobody has it" for pair in self.returning.lost)]
