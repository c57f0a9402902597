"""The ``data`` operators (load, split, concat, sql, map): tables in, tables out, the same bytes every time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import LoadParams, MapParams, SplitParams, SqlParams
from flowmesh_node.operators import tables
from flowmesh_node.operators.base import Batch, Content, Emit, Failed, Input, Item, Produced, Row
from flowmesh_node.operators.text import at_row, params_of, template

Log = Callable[[str], None]


class _Tables:
    """Runs one item after the other; each fails alone."""

    types: tuple[str, ...] = ()

    def load(self, batch: Batch) -> None:
        """Nothing stays loaded."""

    def run(self, batch: Batch, emit: Emit, log: Log) -> None:
        """Settle every item."""
        for index, item in enumerate(batch.items):
            began_ns = time.monotonic_ns()
            scratch = Path(batch.scratch) / str(index)
            scratch.mkdir(parents=True, exist_ok=True)
            try:
                outputs = self.outputs(item, scratch, batch)
            except ExecutionError as error:
                emit(index, Failed(error.reason, f"{error.message} ({error.hint})" if error.hint else error.message))
                continue
            rows = sum(max(each.rows, 0) for contents in outputs.values() for each in contents)
            emit(index, Produced(outputs, rows=rows, exec_us=(time.monotonic_ns() - began_ns) // 1000))

    def outputs(self, item: Item, scratch: Path, batch: Batch) -> dict[str, list[Content]]:
        """Return the contents of the output ports."""
        raise NotImplementedError


def _written(rows: Iterable[Row], path: Path) -> Content:
    writer = tables.TableWriter(path)
    for row in rows:
        writer.add(row)
    return writer.content()


class Load(_Tables):
    """Runs data.load."""

    types = ("data.load",)

    def outputs(self, item: Item, scratch: Path, batch: Batch) -> dict[str, list[Content]]:
        """Read the files of the port into one table."""
        params = params_of(item, LoadParams)
        rows = (row for given in item.inputs["file"] for row in _read(given, params.format, scratch))
        return {"rows": [_written(tables.chosen(rows, params.columns, params.limit), scratch / "rows")]}


def _read(given: Input, form: str, scratch: Path) -> Iterable[Row]:
    if form == "auto":
        form = _recognised(given)
    if form == "jsonl":
        return tables.read_jsonl(given)
    if form == "csv":
        return tables.read_csv(given)
    return tables.read_parquet(given, scratch)


def _recognised(given: Input) -> str:
    """Return the format that the first bytes speak for; a file's name has not come along."""
    with tables.open_input(given) as file:
        head = file.read(64)
    if head.startswith(b"PAR1"):
        return "parquet"
    return "jsonl" if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"") else "csv"


class Split(_Tables):
    """Runs data.split."""

    types = ("data.split",)

    def outputs(self, item: Item, scratch: Path, batch: Batch) -> dict[str, list[Content]]:
        """Cut the table into parts of nearly equal length, in order; there may be empty ones."""
        parts = params_of(item, SplitParams).parts
        lines = [line for given in item.inputs["rows"] for line in tables.lines_of(given)]
        length, longer = divmod(len(lines), parts)
        made: list[Content] = []
        begin = 0
        for number in range(parts):
            end = begin + length + (number < longer)
            part = b"".join(line + b"\n" for line in lines[begin:end])
            made.append(Content("rows", part, rows=end - begin))
            begin = end
        return {"parts": made}


class Concat(_Tables):
    """Runs data.concat."""

    types = ("data.concat",)

    def outputs(self, item: Item, scratch: Path, batch: Batch) -> dict[str, list[Content]]:
        """Put the tables end to end."""
        writer = tables.TableWriter(scratch / "rows")
        for given in item.inputs["rows"]:
            for line in tables.lines_of(given):
                writer.add_line(line)
        return {"rows": [writer.content()]}


class Sql(_Tables):
    """Runs data.sql."""

    types = ("data.sql",)

    def outputs(self, item: Item, scratch: Path, batch: Batch) -> dict[str, list[Content]]:
        """Run the SELECT over the ports."""
        from flowmesh_node.operators.sql import select

        query = params_of(item, SqlParams).query
        return {"rows": [_written(select(query, item.inputs, scratch, batch.memory_bytes), scratch / "rows")]}


class Map(_Tables):
    """Runs data.map."""

    types = ("data.map",)

    def outputs(self, item: Item, scratch: Path, batch: Batch) -> dict[str, list[Content]]:
        """Render the templates over every row."""
        params = params_of(item, MapParams)
        renderers = {column: template(source) for column, source in params.columns.items()}
        writer = tables.TableWriter(scratch / "rows")
        for number, row in enumerate(tables.rows_of(item.inputs["rows"])):
            with at_row(number):
                made = {column: render(row) for column, render in renderers.items()}
                writer.add({**_remaining(row, params), **made})
        return {"rows": [writer.content()]}


def _remaining(row: Row, params: MapParams) -> Row:
    """Return the old columns that stay."""
    for column in (*params.keep, *params.drop):
        if column not in row:
            raise ExecutionError(f"there is no column {column!r}", hint=f"There is {', '.join(row) or 'none'}.")
    kept = {column: row[column] for column in params.keep} if params.keep else row
    return {column: value for column, value in kept.items() if column not in params.drop}
