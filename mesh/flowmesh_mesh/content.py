"""Content of ports in the store: tables, values, files and folders, each named by a Ref.

A table is canonical JSON lines (one compact object per line, columns in the order given), a value compact JSON. Whatever
is read is checked against its Ref: the digest names it, the CID only tells where it begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from flowmesh_cas import unixfs
from flowmesh_cas.cid import cid_text, sha256
from flowmesh_cas.errors import IntegrityError, UsageError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh.manifest import Ref

Row = dict[str, Any]

_encode = msgspec.json.Encoder().encode
_decode_row = msgspec.json.Decoder(Row).decode


def encode_rows(rows: Iterable[Row]) -> tuple[bytes, int]:
    """Return the canonical table and the number of its records; raise UsageError for what JSON cannot hold."""
    lines = [_encoded(row) for row in rows]
    return b"".join(line + b"\n" for line in lines), len(lines)


def decode_rows(data: bytes) -> list[Row]:
    """Return the records of a table; raise IntegrityError naming the line that is not a JSON object."""
    rows: list[Row] = []
    # Only the newline byte ends a record; other line separators may stand inside strings.
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(_decode_row(line))
            except msgspec.DecodeError as error:
                raise IntegrityError(f"line {number} of a table is not a JSON object: {error}") from error
    return rows


def encode_value(value: Any) -> bytes:
    """Return the compact JSON of a value; raise UsageError for what JSON cannot hold."""
    return _encoded(value)


def put_rows(store: BlockStore, rows: Iterable[Row]) -> Ref:
    """Store a table."""
    data, count = encode_rows(rows)
    return put_table_bytes(store, data, count)


def put_table_bytes(store: BlockStore, data: bytes, rows: int) -> Ref:
    """Store a table that is already canonical bytes of ``rows`` records."""
    return _ref("rows", unixfs.import_bytes(store, data), rows)


def put_value(store: BlockStore, value: Any) -> Ref:
    """Store a JSON value."""
    return put_value_bytes(store, encode_value(value))


def put_value_bytes(store: BlockStore, data: bytes) -> Ref:
    """Store a value that is already compact JSON."""
    return _ref("value", unixfs.import_bytes(store, data))


def put_file_bytes(store: BlockStore, data: bytes) -> Ref:
    """Store a file whose bytes are at hand."""
    return _ref("file", unixfs.import_bytes(store, data))


def put_file(store: BlockStore, path: Path | str) -> Ref:
    """Store a file."""
    return _ref("file", unixfs.import_file(store, path))


def put_folder(store: BlockStore, path: Path | str) -> Ref:
    """Store a folder with everything in it; raise UsageError for symbolic links."""
    return _ref("folder", unixfs.import_folder(store, path))


def read_bytes(store: BlockStore, ref: Ref) -> bytes:
    """Return the bytes of a table, value or file; raise IntegrityError unless they are what the Ref says."""
    if ref.kind == "folder":
        raise UsageError(f"{cid_text(ref.cid)} is a folder", hint="Export it.")
    try:
        data = unixfs.read_bytes(store, ref.cid, max_bytes=ref.size)
    except unixfs.TooLargeError as error:
        raise _not_as_said(ref) from error
    if sha256(data) != ref.digest or len(data) != ref.size:
        raise _not_as_said(ref)
    return data


def read_rows(store: BlockStore, ref: Ref) -> list[Row]:
    """Return the records of a table."""
    return decode_rows(read_bytes(store, ref))


def read_value(store: BlockStore, ref: Ref) -> Any:
    """Return a JSON value."""
    data = read_bytes(store, ref)
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"value {cid_text(ref.cid)} is not JSON: {error}") from error


def export(store: BlockStore, ref: Ref, target: Path | str) -> None:
    """Write content to ``target``, a file or a folder by its kind, all of it or nothing."""
    expected = unixfs.Imported(ref.cid, ref.digest, ref.size)
    try:
        unixfs.export(store, ref.cid, target, max_bytes=ref.size, expected=expected)
    except unixfs.TooLargeError as error:
        raise _not_as_said(ref) from error


def _ref(kind: str, imported: unixfs.Imported, rows: int = -1) -> Ref:
    return Ref(kind, imported.cid, imported.digest, imported.size, rows)


def _not_as_said(ref: Ref) -> IntegrityError:
    return IntegrityError(f"content under {cid_text(ref.cid)} is not what its reference says")


def _encoded(value: Any) -> bytes:
    try:
        return _encode(value)
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise UsageError(
            f"cannot be written as JSON: {error}", hint="Use text, numbers, lists and maps with text keys."
        ) from error
