"""Talking to the agent that runs on this machine: a lock and a pid file on its folder, and a local socket.

The socket's address goes through the descriptor of the folder, because a path may be longer than a socket address can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import msgspec
import psutil

from flowmesh_cas.errors import NotFoundError, TransientError, UsageError

SOCKET = "control.sock"
ANSWER_TIMEOUT_S = 5.0
_LINE_MAX_BYTES = 1 << 20

Answerer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class RunningAgent(msgspec.Struct, frozen=True):
    """What the pid file says. ``started_s`` tells a reused pid from the agent."""

    pid: int
    started_s: float
    node: str


@contextlib.contextmanager
def owned(folder: Path, node: str) -> Iterator[None]:
    """Own a node's folder while the block runs; raise UsageError when an agent runs in it already."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock: TextIO = (folder / "lock").open("a")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"a node runs in {folder} already",
                hint="Use another --dir, or stop it with `flowmesh-node leave`.",
            ) from error
        me = RunningAgent(os.getpid(), psutil.Process().create_time(), node)
        (folder / "agent.json").write_bytes(msgspec.json.encode(me))
        yield
        for name in ("agent.json", SOCKET):
            (folder / name).unlink(missing_ok=True)
    finally:
        lock.close()


def running(folder: Path) -> RunningAgent | None:
    """Return the agent that runs in ``folder``, None when there is none."""
    try:
        found = msgspec.json.decode((folder / "agent.json").read_bytes(), type=RunningAgent)
        process = psutil.Process(found.pid)
        is_it = abs(process.create_time() - found.started_s) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, msgspec.DecodeError, psutil.Error):
        return None
    return found if is_it else None


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


async def serve(folder: Path, answer: Answerer) -> asyncio.Server:
    """Answer commands on the folder's socket: one JSON object per line, one back."""
    (folder / SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    with _address(folder) as address:
        listener.bind(address)
    (folder / SOCKET).chmod(0o600)

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError, ValueError):
            while line := await reader.readline():
                try:
                    reply = await answer(msgspec.json.decode(line, type=dict[str, Any]))
                except msgspec.DecodeError as error:
                    reply = {"error": f"unreadable: {error}"}
                writer.write(msgspec.json.encode(reply) + b"\n")
                await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(serve_one, sock=listener, limit=_LINE_MAX_BYTES)


def ask(folder: Path, command: dict[str, Any], *, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
    """Ask the agent in ``folder``; raise NotFoundError when none runs there, TransientError when it does not answer."""
    agent = running(folder) if folder.is_dir() else None
    if agent is None:
        raise NotFoundError(
            f"no node runs in {folder}", hint="Start one with `flowmesh-node join`, or name its folder with --dir."
        )
    try:
        with _address(folder) as address, socket.socket(socket.AF_UNIX) as link:
            link.settimeout(timeout_s)
            link.connect(address)
            link.sendall(msgspec.json.encode(command) + b"\n")
            with link.makefile("rb") as lines:
                answer: dict[str, Any] = msgspec.json.decode(lines.readline(_LINE_MAX_BYTES), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise TransientError(
            f"the node in {folder} (pid {agent.pid}) does not answer: {error}", hint="It may be starting; try again."
        ) from error
    return answer
