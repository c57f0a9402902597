"""The event log: what a leader's core was told, in order, so that its choices can be made again (``flowmesh replay``).

One file per epoch, from its take-over on: a header (settings, epoch, what was known before the first event), then one frame per
event with the time at which it was applied. Frames are msgpack behind a length of four bytes; a file that ends in the middle
of one counts up to there. Encoding and writing happen in a thread: the loop only appends to a list.

A log holds no tenant's secret: private operator keys depend on it, so each step carries the private keys that it computed,
in order, and a replay uses them. It does hold documents, parameters and small results in the clear, as the hub's store does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, get_args

import msgspec

from flowmesh_cas.errors import IntegrityError, UsageError
from flowmesh_mesh import __version__
from flowmesh_mesh.messages import Assignment
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State

log = logging.getLogger("flowmesh.scheduler")

SUFFIX = ".events"
MAGIC = b"flowmesh-events/1\n"
FLUSH_S = 0.25
PENDING_MAX = 200_000
"""Most events that may wait for the disk; a slower one ends the recording rather than fill the memory."""

_LENGTH_BYTES = 4
_EVENTS: dict[str, type[e.Event]] = {kind.__name__: kind for kind in get_args(e.Event)}
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {}


class Header(msgspec.Struct, frozen=True, array_like=True, tag="header"):
    """What the core knew before the first event of an epoch. ``settings``, ``places`` and ``costs`` are plain data."""

    version: str
    epoch: int
    begun_at_us: int
    settings: dict[str, Any]
    places: dict[bytes, list[str]]
    costs: Any = None


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One event as it was applied.

    ``held`` are roots that the hub came to hold since the step before; ``private`` the private operator keys that the step
    computed; ``digest`` stands for all assignments up to and including this step, empty where it made none.
    """

    at_us: int
    kind: str
    event: msgspec.Raw
    held: tuple[bytes, ...] = ()
    private: tuple[bytes, ...] = ()
    digest: bytes = b""


class Closed(msgspec.Struct, frozen=True, array_like=True, tag="closed"):
    """The last frame: why nothing follows. A log without it ended with its process."""

    why: str


_Frame = Header | Step | Closed
_frames: msgspec.msgpack.Decoder[_Frame] = msgspec.msgpack.Decoder(_Frame)


def encode_event(event: e.Event) -> tuple[str, bytes]:
    """Return the name of an event's class and the event as msgpack."""
    return type(event).__name__, _encoder.encode(event)


def unsalted(event: e.Event) -> e.Event:
    """Return an event without the salts of private work, which a core takes from nobody: the assignments found hold them."""
    if not isinstance(event, e.Recovered):
        return event
    found = []
    for each in event.assignments:
        tails = tuple(tuple(msgspec.structs.replace(hop, salt=b"") for hop in tail) for tail in each.tails)
        found.append(msgspec.structs.replace(each, tails=tails) if tails else each)
    return dataclasses.replace(event, assignments=found)


def decode_event(kind: str, data: bytes | msgspec.Raw) -> e.Event:
    """Return the event in ``data``; raise IntegrityError for a class or content that this build does not know."""
    decoder = _decoders.get(kind)
    if decoder is None:
        if kind not in _EVENTS:
            raise IntegrityError(f"the log holds an event {kind!r}, which this version does not know")
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(_EVENTS[kind])
    try:
        found: e.Event = decoder.decode(data)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"an event {kind} of the log cannot be read: {error}") from error
    return found


def chain(before: bytes, assignments: Iterable[Assignment]) -> bytes:
    """Return the digest that follows ``before`` when these assignments are made: id, node and keys of each, in order."""
    digest = sha256(before)
    for assignment in assignments:
        digest.update(_encoder.encode((assignment.id, assignment.node, [item.key for item in assignment.items])))
    return digest.digest()


def assigned_by(commands: Iterable[c.Command]) -> list[Assignment]:
    """Return the assignments among the commands of a step."""
    return [command.assignment for command in commands if type(command) is c.Assign]


_Noted = tuple[int, e.Event, tuple[bytes, ...], tuple[bytes, ...], list[Assignment]]
"""Time, event, roots held, private keys, assignments: what becomes a :class:`Step`."""


