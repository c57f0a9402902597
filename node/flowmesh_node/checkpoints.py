"""Checkpoints of what trains here: put into the store, offered until the mesh holds them, then the earlier ones removed.

Only the newest of a training is offered: a broker that is away for an hour leaves one to send, not hundreds. A checkpoint that
the mesh holds stays here too until a newer one does, because the next attempt may come to this very node.
"""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import FlowmeshError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import content, subjects, tasks
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.checkpoints import PIN, give_back_space, remove_dags
from flowmesh_mesh.clock import monotonic_s
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import Assignment, Checkpoint, CheckpointKept, Item, encode
from flowmesh_node import frames

log = logging.getLogger("flowmesh.node")

OFFER_AGAIN_S = 1.0
OFFER_AGAIN_MAX_S = 15.0
COMPACT_BYTES = 64 * 1024 * 1024
"""After so much was removed the store is asked to give its space back."""

NoteKept = Callable[[float], None]


@dataclass(slots=True)
class _Training:
    """One training: its newest checkpoint, as offered, the one that the mesh holds, and one that is still a folder."""

    assignment: Assignment
    item: Item
    note_kept: NoteKept
    newest: Checkpoint | None = None
    made_at_s: float = 0.0
    offers: int = 0
    next_offer_at_s: float = 0.0
    kept: Checkpoint | None = None
    waiting: frames.Checkpointed | None = None
    storing: asyncio.Task[None] | None = None

    def roots(self) -> list[bytes]:
        """Return the roots of what is wanted of it."""
        return [each.at.cid for each in (self.newest, self.kept) if each is not None]


@dataclass(slots=True)
class Checkpoints:
    """All trainings of this node, by assignment and operator key."""

    bus: Bus
    store: BlockStore
    node: str
    note_here: Callable[[list[bytes]], None]
    _trainings: dict[tuple[str, bytes], _Training] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _removed_bytes: int = 0

    @property
    def unconfirmed(self) -> int:
        """Return how many trainings have a newer checkpoint than the mesh holds."""
        return sum(each.newest is not None or each.storing is not None for each in self._trainings.values())

    def take(self, assignment: Assignment, item: Item, frame: frames.Checkpointed, note_kept: NoteKept) -> None:
        """Take over the folder that a training has written; never waits. One that a newer overtakes is not even stored."""
        training = self._trainings.setdefault((assignment.id, item.key), _Training(assignment, item, note_kept))
        if training.waiting is not None:
            self._spawn(asyncio.to_thread(shutil.rmtree, training.waiting.path, True))
        training.waiting = frame
        if training.storing is None:
            training.storing = self._spawn(self._store_waiting(training))

    async def _store_waiting(self, training: _Training) -> None:
        try:
            while (frame := training.waiting) is not None:
                training.waiting, made_at_s = None, monotonic_s()
                try:
                    await self._store(training, frame, made_at_s)
                except (FlowmeshError, OSError) as error:
                    log.warning("checkpoint of step %d is lost: %s", frame.step, error)
        finally:
            training.storing = None

    async def _store(self, training: _Training, frame: frames.Checkpointed, made_at_s: float) -> None:
        async with self._changing:
            at = await asyncio.to_thread(self._put, Path(frame.path))
            self.note_here([at.cid])
            overtaken, training.newest = training.newest, self._checkpoint(training, frame, at)
            training.made_at_s, training.offers = made_at_s, 0
            if (training.assignment.id, training.item.key) not in self._trainings:  # closed meanwhile
                training.newest, overtaken = None, training.newest
            await self._remove(overtaken)
        if training.newest is not None:
            self._offer(training)

    def _put(self, path: Path) -> Ref:
        at = content.put_folder(self.store, path)
        self.store.pin(at.cid, PIN)
        shutil.rmtree(path, ignore_errors=True)
        return at

    def _checkpoint(self, training: _Training, frame: frames.Checkpointed, at: Ref) -> Checkpoint:
        assignment, item = training.assignment, training.item
        return Checkpoint(
            self.node,
            assignment.id,
            assignment.epoch,
            item.key,
            item.generation,
            item.attempt,
            frame.step,
            frame.steps,
            at,
            frame.stall_us,
        )

    # --- offering

    def _offer(self, training: _Training) -> None:
        training.offers += 1
        pause_s = min(OFFER_AGAIN_MAX_S, OFFER_AGAIN_S * 2 ** (training.offers - 1)) * random.uniform(0.8, 1.2)
        training.next_offer_at_s = monotonic_s() + pause_s
        if training.newest is not None and self.bus.connected:
            try:
                self.bus.post(subjects.node_checkpoint(self.node), encode(training.newest))
                self.bus.push()
            except FlowmeshError as error:
                log.info("a checkpoint is not offered yet: %s", error)

    def offer_all(self) -> None:
        """Offer what the mesh does not hold yet, now: the connection is new, or the leader is."""
        for training in self._trainings.values():
            if training.newest is not None:
                self._offer(training)

    async def watch(self) -> None:
        """Offer again what is due, for ever. What an earlier life of this node has left goes first."""
        await self._remove_left()
        while True:
            await asyncio.sleep(0.25)
            now_s = monotonic_s()
            for training in self._trainings.values():
                if training.newest is not None and training.next_offer_at_s <= now_s:
                    self._offer(training)

    def kept(self, message: CheckpointKept) -> None:
        """The mesh holds a checkpoint: those before it may go."""
        training = self._trainings.get((message.assignment, message.key))
        newest = training.newest if training is not None else None
        if training is None or newest is None or newest.step != message.step:
            return
        training.note_kept(monotonic_s() - training.made_at_s)
        former, training.kept, training.newest = training.kept, newest, None
        self._spawn(self._remove_soon([former]))

    def close(self, assignment: str) -> None:
        """Forget an assignment that is settled, with its checkpoints."""
        closed = [pair for pair in self._trainings if pair[0] == assignment]
        ended = [self._trainings.pop(pair) for pair in closed]
        goners = [each for training in ended for each in (training.newest, training.kept)]
        if ended:
            self._spawn(self._remove_soon(goners))

    # --- removing

    async def _remove_soon(self, goners: list[Checkpoint | None]) -> None:
        async with self._changing:
            for each in goners:
                await self._remove(each)

    async def _remove(self, goner: Checkpoint | None) -> None:
        """Remove a checkpoint from the store, but not what others share with it. Nothing may be put meanwhile."""
        if goner is None:
            return
        keep = [root for training in self._trainings.values() for root in training.roots()]
        if goner.at.cid in keep:
            return
        await asyncio.to_thread(self._remove_now, goner.at, keep)

    def _remove_now(self, at: Ref, keep: list[bytes]) -> None:
        self.store.unpin(at.cid, PIN)
        remove_dags(self.store, [at.cid], keep)
        self._removed_bytes += at.size
        if self._removed_bytes >= COMPACT_BYTES:
            self._removed_bytes = 0
            give_back_space(self.store)

    async def _remove_left(self) -> None:
        async with self._changing:
            keep = [root for training in self._trainings.values() for root in training.roots()]
            await asyncio.to_thread(self._remove_left_now, keep)

    def _remove_left_now(self, keep: list[bytes]) -> None:
        left = [pin.root for pin in self.store.all_pins() if pin.owner == PIN and pin.root not in keep]
        for root in left:
            self.store.unpin(root, PIN)
        remove_dags(self.store, left, keep)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a checkpoint could not be looked after", exc_info=task.exception())

    async def settle(self) -> None:
        """End what is under way: the store is about to be closed."""
        await tasks.end(self._tasks)
