"""Reading files of other formats into rows, and writing rows out, without ever holding a large table in memory twice."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from flowmesh_cas.errors import ExecutionError
from flowmesh_node.operators.base import Content, Input, Row

LINE_MAX_BYTES = 64 * 1024 * 1024
_MEMORY_BYTES = 4 * 1024 * 1024

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class TableWriter:
    """Collects rows as canonical JSON lines, in memory while small, in the file ``path`` when not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = bytearray()
        self._file: BinaryIO | None = None
        self.rows = 0

    def add(self, row: Row) -> None:
        """Add one record; raise ExecutionError for what JSON cannot hold."""
        try:
            self.add_line(_encode(row))
        except (TypeError, ValueError, msgspec.MsgspecError) as error:
            raise ExecutionError(f"row {self.rows} cannot be written as JSON: {error}") from error

    def add_line(self, line: bytes) -> None:
        """Add one record that is canonical JSON already."""
        self._buffer += line
        self._buffer += b"\n"
        self.rows += 1
        if len(self._buffer) > _MEMORY_BYTES:
            self._spill()

    def add_lines(self, data: bytes, rows: int) -> None:
        """Add whole lines at once."""
        self._buffer += data
        self.rows += rows
        if len(self._buffer) > _MEMORY_BYTES:
            self._spill()

    def _spill(self) -> None:
        if self._file is None:
            self._file = self._path.open("wb")
        self._file.write(self._buffer)
        self._buffer.clear()

    def content(self) -> Content:
        """Return the finished table."""
        if self._file is None:
            return Content("rows", bytes(self._buffer), rows=self.rows)
        self._spill()
        self._file.close()
        return Content("rows", path=str(self._path), rows=self.rows)


def open_input(given: Input) -> BinaryIO:
    """Open the bytes of an input for reading."""
    return io.BytesIO(given.data) if given.data is not None else Path(given.path).open("rb")


def lines_of(given: Input) -> Iterator[bytes]:
    """Yield the records of a canonical table as lines, without their ends."""
    with open_input(given) as file:
        for line in file:
            if line := line.rstrip(b"\n"):
                yield line


def rows_of(given: Sequence[Input]) -> Iterator[Row]:
    """Yield the records of tables, one after the other."""
    for table in given:
        for line in lines_of(table):
            yield _decode(line)


