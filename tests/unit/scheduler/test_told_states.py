"""What is told of a run: no more than the ledger shows, for another leader knows nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from flowmesh_mesh.manifest import RunEnd
from flowmesh_scheduler.asks import state_of, told_end
from flowmesh_scheduler.core.state import Run
from flowmesh_scheduler.service import Leader

PAIR = ("A", "run")


def _leader(*, accepting: bool = False, failing: bool = False) -> Leader:
    hands = SimpleNamespace(failing={PAIR} if failing else set())
    requests = SimpleNamespace(is_accepting=lambda pair: accepting and pair == PAIR)
    return cast(Leader, SimpleNamespace(hands=hands, requests=requests))


def _run(reason: str = "") -> Run:
    end = RunEnd("A", "run", reason, "somebody", 1) if reason else None
    return cast(Run, SimpleNamespace(id_pair=PAIR, end=end))


@pytest.mark.parametrize(
    ("where", "reason", "state"),
    [
        ({}, "", "accepted"),
        ({"accepting": True}, "", "received"),
        ({"accepting": True}, "succeeded", "received"),
        ({}, "succeeded", "succeeded"),
        ({"failing": True}, "timeout", "accepted"),
        ({}, "timeout", "failed"),
        ({}, "cancelled", "cancelled"),
    ],
)
def test_a_state_is_told_once_it_follows_from_the_ledger(where: dict[str, Any], reason: str, state: str) -> None:
    leader, run = _leader(**where), _run(reason)
    assert state_of(leader, run) == state
    assert (told_end(leader, run) is not None) == (state in ("succeeded", "failed", "cancelled"))
