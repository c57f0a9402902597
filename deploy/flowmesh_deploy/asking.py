"""One question to every broker of a cluster: each answers for itself."""

from __future__ import annotations

import asyncio

from flowmesh_mesh.bus import Bus, Delivery

ANSWER_S = 1.0
"""A broker that is there answers within milliseconds; one that is not never does."""


async def ask_all(bus: Bus, subject: str, data: bytes, expected: int, timeout_s: float = ANSWER_S) -> list[bytes]:
    """Return what the brokers answer: as soon as ``expected`` have, else all that came within ``timeout_s``."""
    answers: list[bytes] = []
    inbox, is_done = bus.new_inbox(), asyncio.Event()

    def hear(delivery: Delivery) -> None:
        answers.append(delivery.data)
        if len(answers) >= expected:
            is_done.set()

    subscription = await bus.subscribe(inbox, hear)
    await bus.publish(subject, data, reply=inbox)
    try:
        await asyncio.wait_for(is_done.wait(), timeout_s)
    except TimeoutError:
        pass
    finally:
        await subscription.unsubscribe()
    return answers