def read_jsonl(given: Input) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object per line; raise ExecutionError naming the line that is none."""
    with open_input(given) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_MAX_BYTES + 1), b""), 1):
            if len(line) > LINE_MAX_BYTES:
                raise ExecutionError(f"line {number} is longer than {LINE_MAX_BYTES} bytes")
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield _json_object(text, number)


def _json_object(line: bytes, number: int) -> Row:
    try:
        row = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExecutionError(f"line {number} is not JSON: {error}", hint="Each line must be one JSON object.") from error
    if not isinstance(row, dict):
        raise ExecutionError(f"line {number} is not an object but {_shown(line)}", hint="Each line must be one JSON object.")
    return row


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return text if len(text) <= 60 else text[:57] + "..."


# --- CSV -------------------------------------------------------------------------------------------------------------

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})\Z")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?\Z")
_TRUTH = {"true": True, "false": False}


def read_csv(given: Input) -> Iterator[Row]:
    """Yield the records of a CSV file with a header line.

    A column is integer, number or truth value (true/false) when all its filled cells are, and then its empty cells are null;
    any other column is text as it stands.
    """
    with open_input(given) as file:
        try:
            header, records = _csv_records(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        except UnicodeDecodeError as error:
            raise ExecutionError(f"the file is not UTF-8 (byte {error.start} of a block)", hint="Save it as UTF-8.") from error
    converters = [_converter([record[column] for record in records]) for column in range(len(header))]
    for record in records:
        yield {name: convert(cell) for name, convert, cell in zip(header, converters, record, strict=True)}


def _csv_records(text: io.TextIOWrapper) -> tuple[list[str], list[list[str]]]:
    csv.field_size_limit(LINE_MAX_BYTES)
    reader = csv.reader(text, strict=True)
    records: list[list[str]] = []
    try:
        header = next(reader, [])
        _check_header(header)
        for record in reader:
            if not record:
                continue
            if len(record) != len(header):
                raise ExecutionError(f"line {reader.line_num} has {len(record)} cells, the header has {len(header)}")
            records.append(record)
    except csv.Error as error:
        raise ExecutionError(f"line {reader.line_num} is not CSV: {error}") from error
    return header, records


def _check_header(header: list[str]) -> None:
    if not header:
        raise ExecutionError("the file is empty: a CSV file begins with a line of column names")
    for name in header:
        if not name.strip():
            raise ExecutionError("line 1 has a column without a name")
        if header.count(name) > 1:
            raise ExecutionError(f"line 1 has two columns named {name!r}")


def _converter(cells: list[str]) -> Any:
    filled = [cell for cell in cells if cell != ""]
    if not filled:
        return str
    if all(_INTEGER.match(cell) for cell in filled):
        return lambda cell: int(cell) if cell else None
    if all(_NUMBER.match(cell) for cell in filled):
        return lambda cell: float(cell) if cell else None
    if all(cell in _TRUTH for cell in filled):
        return lambda cell: _TRUTH[cell] if cell else None
    return str


# --- what DuckDB reads and computes ----------------------------------------------------------------------------------


@contextmanager
def database(scratch: Path, memory_bytes: int = 0) -> Iterator[Any]:
    """Open an empty database that gives the same answer every time: one thread, order kept, UTC."""
    import duckdb

    memory_bytes = memory_bytes or 2 * 2**30
    connection = duckdb.connect(":memory:")
    try:
        connection.execute("SET threads = 1")
        connection.execute("SET preserve_insertion_order = true")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET autoload_known_extensions = false")
        connection.execute(f"SET memory_limit = '{memory_bytes // 2**20} MiB'")
        connection.execute("SET temp_directory = ?", [str(scratch / "spill")])
        yield connection
    finally:
        connection.close()


def lock(connection: Any) -> None:
    """Cut a database off from files and network, for good."""
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def read_parquet(given: Input, scratch: Path) -> Iterator[Row]:
    """Yield the records of a Parquet file; dates and times become ISO text."""
    path = Path(given.path)
    if given.data is not None:
        path = scratch / "input.parquet"
        path.write_bytes(given.data)
    with database(scratch) as connection:
        yield from query_rows(connection, "SELECT * FROM read_parquet(?)", [str(path)], what="the Parquet file")


def query_rows(connection: Any, query: str, parameters: Sequence[Any] = (), *, what: str = "the query") -> Iterator[Row]:
    """Yield the rows of a query, as JSON would write them; raise ExecutionError in DuckDB's words."""
    import duckdb

    try:
        # The line break ends a comment that the query may end with.
        connection.execute(f"SELECT to_json(result) FROM ({query}\n) result", list(parameters))
        number = 0
        while chunk := connection.fetchmany(2048):
            for (text,) in chunk:
                yield _finite(text, number, what)
                number += 1
    except duckdb.OutOfMemoryException as error:
        raise ExecutionError(f"{what} needs more memory: {_first_lines(error)}", reason="oom") from error
    except duckdb.Error as error:
        raise ExecutionError(f"{what}: {_first_lines(error)}") from error


def _finite(text: str, number: int, what: str) -> Row:
    try:
        row: Row = _decode(text)
    except msgspec.DecodeError as error:
        raise ExecutionError(
            f"row {number} of {what} holds NaN or infinity, which JSON does not know",
            hint="Turn it into NULL, as in CASE WHEN isfinite(x) THEN x END.",
        ) from error
    return row


def _first_lines(error: Exception) -> str:
    return "\n".join(str(error).splitlines()[:8])[:2000]


# --- columns ---------------------------------------------------------------------------------------------------------


def chosen(rows: Iterable[Row], columns: Sequence[str], limit: int) -> Iterator[Row]:
    """Yield the first ``limit`` rows (0: all) with these columns in this order (none: all)."""
    for number, row in enumerate(islice(rows, limit) if limit else rows):
        if not columns:
            yield row
            continue
        for column in columns:
            if column not in row:
                raise ExecutionError(f"row {number} has no column {column!r}", hint=f"It has {', '.join(row) or 'none'}.")
        yield {column: row[column] for column in columns}
