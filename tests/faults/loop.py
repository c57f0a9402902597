"""Virtual time: an event loop whose clock jumps to the next timer, and simulated processes inside it that freeze and die.

Everything runs in one thread. Work given to a thread runs in the loop, after as long as the disk of its process takes, so
that a run is the same whenever it is repeated. A process is a context variable: whatever is scheduled by it, or for it,
carries it along.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections.abc import Callable
from typing import Any

BEGIN_WALL_US = 1_780_000_000_000_000
BEGIN_S = 1000.0

RUNNING, FROZEN, DEAD = "running", "frozen", "dead"

_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class _Job:
    """Work for a thread: done once the disk has got to it, perhaps never if its process dies before."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], future: asyncio.Future[Any]) -> None:
        self.function = function
        self.arguments = arguments
        self.future = future
        self.is_done = False

    def run(self, process: Process | None) -> None:
        if self.is_done:
            return
        self.is_done = True
        if process is not None:
            process.jobs.pop(id(self), None)
        try:
            result = self.function(*self.arguments)
        except Exception as error:
            if not self.future.done():
                self.future.set_exception(error)
            return
        if not self.future.done():
            self.future.set_result(result)


class Process:
    """One life of a simulated process."""

    def __init__(self, loop: VirtualLoop, name: str, rng: random.Random) -> None:
        self.loop = loop
        self.name = name
        self.state = RUNNING
        self.wall_offset_us = 0
        self.disk_s = (0.0001, 0.001)
        self.rng = rng
        self.context = contextvars.copy_context()
        self.context.run(_current.set, self)
        self.jobs: dict[int, _Job] = {}
        self.on_death: list[Callable[[], None]] = []
        self.on_freeze: list[Callable[[], None]] = []
        self.on_thaw: list[Callable[[], None]] = []
        self._withheld: list[asyncio.Handle] = []
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, main: Callable[[], Any]) -> asyncio.Task[Any]:
        """Run a coroutine function as this process."""
        task: asyncio.Task[Any] = self.loop.create_task(main(), context=self.context)
        return task

    def own(self, task: asyncio.Task[Any]) -> None:
        """Keep a task alive: what a dead process had open must not be tidied up by the garbage collector."""
        self._tasks.append(task)
        if len(self._tasks) > 512:
            self._tasks = [each for each in self._tasks if not each.done()]

    def withhold(self, handle: asyncio.Handle) -> None:
        """Keep what this process would run now: until it goes on, or for ever."""
        self._withheld.append(handle)

    def freeze(self) -> None:
        """Stop in the middle of everything (SIGSTOP)."""
        if self.state == RUNNING:
            self.state = FROZEN
            for hook in list(self.on_freeze):
                hook()

    def thaw(self) -> None:
        """Go on, with the ideas of long ago (SIGCONT)."""
        if self.state == FROZEN:
            self.state = RUNNING
            withheld, self._withheld = self._withheld, []
            self.loop.run_again(withheld)
            for hook in list(self.on_thaw):
                hook()

    def kill(self) -> None:
        """Die without a word (SIGKILL, power loss); a write that was under way is on disk, or is not."""
        if self.state == DEAD:
            return
        self.state = DEAD
        jobs, self.jobs = list(self.jobs.values()), {}
        for job in jobs:
            if self.rng.random() < 0.5:
                job.run(None)
        for hook in list(self.on_death):
            hook()

    @property
    def open_tasks(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that have not ended."""
        return [task for task in self._tasks if not task.done()]


def current_process() -> Process | None:
    """Return the process that runs just now, None outside of all."""
    return _current.get()


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop on a virtual clock. Nothing outside of the process can be waited for."""

    _ready: Any
    _stopping: bool

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._now_s = BEGIN_S
        self._timers: list[tuple[float, int, Any]] = []
        self._timer_count = 0
        self._rng = random.Random(f"{seed} disks")
        self.set_task_factory(self._make_task)
        self.failures: list[str] = []
        """What no part of the production code caught: each is a bug."""
        self.set_exception_handler(self._note_failure)

    def _note_failure(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.failures.append(f"{context.get('message')}: {error!r}")

    def _make_task(self, _loop: asyncio.AbstractEventLoop, work: Any, context: Any = None, **_: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=self, context=context)
        process = _current.get() if context is None else context.get(_current)
        if process is not None:
            process.own(task)
        return task

    def time(self) -> float:
        return self._now_s

    def run_again(self, handles: list[asyncio.Handle]) -> None:
        """Run what was withheld."""
        self._ready.extend(handles)

    def forget(self) -> None:
        """Drop everything that is still to come."""
        self._ready.clear()
        self._timers.clear()

    def _run_once(self) -> None:
        """Run what is ready; move the clock to the next timer when nothing is."""
        ready, timers = self._ready, self._timers
        if not ready and not self._stopping:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not timers:
                raise RuntimeError("the simulation stands still: nothing is due, ever")
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_current)
            if process is not None and process.state is not RUNNING:
                process.withhold(handle)
            else:
                handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        return None

    def call_later(self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None) -> Any:  # type: ignore[override]
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None) -> Any:  # type: ignore[override]
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, timer))
        return timer

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """Run it here, once the disk of the process has got to it."""
        future = self.create_future()
        job = _Job(func, args, future)
        process = _current.get()
        delay_s = 0.0
        if process is not None:
            process.jobs[id(job)] = job
            delay_s = self._rng.uniform(*process.disk_s)
        self.call_later(delay_s, job.run, process)
        return future

    def _process_events(self, event_list: Any) -> None:
        return None

    def _write_to_self(self) -> None:
        return None


class VirtualClock:
    """The clocks of whatever process asks."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now_us(self) -> int:
        process = _current.get()
        offset_us = process.wall_offset_us if process is not None else 0
        return BEGIN_WALL_US + offset_us + int((self._loop.time() - BEGIN_S) * 1e6)

    def monotonic_ns(self) -> int:
        return int(self._loop.time() * 1e9)
