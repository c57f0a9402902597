"""What the bus hands out: deliveries, stored messages, conditions of a write, and the errors of the broker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from flowmesh_cas.errors import FencedError, FlowmeshError, InternalError, NotFoundError, TransientError, UsageError

EXPECTED_SEQUENCE = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_SUBJECT = "Nats-Expected-Last-Subject-Sequence-Subject"
MESSAGE_ID = "Nats-Msg-Id"
STATUS = "Status"
DESCRIPTION = "Description"


class AlreadyStoredError(UsageError):
    """The subject is written once, and holds a message already: read it back."""


class NotAllowedError(UsageError):
    """The role of these credentials does not have this right."""


class UnknownOutcomeError(TransientError):
    """No answer came: the message may have been taken or not. Repeat it with the same message id, or read back."""

    unknown_outcome = True


class NoAnswerError(TransientError):
    """Nobody listens on the subject: nothing was delivered."""


class StreamFullError(TransientError):
    """The stream takes no more for now."""


class MadeOtherwiseError(TransientError):
    """A stream of this name exists with another configuration: somebody made it a moment before."""


class ApiError(msgspec.Struct, frozen=True):
    """An error as the broker words it."""

    code: int = 0
    err_code: int = 0
    description: str = ""


_WRONG_SEQUENCE = 10071
_SEQUENCE_IN_FLIGHT = 10164
_STORE_FAILED = 10077
_NO_MESSAGE = 10037
_NAME_IN_USE = 10058
_TOO_FEW_BROKERS = 10005


def error_of(error: ApiError, what: str) -> FlowmeshError:
    """Return the error of our tree for what the broker said about ``what``."""
    text = f"{what}: {error.description} ({error.err_code})"
    if error.err_code == _WRONG_SEQUENCE:
        return FencedError(text, hint="Another writer was faster: read the subject again.")
    if error.err_code == _SEQUENCE_IN_FLIGHT:
        return TransientError(text, retry_after_s=0.01)
    if error.err_code == _STORE_FAILED:
        if "per subject" in error.description:
            return AlreadyStoredError(text, hint="Read the message that is stored.")
        return StreamFullError(text, hint="Wait until the stream has room.")
    if error.err_code == _NAME_IN_USE:
        return MadeOtherwiseError(text, hint="Look at the stream that is there.")
    if error.code == 404:
        return NotFoundError(text)
    if error.code in (408, 429, 503) or error.err_code == _TOO_FEW_BROKERS:
        return TransientError(text, hint="The broker is busy or starting: try again.")
    return InternalError(text)


@dataclass(frozen=True, slots=True)
class Expect:
    """A condition of a write: the last message of ``subject`` (wildcards allowed) has ``subject_sequence`` (0: there is none).

    Without ``subject`` the subject written to is meant.
    """

    subject_sequence: int
    subject: str = ""

    def headers(self) -> dict[str, str]:
        found = {EXPECTED_SEQUENCE: str(self.subject_sequence)}
        if self.subject:
            found[EXPECTED_SUBJECT] = self.subject
        return found


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as a stream keeps it."""

    subject: str
    data: bytes
    seq: int
    headers: Mapping[str, str] = field(default_factory=dict)


class Publisher(Protocol):
    """What a delivery needs of the bus to be answered."""

    def post(self, subject: str, data: bytes = b"", *, reply: str = "", headers: Mapping[str, str] | None = None) -> None: ...


_ACK_PREFIX = "$JS.ACK."
_NO_HEADERS: Mapping[str, str] = {}


class Delivery:
    """A message that arrived. ``seq`` is its sequence in the stream, 0 for a core message."""

    __slots__ = ("_bus", "_headers", "_tokens", "data", "reply", "subject")

    def __init__(self, bus: Publisher, subject: str, reply: str, data: bytes, headers: bytes | None) -> None:
        self._bus = bus
        self.subject = subject
        self.reply = reply
        self.data = data
        self._headers = headers
        self._tokens: Sequence[str] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        return parse_headers(self._headers) if self._headers else _NO_HEADERS

    def _ack_token(self, position: int) -> int:
        if not self.reply.startswith(_ACK_PREFIX):
            return 0
        if self._tokens is None:
            self._tokens = ack_tokens(self.reply)
        return int(self._tokens[position])

    @property
    def seq(self) -> int:
        return self._ack_token(1)

    @property
    def delivered(self) -> int:
        """How often this message was delivered, this time included; 0 for a core message."""
        return self._ack_token(0)

    @property
    def pending(self) -> int:
        """How many messages the consumer still has to deliver after this one."""
        return self._ack_token(4)

    def post_ack(self) -> None:
        """Acknowledge without waiting: for callbacks that are not coroutines."""
        self._bus.post(self.reply, b"+ACK")

    def post_respond(self, data: bytes) -> None:
        """Answer without waiting: for callbacks that are not coroutines."""
        if self.reply:
            self._bus.post(self.reply, data)

    async def ack(self) -> None:
        """Settle the message: it is not delivered again."""
        self.post_ack()

    async def nak(self, delay_s: float = 0.0) -> None:
        """Give the message back; it is delivered again after ``delay_s``."""
        body = b'-NAK {"delay": %d}' % int(delay_s * 1e9) if delay_s > 0 else b"-NAK"
        self._bus.post(self.reply, body)

    async def in_progress(self) -> None:
        """Restart the time that the consumer waits for an acknowledgement."""
        self._bus.post(self.reply, b"+WPI")

    async def term(self) -> None:
        """Give the message up: it is not delivered again."""
        self._bus.post(self.reply, b"+TERM")

    async def respond(self, data: bytes) -> None:
        """Answer a request; without a reply subject nothing is sent."""
        self.post_respond(data)


def ack_tokens(reply: str) -> Sequence[str]:
    """Return delivered, stream sequence, consumer sequence, time and pending of an acknowledgement subject.

    Nine tokens without a domain, eleven or more with one.
    """
    tokens = reply.split(".")
    return tokens[4:9] if len(tokens) == 9 else tokens[6:11]


def parse_headers(raw: bytes) -> dict[str, str]:
    """Return the headers of a message; the inline status of the broker appears as Status and Description."""
    first, _, rest = raw.partition(b"\r\n")
    found: dict[str, str] = {}
    if len(first) > 9:  # NATS/1.0 404 No Messages
        status, _, description = first[9:].decode("utf-8", "replace").partition(" ")
        found[STATUS] = status
        found[DESCRIPTION] = description
    for line in rest.split(b"\r\n"):
        name, separator, value = line.partition(b":")
        if separator:
            found[name.decode("utf-8", "replace").strip()] = value.decode("utf-8", "replace").strip()
    return found


def format_headers(headers: Mapping[str, str]) -> bytes:
    """Return the wire form of headers; raise UsageError for what would break the line."""
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        if "\r" in value or "\n" in value or ":" in name or "\n" in name:
            raise UsageError(f"header {name!r} holds a line break or a colon", hint="Put such data into the payload.")
        lines.append(f"{name}: {value}")
    lines.append("\r\n")
    return "\r\n".join(lines).encode()
