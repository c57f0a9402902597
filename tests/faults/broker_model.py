"""A broker in memory: connections, subjects, accounts, streams, and the faults that a real one has.

It is spoken to in the broker's own protocol (PUB, HPUB, SUB, UNSUB, PING), so that the production bus runs on it unchanged.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec
from tests.faults.streams_model import Consumer, Incoming, Kept, RefusedError, Stream, format_status

from flowmesh_mesh import subjects
from flowmesh_mesh.delivery import ack_tokens, parse_headers

MAX_PAYLOAD = 2 * 1024 * 1024

_NO_RESPONDERS = format_status(503, "")
_TENANT_SUBJECTS = {"fm.submit", "fm.cancel", "fm.ask", "fm.put", "fm.get"}
_API = "$JS.API."
_encode = msgspec.json.Encoder().encode

Frame = tuple[int, bytes, bytes, bytes, bytes | None]
"""Number of the subscription, subject, reply, data and raw headers; number 0 is a PONG."""


class Receiver(Protocol):
    """The other side of a connection, as the broker sees it."""

    def deliver(self, frame: Frame) -> None: ...
    def hang_up(self) -> None: ...


class Session:
    """One connection at the broker. ``tenant`` is the key of its account, empty for the mesh's own."""

    def __init__(self, receiver: Receiver, name: str, owner: str, user: str, account: str, tenant: str) -> None:
        self.receiver = receiver
        self.name = name
        self.owner = owner
        """Name of the process behind it: who is told as the writer of a message."""
        self.user = user
        self.account = account
        self.tenant = tenant
        self.subscriptions: dict[int, _Subscription] = {}
        self.is_open = True


class _Subscription:
    __slots__ = ("is_import", "number", "pattern", "queue", "session")

    def __init__(self, session: Session, number: int, pattern: str, queue: str, is_import: bool) -> None:
        self.session = session
        self.number = number
        self.pattern = pattern
        self.queue = queue
        self.is_import = is_import


class _Interest:
    """Subscriptions by subject, as a tree of tokens."""

    __slots__ = ("children", "here")

    def __init__(self) -> None:
        self.children: dict[str, _Interest] = {}
        self.here: list[_Subscription] = []

    def add(self, subscription: _Subscription) -> None:
        node = self
        for token in subscription.pattern.split("."):
            node = node.children.setdefault(token, _Interest())
        node.here.append(subscription)

    def remove(self, subscription: _Subscription) -> None:
        path: list[tuple[_Interest, str]] = []
        node = self
        for token in subscription.pattern.split("."):
            path.append((node, token))
            node = node.children[token]
        node.here.remove(subscription)
        for parent, token in reversed(path):
            child = parent.children[token]
            if child.here or child.children:
                return
            del parent.children[token]

    def find(self, tokens: list[str]) -> list[_Subscription]:
        found: list[_Subscription] = []
        level = [self]
        for token in tokens:
            following: list[_Interest] = []
            for node in level:
                children = node.children
                if not children:
                    continue
                if (child := children.get(token)) is not None:
                    following.append(child)
                if (child := children.get("*")) is not None:
                    following.append(child)
                if (child := children.get(">")) is not None:
                    found += child.here
            if not following:
                return found
            level = following
        for node in level:
            found += node.here
        return found


