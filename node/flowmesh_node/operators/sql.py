"""One SELECT over tables: what it may do is decided on its parsed form, before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flowmesh_cas.errors import ExecutionError
from flowmesh_node.operators.base import Input, Row
from flowmesh_node.operators.tables import TableWriter, database, lines_of, lock, query_rows, rows_of

_CLOCKS = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}


def select(query: str, tables: Mapping[str, Sequence[Input]], scratch: Path, memory_bytes: int = 0) -> Iterator[Row]:
    """Yield the rows of one SELECT over ``tables``, each named after its port; raise ExecutionError for anything else."""
    with database(scratch, memory_bytes) as connection:
        check(connection, query)
        for name, given in tables.items():
            _fill(connection, name, given, scratch)
        lock(connection)
        try:
            yield from query_rows(connection, query.strip().rstrip(";"))
        except ExecutionError as error:
            raise _explained(error, tables) from error


def check(connection: Any, query: str) -> None:
    """Refuse what is not exactly one SELECT whose answer depends on its input alone."""
    text = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchone()[0]
    parsed = msgspec.json.decode(text)
    if parsed.get("error"):
        message = str(parsed.get("error_message", "it cannot be parsed"))
        if "Only SELECT" in message or parsed.get("error_type") == "not implemented":
            message = "only a SELECT is allowed"
        raise ExecutionError(f"the query: {message}{_place(query, parsed)}")
    if len(parsed["statements"]) != 1:
        raise ExecutionError(f"the query holds {len(parsed['statements'])} statements", hint="Write exactly one SELECT.")
    listed = connection.execute("SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'")
    volatile = {name for (name,) in listed.fetchall()}
    for node in _nodes(parsed["statements"]):
        name = _volatile_name(node, volatile)
        if name:
            raise ExecutionError(
                f"the query: {name} gives another answer every time, and the result is shared by its inputs",
                hint="Take such values from a parameter or a column; sample by a hash of the row.",
            )


def _place(query: str, parsed: Mapping[str, Any]) -> str:
    position = str(parsed.get("position", ""))
    if not position.isdigit():
        return ""
    before = query[: int(position)]
    return f" (line {before.count(chr(10)) + 1}, column {len(before.rpartition(chr(10))[2]) + 1})"


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield each
            pending.extend(each.values())
        elif isinstance(each, list):
            pending.extend(each)


def _volatile_name(node: Mapping[str, Any], volatile: set[str]) -> str:
    if node.get("class") == "FUNCTION" and str(node.get("function_name", "")).lower() in volatile:
        return f"{node['function_name']}()"
    names = node.get("column_names")
    if node.get("class") == "COLUMN_REF" and isinstance(names, list) and len(names) == 1 and str(names[0]).lower() in _CLOCKS:
        return str(names[0])
    sample = node.get("sample")
    return "a sample without REPEATABLE" if isinstance(sample, dict) and sample.get("seed") == -1 else ""


def _explained(error: ExecutionError, tables: Mapping[str, Sequence[Input]]) -> ExecutionError:
    """Add what is not obvious: a table without rows has no columns."""
    empty = [name for name, given in tables.items() if not any(each.rows for each in given)]
    if empty and ("not found" in error.message or "Binder" in error.message):
        text = f"{error.message}\n(table {empty[0]!r} has no rows, and therefore no columns)"
        return ExecutionError(text, reason=error.reason, hint=error.hint)
    return error


# --- tables ----------------------------------------------------------------------------------------------------------


def _fill(connection: Any, name: str, given: Sequence[Input], scratch: Path) -> None:
    """Make the table ``name``; the types of its columns follow from all its values, never from a sample."""
    columns = column_types(rows_of(given))
    if not columns:
        connection.execute(f'CREATE TABLE {_quoted(name)} ("(no rows)" BOOLEAN)')
        return
    writer = TableWriter(scratch / f".table-{name}.jsonl")
    for table in given:
        for line in lines_of(table):
            writer.add_line(line)
    content = writer.content()
    path = Path(content.path) if content.path else scratch / f".table-{name}.jsonl"
    if content.data is not None:
        path.write_bytes(content.data)
    types = ", ".join(f"{_text(column)}: {_text(kind)}" for column, kind in columns.items())
    connection.execute(
        f"CREATE TABLE {_quoted(name)} AS SELECT * FROM read_json({_text(str(path))}, format = 'newline_delimited', "
        f"columns = {{{types}}}, maximum_object_size = 67108864)"
    )
    path.unlink()


def column_types(rows: Iterator[Row]) -> dict[str, str]:
    """Return a type for every column of ``rows``: BOOLEAN, BIGINT, DOUBLE, VARCHAR, or JSON for what is nested or mixed."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for column, value in row.items():
            found.setdefault(column, set()).add(_type(value))
    return {column: _common(kinds - {""}) for column, kinds in found.items()}


def _type(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "BOOLEAN"
    if isinstance(value, int):
        return "BIGINT" if -(2**63) <= value < 2**63 else "DOUBLE"
    if isinstance(value, float):
        return "DOUBLE"
    return "VARCHAR" if isinstance(value, str) else "JSON"


def _common(kinds: set[str]) -> str:
    if not kinds:
        return "VARCHAR"
    if len(kinds) == 1:
        return next(iter(kinds))
    return "DOUBLE" if kinds == {"BIGINT", "DOUBLE"} else "JSON"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
