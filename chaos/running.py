"""Running seeds: one after the other, or side by side in processes of their own."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from chaos.checker import Verdict
from chaos.processes import Shape
from chaos.seed import Outcome, run_seed
from flowmesh_cas.errors import FlowmeshError

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, or until Ctrl-C or SIGTERM, after which everything is still cleaned up."""
    logging.getLogger("flowmesh").setLevel(logging.ERROR)  # that clients complain is what is wanted

    async def guarded() -> T:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        return await task

    return asyncio.run(guarded())


def _one(seed: int, window_s: float, folder: Path, shape: Shape) -> Outcome:
    """Run one seed; a mesh that does not even start is an outcome too."""
    try:
        return run(run_seed(seed, window_s, folder, shape))
    except (FlowmeshError, TimeoutError, OSError) as error:
        return Outcome(seed, window_s, 0.0, Verdict(), [], error=f"{type(error).__name__}: {error}")


def outcomes_of(seeds: list[int], window_s: float, home: Path, shape: Shape, at_once: int) -> Iterator[Outcome]:
    """Run seeds, each in a folder of its own; side by side, each has a process of its own too."""
    if at_once == 1:
        for seed in seeds:
            yield _one(seed, window_s, home / f"seed-{seed}", shape)
        return
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_one, seed, window_s, home / f"seed-{seed}", shape) for seed in seeds]
        try:
            for done in as_completed(running):
                yield done.result()
        except BaseException:
            for future in running:
                future.cancel()
            for process in (pool._processes or {}).values():
                process.terminate()  # each ends what it has started
            raise
