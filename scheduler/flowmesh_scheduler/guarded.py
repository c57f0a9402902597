"""Writing to a guarded stream: every write names the epoch record, so the broker refuses a deposed leader.

On one broker few writes at once go singly and side by side (one sync each); many go as one atomic batch (one sync for all). A
replicated stream takes one guarded write at a time: there everything goes in batches, one after the other. A write whose answer
was lost is read back before it is repeated; while the brokers elect, writes wait.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from flowmesh_cas.errors import FencedError, FlowmeshError, InternalError, TransientError
from flowmesh_mesh import tasks
from flowmesh_mesh.bus import AlreadyStoredError, Bus, Expect, StoredMessage
from flowmesh_mesh.clock import monotonic_s
from flowmesh_mesh.messages import Epoch, decode, encode
from flowmesh_mesh.wire import check_records

log = logging.getLogger("flowmesh.scheduler")

SINGLES_MAX = 8
BATCH_MAX = 1000
BATCH_MAX_BYTES = 4 * 1024 * 1024

PATIENCE_S = 20.0
"""Brokers that elect a new leader of a stream take up to nine seconds: a take-over waits for them."""

TRY_S = 2.0
"""A broker that does not answer within this is asked again: while brokers elect, nobody may hear."""

_PAUSE_S = 0.01
_PAUSE_MAX_S = 0.5

Write = tuple[str, bytes, Callable[[int], None]]
"""Subject, data, and who is told the sequence once the message is durable."""

T = TypeVar("T")


async def patiently(work: Callable[[], Awaitable[T]], patience_s: float = PATIENCE_S) -> T:
    """Try until it works, with growing random pauses; raise the last TransientError when ``patience_s`` have passed."""
    until_s = monotonic_s() + patience_s
    pause_s = _PAUSE_S
    while True:
        try:
            return await work()
        except TransientError:
            if monotonic_s() + pause_s > until_s:
                raise
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(_PAUSE_MAX_S, 2 * pause_s)


Noted = Callable[[str, int, bytes], None]


def _noted(noted: Noted, subject: str, data: bytes, then: Callable[[int], None], sequence: int) -> None:
    noted(subject, sequence, data)
    then(sequence)


class GuardedStream:
    """One guarded stream under the epoch that this leader raised."""

    def __init__(
        self,
        bus: Bus,
        stream: str,
        epochs: str,
        epoch_subject: Callable[[int], str],
        on_fenced: Callable[[Exception], None],
        *,
        is_replicated: bool = False,
    ) -> None:
        self.epoch = 0
        self.refused = 0
        """How many writes the broker has refused because another leads."""
        self.noted: Noted | None = None
        """Told each write (subject, sequence, data) once it is durable: a journal."""
        self._bus = bus
        self._stream = stream
        self._epochs = epochs
        self._epoch_subject = epoch_subject
        self._on_fenced = on_fenced
        self._singles_max = 0 if is_replicated else SINGLES_MAX
        self._fence: Expect | None = None
        self._queue: list[Write] = []
        self._in_flight = 0
        self._is_woken = False
        self._batching: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._is_closed = False

    # --- the epoch

    @property
    def fence_sequence(self) -> int:
        """The sequence of this leader's epoch record, 0 before there is one."""
        return self._fence.subject_sequence if self._fence is not None else 0

    async def raise_epoch(self, at_least: int, leader: str, lease: int, at_us: int) -> int:
        """Write a new epoch record above every earlier one; return the epoch.

        Raise FencedError if another was faster, OutdatedError if this build cannot read what the stream holds.
        """

        async def once() -> int:
            return await self._raise_epoch(at_least, leader, lease, at_us)

        return await patiently(once)

    async def _raise_epoch(self, at_least: int, leader: str, lease: int, at_us: int) -> int:
        last = await self._bus.last_message(self._stream, self._epochs, timeout_s=TRY_S)
        known = decode(last.data, Epoch) if last is not None else None
        if last is not None and known is not None and (known.leader, known.lease, known.at_us) == (leader, lease, at_us):
            self.epoch, self._fence = known.epoch, Expect(last.seq, self._epochs)  # the answer to an earlier try was lost
            return self.epoch
        if known is not None and known.lease > lease:
            raise FencedError(f"stream {self._stream} has a leader with a later lease")
        wire = check_records(self._stream, known.wire if known else 1)
        self.epoch = max(at_least, (known.epoch if known else 0) + 1)
        expect = Expect(last.seq if last else 0, self._epochs)
        record = encode(Epoch(self.epoch, leader, lease, at_us, wire))
        sequence = await self._bus.store(self._epoch_subject(self.epoch), record, expect=expect)
        self._fence = Expect(sequence, self._epochs)
        return self.epoch

    async def is_current(self) -> bool:
        """Tell whether nobody has raised the epoch since."""
        last = await self._bus.last_message(self._stream, self._epochs, timeout_s=TRY_S)
        return last is not None and last.seq == self.fence_sequence

    # --- writes

    def write(self, subject: str, data: bytes, then: Callable[[int], None] = lambda _: None) -> None:
        """Queue a write; ``then`` is told its sequence once it is durable. It leaves with :meth:`flush`, or a moment later."""
        self._queue.append((subject, data, then if self.noted is None else partial(_noted, self.noted, subject, data, then)))
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what is queued: few writes singly and side by side, many as batches."""
        self._is_woken = False
        if not self._queue or self._batching is not None or self._is_closed:
            return
        if len(self._queue) + self._in_flight <= self._singles_max:
            queue, self._queue = self._queue, []
            for write in queue:
                self._single(write)
        elif self._in_flight == 0:
            self._batching = self._loop.create_task(self._batches())

    def _single(self, write: Write) -> None:
        self._in_flight += 1

        def settle(answer: int | FlowmeshError) -> None:
            if isinstance(answer, int):
                self._in_flight -= 1
                write[2](answer)
                self.flush()
            else:
                self._spawn(self._repair(write, answer))

        try:
            self._bus.store_then(write[0], write[1], settle, expect=self._fence)
        except TransientError as error:
            self._spawn(self._repair(write, error))

    async def _repair(self, write: Write, error: FlowmeshError) -> None:
        """Settle a write whose first try failed."""
        try:
            if isinstance(error, FencedError):
                self._refuse(error, 1)
            elif isinstance(error, AlreadyStoredError):
                await self._read_back(write)
            else:
                await self._store(write, is_unknown=getattr(error, "unknown_outcome", False))
        finally:
            self._in_flight -= 1
            self.flush()

    def _refuse(self, error: FlowmeshError, count: int) -> None:
        """The broker took ``count`` writes not, and never will."""
        if isinstance(error, FencedError):
            self.refused += count
        self._on_fenced(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _batches(self) -> None:
        """Drain the queue batch by batch; one at a time, as a replicated stream demands."""
        try:
            while self._queue and not self._is_closed:
                await self._store_batch(self._cut())
        finally:
            self._batching = None
            self.flush()

    async def _store_batch(self, batch: list[Write]) -> None:
        """Write a batch, all or none, until it is known to be stored or refused."""
        messages = [(subject, data) for subject, data, _ in batch]
        is_unknown = False
        pause_s = _PAUSE_S
        while not self._is_closed:
            try:
                last = await self._found(batch[-1]) if is_unknown else None
                sequence = (
                    last.seq if last is not None else await self._bus.store_batch(messages, expect=self._fence, timeout_s=TRY_S)
                )
            except AlreadyStoredError:  # some of it is stored: settle each by itself
                for write in batch:
                    await self._store(write, is_unknown=True)
                return
            except TransientError as error:
                is_unknown = is_unknown or getattr(error, "unknown_outcome", False)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(_PAUSE_MAX_S, pause_s * 2)
            except FlowmeshError as error:
                self._refuse(error, len(batch))
                return
            else:
                first = sequence - len(batch) + 1
                for offset, (_, _, then) in enumerate(batch):
                    then(first + offset)
                return

    def _cut(self) -> list[Write]:
        size = count = 0
        for _, data, _ in self._queue[:BATCH_MAX]:
            if count and size + len(data) > BATCH_MAX_BYTES:
                break
            size += len(data)
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    async def _store(self, write: Write, *, is_unknown: bool = False) -> None:
        """Write one message until it is known to be stored or refused; ``is_unknown``: it may be stored already."""
        subject, data, then = write
        pause_s = _PAUSE_S
        while not self._is_closed:
            try:
                found = await self._found(write) if is_unknown else None
                sequence = found.seq if found is not None else await self._bus.store(subject, data, expect=self._fence)
            except AlreadyStoredError:
                await self._read_back(write)
                return
            except TransientError as error:
                is_unknown = is_unknown or getattr(error, "unknown_outcome", False)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(_PAUSE_MAX_S, pause_s * 2)
            except FlowmeshError as error:
                self._refuse(error, 1)
                return
            else:
                then(sequence)
                return

    async def _read_back(self, write: Write) -> None:
        """The subject is taken: equal content is success, anything else means that two wrote as leader."""
        while not self._is_closed:
            try:
                found = await self._found(write)
            except TransientError:
                await asyncio.sleep(random.uniform(0.05, 0.1))
                continue
            if found is None:
                self._refuse(InternalError(f"{write[0]} already holds something else"), 1)
            else:
                write[2](found.seq)
            return

    async def _found(self, write: Write) -> StoredMessage | None:
        """Return the message if it is stored as it was to be written."""
        found = await self._bus.last_message(self._stream, write[0], timeout_s=TRY_S)
        return found if found is not None and found.data == write[1] else None

    # --- the end

    async def drain(self, timeout_s: float) -> None:
        """Wait until everything queued is durable, at most ``timeout_s``."""
        until_s = monotonic_s() + timeout_s
        self.flush()
        while (self._queue or self._in_flight or self._batching) and not self._is_closed and monotonic_s() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    async def close(self) -> None:
        """Stop writing; what is queued is dropped."""
        self._is_closed = True
        self._queue.clear()
        await tasks.end([*self._tasks, *([self._batching] if self._batching else [])])