class Recording:
    """The log of one epoch while it is being written, by a thread of its own.

    ``state.name_private`` is taken over, so that the private keys of each step are known. Nothing that goes wrong here reaches
    the leader: the recording ends and the process says so.
    """

    def __init__(self, folder: Path, state: State, begun_at_us: int, *, max_bytes: int) -> None:
        self.path = folder / f"{state.epoch}{SUFFIX}"
        self._max_bytes = max_bytes // 2
        self._size_bytes = 0
        self._digest = b""
        self._pending: list[_Noted] = []
        self._private: list[bytes] = []
        self._held: list[bytes] = []
        self._is_noting = True
        self._file: BinaryIO | None = _create(self.path, keep_bytes=self._max_bytes)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="recording")
        self._state = state
        state.name_private = self._note_private
        self._put(header_of(state, begun_at_us))

    def _note_private(self, key: bytes) -> bytes:
        self._private.append(key)
        return key

    def note_held(self, roots: Iterable[bytes]) -> None:
        """Note roots that the hub holds from now on, which no event tells."""
        if self._is_noting:
            self._held.extend(roots)

    def note(self, at_us: int, event: e.Event, commands: Sequence[c.Command]) -> None:
        """Note an event that was applied, and what it led to."""
        if not self._is_noting:
            return
        held, private = tuple(self._held), tuple(self._private)
        self._held.clear()
        self._private.clear()
        self._pending.append((at_us, event, held, private, assigned_by(commands)))
        if len(self._pending) >= PENDING_MAX:
            self._stop("the disk is too slow")

    def _stop(self, why: str) -> None:
        """Note nothing any more; let the writer finish what there is."""
        self._is_noting = False
        self._state.name_private = None
        pending, self._pending = self._pending, []
        self._writer.submit(self._write, pending, why)
        self._writer.shutdown(wait=False)

    async def run(self) -> None:
        """Write what was noted, again and again, until the recording has ended."""
        while self._is_noting:
            await asyncio.sleep(FLUSH_S)
            if not self._is_noting:
                return
            if self._file is None:
                self._stop("")
            elif self._pending:
                pending, self._pending = self._pending, []
                self._writer.submit(self._write, pending)

    async def close(self, why: str) -> None:
        """Write what is left, and why nothing follows."""
        if self._is_noting:
            self._stop(why)
        await asyncio.to_thread(self._writer.shutdown)

    # --- in the writer's thread

    def _write(self, steps: Sequence[_Noted], why: str = "") -> None:
        if self._file is None:
            return
        try:
            for at_us, event, held, private, assignments in steps:
                if assignments:
                    self._digest = chain(self._digest, assignments)
                kind, data = encode_event(unsalted(event))
                self._put(Step(at_us, kind, msgspec.Raw(data), held, private, self._digest if assignments else b""))
                if self._size_bytes > self._max_bytes:
                    why = "it is full"
                    break
            self._file.flush()
        except (OSError, TypeError, ValueError, msgspec.MsgspecError) as error:
            log.exception("the recording cannot go on")
            why = f"error: {error}"
        if why:
            self._end(why)

    def _put(self, frame: msgspec.Struct) -> None:
        assert self._file is not None
        data = _encoder.encode(frame)
        self._size_bytes += self._file.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)

    def _end(self, why: str) -> None:
        log.info("the recording of epoch %d has ended: %s", self._state.epoch, why)
        try:
            self._put(Closed(why))
            if self._file is not None:
                self._file.close()
        except OSError:
            log.exception("the recording cannot be closed")
        self._file = None


def header_of(state: State, begun_at_us: int) -> Header:
    """Return what a state knows before the first event of its epoch."""
    settings = msgspec.to_builtins(state.settings)
    places = {root: sorted(names) for root, names in state.places.items()}
    return Header(__version__, state.epoch, begun_at_us, settings, places, state.costs.dump())


def _create(path: Path, *, keep_bytes: int) -> BinaryIO:
    """Make the file of a log; the oldest logs beside it go until the rest takes no more than ``keep_bytes``."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in _too_many(logs_in(path.parent), keep_bytes):
        old.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    file = os.fdopen(descriptor, "wb")
    file.write(MAGIC)
    return file


def logs_in(folder: Path) -> list[Path]:
    """Return the logs in a folder, oldest epoch first."""
    found = [path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def _too_many(paths: Sequence[Path], keep_bytes: int) -> list[Path]:
    total_bytes = sum(path.stat().st_size for path in paths)
    gone: list[Path] = []
    for path in paths:
        if total_bytes <= keep_bytes:
            break
        total_bytes -= path.stat().st_size
        gone.append(path)
    return gone


class EventLog:
    """A recorded log, read frame by frame. ``ended`` tells why it ends once it has been read: empty when it breaks off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended = ""
        try:
            self._file = path.open("rb")
            magic = self._file.read(len(MAGIC))
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror}", hint="Name a log that `flowmesh up --record` wrote."
            ) from error
        first = self._frame() if magic == MAGIC else None
        if not isinstance(first, Header):
            raise UsageError(f"{path} is no event log", hint="Logs are written by `flowmesh up --record`; docs/scheduler.md.")
        self.header = first

    def settings(self) -> Settings:
        """Return the settings in force; raise IntegrityError for those of a version that had others."""
        try:
            return msgspec.convert(self.header.settings, Settings)
        except msgspec.ValidationError as error:
            message = f"the log was recorded by version {self.header.version}, whose settings this one does not know: {error}"
            raise IntegrityError(message) from error

    def steps(self) -> Iterator[Step]:
        """Yield every whole step, once."""
        with self._file:
            while True:
                frame = self._frame()
                if isinstance(frame, Closed):
                    self.ended = frame.why
                if not isinstance(frame, Step):
                    return
                yield frame

    def _frame(self) -> _Frame | None:
        """Return the next frame, None at the end or where the file breaks off."""
        length = int.from_bytes(self._file.read(_LENGTH_BYTES), "big")
        data = self._file.read(length)
        if not length or len(data) < length:
            return None
        try:
            return _frames.decode(data)
        except msgspec.DecodeError as error:
            raise IntegrityError(f"{self.path} is damaged at byte {self._file.tell()}: {error}") from error
