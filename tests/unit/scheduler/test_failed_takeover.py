"""A take-over that breaks off while it begins to listen: nobody stays behind who answers with a state of then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from flowmesh_cas.errors import TransientError
from flowmesh_mesh import subjects
from flowmesh_scheduler.requests import Requests
from flowmesh_scheduler.service import Leader


class _Bus:
    """A broker that subscribes to everything and then answers nothing."""

    async def ensure_consumer(self, *_: Any) -> int:
        return 0

    async def subscribe(self, subject: str, _: Any) -> str:
        return subject

    async def pull(self, stream: str, *_: Any) -> str:
        return stream

    async def stream_state(self, stream: str) -> None:
        raise TransientError(f"no answer about {stream}")


async def test_every_subscription_of_a_take_over_that_breaks_off_is_known_to_who_ends_it() -> None:
    requests = Requests(cast(Leader, SimpleNamespace(bus=_Bus())))
    listening: list[Any] = []
    with pytest.raises(TransientError):
        await requests.listen(listening)
    assert subjects.ask("*") in listening
    assert len(listening) == 6
