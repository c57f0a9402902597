"""Decisions of a pull session, one by one."""

from __future__ import annotations

import pytest

from flowmesh_cas.cid import RAW, cid_of
from flowmesh_cas.errors import NotFoundError
from flowmesh_cas.pull import STRIKES_MAX, BlocksMissingError, Pull

BLOCKS = [f"block {number}".encode() for number in range(400)]
CIDS = [cid_of(RAW, block) for block in BLOCKS]
NAMED = dict(zip(CIDS, BLOCKS, strict=True))


def test_the_window_bounds_what_is_under_way() -> None:
    pull = Pull(window=3)
    pull.want(CIDS, ["a", "b"])
    asks = pull.asks()
    assert len(asks) == 3
    assert {asking.peer for asking in asks} == {"a", "b"}
    assert pull.asks() == []


def test_small_blocks_share_a_question_and_large_ones_do_not() -> None:
    pull = Pull(window=1)
    pull.want(CIDS, ["a"])
    (asking,) = pull.asks()
    pull.answered(asking, [NAMED[cid] for cid in asking.cids])
    (asking,) = pull.asks()
    assert len(asking.cids) > 100
    large = Pull(window=1)
    blocks = [bytes((number,)) * 1_000_000 for number in range(9)]
    cids = [cid_of(RAW, block) for block in blocks]
    large.want(cids, ["a"])
    (asking,) = large.asks()
    large.answered(asking, blocks[:1])  # no room for more
    (asking,) = large.asks()
    assert asking.cids == (cids[1],)


def test_a_peer_that_lies_is_dropped_and_what_it_gave_before_is_kept() -> None:
    pull = Pull(window=1)
    pull.want(CIDS[:3], ["liar", "good"])
    (asking,) = pull.asks()
    assert asking.peer == "liar"
    verified = pull.answered(asking, [BLOCKS[0], b"lie", BLOCKS[2]])
    assert verified.blocks == [(CIDS[0], BLOCKS[0]), (CIDS[2], BLOCKS[2])]
    assert "lied" in pull.dropped["liar"]
    (again,) = pull.asks()
    assert (again.peer, again.cids) == ("good", (CIDS[1],))


def test_a_peer_that_lacks_a_block_is_not_asked_for_it_again() -> None:
    pull = Pull(window=1)
    pull.want(CIDS[:2], ["a", "b"])
    (asking,) = pull.asks()
    pull.answered(asking, [None, BLOCKS[1]])
    (again,) = pull.asks()
    assert (again.peer, again.cids) == ("b", (CIDS[0],))
    pull.answered(again, [None])
    assert pull.is_done
    assert pull.missing == [CIDS[0]]
    assert not pull.dropped
    with pytest.raises(NotFoundError) as caught:
        pull.raise_if_missing()
    assert isinstance(caught.value, BlocksMissingError)
    assert caught.value.missing == (CIDS[0],)


def test_a_peer_that_does_not_answer_is_asked_last_and_then_dropped() -> None:
    pull = Pull(window=1)
    pull.want(CIDS[:1], ["silent"])
    strikes = []
    while asks := pull.asks():
        strikes.append(asks[0].strikes)
        pull.failed(asks[0], "timed out")
    assert strikes == list(range(STRIKES_MAX))
    assert pull.dropped == {"silent": "timed out"}
    assert pull.missing == [CIDS[0]]
    fresh = Pull(window=1)
    fresh.want(CIDS[:1], ["silent", "good"])
    (asking,) = fresh.asks()
    fresh.failed(asking, "timed out")
    assert fresh.asks()[0].peer == "good"


def test_an_answer_clears_what_failed_before() -> None:
    pull = Pull(window=1)
    pull.want(CIDS, ["a"])
    for _ in range(20):
        (asking,) = pull.asks()
        pull.failed(asking, "busy")
        (asking,) = pull.asks()
        assert asking.strikes == 1
        pull.answered(asking, [NAMED[asking.cids[0]]])
    assert not pull.dropped


@pytest.mark.parametrize("answer", [[], [b"x"] * 500])
def test_an_answer_of_the_wrong_length_is_a_failure(answer: list[bytes | None]) -> None:
    pull = Pull(window=1)
    pull.want(CIDS[:2], ["a"])
    while asks := pull.asks():
        assert pull.answered(asks[0], answer).blocks == []
    assert "a" in pull.dropped
    assert sorted(pull.missing) == sorted(CIDS[:2])


def test_a_block_is_wanted_once() -> None:
    pull = Pull(window=1)
    pull.want([CIDS[0], CIDS[0]], ["a"])
    pull.want([CIDS[0]], ["b"])
    (asking,) = pull.asks()
    assert asking.cids == (CIDS[0],)


def test_roots_with_different_holders_are_asked_of_theirs() -> None:
    pull = Pull()
    pull.want(CIDS[:1], ["a"])
    pull.want(CIDS[1:2], ["b"])
    assert {asking.peer: asking.cids for asking in pull.asks()} == {"a": (CIDS[0],), "b": (CIDS[1],)}


def test_a_block_of_two_roots_falls_back_to_the_holders_of_the_second() -> None:
    pull = Pull(window=1)
    pull.want(CIDS[:1], ["a"])
    pull.want(CIDS[:1], ["a", "b", "c"])
    (asking,) = pull.asks()
    assert asking.peer == "a"
    pull.answered(asking, [None])
    (asking,) = pull.asks()
    assert asking.candidates == ("b", "c")
    pull.answered(asking, [None])
    pull.answered(pull.asks()[0], [None])
    assert pull.missing == CIDS[:1]
    pull.want(CIDS[:1], ["d"])
    assert pull.missing == []
    verified = pull.answered(pull.asks()[0], BLOCKS[:1])
    assert verified.blocks == [(CIDS[0], BLOCKS[0])]
    pull.want(CIDS[:1], ["e"])
    assert pull.is_done


def test_blocks_of_a_dropped_peer_fall_back_too() -> None:
    pull = Pull(window=1)
    pull.want(CIDS[:2], ["a"])
    pull.want(CIDS[:1], ["b"])
    pull.answered(pull.asks()[0], [b"lie"])
    (asking,) = pull.asks()
    assert (asking.peer, asking.cids) == ("b", (CIDS[0],))
    pull.answered(asking, BLOCKS[:1])
    assert pull.asks() == []
    assert pull.is_done
    assert pull.missing == [CIDS[1]]
