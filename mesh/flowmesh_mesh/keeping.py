"""Keeping acceptances for the mesh: on every node, and on every scheduler that stands by.

What is kept of a run is its sealed acceptance, in a file, and pins on the contents that its manifest needs. A keeper can neither
forge an acceptance nor use one; it gives them back to a leader that asks (docs/recovery.md).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import msgspec

from flowmesh_cas.errors import FlowmeshError, UsageError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import tasks
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.manifest import Acceptance, decode_record
from flowmesh_mesh.messages import Guard, Guarded, Recall, Recalled, Sealed, Unguard, decode, encode
from flowmesh_mesh.transfer import Requester, fetch_many

log = logging.getLogger("flowmesh.keeping")

Pair = tuple[str, str]
"""Tenant and run."""

KEPT_S = 14 * 24 * 3600
"""An acceptance that no leader has asked to keep for so long is let go: its run ended while its keeper was away."""

RENEWED_S = 24 * 3600
"""Age from which a repeated Guard renews what is kept; before, it costs nothing."""

CONTENTS_S = 3600
"""How long contents are pinned whose run is not accepted yet."""

FETCH_DEADLINE_S = 300.0
PAGE_BYTES = 512 * 1024
PAGE_RUNS = 4096
SUFFIX = ".sealed"


class Told(Protocol):
    """A message of the leader, which may be answered."""

    @property
    def reply(self) -> str: ...
    def post_respond(self, data: bytes) -> None: ...


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """One file: an acceptance, its seal, the roots pinned for it, and when it was last asked for."""

    acceptance: bytes
    seal: bytes
    roots: tuple[bytes, ...] = ()
    guarded_at_us: int = 0


def pair_of(acceptance: bytes) -> Pair:
    """Return tenant and run of an encoded acceptance; raise IntegrityError for anything else."""
    record = decode_record(acceptance, Acceptance)
    return record.tenant, record.run


def owner_of(pair: Pair) -> str:
    """Return the name of the pins that keep what a run needs."""
    return f"guard-{pair[0]}-{pair[1]}"


class Shelf:
    """A folder with one file per kept acceptance. All methods block: call them from a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, pair: Pair) -> Path:
        return self._folder / (sha256(f"{pair[0]}\0{pair[1]}".encode()).hexdigest()[:40] + SUFFIX)

    def write(self, entries: Iterable[tuple[Pair, Kept]]) -> None:
        """Keep acceptances; they are on disk when this returns, with one sync of the folder for all."""
        for pair, kept in entries:
            path = self._path(pair)
            temporary = path.with_suffix(".part")
            with temporary.open("wb") as file:
                file.write(encode(kept))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, pair: Pair) -> Kept | None:
        """Return what is kept of a run; what cannot be read is no longer kept."""
        path = self._path(pair)
        try:
            return decode(path.read_bytes(), Kept)
        except FileNotFoundError:
            return None
        except (OSError, UsageError) as error:
            log.warning("a kept acceptance of run %s cannot be read: %s", pair[1], error)
            path.unlink(missing_ok=True)
            return None

    def drop(self, pairs: Iterable[Pair]) -> None:
        """Forget runs."""
        for pair in pairs:
            self._path(pair).unlink(missing_ok=True)

    def read_all(self) -> dict[Pair, Kept]:
        """Return everything that is kept; files that cannot be read are removed."""
        found: dict[Pair, Kept] = {}
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                kept = decode(path.read_bytes(), Kept)
                found[pair_of(kept.acceptance)] = kept
            except (OSError, FlowmeshError) as error:
                log.warning("%s cannot be read: %s", path.name, error)
                path.unlink(missing_ok=True)
        return found


