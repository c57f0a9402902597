"""Headers, acknowledgement subjects and errors, without a broker."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_cas.errors import FencedError, FlowmeshError, InternalError, NotFoundError, TransientError, UsageError
from flowmesh_mesh.delivery import (
    AlreadyStoredError,
    ApiError,
    Delivery,
    Expect,
    StreamFullError,
    UnknownOutcomeError,
    error_of,
    format_headers,
    parse_headers,
)


class _Posted:
    """Remembers what is posted."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def post(self, subject: str, data: bytes = b"", *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.messages.append((subject, data))


def _delivery(reply: str) -> tuple[_Posted, Delivery]:
    posted = _Posted()
    return posted, Delivery(posted, "asg.node.n1.a", reply, b"", None)


_NAME = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ-", min_size=1, max_size=20)
_VALUE = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), max_size=30)


@given(st.dictionaries(_NAME, _VALUE, max_size=8))
def test_headers_survive_the_round_trip(headers: dict[str, str]) -> None:
    assert parse_headers(format_headers(headers)) == headers


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\r"])
def test_a_line_break_cannot_smuggle_a_header(value: str) -> None:
    with pytest.raises(UsageError):
        format_headers({"A": value})


def test_the_inline_status_is_read() -> None:
    assert parse_headers(b"NATS/1.0 404 No Messages\r\n\r\n") == {"Status": "404", "Description": "No Messages"}
    heartbeat = parse_headers(b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Stream: 7\r\n\r\n")
    assert heartbeat == {"Status": "100", "Description": "Idle Heartbeat", "Nats-Last-Stream": "7"}


@pytest.mark.parametrize(
    "reply",
    [
        "$JS.ACK.ASSIGN.node_n1.2.1795155980221.9.1700000000000000000.5",
        "$JS.ACK.hub.AHASH.ASSIGN.node_n1.2.1795155980221.9.17.5.rnd",
    ],
)
def test_a_delivery_knows_its_sequence_with_and_without_a_domain(reply: str) -> None:
    _, delivery = _delivery(reply)
    assert (delivery.delivered, delivery.seq, delivery.pending) == (2, 1795155980221, 5)


def test_a_core_message_has_sequence_zero() -> None:
    _, delivery = _delivery("_INBOX_x.1")
    assert (delivery.delivered, delivery.seq) == (0, 0)


async def test_a_delivery_is_settled_in_the_words_of_the_broker() -> None:
    posted, delivery = _delivery("$JS.ACK.S.c.1.1.1.1.0")
    await delivery.ack()
    await delivery.nak(0.5)
    await delivery.nak()
    await delivery.in_progress()
    await delivery.term()
    assert [data for _, data in posted.messages] == [b"+ACK", b'-NAK {"delay": 500000000}', b"-NAK", b"+WPI", b"+TERM"]


async def test_an_answer_without_a_reply_subject_goes_nowhere() -> None:
    posted, delivery = _delivery("")
    await delivery.respond(b"x")
    assert posted.messages == []


@pytest.mark.parametrize(
    ("code", "err_code", "description", "expected"),
    [
        (400, 10071, "wrong last sequence: 7", FencedError),
        (400, 10164, "in process", TransientError),
        (503, 10077, "maximum messages per subject exceeded", AlreadyStoredError),
        (503, 10077, "maximum messages exceeded", StreamFullError),
        (404, 10059, "stream not found", NotFoundError),
        (503, 10008, "JetStream system temporarily unavailable", TransientError),
        (400, 10025, "invalid JSON", InternalError),
    ],
)
def test_what_the_broker_says_becomes_an_error_of_the_tree(
    code: int, err_code: int, description: str, expected: type[FlowmeshError]
) -> None:
    error = error_of(ApiError(code, err_code, description), "led.x")
    assert type(error) is expected
    assert str(err_code) in error.message


def test_only_a_lost_answer_has_an_unknown_outcome() -> None:
    assert UnknownOutcomeError("x").unknown_outcome
    assert not getattr(TransientError("x"), "unknown_outcome", False)


def test_a_condition_names_its_subject_only_when_it_is_another() -> None:
    assert Expect(0).headers() == {"Nats-Expected-Last-Subject-Sequence": "0"}
    assert Expect(9, "led.epoch.*").headers() == {
        "Nats-Expected-Last-Subject-Sequence": "9",
        "Nats-Expected-Last-Subject-Sequence-Subject": "led.epoch.*",
    }
