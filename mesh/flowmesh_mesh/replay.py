"""Reading a stream from beginning to end, fast, without leaving anything behind."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from flowmesh_cas.errors import NotFoundError, TransientError
from flowmesh_mesh.delivery import StoredMessage, ack_tokens, parse_headers
from flowmesh_mesh.streams import SECOND_NS, ConsumerConfig

if TYPE_CHECKING:
    from flowmesh_mesh.bus import Bus

_BATCH = 5000
_STALL_S = 5.0
_ATTEMPTS = 20


class _Reader:
    """One ephemeral consumer that delivers in order until ``until_seq``."""

    def __init__(self, bus: Bus, stream: str, until_seq: int) -> None:
        self._bus = bus
        self._stream = stream
        self._until_seq = until_seq
        self._name = f"read_{bus.new_inbox().replace('.', '_')}"
        self._inbox = bus.new_inbox()
        self._number = 0
        self._left = 0
        self._is_done = False
        self.is_complete = False
        """Whether everything up to the wanted sequence was delivered."""
        self._wake = asyncio.Event()
        self._messages: deque[StoredMessage] = deque()

    async def open(self, subject_filter: str, from_seq: int) -> int:
        """Create the consumer; return how many messages it has to deliver."""
        config = ConsumerConfig(
            self._name,
            filter_subject=subject_filter,
            deliver_policy="by_start_sequence",
            opt_start_seq=max(1, from_seq),
            ack_policy="none",
            inactive_threshold=30 * SECOND_NS,
            mem_storage=True,
            num_replicas=1,
        )
        self._number = self._bus.connection.listen(self._inbox, self._receive)
        self._bus.on_loss.add(self._lose)
        return await self._bus.ensure_consumer(self._stream, config)

    def _lose(self) -> None:
        """Give up: the broker keeps this consumer in memory, and nothing more will come on this link."""
        self._is_done = True
        self._wake.set()

    def ask(self) -> None:
        self._left = _BATCH
        request = b'{"batch":%d,"expires":%d,"no_wait":true}' % (_BATCH, 2 * SECOND_NS)
        self._bus.post(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}", request, reply=self._inbox)

    def _receive(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        if not reply.startswith(b"$JS.ACK"):
            self._is_done = True  # nothing is left, or the consumer is gone: the caller reads on from the last message
        else:
            _, seq, _, _, pending = map(int, ack_tokens(reply.decode()))
            if seq <= self._until_seq:
                self._messages.append(StoredMessage(subject.decode(), data, seq, parse_headers(headers) if headers else {}))
            self._is_done = self.is_complete = seq >= self._until_seq or pending == 0
            self._left -= 1
            if self._left == 0 and not self._is_done:
                self.ask()
        self._wake.set()

    async def batches(self) -> AsyncGenerator[deque[StoredMessage], None]:
        """Yield what has arrived, until the end or until nothing comes for a while."""
        self.ask()
        while not self._is_done or self._messages:
            if not self._messages:
                self._wake.clear()
                try:
                    await asyncio.wait_for(self._wake.wait(), _STALL_S)
                except TimeoutError:
                    return
            found, self._messages = self._messages, deque()
            yield found

    async def close(self) -> None:
        self._bus.on_loss.discard(self._lose)
        self._bus.connection.unlisten(self._number)
        if self._bus.connected:
            try:
                await self._bus.delete_consumer(self._stream, self._name)
            except TransientError:
                return  # the broker drops it after its inactive threshold


async def read_stream(bus: Bus, stream: str, subject_filter: str = "", from_seq: int = 1) -> AsyncGenerator[StoredMessage, None]:
    """Iterate over the messages of ``stream`` up to its last sequence at the time of the call, in order.

    A lost connection or consumer is bridged from the last message read. Raise NotFoundError when there is no such stream,
    TransientError when the broker stays away. A work queue allows no second consumer: it is read message by message.
    """
    found = await bus.stream_info(stream)
    if found is None:
        raise NotFoundError(f"no stream {stream}")
    if found.config.get("retention") == "workqueue":
        messages = _read_queue(bus, stream, subject_filter, max(1, from_seq), found.state.last_seq)
    else:
        messages = _read_log(bus, stream, subject_filter, max(1, from_seq), found.state.last_seq)
    async with aclosing(messages):  # an abandoned replay must not leave its consumer to the garbage collector
        async for message in messages:
            yield message


async def _read_queue(
    bus: Bus, stream: str, subject_filter: str, next_seq: int, until_seq: int
) -> AsyncGenerator[StoredMessage, None]:
    """Ask the stream's leader for one message after the other."""
    while next_seq <= until_seq:
        message = await bus.next_message(stream, next_seq, subject_filter or ">")
        if message is None or message.seq > until_seq:
            return
        yield message
        next_seq = message.seq + 1


async def _read_log(
    bus: Bus, stream: str, subject_filter: str, next_seq: int, until_seq: int
) -> AsyncGenerator[StoredMessage, None]:
    """Read with ephemeral consumers, a fresh one wherever the last one broke off."""
    failures = 0
    while next_seq <= until_seq:
        reader = _Reader(bus, stream, until_seq)
        start_seq = next_seq
        try:
            if not await reader.open(subject_filter, next_seq):
                return
            async for batch in reader.batches():
                for message in batch:
                    next_seq = message.seq + 1
                    yield message
            if reader.is_complete:
                return
        except TransientError:
            failures += 1
            if failures >= _ATTEMPTS:
                raise
            await asyncio.sleep(random.uniform(0.05, 0.2))
            continue
        finally:
            await reader.close()
        failures = failures + 1 if next_seq == start_seq else 0
        if failures >= _ATTEMPTS:
            raise TransientError(f"reading {stream} does not get on", hint="Check the broker.")
