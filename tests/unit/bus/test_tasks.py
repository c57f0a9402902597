"""Ending tasks that do not want to end."""

from __future__ import annotations

import asyncio

from flowmesh_mesh.tasks import end


async def test_a_loop_that_swallows_a_cancellation_is_ended_all_the_same() -> None:
    changed = asyncio.Event()

    async def loop() -> None:
        while True:
            try:
                await asyncio.sleep(60.0)
            except asyncio.CancelledError:
                if not changed.is_set():
                    changed.set()
                    continue
                raise

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    await asyncio.wait_for(end([task], again_s=0.01), 10.0)
    assert task.cancelled()
    assert changed.is_set()


async def test_what_ended_badly_is_passed_over() -> None:
    async def fail() -> None:
        raise ValueError

    task = asyncio.create_task(fail())
    waiting = asyncio.create_task(asyncio.sleep(60.0))
    await asyncio.sleep(0)
    await asyncio.wait_for(end([task, waiting]), 10.0)
    assert task.done()
    assert waiting.cancelled()
