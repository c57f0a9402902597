"""When nobody answers behind a broker, and when that is no reason to leave it."""

from __future__ import annotations

from flowmesh_mesh.isolation import ALONE_S, Silence


def test_silence_that_lasts_is_told_once() -> None:
    silence = Silence(3)
    assert not any(silence.grows(float(second)) for second in range(int(ALONE_S)))
    assert silence.grows(ALONE_S)
    assert not silence.grows(ALONE_S + 1), "it begins anew"


def test_an_answer_ends_it() -> None:
    silence = Silence(3)
    for second in range(14):
        silence.grows(float(second))
    silence.broken()
    assert not any(silence.grows(14.0 + second) for second in range(14))


def test_a_few_questions_in_vain_are_not_enough() -> None:
    silence = Silence(3)
    assert not any(silence.grows(20.0 * number) for number in range(4))
    assert silence.grows(80.0)


def test_with_one_broker_there_is_nobody_else_to_go_to() -> None:
    silence = Silence(1)
    assert not any(silence.grows(float(second)) for second in range(100))


def test_a_peer_that_gives_no_blocks_says_nothing_of_the_broker() -> None:
    silence = Silence(3)
    assert not any(silence.grows(float(second), "fm.blocks.n1") for second in range(100))
