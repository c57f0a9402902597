"""The journal: what a scheduler's own folder remembers of the ledger, should the broker's store be lost.

A leader notes every entry once the ledger shows it, a scheduler that stands by reads the ledger and notes what it finds. Entries
are appended in memory and written once a second, with one sync: so the journal may lack the last second before a power failure of
its machine, and never holds an entry that the ledger did not. It carries no authority: a ledger that is there is right.

A folder of segments, each a run of frames: length, checksum, subject, sequence, record. A torn one counts up to its last whole
frame. Beyond the bound the oldest are cut down to what must not be forgotten: which runs ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from flowmesh_mesh import subjects

if TYPE_CHECKING:
    from flowmesh_mesh.bus import Bus

log = logging.getLogger("flowmesh.scheduler")

FOLDER = "journal"
SUFFIX = ".ledger"
SHORT_SUFFIX = ".ended"
FLUSH_S = 1.0
FLUSH_ENTRIES = 1000
SEGMENTS = 8
SHORT_KINDS = ("led.ended.", "led.cancelled.")
"""What is kept of a segment that is dropped for want of room: that a run ended must not be forgotten."""

_PREFIX_BYTES = 8
_CURSOR_STEP = 1 << 40
_FRAME_MAX_BYTES = 16 * 1024 * 1024


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """An entry of the ledger: where it stands, and what."""

    subject: str
    sequence: int
    record: bytes


_decoder = msgspec.msgpack.Decoder(Entry)
_encoder = msgspec.msgpack.Encoder()


class Journal:
    """Entries of the ledger in a folder of this scheduler; ``last_seq`` is the highest sequence that it holds."""

    def __init__(self, folder: Path, *, max_bytes: int = 1 << 30) -> None:
        self._folder = folder
        self._segment_bytes = max(1, max_bytes // SEGMENTS)
        self._waiting: list[Entry] = []
        self._file: BinaryIO | None = None
        self._size_bytes = 0
        self._flushing = asyncio.Lock()
        self.last_seq = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def note(self, subject: str, sequence: int, record: bytes) -> None:
        """Take an entry that the ledger shows; it is written within a moment."""
        self._waiting.append(Entry(subject, sequence, record))
        self.last_seq = max(self.last_seq, sequence)

    def segments(self) -> list[Path]:
        """Return the files of the journal, oldest first."""
        return sorted((path for path in self._folder.iterdir() if path.suffix in (SUFFIX, SHORT_SUFFIX)), key=_number)

    def entries(self) -> Iterator[Entry]:
        """Yield what is written, oldest first. Blocks."""
        for path in self.segments():
            for entry, _ in _read(path):
                yield entry

    def open(self) -> None:
        """Learn what is here. Blocks."""
        for path in reversed(self.segments()):
            self.last_seq = max((entry.sequence for entry, _ in _read(path)), default=0)
            if self.last_seq:
                return

    def page(self, cursor: int, max_bytes: int) -> tuple[list[Entry], int]:
        """Return written entries from ``cursor`` on, about ``max_bytes``, and the cursor of what follows; -1 at the end. Blocks.

        A cursor names a segment and a byte in it, so that reading on costs nothing; 0 is the beginning.
        """
        number, offset = divmod(cursor, _CURSOR_STEP)
        page: list[Entry] = []
        size = 0
        for path in self.segments():
            segment = _number(path)
            if segment < number:
                continue
            for entry, end in _read(path, offset if segment == number else 0):
                page.append(entry)
                size += len(entry.record) + len(entry.subject)
                if size >= max_bytes:
                    return page, segment * _CURSOR_STEP + end
        return page, -1

    async def flush(self) -> None:
        """Write what waits, and see it on the disk; what cannot be written is lost to the journal, not to the mesh."""
        async with self._flushing:
            waiting, self._waiting = self._waiting, []
            if not waiting:
                return
            try:
                await asyncio.to_thread(self._write, waiting)
            except OSError as error:
                log.error("the journal lacks %d entries: %s", len(waiting), error)

    async def run(self) -> None:
        """Write what waits once in a while, for ever."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def follow(self, bus: Bus, from_seq: int = 0) -> None:
        """Note what the ledger holds beyond what is noted, or from a sequence on: for who does not write it himself."""
        first = from_seq or self.last_seq + 1
        state = await bus.stream_state(subjects.LEDGER)
        if state is None or state.last_seq < first:
            return
        async for message in bus.read_stream(subjects.LEDGER, from_seq=first):
            if is_noted(message.subject):
                self.note(message.subject, message.seq, message.data)
            else:
                self.last_seq = max(self.last_seq, message.seq)
            if len(self._waiting) >= FLUSH_ENTRIES:
                await self.flush()
        await self.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, entries: list[Entry]) -> None:
        if self._file is None:
            self._open_segment()
        assert self._file is not None
        data = b"".join(_frame(entry) for entry in entries)
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._size_bytes += len(data)
        if self._size_bytes >= self._segment_bytes:
            self.close()
            self._make_room()

    def _open_segment(self) -> None:
        """Begin a segment of its own for each life: nothing is ever appended behind a torn end."""
        known = self.segments()
        number = _number(known[-1]) + 1 if known else 1
        self._file = (self._folder / f"{number:08d}{SUFFIX}").open("ab")
        self._size_bytes = 0

    def _make_room(self) -> None:
        """Beyond the bound, keep of the oldest segments only which runs ended; beyond it still, drop the oldest."""
        known = self.segments()
        sizes = {path: path.stat().st_size for path in known}
        limit = self._segment_bytes * SEGMENTS
        for path in known[:-1]:
            if sum(sizes.values()) > limit and path.name.endswith(SUFFIX):
                short = path.with_name(path.name.removesuffix(SUFFIX) + SHORT_SUFFIX)
                temporary = path.with_suffix(".part")
                temporary.write_bytes(b"".join(_frame(e) for e, _ in _read(path) if e.subject.startswith(SHORT_KINDS)))
                temporary.replace(short)
                path.unlink()
                sizes[path] = 0
                sizes[short] = short.stat().st_size
        for path in self.segments()[:-1]:
            if sum(sizes.values()) > limit:
                sizes[path] = 0
                path.unlink()


def is_noted(subject: str) -> bool:
    """Tell whether a journal keeps this kind of entry: all that tells of runs and results, not whose turn it was to lead."""
    return subject.startswith(("led.accepted.", "led.ended.", "led.cancelled.", "led.result."))


def _frame(entry: Entry) -> bytes:
    data = _encoder.encode(entry)
    return len(data).to_bytes(4, "big") + zlib.crc32(data).to_bytes(4, "big") + data


def _number(path: Path) -> int:
    return int(path.stem)


def _read(path: Path, offset: int = 0) -> Iterator[tuple[Entry, int]]:
    """Yield the entries of a segment from a byte on, each with the byte behind it."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while len(prefix := file.read(_PREFIX_BYTES)) == _PREFIX_BYTES:
                length = int.from_bytes(prefix[:4], "big")
                data = file.read(length) if length <= _FRAME_MAX_BYTES else b""
                if len(data) != length or zlib.crc32(data) != int.from_bytes(prefix[4:], "big"):
                    log.warning("%s ends torn at byte %d", path.name, file.tell())
                    return
                yield _decoder.decode(data), file.tell()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s cannot be read: %s", path.name, error)
