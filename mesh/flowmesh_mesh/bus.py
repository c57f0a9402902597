"""The bus: everything that crosses the broker goes through here, and nothing else imports its client library.

``publish`` and ``subscribe`` are core messages (at most once). ``store`` writes to a stream and returns when the broker
has it on disk. Every call has a deadline; a call in flight when the link is lost fails at once and says so.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from flowmesh_cas.errors import FlowmeshError, InternalError, TransientError, UsageError
from flowmesh_mesh.connection import Connection, CredentialsRefusedError
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.delivery import (
    MESSAGE_ID,
    STATUS,
    AlreadyStoredError,
    ApiError,
    Delivery,
    Expect,
    NoAnswerError,
    NotAllowedError,
    StoredMessage,
    StreamFullError,
    UnknownOutcomeError,
    error_of,
    format_headers,
    parse_headers,
)
from flowmesh_mesh.isolation import Silence
from flowmesh_mesh.pull import Callback, Pull
from flowmesh_mesh.stream_api import ConsumerState, StreamApi, StreamInfo, StreamState
from flowmesh_mesh.subscription import Subscription

__all__ = [
    "AlreadyStoredError",
    "Bus",
    "ConsumerState",
    "CredentialsRefusedError",
    "Delivery",
    "Expect",
    "NoAnswerError",
    "NotAllowedError",
    "Pull",
    "StoredMessage",
    "StreamFullError",
    "StreamInfo",
    "StreamState",
    "Subscription",
    "UnknownOutcomeError",
]

log = logging.getLogger("flowmesh.bus")

BATCH_MAX_MESSAGES = 1000

_BAD_SUBJECT = re.compile(r"[\s]|^\.|\.\.|\.$|^$")
_NOBODY = b"NATS/1.0 503"
_VIOLATION = re.compile(r'publish to "([^"]+)"')


class _Stored(msgspec.Struct, frozen=True):
    error: ApiError | None = None
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    count: int = 0


_decode_stored = msgspec.json.Decoder(_Stored).decode


Answered = tuple[bytes, bytes | None] | FlowmeshError
"""Payload and raw headers of an answer, or why there is none."""


class _Request:
    """A request in flight; ``then`` is called once, in the read loop."""

    __slots__ = ("subject", "then", "timer")

    def __init__(self, subject: str, then: Callable[[Answered], None], timer: asyncio.TimerHandle) -> None:
        self.subject = subject
        self.then = then
        self.timer = timer


Notice = Callable[[], Awaitable[None] | None]


class Bus(StreamApi):
    """A connection to the mesh's broker. Made by :meth:`connect`."""

    make_connection: ClassVar[Callable[[], Connection]] = Connection
    """What makes the connection under a bus; a simulation of the broker puts its own here."""

    def __init__(self, connection: Connection, urls: Sequence[str], inbox: str) -> None:
        self.connection = connection
        self.urls = tuple(urls)
        self._inbox = inbox
        self._silence = Silence(len(self.urls))
        self._inbox_count = 0
        self._requests: dict[str, _Request] = {}
        self._request_count = 0
        self._request_prefix = ""
        self._pulls: set[Pull] = set()
        self._subscriptions: set[Subscription] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_loss: set[Callable[[], None]] = set()
        """Called at once when the link is lost, by those inside the bus who wait for messages of it."""
        self._is_up = asyncio.Event()
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._notices: dict[str, Notice] = {}
        self._on_error: Callable[[Exception], Any] | None = None

    @classmethod
    async def connect(
        cls,
        urls: str | Sequence[str],
        credentials: Credentials | None,
        *,
        name: str,
        inbox: str,
        deadline_s: float = 10.0,
        on_disconnect: Notice | None = None,
        on_reconnect: Notice | None = None,
        on_error: Callable[[Exception], Any] | None = None,
    ) -> Bus:
        """Connect within ``deadline_s``; raise TransientError when no broker answers, CredentialsRefusedError when it refuses.

        ``inbox`` is the prefix on which these credentials may listen (``credentials.inbox``). ``on_error`` hears of faults that
        belong to no call, such as a refused subscription.
        """
        urls = [urls] if isinstance(urls, str) else list(urls)
        connection = cls.make_connection()
        unique = connection._nuid.next().decode()
        bus = cls(connection, urls, f"{inbox}.{unique}")
        connection.on_drop = bus._drop
        connection.on_violation = bus._refuse
        bus._on_error = on_error
        bus._notices = {
            name: notice for name, notice in (("disconnect", on_disconnect), ("reconnect", on_reconnect)) if notice is not None
        }
        await connection.open(
            urls,
            credentials,
            name=name,
            inbox=inbox,
            deadline_s=deadline_s,
            reconnected_cb=bus._reconnected,
            error_cb=bus._report,
        )
        bus._is_up.set()
        return bus

    @property
    def connected(self) -> bool:
        return bool(self.connection.is_connected)

    @property
    def max_payload_bytes(self) -> int:
        """Largest message that the broker takes, headers included."""
        return int(self.connection.max_payload)

    def new_inbox(self) -> str:
        """Return a subject on which only this connection listens."""
        self._inbox_count += 1
        return f"{self._inbox}.{self._inbox_count}"

    # --- changes of the connection

    def _drop(self) -> None:
        """Fail what is in flight: its answer cannot come any more."""
        self._is_up.clear()
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.timer.cancel()
            request.then(UnknownOutcomeError(f"the connection was lost while waiting for {request.subject}", retry_after_s=0.1))
        for notice in list(self.on_loss):
            notice()
        self._notify("disconnect")

    async def _reconnected(self) -> None:
        self._is_up.set()
        for pull in list(self._pulls):
            pull.start()
        self._notify("reconnect")

    def _notify(self, event: str) -> None:
        notice = self._notices.get(event)
        if notice is None or self._is_closed:
            return
        try:
            result = notice()
        except Exception:
            log.exception("on_%s failed", event)
            return
        if inspect.isawaitable(result):
            task = asyncio.ensure_future(_guard(result, f"on_{event}"))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _report(self, error: Exception) -> None:
        log.debug("connection: %s", error)
        if self._on_error is not None and not self._is_closed:
            result = self._on_error(error)
            if inspect.isawaitable(result):
                await result

    def _refuse(self, text: str) -> None:
        """Fail the requests to a subject that the broker refused; it names the subject in lower case."""
        found = _VIOLATION.search(text)
        if found is None:
            return
        for token, request in list(self._requests.items()):
            if request.subject.lower() == found.group(1):
                self._settle(
                    token,
                    NotAllowedError(
                        f"these credentials may not publish to {request.subject}", hint="Use credentials of the right role."
                    ),
                )

    async def _wait_up(self, timeout_s: float) -> None:
        if self.connected:
            return
        if self._is_closed or self.connection.is_closed:
            raise TransientError("the connection to the broker is closed", hint="Connect again.")
        try:
            await asyncio.wait_for(self._is_up.wait(), timeout_s)
        except TimeoutError as error:
            raise TransientError(
                "not connected to the broker", hint="Check that the mesh is up; reconnection goes on by itself."
            ) from error

    # --- core messages

    def post(self, subject: str, data: bytes = b"", *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Publish without waiting for anything, from any code that runs in the loop."""
        if _BAD_SUBJECT.search(subject):
            raise UsageError(f"bad subject {subject!r}", hint="A subject is a row of non-empty tokens without spaces.")
        if headers:
            raw = format_headers(headers)
            size = len(raw) + len(data)
            command = b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject.encode(), reply.encode(), len(raw), size, raw, data)
        else:
            size = len(data)
            command = b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), size, data)
        if size > self.connection.max_payload:
            raise UsageError(
                f"message to {subject} has {size} bytes, the broker takes {self.connection.max_payload}",
                hint="Put large content into the store and send its CID.",
            )
        if self._is_closed:
            raise TransientError("the connection to the broker is closed", hint="Connect again.")
        self.connection.send(command)

    def push(self) -> None:
        """Let what was posted leave now, before this turn of the loop goes on with something slower."""
        self.connection.write_pending()

    async def publish(
        self, subject: str, data: bytes = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a core message: at most once, kept for a while when disconnected."""
        self.post(subject, data, reply=reply, headers=headers)
        await self.connection.wait_writable()

    async def request(
        self, subject: str, data: bytes = b"", *, timeout_s: float = 2.0, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """Ask and return the first answer.

        Raise NoAnswerError at once when nobody listens, UnknownOutcomeError when no answer came in ``timeout_s`` or the link was
        lost, TransientError when there is no connection.
        """
        answer, raw = await self._ask(subject, data, timeout_s, headers)
        if raw is not None and parse_headers(raw).get(STATUS) == "503":
            raise NoAnswerError(
                f"nobody answers on {subject}", hint="The other side is not running or is starting.", retry_after_s=0.1
            )
        return answer

    async def _ask(
        self, subject: str, data: bytes, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, bytes | None]:
        if not self.connected:
            await self._wait_up(timeout_s)
        future: asyncio.Future[tuple[bytes, bytes | None]] = self._loop.create_future()

        def settle(answered: Answered) -> None:
            if future.done():
                return
            if isinstance(answered, FlowmeshError):
                future.set_exception(answered)
            else:
                future.set_result(answered)

        token = self._begin(subject, data, settle, timeout_s, headers)
        try:
            return await future
        finally:
            request = self._requests.pop(token, None)
            if request is not None:
                request.timer.cancel()

    def _begin(
        self,
        subject: str,
        data: bytes,
        then: Callable[[Answered], None],
        timeout_s: float,
        headers: Mapping[str, str] | None,
    ) -> str:
        """Send a request; ``then`` hears of its answer."""
        if not self._request_prefix:  # only now: some roles may not ask, and have no inbox
            self._request_prefix = f"{self._inbox}.r."
            self.connection.listen(f"{self._request_prefix}*", self._answer)
        self._request_count += 1
        token = str(self._request_count)
        self.post(subject, data, reply=self._request_prefix + token, headers=headers)
        timer = self._loop.call_later(timeout_s, self._expire, token, timeout_s)
        self._requests[token] = _Request(subject, then, timer)
        return token

    def _settle(self, token: str, answered: Answered) -> None:
        request = self._requests.pop(token, None)
        if request is not None:
            request.timer.cancel()
            request.then(answered)

    def _expire(self, token: str, timeout_s: float) -> None:
        request = self._requests.get(token)
        if request is not None:
            self.note_silence(request.subject)
            self._settle(token, UnknownOutcomeError(f"no answer from {request.subject} within {timeout_s:g} s"))

    def _answer(self, subject: bytes, _reply: bytes, data: bytes, headers: bytes | None) -> None:
        token = subject[len(self._request_prefix) :].decode()
        if headers is not None and headers.startswith(_NOBODY) and (request := self._requests.get(token)) is not None:
            self.note_silence(request.subject)
        else:
            self._silence.broken()
        self._settle(token, (data, headers))

    def note_answer(self) -> None:
        """Somebody behind the broker has answered."""
        self._silence.broken()

    def note_silence(self, subject: str) -> None:
        """Nobody has answered; go to another broker when that lasts, for this one may be cut off from the rest."""
        if self._silence.grows(self._loop.time(), subject) and self.connected:
            log.warning("nobody answers behind this broker: trying another")
            task = asyncio.ensure_future(_guard(self.connection.move(), "moving to another broker"))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Listen to core messages; with ``queue`` each message goes to one member of the group.

        A plain function is called in the read loop and must be quick; a coroutine function runs in a task of its own.
        """
        if _BAD_SUBJECT.search(subject):
            raise UsageError(f"bad subject {subject!r}", hint="A subject is a row of non-empty tokens without spaces.")
        subscription = Subscription(self, subject, queue, callback)
        self._subscriptions.add(subscription)
        return subscription

    # --- streams

    async def store(
        self,
        subject: str,
        data: bytes,
        *,
        message_id: str = "",
        expect: Expect | None = None,
        headers: Mapping[str, str] | None = None,
        ttl_s: float | None = None,
        timeout_s: float = 2.0,
    ) -> int:
        """Write to the stream of ``subject``; return the sequence once it is durable.

        Raise FencedError when ``expect`` does not hold, AlreadyStoredError on a write-once subject, UnknownOutcomeError when no
        answer came (repeat with the same ``message_id``), NoAnswerError when no stream takes the subject. A ``message_id`` seen
        before is not stored again and gives the first sequence.
        """
        fields = dict(headers) if headers else {}
        if message_id:
            fields[MESSAGE_ID] = message_id
        if expect is not None:
            fields.update(expect.headers())
        if ttl_s is not None:
            fields["Nats-TTL"] = f"{max(1000, int(ttl_s * 1000))}ms"
        answer, raw = await self._ask(subject, data, timeout_s, fields)
        return _sequence(answer, raw, subject)

    def store_then(
        self,
        subject: str,
        data: bytes,
        then: Callable[[int | FlowmeshError], None],
        *,
        message_id: str = "",
        expect: Expect | None = None,
        timeout_s: float = 2.0,
    ) -> None:
        """Write as :meth:`store` does, without a task: ``then`` is called in the read loop with the sequence or the error.

        Raise TransientError when there is no connection; ``then`` is not called in that case.
        """
        if not self.connected:
            raise TransientError("not connected to the broker", hint="Reconnection goes on by itself.")

        def settle(answered: Answered) -> None:
            if isinstance(answered, FlowmeshError):
                then(answered)
                return
            try:
                sequence: int | FlowmeshError = _sequence(*answered, subject)
            except FlowmeshError as error:
                sequence = error
            then(sequence)

        fields = expect.headers() if expect is not None else {}
        if message_id:
            fields[MESSAGE_ID] = message_id
        self._begin(subject, data, settle, timeout_s, fields)

    async def store_batch(
        self, messages: Sequence[tuple[str, bytes]], *, expect: Expect | None = None, timeout_s: float = 5.0
    ) -> int:
        """Write up to 1000 messages to one stream, all or none; return the last sequence.

        ``expect`` is checked when the batch is committed. A batch whose answer is lost has an unknown outcome: read back.
        """
        if not messages:
            raise InternalError("an empty batch")
        if len(messages) > BATCH_MAX_MESSAGES:
            raise UsageError(
                f"a batch holds {len(messages)} messages, at most {BATCH_MAX_MESSAGES} are possible", hint="Split it."
            )
        if len(messages) == 1:
            return await self.store(messages[0][0], messages[0][1], expect=expect, timeout_s=timeout_s)
        if not self.connected:
            await self._wait_up(timeout_s)
        batch = self.connection._nuid.next().decode()
        last = len(messages)
        for position, (subject, data) in enumerate(messages[:-1], 1):
            fields = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(position)}
            if position == 1 and expect is not None:
                fields.update(expect.headers())
            self.post(subject, data, headers=fields)
            if position % 64 == 0:
                await self.connection.wait_writable()
        subject, data = messages[-1]
        fields = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(last), "Nats-Batch-Commit": "1"}
        answer, raw = await self._ask(subject, data, timeout_s, fields)
        return _sequence(answer, raw, subject)

    async def pull(self, stream: str, consumer: str, callback: Callback, *, batch: int = 500, expires_s: float = 30.0) -> Pull:
        """Deliver the messages of a durable consumer to ``callback`` until the pull is stopped.

        It waits for a consumer that does not exist yet, and outlives reconnections and restarts of the broker.
        """
        pull = Pull(self, stream, consumer, callback, batch=batch, expires_s=expires_s)
        self._pulls.add(pull)
        pull.start()
        return pull

    def read_stream(self, stream: str, subject_filter: str = "", from_seq: int = 1) -> AsyncGenerator[StoredMessage, None]:
        """Iterate over what the stream holds now, in order; messages that come later are not included."""
        from flowmesh_mesh.replay import read_stream

        return read_stream(self, stream, subject_filter, from_seq)

    # --- the end

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until the broker has taken everything sent so far; raise TransientError otherwise."""
        try:
            await self.connection.flush(timeout_s)
        except Exception as error:
            raise UnknownOutcomeError("the broker did not confirm what was sent") from error

    def forget(self, ended: Pull | Subscription) -> None:
        """Drop an ended pull or subscription."""
        self._pulls.discard(ended)
        self._subscriptions.discard(ended)

    async def close(self) -> None:
        """End pulls and subscriptions, send what is pending, and close; never raises and ends within seconds."""
        if self._is_closed:
            return
        await asyncio.gather(
            *(pull.stop() for pull in list(self._pulls)),
            *(subscription.unsubscribe() for subscription in list(self._subscriptions)),
            return_exceptions=True,
        )
        self._is_closed = True
        self._drop()
        await self.connection.shut()


async def _guard(awaitable: Awaitable[None], what: str) -> None:
    try:
        await awaitable
    except Exception:
        log.exception("%s failed", what)


def _sequence(answer: bytes, raw: bytes | None, subject: str) -> int:
    """Return the sequence in the broker's acknowledgement, or raise what it says."""
    if raw is not None and parse_headers(raw).get(STATUS) == "503":
        raise NoAnswerError(
            f"no stream takes {subject}", hint="The broker or the leader is starting: try again.", retry_after_s=0.1
        )
    try:
        stored = _decode_stored(answer)
    except msgspec.DecodeError as error:
        raise InternalError(f"unreadable acknowledgement for {subject}: {answer[:100]!r}") from error
    if stored.error is not None:
        raise error_of(stored.error, subject)
    return stored.seq
