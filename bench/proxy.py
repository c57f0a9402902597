"""A TCP proxy that can hurt what goes through it: end connections, refuse new ones, swallow bytes."""

from __future__ import annotations

import asyncio
import contextlib


class Proxy:
    """Stands between clients and ``host:port``; :attr:`url` is where clients connect."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._is_refusing = False
        self.port = 0

    @property
    def url(self) -> str:
        """Return the address for clients of the broker."""
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen on a free port."""
        self._flows.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """End everything."""
        self.drop()
        if self._server is not None:
            self._server.close()

    def drop(self) -> None:
        """End all connections, and refuse new ones until :meth:`mend`."""
        self._is_refusing = True
        for writer in list(self._writers):
            writer.transport.abort()

    def swallow(self) -> None:
        """Let nothing through any more in either direction, without a sign of it, until :meth:`mend`."""
        self._flows.clear()

    def mend(self) -> None:
        """Let everything through again; what was swallowed arrives late, as it does on a path that was down."""
        self._is_refusing = False
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._flows.wait()
            if self._is_refusing:
                return
            try:
                far_reader, far_writer = await asyncio.open_connection(*self._target)
            except OSError:
                return
            self._writers.add(far_writer)
            try:
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
            finally:
                self._writers.discard(far_writer)
                far_writer.transport.abort()
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
