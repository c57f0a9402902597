"""What operators read: fetched from who holds it, verified, and laid out as bytes or read-only files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flowmesh_cas import dag, unixfs
from flowmesh_cas.cid import RAW, codec_of
from flowmesh_cas.errors import NotFoundError, TransientError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import content, subjects, transfer
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import Located
from flowmesh_node.operators.base import Input

log = logging.getLogger("flowmesh.node")

_NO_ROOM = ("No space left on device", "disk is full", "Disk quota exceeded")

SMALL_BYTES = 64 * 1024
FETCH_DEADLINE_S = 120.0
PARALLEL_FETCHES = 8
_REMEMBERED_ROOTS = 200_000


class Inputs:
    """Brings content to this node and lays it out for executors."""

    def __init__(self, bus: Bus, store: BlockStore, node: str, cache: Cache) -> None:
        self._bus = bus
        self._store = store
        self._node = node
        self.cache = cache
        self._here: OrderedDict[bytes, None] = OrderedDict()
        self._fetching: dict[bytes, asyncio.Task[int]] = {}
        self._gate = asyncio.Semaphore(PARALLEL_FETCHES)

    def note_here(self, cids: Iterable[bytes]) -> None:
        """Remember roots that are known to be complete in the local store."""
        for cid in cids:
            self._here[cid] = None
        while len(self._here) > _REMEMBERED_ROOTS:
            self._here.popitem(last=False)

    def note_gone(self, cids: Iterable[bytes]) -> None:
        """Forget roots whose content turned out damaged or gone: they are fetched anew."""
        for cid in cids:
            self._here.pop(cid, None)

    def lacks(self, located: Iterable[Located]) -> dict[bytes, Located]:
        """Return what is not known to be here, by root CID."""
        return {each.ref.cid: each for each in located if each.ref.cid not in self._here}

    async def bring(self, wanted: dict[bytes, Located]) -> tuple[set[bytes], int]:
        """Fetch what the store lacks. Return the roots that nobody could give, and the bytes fetched."""
        absent = await asyncio.to_thread(self._absent, list(wanted))
        others = [self._fetching[cid] for cid in absent if cid in self._fetching]
        mine = [cid for cid in absent if cid not in self._fetching]
        fetched = 0
        if mine:
            task = asyncio.create_task(self._fetch([wanted[cid] for cid in mine]))
            self._fetching |= dict.fromkeys(mine, task)
            task.add_done_callback(lambda _: [self._fetching.pop(cid, None) for cid in mine])
            # Whoever else wants one of these waits for the same transfer: it must not end with this assignment.
            fetched = await asyncio.shield(task)
        if others:
            await asyncio.wait(others)
        missing = set(await asyncio.to_thread(self._absent, absent)) if absent else set()
        self.note_here(cid for cid in wanted if cid not in missing)
        return missing, fetched

    async def _fetch(self, located: list[Located]) -> int:
        """Pull several DAGs; what nobody could give is simply not here afterwards."""
        others = (self._node, subjects.HUB)
        wanted = {each.ref.cid: [*(name for name in each.holders if name not in others), subjects.HUB] for each in located}
        async with self._gate:
            try:
                return await transfer.fetch_many(self._bus, self._store, wanted, deadline_s=FETCH_DEADLINE_S)
            except (NotFoundError, TransientError) as error:
                if any(words in error.message for words in _NO_ROOM):
                    raise  # that is this node's trouble: holders have them, and another node may take them
                log.warning("inputs are missing: %s", error.message)
                return 0

    def _absent(self, roots: list[bytes]) -> list[bytes]:
        leaves = [cid for cid in roots if codec_of(cid) == RAW]
        absent = [cid for cid, has in zip(leaves, self._store.has_many(leaves), strict=True) if not has]
        return absent + [cid for cid in roots if codec_of(cid) != RAW and dag.missing(self._store, cid)]

    async def lay_out(self, ref: Ref) -> Input:
        """Return content that is here as an executor's input; raise IntegrityError when it is not what the digest names."""
        return await asyncio.to_thread(self._lay_out, ref)

    async def lay_out_folder(self, cid: bytes) -> Path:
        """Return a read-only folder with the content of a root that is here; its CID alone vouches for it."""

        def write(target: Path) -> None:
            unixfs.export(self._store, cid, target)

        return await asyncio.to_thread(self.cache.path_of, f"{cid.hex()}.model", write)

    def _lay_out(self, ref: Ref) -> Input:
        if ref.kind != "folder" and ref.size <= SMALL_BYTES:
            return Input(ref.kind, ref.digest.hex(), ref.size, ref.rows, data=content.read_bytes(self._store, ref))
        path = self.cache.path_of(name_of(ref), lambda target: content.export(self._store, ref, target))
        return Input(ref.kind, ref.digest.hex(), ref.size, ref.rows, path=str(path))


class Cache:
    """Read-only copies of contents as files and folders, by digest; the least recently used go when it grows too large.

    ``holding`` keeps what it names from going. Safe to use from several threads.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._held: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            if left.name.startswith("."):
                _remove(left)
            else:
                self._sizes[left.name] = _size_bytes(left)

    @contextlib.contextmanager
    def holding(self, refs: Iterable[Ref]) -> Iterator[None]:
        """Keep these contents in the cache while the block runs."""
        names = [name_of(ref) for ref in refs]
        with self._lock:
            for name in names:
                self._held[name] = self._held.get(name, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                for name in names:
                    self._held[name] -= 1
                    if not self._held[name]:
                        del self._held[name]

    def path_of(self, name: str, write: Callable[[Path], None]) -> Path:
        """Return the read-only file or folder of this name; ``write`` makes it, and verifies, when it is not there yet."""
        target = self._folder / name
        with self._lock:
            making = self._making.setdefault(name, threading.Lock())
        with making:
            if not target.exists():
                self._make(target, write)
        with self._lock:
            self._making.pop(name, None)
            if name not in self._sizes:
                self._sizes[name] = _size_bytes(target)
            self._sizes.move_to_end(name)
        self._trim()
        return target

    def _make(self, target: Path, write: Callable[[Path], None]) -> None:
        partial = self._folder / f".{uuid.uuid4().hex}"
        try:
            write(partial)
            _make_read_only(partial)
            partial.rename(target)
        finally:
            if partial.exists():
                _remove(partial)

    def _trim(self) -> None:
        with self._lock:
            excess = sum(self._sizes.values()) - self._limit_bytes
            goners = []
            for name in list(self._sizes):
                if excess <= 0:
                    break
                if name not in self._held:
                    excess -= self._sizes.pop(name)
                    goners.append(name)
        for name in goners:
            _remove(self._folder / name)


def name_of(ref: Ref) -> str:
    """Return what the copy of a content is called."""
    return f"{ref.digest.hex()}.{ref.kind}"


def _make_read_only(path: Path) -> None:
    if path.is_dir():
        for each in path.rglob("*"):
            each.chmod(0o555 if each.is_dir() else 0o444)
        path.chmod(0o755)  # the rename below needs to write to it on some file systems
    else:
        path.chmod(0o444)


def _size_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return path.stat().st_size


def _remove(path: Path) -> None:
    if not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
        return
    for each in path.rglob("*"):
        if each.is_dir() and not each.is_symlink():
            with contextlib.suppress(OSError):
                os.chmod(each, 0o755)
    shutil.rmtree(path, ignore_errors=True)
