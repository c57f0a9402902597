"""The data operators, each through its class as the executor runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowmesh_node.operators.base import Batch, Failed, Input, Item, Produced, decode_rows, encode_rows
from flowmesh_node.operators.data import Concat, Load, Map, Split, Sql

Rows = list[dict[str, Any]]


def _table(rows: Rows) -> Input:
    data = encode_rows(rows)
    return Input("rows", "d", len(data), len(rows), data=data)


def _file(data: bytes) -> Input:
    return Input("file", "d", len(data), data=data)


def _run(operator: Any, params: dict[str, Any], scratch: Path, **ports: list[Input]) -> Produced | Failed:
    settled: list[Produced | Failed] = []
    batch = Batch(operator.types[0], 1, [Item("00", "x", params, ports)], scratch=str(scratch))
    operator.load(batch)
    operator.run(batch, lambda index, result: settled.append(result), lambda line: None)
    assert len(settled) == 1
    return settled[0]


def _bytes(result: Produced | Failed, port: str = "rows", item: int = 0) -> bytes:
    assert isinstance(result, Produced), result
    content = result.outputs[port][item]
    return content.data if content.data is not None else Path(content.path).read_bytes()


def _rows(result: Produced | Failed, port: str = "rows", item: int = 0) -> Rows:
    rows = decode_rows(_bytes(result, port, item))
    assert isinstance(result, Produced)
    assert result.outputs[port][item].rows == len(rows)
    return rows


def _error(result: Produced | Failed) -> str:
    assert isinstance(result, Failed), result
    assert result.reason == "user-error"
    return result.error


# --- data.load


def test_json_lines_come_out_canonical(tmp_path: Path) -> None:
    file = _file(b'\xef\xbb\xbf{"b": 1,  "a": "\xc3\xa9"}\r\n\n  {"b": null}')
    assert _bytes(_run(Load(), {}, tmp_path, file=[file])) == '{"b":1,"a":"é"}\n{"b":null}\n'.encode()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b'{"a":1}\n{"a":\n', "line 2 is not JSON"),
        (b'{"a":1}\n\n[1]\n', "line 3 is not an object but [1]"),
        (b'{"a":1}\n{"a":"\xff"}\n', "line 2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, data: bytes, word: str) -> None:
    assert word in _error(_run(Load(), {"format": "jsonl"}, tmp_path, file=[_file(data)]))


def test_a_line_separator_inside_a_string_does_not_end_the_record(tmp_path: Path) -> None:
    data = '{"a":"x\u2028y\\u0085z"}\n'.encode()
    assert _rows(_run(Load(), {"format": "jsonl"}, tmp_path, file=[_file(data)])) == [{"a": "x\u2028y\x85z"}]


def test_csv_columns_are_typed_by_all_their_cells(tmp_path: Path) -> None:
    data = b'id,x,ok,zip,note\n1,1.5,true,01234,"a, b"\n2,,false,99999,\n-3,2,,00001,"say ""hi"""\n'
    assert _rows(_run(Load(), {"format": "csv"}, tmp_path, file=[_file(data)])) == [
        {"id": 1, "x": 1.5, "ok": True, "zip": "01234", "note": "a, b"},
        {"id": 2, "x": None, "ok": False, "zip": "99999", "note": ""},
        {"id": -3, "x": 2.0, "ok": None, "zip": "00001", "note": 'say "hi"'},
    ]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "the file is empty"),
        (b"a,b\n1,2\n3\n", "line 3 has 1 cells, the header has 2"),
        (b"a,a\n1,2\n", "two columns named 'a'"),
        (b"a,\n1,2\n", "a column without a name"),
        (b'a\n"open\n', "not CSV"),
        (b"a\n\xff\n", "not UTF-8"),
    ],
)
def test_a_bad_csv_file_is_explained(tmp_path: Path, data: bytes, word: str) -> None:
    assert word in _error(_run(Load(), {"format": "csv"}, tmp_path, file=[_file(data)]))


