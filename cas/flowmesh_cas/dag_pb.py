"""The dag-pb codec: nodes with named, sized links and a data field (protobuf, canonical form on writing)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flowmesh_cas.cid import codec_of
from flowmesh_cas.errors import IntegrityError

_VARINT, _BYTES = 0, 2
Field = tuple[int, int | bytes]


@dataclass(frozen=True, slots=True)
class Link:
    """An edge: ``tsize`` is the size in bytes of the whole DAG below, as the writer states it (never to be relied on)."""

    cid: bytes
    name: str
    tsize: int


@dataclass(frozen=True, slots=True)
class Node:
    """One dag-pb node."""

    links: tuple[Link, ...]
    data: bytes


def encode_varint(number: int) -> bytes:
    """Return the protobuf form of a number >= 0."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def encode_bytes(tag: int, data: bytes) -> bytes:
    """Return a length-delimited protobuf field."""
    return encode_varint(tag << 3 | _BYTES) + encode_varint(len(data)) + data


def encode(links: Iterable[Link], data: bytes) -> bytes:
    """Return the canonical block of a node: links first, then data."""
    return b"".join(_encode_link(link) for link in links) + encode_bytes(1, data)


def decode(block: bytes) -> Node:
    """Return the node in ``block``; raise IntegrityError for what is none, UsageError for links to foreign CIDs."""
    links: list[Link] = []
    data = None
    for tag, content in fields(block):
        if tag == 2 and isinstance(content, bytes):
            links.append(_decode_link(content))
        elif tag == 1 and isinstance(content, bytes) and data is None:
            data = content
        else:
            raise IntegrityError(f"not a dag-pb node: unexpected field {tag}")
    return Node(tuple(links), data or b"")


def fields(message: bytes) -> Iterator[Field]:
    """Yield (tag, number or bytes) of each field of a protobuf message; raise IntegrityError when it is malformed."""
    at = 0
    while at < len(message):
        key, at = _decode_varint(message, at)
        tag, wire = key >> 3, key & 7
        number, at = _decode_varint(message, at)
        if wire == _VARINT:
            yield tag, number
        elif wire == _BYTES and at + number <= len(message):
            yield tag, message[at : at + number]
            at += number
        else:
            raise IntegrityError("malformed protobuf")


def _encode_link(link: Link) -> bytes:
    body = encode_bytes(1, link.cid) + encode_bytes(2, link.name.encode()) + b"\x18" + encode_varint(link.tsize)
    return encode_bytes(2, body)


def _decode_link(message: bytes) -> Link:
    cid, name, tsize = b"", "", 0
    for tag, content in fields(message):
        if tag == 1 and isinstance(content, bytes):
            cid = content
        elif tag == 2 and isinstance(content, bytes):
            name = _decode_name(content)
        elif tag == 3 and isinstance(content, int):
            tsize = content
        else:
            raise IntegrityError(f"not a dag-pb link: unexpected field {tag}")
    codec_of(cid)
    return Link(cid, name, tsize)


def _decode_name(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise IntegrityError("link name is not UTF-8") from error


def _decode_varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise IntegrityError("malformed protobuf number")
