"""Streams and consumers of the broker's model: what is kept, what is refused, what is delivered when.

Only what the mesh uses, but that as the real broker does it: tests/conformance/test_broker.py holds both to the same behaviour.
Nothing here knows connections: answers are returned, deliveries go to a function.
"""

from __future__ import annotations

import base64
import bisect
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

Headers = dict[str, str]

DEFAULTS: dict[str, Any] = {
    "retention": "limits",
    "storage": "file",
    "max_consumers": -1,
    "max_msgs": -1,
    "max_bytes": -1,
    "max_age": 0,
    "max_msgs_per_subject": -1,
    "max_msg_size": -1,
    "discard": "old",
    "discard_new_per_subject": False,
    "num_replicas": 1,
    "duplicate_window": 120_000_000_000,
    "first_seq": 0,
    "allow_direct": False,
    "allow_rollup_hdrs": False,
    "deny_delete": False,
    "allow_atomic": False,
    "allow_msg_ttl": False,
    "subject_delete_marker_ttl": 0,
}

WRONG_SEQUENCE, IN_FLIGHT, STORE_FAILED, NO_MESSAGE = 10071, 10164, 10077, 10037


class RefusedError(Exception):
    """What the broker answers with an error."""

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(description)
        self.body = {"code": code, "err_code": err_code, "description": description}


def matches(pattern: list[str], tokens: list[str]) -> bool:
    """Tell whether a subject matches a pattern with ``*`` and ``>``."""
    for index, token in enumerate(pattern):
        if token == ">":
            return len(tokens) > index
        if index >= len(tokens) or (token != "*" and token != tokens[index]):
            return False
    return len(pattern) == len(tokens)


def format_status(status: int, description: str, **headers: str) -> bytes:
    """Return the headers of a message in which the broker speaks for itself."""
    lines = [f"NATS/1.0 {status} {description}".rstrip(), *(f"{name}: {value}" for name, value in headers.items()), "\r\n"]
    return "\r\n".join(lines).encode()


class Kept:
    """A message in a stream. ``writer`` is the name of the connection that wrote it."""

    __slots__ = ("at_s", "data", "expires_s", "headers", "seq", "subject", "writer")

    def __init__(
        self, subject: str, data: bytes, headers: bytes | None, seq: int, at_s: float, expires_s: float, writer: str
    ) -> None:
        self.subject = subject
        self.data = data
        self.headers = headers
        self.seq = seq
        self.at_s = at_s
        self.expires_s = expires_s
        self.writer = writer

    @property
    def size(self) -> int:
        return len(self.data) + len(self.subject) + len(self.headers or b"") + 22


class Incoming:
    """A message on its way into a stream."""

    __slots__ = ("data", "headers", "raw", "subject", "writer")

    def __init__(self, subject: str, data: bytes, raw: bytes | None, headers: Headers, writer: str) -> None:
        self.subject = subject
        self.data = data
        self.raw = raw
        self.headers = headers
        self.writer = writer


def _ttl_s(text: str) -> float:
    if text == "never":
        return float("inf")
    if text.endswith("ms"):
        return int(text[:-2]) / 1000
    return float(text.removesuffix("s"))