class BrokerModel:
    """The broker. ``rng`` chooses members of queue groups and the length of faults."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random, wall_us: Callable[[], int]) -> None:
        self._loop = loop
        self._rng = rng
        self._wall_us = wall_us
        self.streams: dict[str, Stream] = {}
        self.sessions: dict[Session, None] = {}
        self._interest = _Interest()
        self.is_up = True
        self.mesh_account = ""
        self.system_account = ""
        self.leaderless_until_s: dict[str, float] = {}
        """Streams whose replicas elect a leader: they answer nobody, then with an error."""
        self.lose_answers = 0
        """So many of the next writes are stored and not acknowledged."""
        self.on_kept: list[Callable[[Stream, Kept], None]] = []
        self.on_published: list[Callable[[str, bytes, Session | None], None]] = []
        self.on_wiped: list[Callable[[], None]] = []
        self._life = 0
        self._taken_by: dict[str, str] = {}

    # --- connections

    def connect(self, receiver: Receiver, name: str, owner: str, user: str, account: str) -> Session | None:
        """Take a connection, None when the broker is down."""
        if not self.is_up:
            return None
        tenant = account if account and account not in (self.mesh_account, self.system_account) else ""
        session = Session(receiver, name, owner, user, account, tenant)
        self.sessions[session] = None
        self._tell_of(session, "CONNECT")
        return session

    def _tell_of(self, session: Session, event: str) -> None:
        body = {"client": {"name": session.name, "user": session.user, "nkey": session.user, "acc": session.account}}
        self.publish(None, f"$SYS.ACCOUNT.{session.account or 'G'}.{event}", "", _encode(body), None)

    def disconnect(self, session: Session) -> None:
        """Notice that a connection ended."""
        if not session.is_open:
            return
        session.is_open = False
        self.sessions.pop(session, None)
        for subscription in session.subscriptions.values():
            self._interest.remove(subscription)
        session.subscriptions.clear()
        if self.is_up:
            self._tell_of(session, "DISCONNECT")

    def hang_up(self, session: Session) -> None:
        """End a connection from this side."""
        self.disconnect(session)
        session.receiver.hang_up()

    def receive(self, session: Session, commands: Iterable[bytes]) -> None:
        """Carry out protocol commands of a connection."""
        for command in commands:
            if not session.is_open or not self.is_up:
                return
            line, _, body = command.partition(b"\r\n")
            words = line.split(b" ")
            verb = words[0]
            if verb == b"PUB":
                self._publish_of(session, words[1], words[2] if len(words) > 3 else b"", body[:-2], None)
            elif verb == b"HPUB":
                header_size = int(words[-2])
                reply = words[2] if len(words) > 4 else b""
                self._publish_of(session, words[1], reply, body[header_size:-2], body[:header_size])
            elif verb == b"SUB":
                self._subscribe(session, words[1].decode(), words[2].decode() if len(words) > 3 else "", int(words[-1]))
            elif verb == b"UNSUB":
                subscription = session.subscriptions.pop(int(words[1]), None)
                if subscription is not None:
                    self._interest.remove(subscription)
            elif verb == b"PING":
                session.receiver.deliver((0, b"", b"", b"", None))

    def _subscribe(self, session: Session, subject: str, queue: str, number: int) -> None:
        is_import = bool(session.tenant) and subject.startswith("fm.runs.")
        pattern = f"fm.runs.{session.tenant}.{subject.removeprefix('fm.runs.')}" if is_import else subject
        subscription = session.subscriptions[number] = _Subscription(session, number, pattern, queue, is_import)
        self._interest.add(subscription)

    # --- messages

    def _publish_of(self, session: Session, subject: bytes, reply: bytes, data: bytes, raw: bytes | None) -> None:
        text = subject.decode()
        if session.tenant and text in _TENANT_SUBJECTS:
            text = f"{text}.{session.tenant}"
        self.publish(session, text, reply.decode(), data, raw)

    def publish(self, session: Session | None, subject: str, reply: str, data: bytes, raw: bytes | None) -> None:
        """Hand a message to whom it concerns: interface, streams, subscribers."""
        if subject.startswith("$JS."):
            if subject.startswith(_API):
                self._answer_api(subject[len(_API) :], reply, data)
            elif subject.startswith("$JS.ACK."):
                self._take_ack(subject, reply, data)
            return
        tokens = subject.split(".")
        is_taken = False
        if not subject.startswith("_INBOX"):
            stream = self._stream_of(subject, tokens)
            if stream is not None:
                is_taken = True
                self._store(stream, session, subject, reply, data, raw)
        for hook in self.on_published:
            hook(subject, data, session)
        is_heard = self._deliver(subject, tokens, reply, data, raw)
        if reply and not is_heard and not is_taken:
            self._reply(reply, b"", _NO_RESPONDERS)

    def _stream_of(self, subject: str, tokens: list[str]) -> Stream | None:
        if subject not in self._taken_by:
            found = next((stream.name for stream in self.streams.values() if stream.takes(tokens)), "")
            if len(self._taken_by) > 10_000:
                self._taken_by.clear()
            self._taken_by[subject] = found
        return self.streams.get(self._taken_by[subject])

    def _deliver(self, subject: str, tokens: list[str], reply: str, data: bytes, raw: bytes | None) -> bool:
        found = self._interest.find(tokens)
        groups: dict[str, list[_Subscription]] = {}
        name, answer = subject.encode(), reply.encode()
        for each in found:
            if each.queue:
                groups.setdefault(each.queue, []).append(each)
            else:
                self._hand(each, name, subject, answer, data, raw)
        for members in groups.values():
            self._hand(self._rng.choice(members), name, subject, answer, data, raw)
        return bool(found)

    def _hand(self, to: _Subscription, name: bytes, subject: str, reply: bytes, data: bytes, raw: bytes | None) -> None:
        if to.is_import:
            name = f"fm.runs.{subject.removeprefix(f'fm.runs.{to.session.tenant}.')}".encode()
        to.session.receiver.deliver((to.number, name, reply, data, raw))

    def _reply(self, reply: str, data: bytes, raw: bytes | None = None) -> bool:
        return self._deliver(reply, reply.split("."), "", data, raw) if reply else False

    def _send_to(self, inbox: str, subject: str, reply: str, data: bytes, raw: bytes | None) -> bool:
        """Deliver a message of a stream to an inbox under its own subject; tell whether anybody listens there."""
        name, answer = subject.encode(), reply.encode()
        found = self._interest.find(inbox.split("."))
        for each in found:
            each.session.receiver.deliver((each.number, name, answer, data, raw))
        return bool(found)

    # --- streams

    def _store(self, stream: Stream, session: Session | None, subject: str, reply: str, data: bytes, raw: bytes | None) -> None:
        if self._is_leaderless(stream.name):
            if self._rng.random() < 0.5:
                self._reply(reply, b"", _NO_RESPONDERS)
            return
        headers = parse_headers(raw) if raw else {}
        message = Incoming(subject, data, raw, headers, session.owner if session is not None else "")
        try:
            answer: dict[str, Any] | None = stream.store(message)
        except RefusedError as error:
            answer = {"stream": stream.name, "seq": 0, "error": error.body}
        else:
            if self.lose_answers and answer is not None and reply:
                self.lose_answers -= 1
                return
        if answer is None or not reply:
            return
        body = _encode(answer)
        if stream.is_replicated and "error" not in answer:
            agreed_s = self._loop.time() + self._rng.uniform(0.0003, 0.002)
            stream.note_in_flight(message, agreed_s)
            life = self._life
            self._loop.call_at(agreed_s, lambda: self._reply(reply, body) if life == self._life else None)
        else:
            self._reply(reply, body)

    def _is_leaderless(self, stream: str) -> bool:
        return self.leaderless_until_s.get(stream, 0.0) > self._loop.time()

    def _note_kept(self, stream: Stream, kept: Kept) -> None:
        for hook in self.on_kept:
            hook(stream, kept)

    def _take_ack(self, subject: str, reply: str, data: bytes) -> None:
        parts = subject.split(".")
        stream = self.streams.get(parts[2])
        consumer = stream.consumers.get(parts[3]) if stream is not None else None
        if consumer is not None and not self._is_leaderless(parts[2]):
            consumer.ack(int(ack_tokens(subject)[1]), data)
            if reply:
                self._reply(reply, b"")

    # --- the interface

    def _answer_api(self, what: str, reply: str, data: bytes) -> None:
        words = what.split(".")
        if words[:3] == ["CONSUMER", "MSG", "NEXT"]:
            self._ask_consumer(words[3], words[4], reply, data)
            return
        name = words[3] if words[:2] == ["STREAM", "MSG"] else words[2]
        if self._is_leaderless(name):
            return
        body = msgspec.json.decode(data) if data else {}
        try:
            handler = _HANDLERS[".".join(words[:3] if words[:2] == ["STREAM", "MSG"] else words[:2])]
            answer = handler(self, name, words, body)
        except RefusedError as error:
            answer = {"error": error.body}
        self._reply(reply, _encode(answer))

    def _ask_consumer(self, stream: str, name: str, reply: str, data: bytes) -> None:
        found = self.streams.get(stream)
        consumer = found.consumers.get(name) if found is not None else None
        if self._is_leaderless(stream):
            return
        if consumer is None:
            self._reply(reply, b"", _NO_RESPONDERS)
        else:
            consumer.ask(reply, msgspec.json.decode(data) if data else {})

    def _stream(self, name: str) -> Stream:
        found = self.streams.get(name)
        if found is None:
            raise RefusedError(404, 10059, "stream not found")
        return found

    def _consumer(self, stream: str, name: str) -> Consumer:
        found = self._stream(stream).consumers.get(name)
        if found is None:
            raise RefusedError(404, 10014, "consumer not found")
        return found

    def _create_stream(self, name: str, _words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        self._taken_by.clear()
        found = self.streams.get(name)
        if found is None:
            found = self.streams[name] = Stream(body, self._loop.time, self._call_at)
            found.on_kept = self._note_kept
        elif any(found.config.get(field) != value for field, value in body.items() if field != "first_seq" and value):
            raise RefusedError(400, 10058, "stream name already in use with a different configuration")
        return found.describe()

    def _update_stream(self, name: str, _words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        self._taken_by.clear()
        stream = self._stream(name)
        stream.configure(body)
        return stream.describe()

    def _delete_stream(self, name: str, _words: list[str], _body: dict[str, Any]) -> dict[str, Any]:
        self._taken_by.clear()
        for consumer in self._stream(name).consumers.values():
            consumer.close("Consumer Deleted")
        del self.streams[name]
        return {"success": True}

    def _stream_info(self, name: str, _words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        return self._stream(name).describe(body.get("subjects_filter", ""))

    def _purge_stream(self, name: str, _words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        return {"success": True, "purged": self._stream(name).purge(body.get("filter", ""), body.get("seq", 0))}

    def _get_message(self, name: str, _words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        return self._stream(name).read(body)

    def _delete_message(self, name: str, _words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        if not self._stream(name).remove(body["seq"]):
            raise RefusedError(500, 10057, "no message found")
        return {"success": True}

    def _create_consumer(self, stream: str, words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        found, name, config = self._stream(stream), words[3], body["config"]
        consumer = found.consumers.get(name)
        if consumer is None:
            if found.config["retention"] == "workqueue" and found.consumers:
                raise RefusedError(400, 10100, "filtered consumer not unique on workqueue stream")
            if 0 < found.config["max_consumers"] <= len(found.consumers):
                raise RefusedError(400, 10026, "maximum consumers limit reached")
            consumer = Consumer(found, name, config, self._loop.time, self._call_at, self._send_to)
            found.consumers[name] = consumer
            if not config.get("durable_name") and config.get("inactive_threshold"):
                self._watch_activity(consumer, config["inactive_threshold"] / 1e9)
        return consumer.describe()

    def _watch_activity(self, consumer: Consumer, threshold_s: float) -> None:
        left_s = consumer.used_at_s + threshold_s - self._loop.time()
        if left_s > 0:
            self._loop.call_later(left_s, self._watch_activity, consumer, threshold_s)
        elif not consumer.is_gone:
            consumer.close("Consumer Deleted")
            consumer.stream.consumers.pop(consumer.name, None)

    def _consumer_info(self, stream: str, words: list[str], _body: dict[str, Any]) -> dict[str, Any]:
        return self._consumer(stream, words[3]).describe()

    def _consumer_names(self, stream: str, _words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        names = sorted(self._stream(stream).consumers)
        return {"consumers": names[body.get("offset", 0) :][:1024], "total": len(names)}

    def _delete_consumer(self, stream: str, words: list[str], _body: dict[str, Any]) -> dict[str, Any]:
        self._consumer(stream, words[3]).close("Consumer Deleted")
        del self.streams[stream].consumers[words[3]]
        return {"success": True}

    def _call_at(self, when_s: float, action: Callable[[], None]) -> Any:
        life = self._life
        return self._loop.call_at(when_s, lambda: action() if life == self._life else None)

    # --- faults

    def stop(self, *, is_power_lost: bool = False, unsynced_s: float = 0.0) -> None:
        """Die: every connection ends, memory is gone; with the power also what was stored in the last ``unsynced_s`` seconds."""
        self.is_up = False
        self._life += 1
        self._taken_by.clear()
        for session in list(self.sessions):
            self.hang_up(session)
        for name, stream in list(self.streams.items()):
            if stream.config["storage"] == "memory":
                del self.streams[name]
                continue
            stream.forget_batches()
            stream.consumers = {key: each for key, each in stream.consumers.items() if not each.is_in_memory}
            if is_power_lost and unsynced_s:
                stream.lose_since(self._loop.time() - unsynced_s)

    def start(self) -> None:
        """Come back with what was on disk. Memory streams are there again, empty, as their configuration is on no disk."""
        self.is_up = True
        for stream in self.streams.values():
            stream.arm(anew=True)
            for consumer in stream.consumers.values():
                consumer.restart()

    def wipe(self) -> None:
        """Lose the whole store; call it while the broker is down."""
        self.streams.clear()
        self._taken_by.clear()
        for hook in self.on_wiped:
            hook()


_HANDLERS: dict[str, Callable[[BrokerModel, str, list[str], dict[str, Any]], dict[str, Any]]] = {
    "STREAM.CREATE": BrokerModel._create_stream,
    "STREAM.UPDATE": BrokerModel._update_stream,
    "STREAM.DELETE": BrokerModel._delete_stream,
    "STREAM.INFO": BrokerModel._stream_info,
    "STREAM.PURGE": BrokerModel._purge_stream,
    "STREAM.MSG.GET": BrokerModel._get_message,
    "STREAM.MSG.DELETE": BrokerModel._delete_message,
    "CONSUMER.CREATE": BrokerModel._create_consumer,
    "CONSUMER.INFO": BrokerModel._consumer_info,
    "CONSUMER.NAMES": BrokerModel._consumer_names,
    "CONSUMER.DELETE": BrokerModel._delete_consumer,
}

GUARDED = (subjects.LEDGER, subjects.ASSIGN)
