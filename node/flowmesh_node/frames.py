"""What the agent and its executor processes say to each other: length-prefixed msgpack over a socket pair."""

from __future__ import annotations

import socket
import struct

import msgspec

from flowmesh_cas.errors import InternalError
from flowmesh_node.operators.base import Batch, Failed, Produced

FRAME_MAX_BYTES = 64 * 1024 * 1024
SPILL_BYTES = 64 * 1024
"""Contents above this size go through a file of the scratch folder, not through the socket."""

_LENGTH = struct.Struct(">I")


class Run(msgspec.Struct, frozen=True, array_like=True, tag="run"):
    """Agent to executor: run this batch."""

    batch: Batch


class Settled(msgspec.Struct, frozen=True, array_like=True, tag="settled"):
    """Executor to agent: the item ``index`` is settled, well or badly."""

    index: int
    produced: Produced | None = None
    failed: Failed | None = None


class Pace(msgspec.Struct, frozen=True, array_like=True, tag="pace"):
    """Agent to executor, while it trains: write a checkpoint ``now``, or what was written last took ``behind_s`` until the mesh
    held it.
    """

    now: bool = False
    behind_s: float = 0.0


class Checkpointed(msgspec.Struct, frozen=True, array_like=True, tag="checkpointed"):
    """Executor to agent: the folder ``path`` is a complete checkpoint of the item ``index``; training stood still for
    ``stall_us``.
    """

    index: int
    path: str
    step: int
    steps: int
    stall_us: int


class Line(msgspec.Struct, frozen=True, array_like=True, tag="line"):
    """Executor to agent: a log line."""

    text: str


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag="loaded"):
    """Executor to agent: what the batch needs is ready; running begins. ``numeric`` is the class of numbers that it gives."""

    load_us: int
    resident: tuple[str, ...] = ()
    numeric: str = ""


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="finished"):
    """Executor to agent: the batch is over. ``resident`` are digests of models kept."""

    resident: tuple[str, ...] = ()


Frame = Run | Settled | Line | Loaded | Finished | Pace | Checkpointed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def pack(frame: Frame) -> bytes:
    """Return a frame's bytes, length first; raise InternalError above FRAME_MAX_BYTES."""
    body = _encoder.encode(frame)
    if len(body) > FRAME_MAX_BYTES:
        raise InternalError(f"frame of {len(body)} bytes is too large")
    return _LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> Frame:
    """Return the frame in ``body``; raise InternalError for what is not one."""
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise InternalError(f"unreadable frame: {error}") from error


def length(prefix: bytes) -> int:
    """Return how many bytes follow a prefix of 4 bytes; raise InternalError above FRAME_MAX_BYTES."""
    size: int = _LENGTH.unpack(prefix)[0]
    if size > FRAME_MAX_BYTES:
        raise InternalError(f"frame of {size} bytes is too large")
    return size


def receive(link: socket.socket) -> Frame | None:
    """Return the next frame, or None when the other side is gone."""
    prefix = _exactly(link, 4)
    body = _exactly(link, length(prefix)) if prefix else b""
    return unpack(body) if body else None


def _exactly(link: socket.socket, size: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < size:
        chunk = link.recv(min(size - len(chunks), 1 << 20))
        if not chunk:
            return b""
        chunks += chunk
    return bytes(chunks)
