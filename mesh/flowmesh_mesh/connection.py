"""One connection to the broker: the client library with the faults mended that a mesh cannot live with.

What differs from the library, and why:

- messages go from the read loop straight to a handler (no queue and no task per message), and what is sent in one
  turn of the event loop leaves in one write;
- errors of the broker that need not end a connection (expired or revoked credentials, too many subscriptions) lead to
  a reconnection with fresh credentials instead of a client that is closed for ever;
- a path that swallows bytes is aborted after a second instead of blocking reconnection and close;
- a first connection has a deadline, is proven by a round trip, and names the refusal when credentials are wrong;
- a lost broker is left at once for one that has not failed; reconnection waits a random time that grows where all have failed.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from nats import errors
from nats.aio.client import Client, Srv
from nats.aio.transport import TcpTransport
from nats.protocol.parser import PERMISSIONS_ERR

from flowmesh_cas.errors import TransientError, UsageError
from flowmesh_mesh import tasks
from flowmesh_mesh.credentials import Credentials

log = logging.getLogger("flowmesh.bus")

PING_S = 2
"""How often the broker is asked for a sign of life. One that owes two answers is left: a frozen one after four to six seconds."""

FIRST_WAIT_S = 0.05
"""Longest wait before the first attempt after a loss: those who lost the same broker do not all knock at once."""

RECONNECT_MAX_S = 2.0
"""Longest wait between two attempts to reconnect; the wait is random below a bound that doubles up to this."""

PENDING_MAX_BYTES = 4 * 1024 * 1024
"""Core messages kept while disconnected; more are refused."""

WRITE_BUFFER_MAX_BYTES = 4 * 1024 * 1024
"""Unsent bytes above which a publisher waits for the socket."""

_RECONNECT_ON = (
    "authentication expired",
    "authentication revoked",
    "authentication timeout",
    "connections exceeded",
    "server shutdown",
    "user authentication",
    "authorization violation",
)
_HARMLESS = ("maximum subscriptions exceeded", "invalid subscription", "invalid subject", "invalid publish subject")

Handler = Callable[[bytes, bytes, bytes, bytes | None], None]
"""Called with subject, reply, data and raw headers, in the read loop: must be quick and not block."""


async def _within(deadline_s: float, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work`` within ``deadline_s`` or raise TimeoutError; nothing of it is left afterwards.

    It is cancelled until it ends: the loops around attempts to connect may swallow a cancellation and go on for ever.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=deadline_s)
        if not task.done():
            raise TimeoutError
    finally:
        await tasks.end([task], again_s=0.05)
    await task


class CredentialsRefusedError(UsageError):
    """The broker does not accept the credentials."""


class _SafeTcp(TcpTransport):  # type: ignore[misc]
    """TCP whose close ends although unsent bytes cannot leave."""

    async def wait_closed(self) -> None:
        try:
            await asyncio.wait_for(super().wait_closed(), 1.0)
        except TimeoutError:
            for writer in (self._io_writer, self._bare_io_writer):
                if writer is not None:
                    writer.transport.abort()
        except OSError:
            pass


class _Listener:
    """A subscription in the shape that the library replays after a reconnection."""

    def __init__(self, subject: str, queue: str, handler: Handler) -> None:
        self._subject = subject
        self._queue = queue
        self._max_msgs = 0
        self._received = 0
        self._wait_for_msgs_task = None
        self._message_iterator = None
        self._pending_next_msgs_calls = None
        self.handler = handler


class Connection(Client):  # type: ignore[misc]
    """A client that mends itself. ``on_drop`` is called at once when the link is lost, before it is built anew."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[bytes]
        self._transport: Any
        self._sid: int
        self.on_drop: Callable[[], None] = lambda: None
        self.on_violation: Callable[[str], None] = lambda _: None
        self._loop = asyncio.get_running_loop()
        self._flush_scheduled = False
        self._is_first = True
        self._tried = ""
        """Address of the broker that was tried, or lost, last."""

    async def open(
        self, urls: list[str], credentials: Credentials | None, *, name: str, inbox: str, deadline_s: float, **callbacks: Any
    ) -> None:
        """Connect within ``deadline_s`` or raise TransientError; raise CredentialsRefusedError when the broker says no."""
        options: dict[str, Any] = {}
        if credentials is not None:
            signer = credentials
            options["user_jwt_cb"] = lambda: signer.jwt.encode()
            options["signature_cb"] = lambda nonce: base64.b64encode(signer.sign(nonce.encode()))
        options |= callbacks
        try:
            await _within(deadline_s, self._connect(urls, name=name, inbox_prefix=inbox, **options))
        except (CredentialsRefusedError, asyncio.CancelledError):
            await self.shut()
            raise
        except (TimeoutError, OSError, errors.Error) as error:
            reason = str(self._err or error) or type(error).__name__
            await self.shut()
            raise TransientError(
                f"no broker answers at {', '.join(urls)} ({reason})",
                hint="Start the mesh with `flowmesh up`, or check the address of the broker.",
            ) from error
        self._is_first = False

    async def _connect(self, urls: list[str], **options: Any) -> None:
        await self.connect(
            urls,
            ping_interval=PING_S,
            max_outstanding_pings=2,
            reconnect_time_wait=0.05,
            max_reconnect_attempts=-1,
            pending_size=PENDING_MAX_BYTES,
            reconnect_to_server_handler=self._next_server,
            **options,
        )
        if not self.is_connected:
            raise errors.ConnectionClosedError
        await self.flush()

    def _next_server(self, servers: list[Any], _info: dict[str, Any]) -> tuple[Any, float]:
        """Choose where to reconnect, and after which random wait in seconds.

        First come those with the fewest failures since they were last connected to, among them others than the one tried last.
        """
        fewest = min(server.reconnects for server in servers)
        best = [server for server in servers if server.reconnects == fewest]
        server = random.choice([each for each in best if each.uri.netloc != self._tried] or best)
        self._tried = server.uri.netloc
        bound = min(RECONNECT_MAX_S, 0.02 * 2 ** min(fewest, 10)) if fewest else FIRST_WAIT_S
        return server, random.uniform(0.0, bound)

    def _note_loss(self) -> None:
        """Count the loss of a link against the broker it led to."""
        if self._current_server is not None:
            self._current_server.reconnects += 1
            self._tried = self._current_server.uri.netloc

    # --- sending

    def send(self, command: bytes) -> None:
        """Queue a protocol command; all commands of one turn of the loop leave in one write."""
        if not self.is_connected and self._pending_data_size + len(command) > PENDING_MAX_BYTES:
            raise TransientError(
                "not connected to the broker, and the buffer is full", hint="Try again when the connection is back."
            )
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self.write_pending)

    def write_pending(self) -> None:
        """Hand what is queued to the socket now; otherwise it leaves at the end of this turn of the loop."""
        self._flush_scheduled = False
        if self._pending and self.is_connected and self._transport:
            commands, self._pending, self._pending_data_size = self._pending, [], 0
            try:
                self._transport.write(commands[0] if len(commands) == 1 else b"".join(commands))
            except RuntimeError as error:  # the loop closed the socket a moment ago; the read loop is about to see it
                log.debug("a connection ended while something was sent: %s", error)

    async def wait_writable(self) -> None:
        """Wait while too many bytes are unsent."""
        writer = self._transport._io_writer if self._transport else None
        if writer is not None and writer.transport.get_write_buffer_size() > WRITE_BUFFER_MAX_BYTES:
            self.write_pending()
            await writer.drain()

    async def flush(self, timeout: float = 10) -> None:
        self.write_pending()
        await super().flush(timeout)

    # --- receiving

    def listen(self, subject: str, handler: Handler, queue: str = "") -> int:
        """Subscribe; return the number of the subscription."""
        self._sid += 1
        self._subs[self._sid] = _Listener(subject, queue, handler)
        if self.is_connected:
            self.send(f"SUB {subject} {queue} {self._sid}\r\n".encode())
        return self._sid

    def unlisten(self, number: int) -> None:
        """End a subscription."""
        if self._subs.pop(number, None) is not None and self.is_connected:
            self.send(f"UNSUB {number}\r\n".encode())

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        listener = self._subs.get(sid)
        if listener is None:
            return
        try:
            listener.handler(subject, reply, data, headers)
        except Exception:
            log.exception("handler of %s failed", listener._subject)

    # --- faults

    async def _connect_to_server(self, server: Srv) -> None:
        if not self._transport and server.uri.scheme not in ("ws", "wss"):
            self._transport = _SafeTcp()
        await super()._connect_to_server(server)

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except errors.Error as error:
            if self._is_first and "authorization violation" in str(error).lower():
                raise CredentialsRefusedError(
                    "the broker refused the credentials",
                    hint="They may have expired or belong to another mesh: ask the operator of the mesh for new ones.",
                ) from error
            raise
        if not self.is_connected:  # the broker hung up instead of answering
            raise errors.ConnectionClosedError

    async def _process_op_err(self, error: Exception) -> None:
        if self.is_connected:
            self._note_loss()
            self.on_drop()
        await super()._process_op_err(error)

    async def move(self) -> None:
        """Go to another broker although the link to this one holds."""
        self._note_loss()
        await self.force_reconnect()

    async def force_reconnect(self) -> None:
        if self.is_connected:
            self.on_drop()
        await super().force_reconnect()

    async def _process_err(self, err_msg: str) -> None:
        lowered = err_msg.lower()
        if PERMISSIONS_ERR in lowered:
            self.on_violation(lowered)
            await self._error_cb(errors.Error(f"nats: {err_msg}"))
        elif any(text in lowered for text in _RECONNECT_ON):
            self._err = errors.Error(f"nats: {err_msg}")
            await self._error_cb(self._err)
            await self._process_op_err(self._err)
        elif any(text in lowered for text in _HARMLESS):
            await self._error_cb(errors.Error(f"nats: {err_msg}"))
        else:
            await super()._process_err(err_msg)

    async def shut(self, budget_s: float = 2.0) -> None:
        """Send what is pending and close, within ``budget_s`` whatever the other side does."""
        try:
            self.write_pending()
            await asyncio.wait_for(self.close(), budget_s)
        except (TimeoutError, OSError, errors.Error):
            pass
        finally:
            self._status = Client.CLOSED
            if self._reconnection_task is not None:
                await tasks.end([self._reconnection_task], again_s=0.05)
