"""An executor process: receives batches over a socket, runs them with the operator library, one at a time.

Started as ``python -m flowmesh_node.process FD`` by the agent. It dies with the agent, and whatever the libraries in
it print goes to a pipe that the agent reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from flowmesh_cas.errors import ExecutionError, FlowmeshError, IntegrityError, InternalError, NotFoundError, UsageError
from flowmesh_node import frames
from flowmesh_node.operators.base import Batch, Content, Failed, Implementation, Produced
from flowmesh_node.operators.registry import implementation

ERROR_MAX_CHARS = 8000
LINES_MAX_CHARS = 64 * 1024
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel for ``signal_number`` when the parent dies; exit at once when it is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def failure_of(error: BaseException, *, is_loading: bool = False) -> Failed:
    """Return what to say about an exception that escaped from an operator."""
    if isinstance(error, ExecutionError):
        return Failed(error.reason, _with_hint(error))
    if isinstance(error, NotFoundError) and is_loading:
        return Failed("model-missing", _with_hint(error))
    if isinstance(error, (UsageError, IntegrityError)):
        return Failed("user-error", _with_hint(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failed("oom", f"out of memory: {str(error)[:500]}")
    text = "".join(traceback.format_exception(error, limit=-8))
    return Failed("internal", text[-ERROR_MAX_CHARS:])


def _with_hint(error: FlowmeshError) -> str:
    return (f"{error.message} ({error.hint})" if error.hint else error.message)[:ERROR_MAX_CHARS]


class Worker:
    """Keeps one implementation per class alive, and settles each item of a batch exactly once."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._implementations: dict[str, Implementation] = {}

    def serve(self) -> None:
        """Run batches until the agent closes the link."""
        while frame := frames.receive(self._link):
            # What was said to a training that had just ended concerns nobody any more.
            if isinstance(frame, frames.Run):
                self._run(frame.batch)

    def keep(self, index: int, path: str, step: int, steps: int, stall_us: int) -> None:
        """Hand a complete checkpoint to the agent."""
        self._send(frames.Checkpointed(index, path, step, steps, stall_us))

    def pace(self) -> tuple[bool, float]:
        """Return what the agent has said since the last call; never waits for it to begin a word."""
        is_now, behind_s = False, 0.0
        while select.select([self._link], [], [], 0)[0]:
            frame = frames.receive(self._link)
            if not isinstance(frame, frames.Pace):
                raise InternalError("the agent does not send that to a process at work")
            is_now, behind_s = is_now or frame.now, frame.behind_s or behind_s
        return is_now, behind_s

    def _send(self, frame: frames.Frame) -> None:
        with self._lock:
            self._link.sendall(frames.pack(frame))

    def _run(self, batch: Batch) -> None:
        settled: set[int] = set()

        def emit(index: int, result: Produced | Failed) -> None:
            if index in settled or not 0 <= index < len(batch.items):
                return
            settled.add(index)
            self._send(settlement(index, result, batch.scratch))

        is_loading = True
        try:
            operator = self._implementation(batch.type)
            began = time.monotonic_ns()
            operator.load(batch)
            load_us = (time.monotonic_ns() - began) // 1000
            self._send(frames.Loaded(load_us, resident(self._implementations.values()), str(getattr(operator, "numeric", ""))))
            is_loading = False
            operator.run(batch, emit, self._log)
            unsettled = Failed("internal", f"{batch.type} left this item unsettled")
        except Exception as error:
            unsettled = failure_of(error, is_loading=is_loading)
        for index in range(len(batch.items)):
            emit(index, unsettled)
        # Before the end is told, so that the agent has every line that belongs to this batch.
        sys.stdout.flush()
        sys.stderr.flush()
        self._send(frames.Finished(resident(self._implementations.values())))

    def _log(self, text: str) -> None:
        for begin in range(0, len(text), LINES_MAX_CHARS):
            self._send(frames.Line(text[begin : begin + LINES_MAX_CHARS]))

    def _implementation(self, type_name: str) -> Implementation:
        if type_name not in self._implementations:
            made = implementation(type_name)
            attach = getattr(made, "attach", None)
            if attach is not None:
                attach(self)
            for name in made.types:
                self._implementations[name] = made
        return self._implementations[type_name]


def resident(operators: Iterable[Implementation]) -> tuple[str, ...]:
    """Return the digests of the models in memory, as far as the operators say."""
    found: set[str] = set()
    for operator in operators:
        said: Callable[[], Iterable[str]] | None = getattr(operator, "resident", None)
        found |= set(said()) if said is not None else set()
    return tuple(sorted(found))


def settlement(index: int, result: Produced | Failed, scratch: str) -> frames.Settled:
    """Return the frame for a settled item; contents too large for the socket go to a file first."""
    if isinstance(result, Failed):
        return frames.Settled(index, failed=Failed(result.reason, result.error[:ERROR_MAX_CHARS]))
    outputs = {
        port: [_spilled(each, Path(scratch) / f".out-{index}-{port}-{n}") for n, each in enumerate(contents)]
        for port, contents in result.outputs.items()
    }
    return frames.Settled(index, produced=replace(result, outputs=outputs))


def _spilled(each: Content, path: Path) -> Content:
    if each.data is None or len(each.data) <= frames.SPILL_BYTES:
        return each
    path.write_bytes(each.data)
    return Content(each.kind, path=str(path), rows=each.rows)


def main(arguments: list[str]) -> None:
    """Serve the agent that started this process; the first argument is the number of the inherited socket."""
    die_with_parent(int(arguments[1]), signal.SIGTERM if arguments[2] == "user" else signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the agent decides what ends when.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    link = socket.socket(fileno=int(arguments[0]))
    os.set_inheritable(link.fileno(), False)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        Worker(link).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
