"""The network of a simulation, and the connection that stands under the production bus in it.

A connection is a link with two directions. Within a direction nothing overtakes; between links everything may. A process
can be cut off (connections end, none begins) or stand before a black hole (nothing moves, nobody is told, until one side
loses patience).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.faults.broker_model import MAX_PAYLOAD, BrokerModel, Frame, Session
from tests.faults.loop import Process, current_process

from flowmesh_cas.errors import TransientError
from flowmesh_mesh.connection import PENDING_MAX_BYTES, RECONNECT_MAX_S, Handler
from flowmesh_mesh.credentials import Credentials

log = logging.getLogger("flowmesh.bus")

CONNECT_TIMEOUT_S = 2.0
PATIENCE_S = (4.0, 6.0)
"""How long each side waits for a sign of life of the other: two unanswered pings, two seconds apart."""


@dataclass(slots=True)
class Condition:
    """What lies between one process and the broker."""

    is_cut: bool = False
    is_hole: bool = False
    extra_s: float = 0.0


class Network:
    """All links to one broker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, broker: BrokerModel, rng: random.Random) -> None:
        self.loop = loop
        self.broker = broker
        self.rng = rng
        self.latency_s = (0.0001, 0.0008)
        self.conditions: dict[str, Condition] = {}
        self.links: dict[Link, None] = {}
        self._numbers = 0

    def condition(self, owner: str) -> Condition:
        """Return the condition of a process by its name."""
        found = self.conditions.get(owner)
        if found is None:
            found = self.conditions[owner] = Condition()
        return found

    def new_name(self) -> bytes:
        """Return a name that no other connection has."""
        self._numbers += 1
        return f"N{self._numbers:08d}".encode()

    def delay_s(self, owner: str) -> float:
        extra_s = self.condition(owner).extra_s
        return self.rng.uniform(*self.latency_s) + (self.rng.uniform(0.0, extra_s) if extra_s else 0.0)

    def connection(self) -> Any:
        """Make a connection for whichever process runs; it stands under the production bus."""
        return SimConnection(self)

    def cut(self, owner: str) -> None:
        """End the connections of a process and let it make none."""
        self.condition(owner).is_cut = True
        for link in self._links_of(owner):
            link.break_off()

    def swallow(self, owner: str) -> None:
        """Let nothing through to and from a process, and tell nobody."""
        self.condition(owner).is_hole = True
        for link in self._links_of(owner):
            link.lose_patience()

    def heal(self, owner: str) -> None:
        """Let everything through again."""
        condition = self.condition(owner)
        condition.is_cut = condition.is_hole = False
        condition.extra_s = 0.0
        for link in self._links_of(owner):
            link.resume()

    def _links_of(self, owner: str) -> list[Link]:
        return [link for link in self.links if link.owner == owner]


