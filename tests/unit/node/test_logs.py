"""Log lines: the rate, the cap, and what is said about what was left out."""

from __future__ import annotations

from flowmesh_node import logs
from flowmesh_node.logs import LineTap


async def test_lines_go_out_together_and_are_kept() -> None:
    sent: list[tuple[str, ...]] = []
    tap = LineTap(sent.append)
    tap.line("one\r\n")
    tap.line("")
    tap.line("three")
    assert not sent
    tap.flush()
    assert sent == [("one", "", "three")]
    assert tap.kept() == b"one\n\nthree\n"


async def test_what_is_above_the_rate_is_counted_not_sent() -> None:
    sent: list[str] = []
    tap = LineTap(lambda lines: sent.extend(lines))
    for number in range(logs.LINES_PER_S * 5):
        tap.line(str(number))
    tap.flush()
    assert logs.LINES_PER_S <= len(sent) <= logs.LINES_PER_S + 50
    assert "lines left out" in sent[-1]
    assert tap.kept().count(b"\n") == logs.LINES_PER_S * 5


async def test_the_kept_log_has_an_end_and_says_how_much_is_missing() -> None:
    tap = LineTap(lambda lines: None)
    for _ in range(30):
        tap.line("x" * 99_999)
    kept = tap.kept()
    assert len(kept) < logs.KEPT_MAX_BYTES + 100
    assert kept.endswith(b"[cut here: %d more bytes]\n" % (3_000_000 - logs.KEPT_MAX_BYTES))


async def test_nothing_printed_is_no_log() -> None:
    assert LineTap(lambda lines: None).kept() == b""
