"""The leader's part in checkpoints: fetched to the hub, read through, then pointed to by a fenced write in ASSIGN.

A node offers the newest checkpoint of each training until it hears that it is kept. One at a time is fetched per training, the
newest that was offered. The pointer moves only when the hub has every byte and the attempt is still the one that runs; it is
written under the epoch, so a deposed leader moves none. What an earlier pointer stood for is removed afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import FlowmeshError, IntegrityError, TransientError, UsageError
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Delivery, Subscription
from flowmesh_mesh.checkpoints import PIN, check_stored, give_back_space, remove_dags
from flowmesh_mesh.messages import Checkpoint, CheckpointKept, SchedulerBeat, decode, encode
from flowmesh_mesh.transfer import fetch
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.checkpoints import refusal

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

FETCHES = 4
FETCH_DEADLINE_S = 300.0
BRING_AGAIN_S = 5.0
COMPACT_BYTES = 256 * 1024 * 1024
"""After so much was removed the hub's store is asked to give its space back."""


class Checkpoints:
    """Takes checkpoints for a leader, and knows where the pointers stand."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._pointers: dict[bytes, tuple[Checkpoint, int]] = {}
        self._offered: dict[bytes, Checkpoint] = {}
        self._taking: dict[bytes, Checkpoint | None] = {}
        self._slots = asyncio.Semaphore(FETCHES)
        self._removing = asyncio.Lock()
        self._damaged: set[bytes] = set()
        self._hubs: set[str] = set()
        self._removed_bytes = 0

    # --- take-over

    async def listen(self) -> list[Subscription]:
        """Subscribe to what nodes offer; and learn which other schedulers may still hold what this hub lacks."""
        subscribe = self._leader.bus.subscribe
        return [
            await subscribe("fm.node.*.checkpoint", self._on_checkpoint),
            await subscribe(subjects.scheduler_beat("*"), self._on_scheduler),
        ]

    async def recover(self) -> None:
        """Read the pointers of earlier leaders and tell the core; bring what this hub lacks, remove what nobody points to."""
        async for message in self._leader.bus.read_stream(subjects.ASSIGN, subjects.assign_checkpoint("*")):
            try:
                made = decode(message.data, Checkpoint)
            except UsageError as error:
                log.warning("checkpoint pointer %d cannot be read: %s", message.seq, error)
                continue
            self._pointers[made.key] = (made, message.seq)  # in order: the last one stands
        standing = [made for made, _ in self._pointers.values()]
        here = await asyncio.to_thread(lambda: [self._leader.hub.holds(made.at.cid) for made in standing])
        for made, is_here in zip(standing, here, strict=True):
            self._leader.apply(e.Checkpointed(made, is_here))
            if not is_here:
                self._spawn(self._bring(made))
        self._spawn(self._remove_left())

    def _on_scheduler(self, delivery: Delivery) -> None:
        with contextlib.suppress(UsageError):
            if holder := decode(delivery.data, SchedulerBeat).holder:
                self._hubs.add(holder)

    async def _bring(self, made: Checkpoint) -> None:
        """Fetch what another scheduler's hub held when it led, from whoever has it; as long as it is pointed to."""
        while self._points_to(made):
            try:
                async with self._slots:
                    await self._fetch(made, [made.node, *sorted(self._hubs)])
                self._leader.hub_holds([made.at.cid])
                return
            except FlowmeshError as error:
                log.info("checkpoint of %s, step %d, is not at this hub yet: %s", made.key.hex()[:12], made.step, error)
            await asyncio.sleep(BRING_AGAIN_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something run that may fail without ending a leadership: a checkpoint is a saving, not a promise."""

        async def guarded() -> None:
            try:
                await work
            except (FlowmeshError, OSError) as error:
                log.warning("looking after checkpoints: %s", error)

        self._leader.spawn(guarded())

    def _points_to(self, made: Checkpoint) -> bool:
        known = self._pointers.get(made.key)
        return known is not None and known[0] == made

    # --- taking

    def _on_checkpoint(self, delivery: Delivery) -> None:
        try:
            made = decode(delivery.data, Checkpoint)
        except UsageError as error:
            log.warning("on %s: %s", delivery.subject, error)
            return
        if delivery.subject != subjects.node_checkpoint(made.node) or not self._leader.is_ready:
            return
        if self._points_to(made):
            self._answer(made)
        elif self._is_wanted(made) and self._taking.get(made.key) != made:
            self._offered[made.key] = made
            if made.key not in self._taking:
                self._taking[made.key] = made
                self._spawn(self._take_all(made.key))

    def _is_wanted(self, made: Checkpoint) -> bool:
        why = "it is damaged" if made.at.cid in self._damaged else refusal(self._leader.state, made)
        if why:
            log.info("refused a checkpoint of %s, step %d, from %s: %s", made.key.hex()[:12], made.step, made.node, why)
        return not why

    async def _take_all(self, key: bytes) -> None:
        try:
            while (made := self._offered.pop(key, None)) is not None:
                self._taking[key] = made
                is_kept = False
                try:
                    is_kept = await self._take(made)
                except (FlowmeshError, OSError) as error:
                    log.warning("checkpoint of %s, step %d, from %s is not kept: %s", key.hex()[:12], made.step, made.node, error)
                self._taking[key] = None
                if not is_kept:
                    await self._remove([made])
        finally:
            self._taking.pop(key, None)

    async def _take(self, made: Checkpoint) -> bool:
        """Fetch, read through, and move the pointer if the attempt still runs by then; tell whether it was moved."""
        async with self._slots:
            await self._fetch(made, [made.node])
        try:
            await self._check(made)
        except IntegrityError:
            self._damaged.add(made.at.cid)
            raise
        if not self._is_wanted(made):
            return False
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def settle(sequence: int) -> None:
            if not stored.done():
                stored.set_result(sequence)

        subject = subjects.assign_checkpoint(made.key.hex())
        self._leader.assign.write(subject, encode(made), settle)
        sequence = await stored
        former = self._pointers.get(made.key)
        self._pointers[made.key] = (made, sequence)
        self._leader.apply(e.Checkpointed(made))
        self._answer(made)
        await self._purge(subject, sequence)
        if former is not None:
            await self._remove([former[0]])
        return True

    async def _fetch(self, made: Checkpoint, holders: list[str]) -> None:
        """Bring every block to the hub, pinned under the operator key; remembered as being there, or on its way."""
        store = self._leader.hub.store
        await asyncio.to_thread(store.pin, made.at.cid, _owner(made.key))
        await fetch(self._leader.bus, store, made.at.cid, holders, deadline_s=FETCH_DEADLINE_S)

    async def _check(self, made: Checkpoint) -> None:
        manifest = await asyncio.to_thread(check_stored, self._leader.hub.store, made.at.cid)
        misfit = manifest.misfit(operator=made.key.hex(), generation=made.generation)
        if misfit or (manifest.attempt, manifest.step, manifest.steps) != (made.attempt, made.step, made.steps):
            raise IntegrityError(misfit or f"its manifest tells of attempt {manifest.attempt}, step {manifest.step}")

    def _answer(self, made: Checkpoint) -> None:
        kept = CheckpointKept(self._leader.state.epoch, made.assignment, made.key, made.step)
        with contextlib.suppress(FlowmeshError):
            self._leader.bus.post(subjects.node_control(made.node), encode(kept))
            self._leader.bus.push()

    async def _purge(self, subject: str, below_seq: int) -> None:
        """Remove pointers below a sequence that this leader wrote or read: those of a later leader stand above it."""
        with contextlib.suppress(TransientError):
            await self._leader.bus.purge(subjects.ASSIGN, subject, below_seq=below_seq)

    # --- removing

    def drop(self, key: bytes) -> None:
        """Remove an operator's pointer and checkpoint: it has ended."""
        self._offered.pop(key, None)
        known = self._pointers.pop(key, None)
        if known is not None:
            self._spawn(self._drop(*known))

    async def _drop(self, made: Checkpoint, sequence: int) -> None:
        await self._purge(subjects.assign_checkpoint(made.key.hex()), sequence + 1)
        await self._remove([made])

    async def _remove(self, goners: Iterable[Checkpoint]) -> None:
        """Remove checkpoints from the hub, but not what others share with them."""
        async with self._nothing_fetched():
            keep = self._wanted_roots()
            gone = [made for made in goners if made.at.cid not in keep]
            pairs = [(made.at.cid, _owner(made.key)) for made in gone]
            await asyncio.to_thread(self._remove_now, pairs, keep, sum(made.at.size for made in gone))

    async def _remove_left(self) -> None:
        """Remove what earlier leaders fetched to this hub and nobody points to."""
        async with self._nothing_fetched():
            keep = self._wanted_roots()
            pins = await asyncio.to_thread(self._leader.hub.store.all_pins)
            left = [(pin.root, pin.owner) for pin in pins if pin.owner.startswith(f"{PIN}:") and pin.root not in keep]
            await asyncio.to_thread(self._remove_now, left, keep, 0)

    def _wanted_roots(self) -> set[bytes]:
        standing = {made.at.cid for made, _ in self._pointers.values()}
        return standing | {made.at.cid for made in (*self._taking.values(), *self._offered.values()) if made is not None}

    def _remove_now(self, goners: list[tuple[bytes, str]], keep: set[bytes], size_bytes: int) -> None:
        store = self._leader.hub.store
        for root, owner in goners:
            store.unpin(root, owner)
        if goners:
            remove_dags(store, [root for root, _ in goners], keep)
        self._removed_bytes += size_bytes
        if self._removed_bytes >= COMPACT_BYTES:
            self._removed_bytes = 0
            give_back_space(store)

    @asynccontextmanager
    async def _nothing_fetched(self) -> AsyncIterator[None]:
        """Keep fetches out: one that finds a block here must find it still when it is done."""
        async with self._removing:
            for _ in range(FETCHES):
                await self._slots.acquire()
            try:
                yield
            finally:
                for _ in range(FETCHES):
                    self._slots.release()


def _owner(key: bytes) -> str:
    return f"{PIN}:{key.hex()}"
