"""Ending tasks for certain.

A task may swallow a cancellation: ``asyncio.wait_for`` does in Python 3.11 when what it waits for is done in the same turn of the
loop, and the client library's loops around attempts to connect do. A loop that swallowed it goes on for ever, and so does whoever
waits for its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_S = 1.0
"""Pause before a task that has not ended is cancelled once more: what it tidies up on its way out is given that time."""


async def end(tasks: Iterable[asyncio.Task[Any]], *, again_s: float = AGAIN_S) -> None:
    """Cancel tasks until each has ended; what they raised is of no interest any more."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=again_s)
        for task in done:
            if not task.cancelled():
                task.exception()  # it has been looked at
