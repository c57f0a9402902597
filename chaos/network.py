"""The network between processes, in our hands: each connection to a broker runs through a listener of its own source.

Every process is told addresses that lead here, one listener for each (source, target); what a link is made to do touches that
process alone, and needs no rights of the machine. Nothing is altered or reordered within a connection: as with TCP, bytes
arrive late, all of them in order, or the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

CHUNK_BYTES = 64 * 1024
HOST = "127.0.0.1"


class Mode(StrEnum):
    """What a link does with what passes through it."""

    OPEN = "open"
    CUT = "cut"
    """Connections end at once, and none can be made."""
    HOLE = "hole"
    """Nothing passes and nobody is told; what was held arrives once the link is open again, as after lost packets."""
    SWALLOW = "swallow"
    """Accepts everything and drops it; the connections end when the link opens."""
    HALF_OUT = "half-out"
    """What the source says arrives, what is answered does not, until the link opens."""
    HALF_IN = "half-in"
    """What the source says does not arrive, what it is told does."""
    SLOW = "slow"
    """Every piece waits for the link's delay."""


@dataclass(slots=True)
class Link:
    """Everything between one source and one target."""

    source: str
    target: str
    mode: Mode = Mode.OPEN
    delay_s: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    wires: set[asyncio.Task[None]] = field(default_factory=set)

    def holds(self, is_outward: bool) -> bool:
        """Tell whether bytes of a direction have to wait."""
        return self.mode is Mode.HOLE or self.mode is (Mode.HALF_IN if is_outward else Mode.HALF_OUT)

    def turn(self, mode: Mode, delay_s: float = 0.0) -> None:
        """Let the link do something else from now on."""
        before, self.mode, self.delay_s = self.mode, mode, delay_s
        if mode is Mode.CUT or before is Mode.SWALLOW:
            for wire in list(self.wires):
                wire.cancel()
        self.changed.set()
        self.changed = asyncio.Event()


class Network:
    """Listeners of many sources to many targets, by their ports."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        self._servers: list[asyncio.Server] = []

    async def listen(self, source: str, target: str, target_port: int, port: int = 0) -> int:
        """Open the way of ``source`` to ``target``; return the port on which the source finds it."""
        link = self._links.setdefault((source, target), Link(source, target))

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._carry(link, target_port, reader, writer)

        server = await asyncio.start_server(accept, HOST, port)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def between(self, sources: Iterable[str], targets: Iterable[str] | None = None) -> list[Link]:
        """Return the links of these sources (to all targets, or to some), and those that lead to them."""
        wanted = set(sources)
        others = None if targets is None else set(targets)
        return [
            link
            for link in self._links.values()
            if (link.source in wanted and (others is None or link.target in others))
            or (link.target in wanted and (others is None or link.source in others))
        ]

    def of(self, source: str) -> list[Link]:
        """Return the links on which a process talks."""
        return [link for link in self._links.values() if link.source == source]

    def open_all(self) -> None:
        """Mend everything."""
        for link in self._links.values():
            if link.mode is not Mode.OPEN:
                link.turn(Mode.OPEN)

    async def close(self) -> None:
        """End all connections and listeners."""
        for server in self._servers:
            server.close()
        wires = [wire for link in self._links.values() for wire in link.wires]
        for wire in wires:
            wire.cancel()
        await asyncio.gather(*wires, return_exceptions=True)

    async def _carry(self, link: Link, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = asyncio.current_task()
        assert wire is not None
        link.wires.add(wire)
        writers = [writer]
        try:
            if link.mode is not Mode.CUT:
                far_reader, far_writer = await asyncio.open_connection(HOST, port)
                writers.append(far_writer)
                await _either(_pump(link, True, reader, far_writer), _pump(link, False, far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            link.wires.discard(wire)
            for each in writers:
                each.transport.abort()


async def _either(*pumps: Coroutine[Any, Any, None]) -> None:
    """Run both directions until one of them ends."""
    tasks = [asyncio.ensure_future(pump) for pump in pumps]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(link: Link, is_outward: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Move bytes one way until the connection ends."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            if link.mode is Mode.SLOW:
                await asyncio.sleep(link.delay_s)
            while link.holds(is_outward):
                await link.changed.wait()
            if link.mode is Mode.SWALLOW:
                continue
            writer.write(data)
            await writer.drain()
        while link.holds(is_outward):  # the end of a connection does not get through either
            await link.changed.wait()