class Keeper:
    """Does what a leader asks of one holder: guard, let go, tell.

    ``bus`` fetches; ``holder`` is the name under which ``store`` is given to others; ``is_current`` tells whether an epoch is
    that of the highest leader seen. Call :meth:`restore` (it blocks) before anything else.
    """

    def __init__(
        self, bus: Requester, store: BlockStore, holder: str, folder: Path, is_current: Callable[[int], bool] = lambda _: True
    ) -> None:
        self.holder = holder
        self.bus = bus
        self._store = store
        self._shelf = Shelf(folder)
        self._is_current = is_current
        self._guarded_at_us: dict[Pair, int] = {}
        self._busy = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def runs(self) -> tuple[Pair, ...]:
        """Return the runs whose acceptances are kept here."""
        return tuple(self._guarded_at_us)

    def restore(self) -> None:
        """Take up what an earlier life of this process kept; let go what nobody has asked for in a long time."""
        oldest_us = now_us() - KEPT_S * 1_000_000
        for pair, kept in self._shelf.read_all().items():
            if kept.guarded_at_us < oldest_us:
                self._forget([pair])
            else:
                self._guarded_at_us[pair] = kept.guarded_at_us

    def kept(self) -> dict[Pair, Kept]:
        """Return everything that is kept here. Blocks."""
        return self._shelf.read_all()

    def receive(self, message: Guard | Unguard | Recall, told: Told) -> None:
        """Take a message of the leader; the answer follows when its work is done."""
        if not isinstance(message, Recall) and not self._is_current(message.epoch):
            log.info("refused a %s of epoch %d", type(message).__name__, message.epoch)
            return
        task = asyncio.get_running_loop().create_task(self._do(message, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def forget(self, pairs: Iterable[Pair]) -> None:
        """Let runs go."""
        async with self._busy:
            await asyncio.to_thread(self._forget, list(pairs))

    async def close(self) -> None:
        """Stop what is under way."""
        await tasks.end(self._tasks)

    async def _do(self, message: Guard | Unguard | Recall, told: Told) -> None:
        answer: Guarded | Recalled | None = None
        try:
            if isinstance(message, Guard):
                answer = await self._guard(message)
            elif isinstance(message, Recall):
                answer = await asyncio.to_thread(self.recalled, message)
            else:
                await self.forget(pair for pair in message.runs if pair in self._guarded_at_us)
        except (FlowmeshError, OSError) as error:
            log.warning("cannot keep what the leader asked for: %s", error)
            answer = Guarded(self.holder, f"{type(error).__name__}: {error}") if isinstance(message, Guard) else None
        if answer is not None and told.reply:
            told.post_respond(encode(answer))

    # --- keeping

    async def _guard(self, message: Guard) -> Guarded:
        if not message.acceptance:
            return await self._hold_contents(message)
        entries = [Sealed(message.acceptance, message.seal, message.roots), *message.others]
        fresh, kept_already = self._sort(entries)
        errors: list[str] = []
        whole: list[tuple[Pair, Sealed]] = []
        for pair, entry in fresh:
            try:
                await self._fetch(entry.roots, message.holders)
                whole.append((pair, entry))
            except FlowmeshError as error:
                errors.append(f"run {pair[1]}: {error.message}")
        async with self._busy:
            await asyncio.to_thread(self._keep, whole)
        runs = (*kept_already, *(pair for pair, _ in whole))
        return Guarded(self.holder, "; ".join(errors[:3]), runs if errors else ())

    def _sort(self, entries: Iterable[Sealed]) -> tuple[list[tuple[Pair, Sealed]], list[Pair]]:
        """Return what is to be kept anew, and the runs that were renewed lately."""
        renewed_us = now_us() - RENEWED_S * 1_000_000
        fresh: list[tuple[Pair, Sealed]] = []
        known: list[Pair] = []
        for entry in entries:
            pair = pair_of(entry.acceptance)
            if self._guarded_at_us.get(pair, 0) > renewed_us:
                known.append(pair)
            else:
                fresh.append((pair, entry))
        return fresh, known

    async def _fetch(self, roots: tuple[bytes, ...], holders: tuple[str, ...]) -> None:
        sources = [name for name in holders if name != self.holder]
        if roots:
            await fetch_many(self.bus, self._store, dict.fromkeys(roots, sources), deadline_s=FETCH_DEADLINE_S)

    async def _hold_contents(self, message: Guard) -> Guarded:
        expires_at_us = now_us() + CONTENTS_S * 1_000_000
        await asyncio.to_thread(self._store.pin_many, message.roots, "guard", expires_at_us)
        await self._fetch(message.roots, message.holders)
        return Guarded(self.holder)

    def _keep(self, entries: list[tuple[Pair, Sealed]]) -> None:
        at_us = now_us()
        for pair, entry in entries:
            if entry.roots:
                self._store.pin_many(entry.roots, owner_of(pair), at_us + KEPT_S * 1_000_000)
        self._shelf.write((pair, Kept(entry.acceptance, entry.seal, entry.roots, at_us)) for pair, entry in entries)
        for pair, _ in entries:
            self._guarded_at_us[pair] = at_us

    def _forget(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            kept = self._shelf.read(pair)
            for root in kept.roots if kept is not None else ():
                self._store.unpin(root, owner_of(pair))
        self._shelf.drop(pairs)
        for pair in pairs:
            self._guarded_at_us.pop(pair, None)

    # --- telling

    def recalled(self, question: Recall) -> Recalled:
        """Return one page of what is kept. Blocks."""
        pairs = sorted(self._guarded_at_us)
        start = max(0, question.cursor)
        if question.what == "runs":
            page = tuple(pairs[start : start + PAGE_RUNS])
            following = start + len(page)
            return Recalled(self.holder, cursor=following if following < len(pairs) else -1, runs=page)
        acceptances: list[tuple[bytes, bytes]] = []
        size = 0
        for position in range(start, len(pairs)):
            kept = self._shelf.read(pairs[position])
            if kept is None:
                continue
            if acceptances and size + len(kept.acceptance) > PAGE_BYTES:
                return Recalled(self.holder, tuple(acceptances), position)
            size += len(kept.acceptance) + len(kept.seal)
            acceptances.append((kept.acceptance, kept.seal))
        return Recalled(self.holder, tuple(acceptances), -1)
