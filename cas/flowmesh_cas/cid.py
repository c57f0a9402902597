"""Content identifiers and strict DAG-CBOR.

In memory and on the wire a CID is its 36 binary bytes (CIDv1, sha2-256); text (base32) stands at the
edges only. DAG-CBOR comes from ``libipld``: a value of 36 bytes that is a CID is encoded as a link (tag 42).
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import libipld

from flowmesh_cas.errors import IntegrityError, UsageError

RAW = 0x55
DAG_PB = 0x70
DAG_CBOR = 0x71

_PREFIX = {codec: bytes((0x01, codec, 0x12, 0x20)) for codec in (RAW, DAG_PB, DAG_CBOR)}
_CODECS = {prefix: codec for codec, prefix in _PREFIX.items()}
CID_LENGTH = 36


def sha256(data: bytes) -> bytes:
    """Return the 32-byte SHA-256 of ``data``."""
    return hashlib.sha256(data).digest()


def cid_from_digest(codec: int, digest: bytes) -> bytes:
    """Return the binary CID of a block with this SHA-256 digest."""
    return _PREFIX[codec] + digest


def cid_of(codec: int, block: bytes) -> bytes:
    """Return the binary CID (36 bytes) of a block."""
    return _PREFIX[codec] + hashlib.sha256(block).digest()


def codec_of(cid: bytes) -> int:
    """Return the codec of a binary CID; raise UsageError for what is not one of ours."""
    codec = _CODECS.get(cid[:4])
    if codec is None or len(cid) != CID_LENGTH:
        raise UsageError(f"not a CIDv1 with sha2-256 and a known codec: {cid.hex()[:80]}")
    return codec


def digest_of(cid: bytes) -> bytes:
    """Return the SHA-256 digest inside a binary CID."""
    codec_of(cid)
    return cid[4:]


def cid_text(cid: bytes) -> str:
    """Return the base32 text of a binary CID, as IPFS tools print it."""
    return "b" + base64.b32encode(cid).decode("ascii").lower().rstrip("=")


def cid_parse(text: str) -> bytes:
    """Return the binary CID of a base32 text; raise UsageError when it is not one."""
    try:
        if not text.startswith("b") or text != text.lower() or len(text) > 128:
            raise ValueError("only base32 CIDv1")
        body = text[1:].upper()
        cid = base64.b32decode(body + "=" * (-len(body) % 8))
        codec_of(cid)
    except (ValueError, UsageError) as error:
        raise UsageError(f"not a CID: {text[:80]!r}", hint="A CID looks like bafy... or bafk... (CIDv1, base32).") from error
    return cid


def verify(cid: bytes, block: bytes) -> None:
    """Raise IntegrityError unless ``block`` is what ``cid`` names."""
    if cid_of(codec_of(cid), block) != cid:
        raise IntegrityError(f"block does not match its CID {cid_text(cid)}")


def encode_dag_cbor(value: Any) -> bytes:
    """Encode to canonical DAG-CBOR. Maps need text keys; NaN and infinities are refused; CID bytes become links."""
    try:
        encoded: bytes = libipld.encode_dag_cbor(value)
    except ValueError as error:
        raise UsageError(f"cannot be written as DAG-CBOR: {error}") from error
    return encoded


def decode_dag_cbor(block: bytes) -> Any:
    """Decode strict DAG-CBOR; raise IntegrityError for anything that is not the canonical form."""
    try:
        value = libipld.decode_dag_cbor(block)
        canonical = libipld.encode_dag_cbor(value) == block
    except ValueError as error:
        raise IntegrityError(f"not DAG-CBOR: {error}") from error
    if not canonical:
        raise IntegrityError("not canonical DAG-CBOR")
    return value
