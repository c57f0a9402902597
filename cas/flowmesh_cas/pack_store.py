"""The store on disk: append-only packs, and a SQLite index that says where each block lies.

Write order: blocks into a pack, fdatasync, commit of the index (synced too). A crash at any point leaves either the block
or nothing: what the index does not name is overwritten by the next writer. Any number of processes may open one store,
to read and to write; each writes to a pack of its own.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from flowmesh_cas import pack
from flowmesh_cas.cid import cid_of, cid_text, codec_of
from flowmesh_cas.dag import reachable
from flowmesh_cas.errors import FlowmeshError, IntegrityError, NotFoundError, TransientError, UsageError
from flowmesh_cas.pack import PACK_MAX_BYTES, PackReader, PackWriter
from flowmesh_cas.pack_index import Extent, PackIndex
from flowmesh_cas.store import Block, BlockStore, Pin, Swept, absent, check_block

BATCH_BYTES = 16 * 1024 * 1024
"""After so many bytes a batch is synced and committed; a crash costs at most one batch per writer."""
BATCH_BLOCKS = 65_536
COMPACT_BELOW = 0.5
"""A pack is rewritten when less than this share of it is in use."""


class PackStore(BlockStore):
    """Blocks on disk under one folder. With ``sync=False`` they survive a kill, but not a power loss."""

    def __init__(self, path: Path | str, sync: bool = True) -> None:
        self._path = Path(path)
        self._sync = sync
        self._packs = self._path / "packs"
        try:
            self._packs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make a store at {path}: {error.strerror}", hint="Name a folder that you may write to."
            ) from error
        self._index = PackIndex(self._path / "index.db", sync=sync)
        if self._index.is_new():
            self._index.create((int(file.stem), pack.scan(file)) for file in sorted(self._packs.glob("*.pack")))
        self._write_lock = threading.RLock()
        self._writer: PackWriter | None = None
        self._readers: dict[int, PackReader] = {}

    # --- blocks

    def get(self, cid: bytes) -> bytes:
        found = self._index.find((cid,))
        extent = found.get(cid)
        if extent is None:
            codec_of(cid)
            raise absent(cid)
        return self._read(cid, extent)

    def get_many(self, cids: Sequence[bytes]) -> list[bytes | None]:
        found = self._index.find(cids)
        return [self._read_or_none(cid, found.get(cid)) for cid in cids]

    def has_many(self, cids: Sequence[bytes]) -> list[bool]:
        found = self._index.find(cids) if cids else {}
        return [cid in found for cid in cids]

    def put_many(self, blocks: Iterable[Block]) -> None:
        batch: dict[bytes, bytes] = {}
        size = 0
        for cid, block in blocks:
            check_block(cid, block)
            batch[cid] = block
            size += len(block)
            if size >= BATCH_BYTES or len(batch) >= BATCH_BLOCKS:
                self._write(batch)
                batch, size = {}, 0
        if batch:
            self._write(batch)

    def delete_many(self, cids: Iterable[bytes]) -> None:
        if held := list(self._index.find(list(cids))):
            self._index.remove(held)

    def cids(self) -> Iterator[bytes]:
        return iter(self._index.cids())

    # --- pins and sweep

    def pin_many(self, roots: Iterable[bytes], owner: str, expires_at_us: int | None = None) -> None:
        checked = list(roots)
        for root in checked:
            codec_of(root)
        if checked:
            self._index.pin(checked, owner, expires_at_us)

    def unpin(self, root: bytes, owner: str) -> None:
        self._index.unpin(root, owner)

    def all_pins(self) -> list[Pin]:
        return self._index.pins()

    def pins(self, root: bytes) -> list[Pin]:
        return self._index.pins_on(root)

    def sweep(self, now_us: int, grace_us: int) -> Swept:
        expired = self._index.expire_pins(now_us)
        rows = self._index.condemned()
        roots = {pin.root for pin in self._index.pins()}
        live = reachable(self, roots)
        self._index.condemn([cid for cid, _, since_us in rows if cid not in live and since_us is None], now_us)
        doomed = [
            (cid, now_us if since_us is None else since_us, size)
            for cid, size, since_us in rows
            if cid not in live and now_us - (now_us if since_us is None else since_us) >= grace_us
        ]
        removed, removed_bytes = self._reap(doomed, roots, live)
        self.compact()
        waiting = len(rows) - len(live) - removed
        return Swept(len(live), max(waiting, 0), removed, removed_bytes, expired)

    def compact(self) -> None:
        """Rewrite packs of which little is in use, and remove empty ones; those that others write to are left alone."""
        with self._write_lock:
            for usage in self._index.usage():
                used = usage.live_bytes + usage.live_blocks * pack.HEADER.size
                if used < usage.end_bytes * COMPACT_BELOW:
                    self._rewrite(usage.number)

    def close(self) -> None:
        with self._write_lock:
            self._release()
            self._readers.clear()
            self._index.close()

    # --- reading

    def _read_or_none(self, cid: bytes, extent: Extent | None) -> bytes | None:
        if extent is None:
            return None
        try:
            return self._read(cid, extent)
        except (NotFoundError, IntegrityError):
            return None

    def _read(self, cid: bytes, extent: Extent) -> bytes:
        """Return the verified block; when it is not there, look once more where it lies by now, then drop it."""
        while True:
            block = self._read_extent(extent)
            if len(block) == extent.size and cid_of(codec_of(cid), block) == cid:
                return block
            # Another process may have moved it, and removed the pack, since we looked.
            self._readers.pop(extent.pack, None)
            now = self._index.find((cid,)).get(cid)
            if now is None:
                raise absent(cid)
            if now == extent and self._read_extent(extent) != block:
                continue
            if now == extent:
                with suppress(FlowmeshError):
                    self._index.drop(cid, extent)
                raise IntegrityError(
                    f"block {cid_text(cid)} went bad on disk and was dropped", hint="Fetch it from another holder."
                )
            extent = now

    def _read_extent(self, extent: Extent) -> bytes:
        try:
            reader = self._readers.get(extent.pack)
            if reader is None:
                reader = self._readers[extent.pack] = PackReader(self._pack_path(extent.pack))
            return reader.read(extent.start, extent.size)
        except OSError as error:
            # Only these two say something about the block; out of file descriptors, for one, does not.
            if error.errno in (errno.ENOENT, errno.EIO):
                return b""
            raise TransientError(f"cannot read pack {extent.pack}: {error.strerror}", hint="Try again.") from error

    # --- writing

    def _write(self, batch: dict[bytes, bytes]) -> None:
        with self._write_lock:
            found = self._index.find(list(batch))
            blocks = [(cid, block) for cid, block in batch.items() if cid not in found]
            if not blocks:
                return
            writer = self._open_writer()
            starts, end = writer.append(blocks, sync=self._sync)
            extents = [(cid, start, len(block)) for (cid, block), start in zip(blocks, starts, strict=True)]
            self._index.add(writer.number, end, extents)
            writer.end = end

    def _open_writer(self) -> PackWriter:
        """Return the pack to write to: ours, or one that nobody writes to, or a new one."""
        if self._writer is not None and self._writer.end >= PACK_MAX_BYTES:
            self._release()
        if self._writer is None:
            self._writer = self._adopt() or self._create()
        return self._writer

    def _adopt(self) -> PackWriter | None:
        for number, _ in self._index.packs(PACK_MAX_BYTES):
            writer = PackWriter.open(number, self._pack_path(number), 0)
            if writer is None:
                continue
            # Only now, under the lock, does the end stand still.
            end = self._index.pack_end(number)
            if end is not None:
                writer.end = end
                return writer
            writer.close()
        return None

    def _create(self) -> PackWriter:
        number = self._index.new_pack()
        path = self._pack_path(number)
        pack.create(path)
        writer = PackWriter.open(number, path, 0)
        return writer if writer is not None else self._create()

    def _release(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _pack_path(self, number: int) -> Path:
        return self._packs / f"{number:08d}.pack"

    # --- removing

    def _reap(self, doomed: Sequence[tuple[bytes, int, int]], roots: set[bytes], live: set[bytes]) -> tuple[int, int]:
        """Remove what is still condemned and under no pin; return how many blocks and bytes."""
        removed = removed_bytes = 0
        with self._index.transaction() as connection:
            # Pins made since the mark keep what lies under them.
            live = live | reachable(self, {pin.root for pin in self._index.pins()} - roots)
            for cid, since_us, size in doomed:
                if cid not in live:
                    gone = connection.execute("DELETE FROM extent WHERE cid = ? AND condemned_us = ?", (cid, since_us)).rowcount
                    removed += gone
                    removed_bytes += gone * size
        return removed, removed_bytes

    def _rewrite(self, number: int) -> None:
        """Move what is in use to the pack that we write to, then remove the old pack."""
        if self._writer is not None and self._writer.number == number:
            self._release()
        old = PackWriter.open(number, self._pack_path(number), 0)
        if old is None:
            return
        try:
            for group in _groups(self._index.extents_in(number)):
                self._move(group)
            self._index.forget_pack(number)
            self._readers.pop(number, None)
            old.path.unlink()
        finally:
            old.close()

    def _move(self, group: Sequence[tuple[bytes, Extent]]) -> None:
        held = [(cid, extent, self._read_or_none(cid, extent)) for cid, extent in group]
        kept = [(cid, extent, block) for cid, extent, block in held if block is not None]
        if kept:
            writer = self._open_writer()
            starts, end = writer.append([(cid, block) for cid, _, block in kept], sync=self._sync)
            self._index.move(
                writer.number, end, [(cid, extent, start) for (cid, extent, _), start in zip(kept, starts, strict=True)]
            )
            writer.end = end


def _groups(extents: Sequence[tuple[bytes, Extent]]) -> Iterator[list[tuple[bytes, Extent]]]:
    """Cut a list of extents into groups of at most BATCH_BYTES."""
    group: list[tuple[bytes, Extent]] = []
    size = 0
    for cid, extent in extents:
        group.append((cid, extent))
        size += extent.size
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
