"""Streams and consumers through the broker's own interface: make, look, read, delete. Every read is the leader's."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from flowmesh_cas.errors import InternalError, NotFoundError, TransientError
from flowmesh_mesh.delivery import ApiError, MadeOtherwiseError, NoAnswerError, StoredMessage, error_of, parse_headers
from flowmesh_mesh.streams import ConsumerConfig, StreamConfig

T = TypeVar("T")


class StreamState(msgspec.Struct, frozen=True):
    """What a stream holds."""

    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    consumer_count: int = 0
    num_subjects: int = 0
    num_deleted: int = 0
    subjects: dict[str, int] = {}


class Replica(msgspec.Struct, frozen=True):
    """A copy of a stream on another broker than the leading one's."""

    name: str = ""
    current: bool = False
    offline: bool = False
    lag: int = 0


class StreamCluster(msgspec.Struct, frozen=True):
    """Who leads a stream of several copies, and how the others are."""

    leader: str = ""
    replicas: list[Replica] = []


class StreamInfo(msgspec.Struct, frozen=True):
    """How a stream is set up, as the broker words it, and what it holds; ``cluster`` where the broker is one of several."""

    config: dict[str, Any] = {}
    state: StreamState = StreamState()
    error: ApiError | None = None
    cluster: StreamCluster | None = None


class ConsumerState(msgspec.Struct, frozen=True):
    """How far a consumer is: ``num_pending`` not delivered yet, ``num_ack_pending`` delivered and not settled."""

    num_pending: int = 0
    num_ack_pending: int = 0
    num_redelivered: int = 0
    num_waiting: int = 0
    error: ApiError | None = None


class _Kept(msgspec.Struct, frozen=True):
    subject: str
    seq: int
    hdrs: str = ""
    data: str = ""


class _Message(msgspec.Struct, frozen=True):
    message: _Kept | None = None
    error: ApiError | None = None


class _Done(msgspec.Struct, frozen=True):
    error: ApiError | None = None
    success: bool = False
    num_pending: int = 0


class _Names(msgspec.Struct, frozen=True):
    consumers: list[str] | None = None
    total: int = 0
    error: ApiError | None = None


