"""Events of runs for whoever watches: numbered per run, in the encoding in which the run was submitted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from flowmesh_cas.cid import cid_text
from flowmesh_mesh import subjects
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import RunEvent, encode

CHANGES_MAX = 5000
CHANGES_GATHERED_S = 0.005
LINES_KEPT = 1000


class Feed:
    """Events of one run. What happens before the acceptance is durable waits for it."""

    def __init__(self, tenant: str, run: str, encoding: str, first: int = 0) -> None:
        self.seq = first
        self.subject = subjects.run_event(tenant, run)
        self.run = run
        self.encoding = encoding
        self.is_open = False
        self.held: list[tuple[str, dict[str, Any]]] = []
        self.changes: list[Any] = []
        self.counts: Mapping[str, int] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.lines: dict[int, tuple[int, deque[str]]] = {}


class Feeds:
    """The feeds of all runs. ``post`` publishes a core message; the stream RUNS keeps it."""

    def __init__(self, post: Callable[[str, bytes], None], clock_us: Callable[[], int], first: int = 0) -> None:
        self._post = post
        self._clock_us = clock_us
        self._first = first
        self._feeds: dict[tuple[str, str], Feed] = {}

    def feed(self, tenant: str, run: str, encoding: str = "msgpack") -> Feed:
        """Return the feed of a run, made on first use."""
        found = self._feeds.get((tenant, run))
        if found is None:
            found = self._feeds[(tenant, run)] = Feed(tenant, run, encoding, self._first)
        return found

    def seq(self, tenant: str, run: str) -> int:
        """Return the number of the last event of a run."""
        found = self._feeds.get((tenant, run))
        return found.seq if found else 0

    def send(self, feed: Feed, kind: str, body: dict[str, Any]) -> None:
        """Publish an event now."""
        feed.seq += 1
        event = RunEvent(feed.run, feed.seq, self._clock_us(), kind, body)
        if feed.encoding == "json":
            plain = {"v": 1, "run": event.run, "seq": event.seq, "at_us": event.at_us, "kind": kind, **body}
            self._post(feed.subject, msgspec.json.encode(plain))
        else:
            self._post(feed.subject, encode(event))

    def tell(self, tenant: str, run: str, kind: str, body: dict[str, Any]) -> None:
        """Publish an event once the run is accepted, after the changes that came before it."""
        feed = self.feed(tenant, run)
        if kind == "ended" and len(feed.changes) <= CHANGES_MAX:
            body = {**body, "changes": feed.changes}
            self._forget_changes(feed)
        self._flush(feed)
        self._tell(feed, kind, body)

    def _tell(self, feed: Feed, kind: str, body: dict[str, Any]) -> None:
        if feed.is_open:
            self.send(feed, kind, body)
        else:
            feed.held.append((kind, body))

    def open(self, feed: Feed) -> None:
        """The acceptance is durable: send what waited for it."""
        feed.is_open = True
        held, feed.held = feed.held, []
        for kind, body in held:
            self.send(feed, kind, body)

    def tell_changes(self, tenant: str, run: str, changes: list[Any], counts: Mapping[str, int]) -> None:
        """Publish changes of operators within a moment, together with those that follow at once."""
        feed = self.feed(tenant, run)
        feed.changes += changes
        feed.counts = counts
        if feed.timer is None:
            feed.timer = asyncio.get_running_loop().call_later(CHANGES_GATHERED_S, self._flush, feed)

    def _flush(self, feed: Feed) -> None:
        """Publish the changes that wait, in pieces that fit into messages."""
        changes, counts = feed.changes, dict(feed.counts)
        self._forget_changes(feed)
        for start in range(0, len(changes), CHANGES_MAX):
            self._tell(feed, "operators", {"changes": changes[start : start + CHANGES_MAX], "counts": counts})

    def _forget_changes(self, feed: Feed) -> None:
        feed.changes = []
        if feed.timer is not None:
            feed.timer.cancel()
            feed.timer = None

    def note_lines(
        self, tenant: str, run: str, index: int, name: str, lines: list[str], attempt: int = 0, node: str = ""
    ) -> None:
        """Publish log lines and keep the last of them, of the newest attempt, for those who ask later."""
        feed = self.feed(tenant, run)
        newest, kept = feed.lines.get(index, (0, deque[str](maxlen=LINES_KEPT)))
        if attempt > newest:
            kept.clear()
        if attempt >= newest:
            kept.extend(lines)
            feed.lines[index] = (attempt, kept)
        self.tell(tenant, run, "log", {"index": index, "name": name, "lines": lines, "attempt": attempt, "node": node})

    def lines_of(self, tenant: str, run: str, index: int, attempt: int) -> list[str]:
        """Return the last lines that an attempt at an operator printed."""
        newest, kept = self.feed(tenant, run).lines.get(index, (0, deque[str]()))
        return list(kept) if newest in (0, attempt) else []

    def forget(self, tenant: str, run: str) -> None:
        """Drop the feed of a run that is no longer in memory."""
        self._feeds.pop((tenant, run), None)


def plain_ref(ref: Ref) -> dict[str, Any]:
    """Return a content as plain data, for events and answers."""
    return {"kind": ref.kind, "cid": cid_text(ref.cid), "digest": ref.digest.hex(), "size": ref.size, "rows": ref.rows}


def plain_outputs(outputs: Mapping[str, list[Ref]]) -> dict[str, list[dict[str, Any]]]:
    """Return outputs by name as plain data."""
    return {name: [plain_ref(ref) for ref in refs] for name, refs in outputs.items()}
