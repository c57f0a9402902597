"""Pack files: blocks one after another, each behind a header that names it, so that a lost index can be rebuilt.

A pack has one writer at a time, in any process: whoever holds the lock on the file. Readers need no lock, they
read only what the index has committed, and that never changes while the pack exists.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from flowmesh_cas.cid import cid_of, codec_of
from flowmesh_cas.errors import TransientError, UsageError
from flowmesh_cas.store import BLOCK_MAX_BYTES, Block

PACK_MAX_BYTES = 1 << 30
"""A pack that has reached this size gets no more blocks."""

HEADER = struct.Struct(">36sI")
"""CID and length of the block that follows."""


class PackReader:
    """A pack opened for reading; closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``start``."""
        return os.pread(self._fd, size, start)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class PackWriter:
    """The one writer of a pack. ``end`` is where the committed blocks end, in bytes; what lies behind is void."""

    def __init__(self, number: int, path: Path, fd: int, end: int) -> None:
        self.number = number
        self.path = path
        self.end = end
        self._fd = fd

    @classmethod
    def open(cls, number: int, path: Path, end: int) -> Self | None:
        """Return the writer of an existing pack, None when it has another one or is gone."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been removed between opening and locking.
            if os.fstat(fd).st_ino != path.stat().st_ino:
                raise FileNotFoundError(path)
        except (BlockingIOError, FileNotFoundError):
            os.close(fd)
            return None
        return cls(number, path, fd, end)

    def append(self, blocks: Sequence[Block], *, sync: bool) -> tuple[list[int], int]:
        """Write blocks behind the end, synced to disk; return where each starts and the new end.

        The end moves only when the caller sets it, after the index has committed. Raises TransientError when the disk is full.
        """
        starts: list[int] = []
        pieces: list[bytes] = []
        at = self.end
        for cid, block in blocks:
            at += HEADER.size
            starts.append(at)
            pieces += (HEADER.pack(cid, len(block)), block)
            at += len(block)
        try:
            self._write(b"".join(pieces))
            if sync:
                os.fdatasync(self._fd)
        except OSError as error:
            raise TransientError(
                f"cannot write to {self.path}: {error.strerror}", hint="Free space on its disk, or sweep the store."
            ) from error
        return starts, at

    def close(self) -> None:
        """Let another writer in."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes) -> None:
        view, at = memoryview(data), self.end
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written


def create(path: Path) -> None:
    """Make an empty pack whose name survives a power loss."""
    path.touch(exist_ok=False)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def scan(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield (CID, start, size in bytes) of every block of a pack that verifies; stop at the torn end."""
    with path.open("rb") as file:
        at = 0
        while len(header := file.read(HEADER.size)) == HEADER.size:
            cid, size = HEADER.unpack(header)
            block = file.read(size) if size <= BLOCK_MAX_BYTES else b""
            try:
                codec = codec_of(cid)
            except UsageError:
                return
            if len(block) < size:
                return
            at += HEADER.size
            if cid_of(codec, block) == cid:
                yield cid, at, size
            at += size
