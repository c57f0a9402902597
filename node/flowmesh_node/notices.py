"""Notices that a machine will be taken away: a file that appears, or what a provider's metadata service answers.

Three documented shapes are understood, whatever the address: that of AWS (``spot/instance-action``: 404 until there is a notice,
then ``{"action", "time"}``), of GCP (``instance/preempted``: ``TRUE``), of Azure (``scheduledevents``: ``{"Events": [...]}``).
Most machines go without any notice; nothing may depend on one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.clock import now_us

log = logging.getLogger("flowmesh.node")

POLL_S = 2.0
ANSWER_MAX_BYTES = 64 * 1024
ANSWER_TIMEOUT_S = 2.0
UNTOLD_S = 30.0
"""How soon a machine is taken to go that tells no time: the shortest notice of those providers."""

_HEADERS = {"Metadata-Flavor": "Google", "Metadata": "true"}
_TAKEN_AWAY = ("Preempt", "Terminate")


def leaving_at_us(text: str, now: int) -> int:
    """Return when the machine will be taken away according to an answer, in microseconds; 0 if it will not."""
    word = text.strip()
    if not word or word.upper() == "TRUE":
        return now + int(UNTOLD_S * 1e6) if word else 0
    try:
        told = msgspec.json.decode(word)
    except msgspec.DecodeError:
        return 0
    if isinstance(told, int | float) and not isinstance(told, bool):
        return now + int(max(0.0, float(told)) * 1e6)
    if not isinstance(told, dict):
        return 0
    if "Events" in told:
        times = [_moment(event.get("NotBefore"), now) for event in _events(told) if event.get("EventType") in _TAKEN_AWAY]
        return min(times, default=0)
    return _moment(told.get("time"), now) if told.get("time") or told.get("action") else 0


def _events(told: dict[str, Any]) -> list[dict[str, Any]]:
    events = told["Events"]
    return [each for each in events if isinstance(each, dict)] if isinstance(events, list) else []


def _moment(text: Any, now: int) -> int:
    """Return a time as providers write it, ISO 8601 or that of HTTP; soon, where none can be read."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            found = read(text)
            return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1e6)
    return now + int(UNTOLD_S * 1e6)


def check_address(url: str, *, anywhere: bool) -> None:
    """Raise UsageError for an address that is not on this machine or link, unless that is allowed."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(f"{url!r} is no address of a metadata service", hint="Give one that begins with http://.")
    if anywhere:
        return
    try:
        found = {ipaddress.ip_address(each[4][0]) for each in socket.getaddrinfo(parts.hostname, parts.port or 80)}
    except OSError as error:
        raise UsageError(f"{parts.hostname} cannot be resolved: {error}", hint="Check --notice-url.") from error
    if not all(each.is_loopback or each.is_link_local for each in found):
        raise UsageError(
            f"{parts.hostname} is neither this machine nor on its link",
            hint="Whoever answers there could end this node; add --notice-anywhere if that is meant.",
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


def ask(url: str) -> str:
    """Return what the metadata service says, empty when it says nothing; blocking. With the token of AWS where it wants one."""
    try:
        return _answer(urllib.request.Request(url, headers=_HEADERS))
    except urllib.error.HTTPError as error:
        if error.code != 401:
            return ""
    except OSError:
        return ""
    try:
        parts = urlsplit(url)
        wish = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        token = _answer(
            urllib.request.Request(f"{parts.scheme}://{parts.netloc}/latest/api/token", method="PUT", headers=wish, data=b"")
        )
        return _answer(urllib.request.Request(url, headers={**_HEADERS, "X-aws-ec2-metadata-token": token}))
    except OSError:
        return ""


def _answer(request: urllib.request.Request) -> str:
    with _opener.open(request, timeout=ANSWER_TIMEOUT_S) as answer:
        return bytes(answer.read(ANSWER_MAX_BYTES)).decode(errors="replace") or "{}"


def _text_of(file: Path) -> str | None:
    """Return what stands in a file; None while there is none."""
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError:
        return ""


async def wait_for_notice(file: Path | None, url: str, poll_s: float = POLL_S, ask: Callable[[str], str] = ask) -> int:
    """Wait until this machine is to be taken away; return when, in microseconds."""
    while True:
        if file is not None and (text := await asyncio.to_thread(_text_of, file)) is not None:
            return leaving_at_us(text, now_us()) or now_us() + int(UNTOLD_S * 1e6)
        if url and (at_us := leaving_at_us(await asyncio.to_thread(ask, url), now_us())):
            return at_us
        await asyncio.sleep(poll_s)