def test_parquet_is_read_with_its_types(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    path = tmp_path / "in.parquet"
    query = "SELECT 1 AS i, 0.5::DOUBLE AS f, 'x' AS s, [1, 2] AS l, DATE '2024-02-29' AS d, NULL AS n"
    duckdb.sql(f"COPY ({query}) TO '{path}' (FORMAT parquet)")
    params = {"format": "auto"}
    wanted = [{"i": 1, "f": 0.5, "s": "x", "l": [1, 2], "d": "2024-02-29", "n": None}]
    assert _rows(_run(Load(), params, tmp_path, file=[_file(path.read_bytes())])) == wanted
    assert "Parquet" in _error(_run(Load(), {"format": "parquet"}, tmp_path, file=[_file(b"PAR1 no")]))


def test_limit_and_columns_choose(tmp_path: Path) -> None:
    file = _file(b'{"a":1,"b":2}\n{"a":3,"b":4}\n{"a":5}\n')
    assert _rows(_run(Load(), {"columns": ["b"], "limit": 2}, tmp_path, file=[file])) == [{"b": 2}, {"b": 4}]
    assert "row 2 has no column 'b'" in _error(_run(Load(), {"columns": ["b"]}, tmp_path, file=[file]))


def test_a_large_table_goes_through_a_file(tmp_path: Path) -> None:
    data = b"".join(b'{"n":%d,"text":"%s"}\n' % (n, b"x" * 1000) for n in range(6000))
    result = _run(Load(), {"format": "jsonl"}, tmp_path, file=[_file(data)])
    assert isinstance(result, Produced)
    assert result.outputs["rows"][0].path
    assert _bytes(result) == data


# --- data.split, data.concat


def test_parts_are_nearly_equal_and_concat_restores_them(tmp_path: Path) -> None:
    rows = [{"n": n} for n in range(10)]
    split = _run(Split(), {"parts": 4}, tmp_path, rows=[_table(rows)])
    assert isinstance(split, Produced)
    parts = [_rows(split, "parts", n) for n in range(4)]
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    assert _bytes(_run(Concat(), {}, tmp_path, rows=[_table(part) for part in parts])) == encode_rows(rows)


def test_more_parts_than_rows_gives_empty_ones(tmp_path: Path) -> None:
    split = _run(Split(), {"parts": 3}, tmp_path, rows=[_table([{"n": 1}])])
    assert [_rows(split, "parts", n) for n in range(3)] == [[{"n": 1}], [], []]


# --- data.map


def test_templates_make_columns(tmp_path: Path) -> None:
    rows: Rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    params = {"columns": {"c": "{{ b }}-{{ a + 1 }}", "b": "{{ b | upper }}"}, "drop": ["a"]}
    assert _rows(_run(Map(), params, tmp_path, rows=[_table(rows)])) == [{"b": "X", "c": "x-2"}, {"b": "Y", "c": "y-3"}]
    kept = _run(Map(), {"columns": {"c": "{{ a }}"}, "keep": ["b"]}, tmp_path, rows=[_table(rows)])
    assert _rows(kept) == [{"b": "x", "c": "1"}, {"b": "y", "c": "2"}]


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"columns": {"c": "{{ nope }}"}}, "'nope' is undefined"),
        ({"columns": {"c": "{{ a"}}, "bad template"),
        ({"columns": {"c": "{{ ''.__class__.__mro__ }}"}}, "row 0"),
        ({"columns": {}, "drop": ["z"]}, "row 0: there is no column 'z'"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_explained(tmp_path: Path, params: dict[str, Any], word: str) -> None:
    assert word in _error(_run(Map(), params, tmp_path, rows=[_table([{"a": 1}])]))


# --- data.sql


def _sql(query: str, tmp_path: Path, **ports: list[Input]) -> Produced | Failed:
    pytest.importorskip("duckdb")
    return _run(Sql(), {"query": query}, tmp_path, **ports)


def test_ports_are_tables_and_order_is_kept(tmp_path: Path) -> None:
    left = [_table([{"k": 1, "v": "a"}]), _table([{"k": 2, "v": "b"}, {"k": 3, "v": None}])]
    right = [_table([{"k": 2, "w": 0.5}, {"k": 3, "w": 2}])]
    query = "SELECT l.k, v, w * 2 AS w FROM l JOIN r USING (k) ORDER BY l.k DESC -- the end"
    assert _bytes(_sql(query, tmp_path, l=left, r=right)) == b'{"k":3,"v":null,"w":4.0}\n{"k":2,"v":"b","w":1.0}\n'


def test_text_that_looks_like_a_date_stays_text_and_nested_values_stay_nested(tmp_path: Path) -> None:
    rows: Rows = [{"d": "2024-01-01", "m": [{"role": "user"}], "x": 1}, {"d": "05", "m": None, "x": "one"}]
    assert _rows(_sql("SELECT * FROM t", tmp_path, t=[_table(rows)])) == rows


def test_the_same_query_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"g": n % 7, "x": n / 3} for n in range(5000)]
    query = "SELECT g, sum(x) AS s, list(x) AS l FROM t GROUP BY g"
    first, second = (_bytes(_sql(query, tmp_path, t=[_table(rows)])) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT nope FROM t", "nope"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("DROP TABLE t", "SELECT"),
        ("COPY t TO 'x.csv'", "SELECT"),
        ("SET threads = 4", "SELECT"),
        ("ATTACH 'x.db'", "SELECT"),
        ("SELECT * FROM read_csv('/etc/passwd')", "disabled"),
        ("SELECT * FROM '/etc/passwd.csv'", "disabled"),
        ("SELECT random()", "random() gives another answer"),
        ("SELECT now()", "now() gives another answer"),
        ("SELECT current_date", "current_date gives another answer"),
        ("SELECT * FROM t WHERE x > (SELECT uuid() IS NULL)", "gives another answer"),
        ("SELECT * FROM t USING SAMPLE 1", "sample"),
        ("SELECT 'nan'::DOUBLE AS x", "row 0 of the query holds NaN"),
    ],
)
def test_what_is_not_one_select_over_the_ports_is_refused(tmp_path: Path, query: str, word: str) -> None:
    assert word in _error(_sql(query, tmp_path, t=[_table([{"x": 1}])]))


def test_an_empty_table_has_no_columns_and_the_error_says_so(tmp_path: Path) -> None:
    assert "'t' has no rows" in _error(_sql("SELECT x FROM t", tmp_path, t=[_table([])]))
    assert _rows(_sql("SELECT count(*) AS n FROM t", tmp_path, t=[_table([])])) == [{"n": 0}]


def test_an_item_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    settled: dict[int, Produced | Failed] = {}
    items = [Item(str(n), "x", {"parts": parts}, {"rows": [_table([{"n": 1}])]}) for n, parts in enumerate((1, "two", 1))]
    Split().run(Batch("data.split", 1, items, scratch=str(tmp_path)), settled.__setitem__, lambda line: None)
    assert [type(settled[n]) for n in range(3)] == [Produced, Failed, Produced]