class Stream:
    """One stream and its consumers."""

    def __init__(self, config: dict[str, Any], now_s: Callable[[], float], call_at: Callable[[float, Callable[[], None]], Any]):
        self.config = {**DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
        for name in ("max_msgs", "max_bytes", "max_consumers", "max_msgs_per_subject", "max_msg_size"):
            self.config[name] = self.config[name] or -1
        self.config["num_replicas"] = self.config["num_replicas"] or 1
        self.name: str = config["name"]
        self._now_s = now_s
        self._call_at = call_at
        self._patterns = [subject.split(".") for subject in self.config["subjects"]]
        self.last_seq = max(0, int(self.config["first_seq"]) - 1)
        self.messages: dict[int, Kept] = {}
        self._seqs: list[int] = []
        self._by_subject: dict[str, list[int]] = {}
        self._bytes = 0
        self._known: dict[str, tuple[int, float]] = {}
        self._last_of_filter: dict[str, tuple[list[str], int]] = {}
        self._in_flight: dict[str, float] = {}
        self._batches: dict[str, list[Incoming]] = {}
        self._expiries: list[tuple[float, int]] = []
        self.consumers: dict[str, Consumer] = {}
        self._armed_s = float("inf")
        self.on_kept: Callable[[Stream, Kept], None] = lambda stream, kept: None

    def takes(self, tokens: list[str]) -> bool:
        """Tell whether a subject belongs to this stream."""
        return any(matches(pattern, tokens) for pattern in self._patterns)

    def configure(self, config: dict[str, Any]) -> None:
        """Bring the stream to another configuration."""
        self.config |= {name: value for name, value in config.items() if name != "first_seq"}
        self._patterns = [subject.split(".") for subject in self.config["subjects"]]

    # --- writing

    def store(self, message: Incoming) -> dict[str, Any] | None:
        """Take a message; return the acknowledgement, None for one in the middle of a batch. Raise RefusedError."""
        self.expire()
        batch = message.headers.get("Nats-Batch-Id")
        if batch is not None:
            return self._stage(batch, message)
        known = self._known_id(message.headers)
        if self.is_replicated and known is not None:
            return self._ack(known, duplicate=True)
        self._check_expectation(message)
        if known is not None:
            return self._ack(known, duplicate=True)
        self._check_room(message, set())
        return self._ack(self._keep(message))

    @property
    def is_replicated(self) -> bool:
        return bool(self.config["num_replicas"] > 1)

    def _ack(self, seq: int, **more: Any) -> dict[str, Any]:
        return {"stream": self.name, "seq": seq, **more}

    def _known_id(self, headers: Headers) -> int | None:
        name = headers.get("Nats-Msg-Id")
        if not name or name not in self._known:
            return None
        seq, at_s = self._known[name]
        if self._now_s() - at_s > self.config["duplicate_window"] / 1e9:
            del self._known[name]
            return None
        return seq

    def _check_expectation(self, message: Incoming) -> None:
        expected = message.headers.get("Nats-Expected-Last-Subject-Sequence")
        if expected is None:
            return
        subject = message.headers.get("Nats-Expected-Last-Subject-Sequence-Subject", message.subject)
        now_s = self._now_s()
        if self.is_replicated and self._in_flight.get(subject, 0.0) > now_s:
            raise RefusedError(400, IN_FLIGHT, "expected last sequence per subject temporarily unavailable")
        last = self.last_seq_of(subject)
        if last != int(expected):
            raise RefusedError(400, WRONG_SEQUENCE, f"wrong last sequence: {last}")

    def note_in_flight(self, message: Incoming, until_s: float) -> None:
        """Remember that a conditional write is being agreed on: another on the same subject is refused meanwhile."""
        if "Nats-Expected-Last-Subject-Sequence" in message.headers:
            subject = message.headers.get("Nats-Expected-Last-Subject-Sequence-Subject", message.subject)
            self._in_flight[subject] = until_s

    def _check_room(self, message: Incoming, fresh: set[str]) -> None:
        config = self.config
        if "Nats-TTL" in message.headers and not config["allow_msg_ttl"]:
            raise RefusedError(400, 10166, "per-message TTL is disabled")
        if config["discard"] != "new":
            return
        if config["discard_new_per_subject"] and config["max_msgs_per_subject"] > 0:
            held = len(self._by_subject.get(message.subject, ())) + (message.subject in fresh)
            if held >= config["max_msgs_per_subject"]:
                raise RefusedError(503, STORE_FAILED, "maximum messages per subject exceeded")
        if 0 < config["max_msgs"] <= len(self.messages):
            raise RefusedError(503, STORE_FAILED, "maximum messages exceeded")
        if 0 < config["max_bytes"] < self._bytes + len(message.data):
            raise RefusedError(503, STORE_FAILED, "maximum bytes exceeded")

    def _stage(self, batch: str, message: Incoming) -> dict[str, Any] | None:
        if not self.config["allow_atomic"]:
            raise RefusedError(400, 10174, "atomic publish is disabled")
        position = int(message.headers["Nats-Batch-Sequence"])
        staged = self._batches.setdefault(batch, []) if position == 1 else self._batches.get(batch)
        if staged is None or len(staged) != position - 1:
            self._batches.pop(batch, None)
            if "Nats-Batch-Commit" not in message.headers:
                return None
            raise RefusedError(400, 10176, "atomic publish sequence is incomplete")
        staged.append(message)
        if "Nats-Batch-Commit" not in message.headers:
            return None
        del self._batches[batch]
        return self._commit(batch, staged)

    def _commit(self, batch: str, staged: list[Incoming]) -> dict[str, Any]:
        fresh: set[str] = set()
        for message in staged:
            self._check_expectation(message)
            self._check_room(message, fresh)
            fresh.add(message.subject)
        for message in staged:
            last = self._keep(message)
        return self._ack(last, batch=batch, count=len(staged))

    def forget_batches(self) -> None:
        """Abandon what is staged."""
        self._batches.clear()

    def _keep(self, message: Incoming) -> int:
        now_s = self._now_s()
        seq: int = self.last_seq + 1
        self.last_seq = seq
        ttl = message.headers.get("Nats-TTL")
        expires_s = now_s + _ttl_s(ttl) if ttl else float("inf")
        if self.config["max_age"] and ttl != "never":
            expires_s = min(expires_s, now_s + self.config["max_age"] / 1e9)
        kept = Kept(message.subject, message.data, message.raw, seq, now_s, expires_s, message.writer)
        name = message.headers.get("Nats-Msg-Id")
        if name:
            self._known[name] = (seq, now_s)
        self._add(kept)
        self._evict(message.subject)
        return seq

    def _add(self, kept: Kept) -> None:
        self.messages[kept.seq] = kept
        self._seqs.append(kept.seq)
        self._by_subject.setdefault(kept.subject, []).append(kept.seq)
        self._bytes += kept.size
        if kept.expires_s != float("inf"):
            heapq.heappush(self._expiries, (kept.expires_s, kept.seq))
            self.arm()
        if self._last_of_filter:
            tokens = kept.subject.split(".")
            for text, (pattern, _) in self._last_of_filter.items():
                if matches(pattern, tokens):
                    self._last_of_filter[text] = (pattern, kept.seq)
        self.on_kept(self, kept)
        for consumer in list(self.consumers.values()):
            consumer.note_new(kept)

    def _evict(self, subject: str) -> None:
        """Make room by dropping the oldest, where the configuration says so."""
        config = self.config
        limit = int(config["max_msgs_per_subject"])
        held = self._by_subject.get(subject, [])
        while limit > 0 and len(held) > limit:
            self.remove(held[0])
        while 0 < config["max_msgs"] < len(self.messages) or 0 < config["max_bytes"] < self._bytes:
            self.remove(next(iter(self.messages)))

    def expire(self) -> None:
        """Remove what has outlived its time; the last of a subject leaves a marker where the stream is set up so."""
        now_s = self._now_s()
        while self._expiries and self._expiries[0][0] <= now_s:
            _, seq = heapq.heappop(self._expiries)
            kept = self.messages.get(seq)
            if kept is None:
                continue
            is_last = self._by_subject[kept.subject][-1] == seq
            is_marker = kept.headers is not None and b"Nats-Marker-Reason" in kept.headers
            self.remove(seq)
            marker_ns = self.config["subject_delete_marker_ttl"]
            if marker_ns and is_last and not is_marker:
                self._mark(kept.subject, marker_ns / 1e9)

    def arm(self, *, anew: bool = False) -> None:
        """See that what expires next is removed in time; ``anew`` when the broker has forgotten its timers."""
        if anew:
            self._armed_s = float("inf")
        if self._expiries and self._expiries[0][0] < self._armed_s:
            self._armed_s = self._expiries[0][0]
            self._call_at(self._armed_s, self._wake)

    def _wake(self) -> None:
        self._armed_s = float("inf")
        self.expire()
        self.arm()

    def _mark(self, subject: str, ttl_s: float) -> None:
        raw = f"NATS/1.0\r\nNats-Marker-Reason: MaxAge\r\nNats-TTL: {ttl_s:g}s\r\n\r\n".encode()
        self.last_seq += 1
        now_s = self._now_s()
        self._add(Kept(subject, b"", raw, self.last_seq, now_s, now_s + ttl_s, "the broker"))

    # --- removing

    def remove(self, seq: int) -> bool:
        """Remove one message; tell whether it was there."""
        kept = self.messages.pop(seq, None)
        if kept is None:
            return False
        self._bytes -= kept.size
        held = self._by_subject[kept.subject]
        held.remove(seq)
        if not held:
            del self._by_subject[kept.subject]
        for text, (_, last) in list(self._last_of_filter.items()):
            if last == seq:
                del self._last_of_filter[text]
        if len(self._seqs) > 64 and len(self._seqs) > 2 * len(self.messages):
            self._seqs = list(self.messages)
        for consumer in self.consumers.values():
            consumer.note_removed(kept)
        return True

    def purge(self, subject: str, below_seq: int) -> int:
        """Remove what matches; return how many."""
        if not subject and not below_seq:
            doomed = list(self.messages)
        else:
            doomed = [kept.seq for kept in self.select(subject or ">", 0) if not below_seq or kept.seq < below_seq]
        for seq in doomed:
            self.remove(seq)
        return len(doomed)

    def lose_since(self, at_s: float) -> int:
        """Lose what was stored after a moment, although it was acknowledged: the disk had not synced it. Return how many."""
        doomed = [seq for seq, kept in self.messages.items() if kept.at_s > at_s]
        for seq in doomed:
            self.remove(seq)
        if doomed:
            self.last_seq = doomed[0] - 1
            self._seqs = list(self.messages)
            self._known = {name: found for name, found in self._known.items() if found[0] <= self.last_seq}
        return len(doomed)

    # --- reading

    @property
    def first_seq(self) -> int:
        return next(iter(self.messages), self.last_seq + 1)

    def last_seq_of(self, pattern: str) -> int:
        """Return the sequence of the last message of a subject, which may have wildcards; 0 when there is none."""
        if "*" not in pattern and ">" not in pattern:
            held = self._by_subject.get(pattern)
            return held[-1] if held else 0
        found = self._last_of_filter.get(pattern)
        if found is None:
            tokens = pattern.split(".")
            last = max((held[-1] for s, held in self._by_subject.items() if matches(tokens, s.split("."))), default=0)
            found = self._last_of_filter[pattern] = (tokens, last)
        return found[1]

    def select(self, pattern: str, from_seq: int) -> Iterator[Kept]:
        """Yield messages from a sequence on whose subject matches."""
        tokens = pattern.split(".")
        everything = pattern in ("", ">")
        seqs = self._seqs
        index = bisect.bisect_left(seqs, from_seq)
        while index < len(seqs):
            kept = self.messages.get(seqs[index])
            index += 1
            if kept is not None and (everything or kept.subject == pattern or matches(tokens, kept.subject.split("."))):
                yield kept

    def read(self, query: dict[str, Any]) -> dict[str, Any]:
        """Answer a question for one message."""
        self.expire()
        if "last_by_subj" in query:
            kept = self.messages.get(self.last_seq_of(query["last_by_subj"]))
        elif "next_by_subj" in query:
            kept = next(self.select(query["next_by_subj"], query.get("seq", 0)), None)
        else:
            kept = self.messages.get(query["seq"])
        if kept is None:
            raise RefusedError(404, NO_MESSAGE, "no message found")
        found: dict[str, Any] = {"subject": kept.subject, "seq": kept.seq, "data": base64.b64encode(kept.data).decode()}
        if kept.headers:
            found["hdrs"] = base64.b64encode(kept.headers).decode()
        return {"message": found}

    def describe(self, subjects_filter: str = "") -> dict[str, Any]:
        """Return configuration and state."""
        self.expire()
        state: dict[str, Any] = {
            "messages": len(self.messages),
            "bytes": self._bytes,
            "first_seq": self.first_seq,
            "last_seq": self.last_seq,
            "consumer_count": len(self.consumers),
            "num_subjects": len(self._by_subject),
        }
        if subjects_filter:
            pattern = subjects_filter.split(".")
            state["subjects"] = {s: len(held) for s, held in self._by_subject.items() if matches(pattern, s.split("."))}
        return {"config": dict(self.config), "state": state}


class _Waiting:
    """A request for messages."""

    __slots__ = ("ends_s", "heartbeat_s", "heartbeat_timer", "inbox", "left", "no_wait")

    def __init__(self, inbox: str, body: dict[str, Any], now_s: float) -> None:
        self.inbox = inbox
        self.left: int = body.get("batch", 1)
        expires = body.get("expires", 0)
        self.ends_s = now_s + expires / 1e9 if expires else float("inf")
        self.heartbeat_s = body.get("idle_heartbeat", 0) / 1e9
        self.no_wait: bool = body.get("no_wait", False)
        self.heartbeat_timer: Any = None


class Consumer:
    """A pull consumer. ``send`` gets inbox, subject, reply, data and headers; it tells whether anybody listens there."""

    def __init__(
        self,
        stream: Stream,
        name: str,
        config: dict[str, Any],
        now_s: Callable[[], float],
        call_at: Callable[[float, Callable[[], None]], Any],
        send: Callable[[str, str, str, bytes, bytes | None], bool],
    ) -> None:
        self.stream = stream
        self.name = name
        self.config = config
        self._now_s = now_s
        self._call_at = call_at
        self._send = send
        self._filter: str = config.get("filter_subject", "")
        self._tokens = self._filter.split(".") if self._filter else []
        self.is_explicit = config.get("ack_policy", "none") == "explicit"
        self._ack_wait_s = (config.get("ack_wait") or 30_000_000_000) / 1e9
        self._max_ack_pending: int = config.get("max_ack_pending") or 1000
        start = config.get("opt_start_seq", 0) if config.get("deliver_policy") == "by_start_sequence" else 0
        self.next_seq = max(start, 1)
        self.num_pending = sum(1 for _ in stream.select(self._filter or ">", self.next_seq))
        self.unacked: dict[int, tuple[float, int]] = {}
        """Sequence -> when it is delivered again, and how often it was delivered."""
        self._again: deque[int] = deque()
        self._counts: dict[int, int] = {}
        self._delivered = 0
        self._waiting: deque[_Waiting] = deque()
        self.used_at_s = now_s()
        self.is_gone = False

    @property
    def is_in_memory(self) -> bool:
        return bool(self.config.get("mem_storage")) or self.stream.config["storage"] == "memory"

    def wants(self, subject: str) -> bool:
        return not self._tokens or matches(self._tokens, subject.split("."))

    def note_new(self, kept: Kept) -> None:
        if kept.seq >= self.next_seq and self.wants(kept.subject):
            self.num_pending += 1
            if self._waiting:
                self.work()

    def note_removed(self, kept: Kept) -> None:
        if kept.seq >= self.next_seq and self.wants(kept.subject):
            self.num_pending -= 1
        self.unacked.pop(kept.seq, None)

    # --- requests

    def ask(self, inbox: str, body: dict[str, Any]) -> None:
        """Take a request for messages."""
        self.used_at_s = self._now_s()
        waiting = _Waiting(inbox, body, self.used_at_s)
        self._waiting.append(waiting)
        self.work()
        if waiting.left and waiting in self._waiting:
            if waiting.no_wait:
                self._end(waiting, 404, "No Messages")
                return
            if waiting.ends_s != float("inf"):
                self._call_at(waiting.ends_s, lambda: self._expire(waiting))
            if waiting.heartbeat_s:
                self._beat_later(waiting)

    def _beat_later(self, waiting: _Waiting) -> None:
        waiting.heartbeat_timer = self._call_at(self._now_s() + waiting.heartbeat_s, lambda: self._beat(waiting))

    def _beat(self, waiting: _Waiting) -> None:
        if waiting in self._waiting and not self.is_gone:
            if self._send(waiting.inbox, waiting.inbox, "", b"", format_status(100, "Idle Heartbeat")):
                self._beat_later(waiting)
            else:
                self._waiting.remove(waiting)

    def _expire(self, waiting: _Waiting) -> None:
        if waiting in self._waiting and not self.is_gone:
            self._end(waiting, 408, "Request Timeout")

    def _end(self, waiting: _Waiting, status: int, description: str) -> None:
        self._waiting.remove(waiting)
        if waiting.heartbeat_timer is not None:
            waiting.heartbeat_timer.cancel()
        self._send(waiting.inbox, waiting.inbox, "", b"", format_status(status, description))

    def close(self, description: str) -> None:
        """Tell those who wait that the consumer is gone."""
        self.is_gone = True
        for waiting in list(self._waiting):
            self._end(waiting, 409, description)

    def work(self) -> None:
        """Deliver while somebody waits and something is there."""
        while self._waiting and not self.is_gone:
            if self.is_explicit and len(self.unacked) >= self._max_ack_pending:
                return
            found = self._next()
            if found is None:
                return
            self._deliver(found)

    def _next(self) -> Kept | None:
        while self._again:
            kept = self.stream.messages.get(self._again.popleft())
            if kept is not None:
                return kept
        kept = next(self.stream.select(self._filter or ">", self.next_seq), None) if self.num_pending > 0 else None
        if kept is not None:
            self.next_seq = kept.seq + 1
            self.num_pending -= 1
        return kept

    def _deliver(self, kept: Kept) -> None:
        count = self._counts[kept.seq] = self._counts.get(kept.seq, 0) + 1
        if not self.is_explicit:
            del self._counts[kept.seq]
        self._delivered += 1
        stamp = int(self._now_s() * 1e9)
        name, consumer = self.stream.name, self.name
        reply = f"$JS.ACK.{name}.{consumer}.{count}.{kept.seq}.{self._delivered}.{stamp}.{self.num_pending}"
        while self._waiting:
            waiting = self._waiting[0]
            if self._send(waiting.inbox, kept.subject, reply, kept.data, kept.headers):
                waiting.left -= 1
                if waiting.heartbeat_timer is not None:
                    waiting.heartbeat_timer.cancel()
                    self._beat_later(waiting)
                if not waiting.left:
                    self._waiting.popleft()
                    if waiting.heartbeat_timer is not None:
                        waiting.heartbeat_timer.cancel()
                break
            self._waiting.popleft()  # nobody listens there any more
        else:
            self._again.appendleft(kept.seq)
            return
        if self.is_explicit:
            self._await_ack(kept.seq, self._ack_wait_s, count)

    # --- acknowledgements

    def _await_ack(self, seq: int, after_s: float, count: int) -> None:
        due_s = self._now_s() + after_s
        self.unacked[seq] = (due_s, count)
        self._call_at(due_s, lambda: self._due(seq, due_s))

    def _due(self, seq: int, due_s: float) -> None:
        if not self.is_gone and self.unacked.get(seq, (0.0, 0))[0] == due_s:
            del self.unacked[seq]
            self._again.append(seq)
            self.work()

    def ack(self, seq: int, body: bytes) -> None:
        """Take an acknowledgement of whatever delivery of a message."""
        self.used_at_s = self._now_s()
        if body.startswith(b"+WPI"):
            if seq in self.unacked:
                self._await_ack(seq, self._ack_wait_s, self.unacked[seq][1])
        elif body.startswith(b"-NAK"):
            if seq in self.unacked:
                delay_ns = int(body.partition(b'"delay": ')[2].rstrip(b"} ") or 0)
                self._await_ack(seq, delay_ns / 1e9, self.unacked[seq][1])
        else:
            self._settle(seq)
        self.work()

    def _settle(self, seq: int) -> None:
        self.unacked.pop(seq, None)
        self._counts.pop(seq, None)
        if seq in self._again:
            self._again.remove(seq)
        if self.stream.config["retention"] == "workqueue":
            self.stream.remove(seq)

    def restart(self) -> None:
        """The broker was started again: requests are forgotten, what was not acknowledged will come again."""
        self._waiting.clear()
        for seq, (_, count) in list(self.unacked.items()):
            self._await_ack(seq, self._ack_wait_s, count)

    def describe(self) -> dict[str, Any]:
        """Return configuration and state."""
        return {
            "stream_name": self.stream.name,
            "name": self.name,
            "config": self.config,
            "num_pending": self.num_pending,
            "num_ack_pending": len(self.unacked),
            "num_redelivered": sum(count > 1 for _, count in self.unacked.values()),
            "num_waiting": len(self._waiting),
        }