class StreamApi(ABC):
    """What can be asked of streams, given a way to ask."""

    @abstractmethod
    async def request(
        self, subject: str, data: bytes = b"", *, timeout_s: float = 2.0, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """Ask and return the first answer."""

    async def _api(self, subject: str, body: Any, kind: type[T], what: str, timeout_s: float = 5.0) -> T:
        """Ask the stream API; raise our error when it answers with one."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        try:
            answer = await self.request(f"$JS.API.{subject}", data, timeout_s=timeout_s)
        except NoAnswerError as error:
            raise TransientError(
                f"{what}: the broker's streams are not ready", hint="The broker is starting: try again."
            ) from error
        decoded = msgspec.json.decode(answer, type=kind)
        error_body: ApiError | None = getattr(decoded, "error", None)
        if error_body is not None:
            raise error_of(error_body, what)
        return decoded

    async def last_message(self, stream: str, subject: str, *, timeout_s: float = 5.0) -> StoredMessage | None:
        """Return the last message of ``subject`` as the stream's leader knows it; None when there is none."""
        return await self._read(stream, {"last_by_subj": subject}, timeout_s)

    async def message(self, stream: str, seq: int) -> StoredMessage | None:
        """Return the message with sequence ``seq`` as the stream's leader knows it; None when there is none."""
        return await self._read(stream, {"seq": seq})

    async def next_message(self, stream: str, from_seq: int, subject_filter: str = ">") -> StoredMessage | None:
        """Return the first message at or after ``from_seq`` whose subject matches, by the leader; None when there is none."""
        return await self._read(stream, {"seq": max(1, from_seq), "next_by_subj": subject_filter})

    async def _read(self, stream: str, query: dict[str, Any], timeout_s: float = 5.0) -> StoredMessage | None:
        try:
            found = await self._api(f"STREAM.MSG.GET.{stream}", query, _Message, f"reading {stream}", timeout_s)
        except NotFoundError as error:
            if "no message found" in error.message:
                return None
            raise
        if found.message is None:
            return None
        kept = found.message
        headers = parse_headers(base64.b64decode(kept.hdrs)) if kept.hdrs else {}
        return StoredMessage(kept.subject, base64.b64decode(kept.data), kept.seq, headers)

    async def ensure_stream(self, config: StreamConfig) -> StreamState:
        """Create the stream, or bring it to ``config``; what can only be set at creation stays as it is."""
        what = f"stream {config.name}"
        try:
            found = await self._api(f"STREAM.INFO.{config.name}", b"", StreamInfo, what)
        except NotFoundError:
            try:
                created = await self._api(f"STREAM.CREATE.{config.name}", config, StreamInfo, what)
                return created.state
            except MadeOtherwiseError:  # another scheduler was faster: its first sequence is another
                found = await self._api(f"STREAM.INFO.{config.name}", b"", StreamInfo, what)
        wanted = msgspec.to_builtins(config)
        wanted.pop("first_seq", None)
        if any(found.config.get(name) != value for name, value in wanted.items()):
            merged = {**found.config, **wanted}
            found = await self._api(f"STREAM.UPDATE.{config.name}", merged, StreamInfo, what)
        return found.state

    async def stream_info(self, stream: str, *, subjects: str = "") -> StreamInfo | None:
        """Return a stream's configuration and state, None when there is none; ``subjects`` filters what is counted by subject."""
        body = {"subjects_filter": subjects} if subjects else b""
        try:
            return await self._api(f"STREAM.INFO.{stream}", body, StreamInfo, f"stream {stream}")
        except NotFoundError:
            return None

    async def stream_state(self, stream: str, *, subjects: str = "") -> StreamState | None:
        """Return what a stream holds, None when it does not exist; ``subjects`` is a filter of subjects to count."""
        found = await self.stream_info(stream, subjects=subjects)
        return None if found is None else found.state

    async def ensure_consumer(self, stream: str, config: ConsumerConfig) -> int:
        """Create the consumer or bring it to ``config``; return how many messages wait for it."""
        body = {"stream_name": stream, "config": msgspec.to_builtins(config)}
        subject = f"CONSUMER.CREATE.{stream}.{config.name}" + (f".{config.filter_subject}" if config.filter_subject else "")
        return (await self._api(subject, body, _Done, f"consumer {config.name} of {stream}")).num_pending

    async def consumer_state(self, stream: str, consumer: str) -> ConsumerState | None:
        """Return how far a consumer is, None when there is none."""
        try:
            return await self._api(f"CONSUMER.INFO.{stream}.{consumer}", b"", ConsumerState, f"consumer {consumer} of {stream}")
        except NotFoundError:
            return None

    async def consumer_names(self, stream: str) -> list[str]:
        """Return the names of all consumers of a stream; none when there is no stream."""
        found: list[str] = []
        while True:
            try:
                page = await self._api(f"CONSUMER.NAMES.{stream}", {"offset": len(found)}, _Names, f"consumers of {stream}")
            except NotFoundError:
                return found
            found += page.consumers or ()
            if not page.consumers or len(found) >= page.total:
                return found

    async def delete_consumer(self, stream: str, consumer: str) -> None:
        """Delete a consumer; it is no error when there is none."""
        try:
            await self._api(f"CONSUMER.DELETE.{stream}.{consumer}", b"", _Done, f"consumer {consumer} of {stream}")
        except NotFoundError:
            return

    async def delete_message(self, stream: str, seq: int) -> bool:
        """Delete one message; tell whether it was there."""
        try:
            await self._api(f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": True}, _Done, f"message {seq} of {stream}")
        except InternalError as error:
            if "(10057)" in error.message or "not found" in error.message:
                return False
            raise
        except NotFoundError:
            return False
        return True

    async def purge(self, stream: str, subject: str = "", *, below_seq: int = 0) -> None:
        """Delete all messages, or those of ``subject`` (wildcards allowed), or those with a sequence below ``below_seq``."""
        body: dict[str, Any] = {"filter": subject} if subject else {}
        if below_seq:
            body["seq"] = below_seq
        await self._api(f"STREAM.PURGE.{stream}", body or b"", _Done, f"purging {stream}")

    async def delete_stream(self, stream: str) -> None:
        """Delete a stream and all it holds; it is no error when there is none."""
        try:
            await self._api(f"STREAM.DELETE.{stream}", b"", _Done, f"stream {stream}")
        except NotFoundError:
            return