class Link:
    """One connection between a process and the broker."""

    def __init__(self, network: Network, client: SimConnection, process: Process | None) -> None:
        self._network = network
        self._client = client
        self._process = process
        self.owner = process.name if process is not None else ""
        self._condition = network.condition(self.owner)
        self.session: Session | None = None
        self.is_open = True
        self._up: list[bytes] = []
        self._down: list[Frame] = []
        self._is_up_due = self._is_down_due = False
        self._patience = 0
        network.links[self] = None

    @property
    def _is_stuck(self) -> bool:
        return self._condition.is_hole

    def send(self, commands: list[bytes]) -> None:
        """Send towards the broker."""
        self._up += commands
        if not self._is_up_due and not self._is_stuck:
            self._is_up_due = True
            self._network.loop.call_later(self._network.delay_s(self.owner), self._arrive, context=_NOBODY)

    def _arrive(self) -> None:
        self._is_up_due = False
        if self._is_stuck or self.session is None:
            return
        commands, self._up = self._up, []
        self._network.broker.receive(self.session, commands)

    def deliver(self, frame: Frame) -> None:
        """Send towards the process (called by the broker)."""
        self._down.append(frame)
        if not self._is_down_due and not self._is_stuck:
            self._is_down_due = True
            self._network.loop.call_later(self._network.delay_s(self.owner), self._reach, context=self._context())

    def _context(self) -> Any:
        return self._process.context if self._process is not None else None

    def _reach(self) -> None:
        self._is_down_due = False
        if self._is_stuck:
            return
        frames, self._down = self._down, []
        if self.is_open:
            self._client.take(frames)

    def hang_up(self) -> None:
        """End the connection from the broker's side; the process notices a moment later."""
        self.session = None
        if self.is_open and not self._is_stuck:
            self._network.loop.call_later(self._network.delay_s(self.owner), self._notice_end, context=self._context())

    def _notice_end(self) -> None:
        if self.is_open:
            self._reach()
            self.close()
            self._client.lose()

    def close(self) -> None:
        """End the connection from the process's side: what was sent still arrives, then the end does."""
        if not self.is_open:
            return
        self.is_open = False
        self._network.links.pop(self, None)
        if not self._is_stuck:
            self._network.loop.call_later(self._network.delay_s(self.owner), self._end_at_broker, context=_NOBODY)
        else:
            self._network.loop.call_later(self._network.rng.uniform(*PATIENCE_S), self._end_at_broker, context=_NOBODY)

    def _end_at_broker(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            if self._up and not self._is_stuck:
                self._network.broker.receive(session, self._up)
            self._network.broker.disconnect(session)

    def break_off(self) -> None:
        """End the connection on both sides; what is on its way is lost."""
        self._up, self._down = [], []
        session, self.session = self.session, None
        if session is not None:
            self._network.broker.disconnect(session)
        self.hang_up()

    def lose_patience(self) -> None:
        """Each side gives the silent other one up after a while, unless it speaks again."""
        self._patience += 1
        uniform = self._network.rng.uniform
        self._network.loop.call_later(uniform(*PATIENCE_S), self._give_up_process, self._patience, context=_NOBODY)
        self._network.loop.call_later(uniform(*PATIENCE_S), self._give_up_broker, self._patience, context=self._context())

    def _give_up_process(self, patience: int) -> None:
        session = self.session
        if patience == self._patience and session is not None:
            self.session = None
            self._up.clear()
            self._network.broker.disconnect(session)

    def _give_up_broker(self, patience: int) -> None:
        if patience == self._patience and self.is_open:
            self.close()
            self._client.lose()

    def resume(self) -> None:
        """Let what is stuck move; an end that was not noticed is noticed."""
        self._patience += 1
        network = self._network
        pause_s = network.rng.uniform(0.0, 1.0)
        if self.session is None:
            network.loop.call_later(pause_s, self._notice_end, context=self._context())
            return
        if self._up and not self._is_up_due:
            self._is_up_due = True
            network.loop.call_later(pause_s, self._arrive, context=_NOBODY)
        if self._down and not self._is_down_due:
            self._is_down_due = True
            network.loop.call_later(pause_s, self._reach, context=self._context())


def _nobody() -> Any:
    import contextvars

    return contextvars.Context()


_NOBODY = _nobody()


class _Nuid:
    def __init__(self, network: Network) -> None:
        self._network = network

    def next(self) -> bytes:
        return self._network.new_name()


class SimConnection:
    """What ``flowmesh_mesh.connection.Connection`` is to the bus, over a simulated network."""

    def __init__(self, network: Network) -> None:
        self.on_drop: Callable[[], None] = lambda: None
        self.on_violation: Callable[[str], None] = lambda _: None
        self.max_payload = MAX_PAYLOAD
        self.is_connected = False
        self.is_closed = False
        self._network = network
        self._nuid = _Nuid(network)
        self._loop = asyncio.get_running_loop()
        self._process = current_process()
        self._owner = self._process.name if self._process is not None else ""
        self._link: Link | None = None
        self._listeners: dict[int, tuple[str, str, Handler]] = {}
        self._number = 0
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._is_flush_due = False
        self._pongs: list[asyncio.Future[None]] = []
        self._reconnecting: asyncio.Task[None] | None = None
        self._name = self._user = self._account = ""
        self._reconnected_cb: Callable[[], Any] | None = None
        if self._process is not None:
            self._process.on_death.append(self._die)
            self._process.on_freeze.append(self._freeze)
            self._process.on_thaw.append(self._thaw)

    # --- connecting

    async def open(
        self, urls: list[str], credentials: Credentials | None, *, name: str, inbox: str, deadline_s: float, **callbacks: Any
    ) -> None:
        """Connect within ``deadline_s`` or raise TransientError."""
        self._name = name
        if credentials is not None:
            self._user, self._account = credentials.public_key, credentials.account
        self._reconnected_cb = callbacks.get("reconnected_cb")
        try:
            async with asyncio.timeout(deadline_s):
                tries = 0
                while not await self._attempt():
                    tries += 1
                    await asyncio.sleep(self._network.rng.uniform(0.0, min(RECONNECT_MAX_S, 0.02 * 2 ** min(tries, 10))))
        except TimeoutError as error:
            self.is_closed = True
            raise TransientError(
                f"no broker answers at {', '.join(urls)}",
                hint="Start the mesh with `flowmesh up`, or check the address of the broker.",
            ) from error

    async def _attempt(self) -> bool:
        """Try once; tell whether there is a link now."""
        condition = self._network.condition(self._owner)
        await asyncio.sleep(3 * self._network.delay_s(self._owner))
        if condition.is_hole:
            await asyncio.sleep(CONNECT_TIMEOUT_S)
            return False
        if condition.is_cut or self.is_closed:
            return False
        link = Link(self._network, self, self._process)
        session = self._network.broker.connect(link, self._name, self._owner, self._user, self._account)
        if session is None:
            link.close()
            return False
        link.session = session
        self._link = link
        self.is_connected = True
        link.send([f"SUB {subject} {queue} {n}\r\n".encode() for n, (subject, queue, _) in self._listeners.items()])
        self.write_pending()
        return True

    def lose(self) -> None:
        """The link ended; build it anew."""
        if not self.is_connected:
            return
        self.is_connected = False
        self._link = None
        self._fail_pongs()
        self.on_drop()
        if not self.is_closed:
            self._reconnecting = self._loop.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        tries = 0
        while not self.is_closed:
            await asyncio.sleep(self._network.rng.uniform(0.0, min(RECONNECT_MAX_S, 0.02 * 2 ** min(tries, 10))))
            tries += 1
            if await self._attempt():
                if self._reconnected_cb is not None:
                    await self._reconnected_cb()
                return

    def _die(self) -> None:
        self.is_connected = False
        self.is_closed = True
        if self._link is not None:
            self._link.close()

    def _freeze(self) -> None:
        if self._link is not None:
            self._link.lose_patience()

    def _thaw(self) -> None:
        if self._link is not None:
            self._link.resume()

    # --- sending

    def send(self, command: bytes) -> None:
        """Queue a protocol command; all commands of one turn of the loop leave together."""
        if not self.is_connected and self._pending_bytes + len(command) > PENDING_MAX_BYTES:
            raise TransientError(
                "not connected to the broker, and the buffer is full", hint="Try again when the connection is back."
            )
        self._pending.append(command)
        self._pending_bytes += len(command)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self.write_pending)

    def write_pending(self) -> None:
        """Hand what is queued to the network now."""
        self._is_flush_due = False
        if self._pending and self._link is not None and self.is_connected:
            commands, self._pending, self._pending_bytes = self._pending, [], 0
            self._link.send(commands)

    async def wait_writable(self) -> None:
        """Never wait: the network of the simulation takes everything."""

    async def flush(self, timeout: float = 10) -> None:
        """Wait until the broker has taken everything sent so far."""
        if not self.is_connected:
            raise TransientError("not connected to the broker")
        pong: asyncio.Future[None] = self._loop.create_future()
        self._pongs.append(pong)
        self.send(b"PING\r\n")
        await asyncio.wait_for(pong, timeout)

    def _fail_pongs(self) -> None:
        pongs, self._pongs = self._pongs, []
        for pong in pongs:
            if not pong.done():
                pong.set_exception(TransientError("the connection was lost"))

    # --- receiving

    def listen(self, subject: str, handler: Handler, queue: str = "") -> int:
        """Subscribe; return the number of the subscription."""
        self._number += 1
        self._listeners[self._number] = (subject, queue, handler)
        if self.is_connected:
            self.send(f"SUB {subject} {queue} {self._number}\r\n".encode())
        return self._number

    def unlisten(self, number: int) -> None:
        """End a subscription."""
        if self._listeners.pop(number, None) is not None and self.is_connected:
            self.send(f"UNSUB {number}\r\n".encode())

    def take(self, frames: list[Frame]) -> None:
        """Hand what arrived to its handlers."""
        for number, subject, reply, data, headers in frames:
            if number == 0:
                if self._pongs:
                    pong = self._pongs.pop(0)
                    if not pong.done():
                        pong.set_result(None)
                continue
            listener = self._listeners.get(number)
            if listener is None:
                continue
            try:
                listener[2](subject, reply, data, headers)
            except Exception:
                log.exception("handler of %s failed", listener[0])

    # --- the end

    async def shut(self, budget_s: float = 2.0) -> None:
        """Send what is pending and close."""
        self.write_pending()
        self.is_connected = False
        self.is_closed = True
        self._fail_pongs()
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._reconnecting is not None:
            self._reconnecting.cancel()
