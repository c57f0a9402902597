"""The witness: a small process beside the agent that says at once that the agent has died.

A connection that ends may be a connection that drops: work that is dear waits out the lease then. Only somebody on the same
machine can tell a death from a drop. The agent holds one end of a pipe, the witness the other: it ends with the agent, however
that ends, unless the agent has said goodbye before. Executors die with their agent, so that what it held runs nowhere any more.

The witness is forked off before the agent begins anything, and has no connection until it needs one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Sequence

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.clock import monotonic_s, now_us
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.messages import Beat, encode

PURPOSE = " witness"
"""What the name of its connection ends with."""

TELL_S = 10.0
"""How long it tries to reach the mesh; after that the lease of the node has ended anyway."""

_GOODBYE = b"goodbye"


class Witness:
    """The agent's end: what it tells its witness."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def begin(self, life: int) -> None:
        """Tell which life of the node this is; from now on its end is reported."""
        self._say(f"{life}\n".encode())

    def release(self) -> None:
        """Let the witness go: the agent has left in good order."""
        self._say(_GOODBYE)
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _say(self, words: bytes) -> None:
        if self._pipe >= 0:
            with contextlib.suppress(OSError):  # there may be no witness any more: then the lease tells
                os.write(self._pipe, words)


def call_witness(urls: Sequence[str], credentials: str, node: str) -> Witness:
    """Fork the witness off; call this before anything has threads."""
    ours, theirs = os.pipe()
    if os.fork():
        os.close(ours)
        return Witness(theirs)
    try:
        os.close(theirs)
        _detach(ours)
        life = _wait(ours)
        if life:
            asyncio.run(_tell(urls, Credentials.parse(credentials), node, life))
    finally:
        os._exit(0)


def _detach(keep: int) -> None:
    """Keep nothing of the terminal, the files or the signals of the node's own process."""
    os.setsid()
    for ended_by in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ended_by, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 65536 else 65536)


def _wait(pipe: int) -> int:
    """Wait for the end of the agent; return its life, 0 if it said goodbye or had not begun."""
    said = b""
    while words := os.read(pipe, 256):
        said += words
    return 0 if said.endswith(_GOODBYE) or not said else int(said.partition(b"\n")[0])


async def _tell(urls: Sequence[str], credentials: Credentials, node: str, life: int) -> None:
    """Report the death until the mesh has it, or until it is no news any more."""
    deadline_s = monotonic_s() + TELL_S
    while monotonic_s() < deadline_s:
        try:
            bus = await Bus.connect(
                list(urls), credentials, name=f"node {node}{PURPOSE}", inbox=subjects.inbox_prefix(node), deadline_s=2.0
            )
            bus.post(subjects.node_beat(node), encode(Beat(node, now_us(), 0, state="died", life=life)))
            await bus.flush()
            await bus.close()
            return
        except FlowmeshError:
            await asyncio.sleep(random.uniform(0.05, 0.3))
