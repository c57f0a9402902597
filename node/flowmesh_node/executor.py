"""One executor process as the agent sees it: started, given a batch at a time, read line by line, killed when it must be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flowmesh_cas.errors import ExecutionError, InternalError
from flowmesh_node import frames
from flowmesh_node.operators.base import Batch

LINE_MAX_BYTES = 8192
KILL_GRACE_S = 2.0
LOAD_TIMEOUT_S = 1800.0
"""Limit of making models ready, unpacking included."""


@dataclass(slots=True)
class Watch:
    """What a batch wants to hear while it runs: settled items, log lines, that loading is over, and checkpoints."""

    on_settled: Callable[[frames.Settled], None]
    on_line: Callable[[str], None]
    on_loaded: Callable[[frames.Loaded], None]
    on_checkpoint: Callable[[frames.Checkpointed], None] = lambda frame: None


class Executor:
    """A child process of one kind. ``resident`` are the digests of the models that it keeps."""

    def __init__(self, kind: str, environment: Mapping[str, str]) -> None:
        self.kind = kind
        self.resident: tuple[str, ...] = ()
        self.used_at = time.monotonic()
        self.is_busy = False
        self.is_lent = False
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._pipes: asyncio.Task[None] | None = None
        self._watch: Watch | None = None

    @property
    def pid(self) -> int:
        """Process id, 0 before the start."""
        return self._process.pid if self._process else 0

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None and self._writer is not None

    async def start(self) -> None:
        """Start the process with nothing open but a socket to us, a pipe for what it prints, and /dev/null."""
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "flowmesh_node.process", str(theirs.fileno()), str(os.getpid()), self.kind,
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(self._environment),
                start_new_session=True,
                limit=LINE_MAX_BYTES * 2,
            )  # fmt: skip
        finally:
            theirs.close()
        ours.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self._pipes = asyncio.create_task(self._read_lines())

    async def run(self, batch: Batch, watch: Watch, timeout_s: float = 0.0) -> None:
        """Run a batch to its end. Raise ExecutionError (timeout, crashed) when the process does not get there.

        ``timeout_s`` counts from the moment that everything is loaded; loading has a limit of its own.
        """
        if self._writer is None or self.is_busy:
            raise InternalError("this executor cannot take a batch")
        self.is_busy, self._watch = True, watch
        try:
            self._writer.write(frames.pack(frames.Run(batch)))
            async with asyncio.timeout(LOAD_TIMEOUT_S) as limit:
                await self._follow(watch, limit, timeout_s)
        except TimeoutError as error:
            await self.kill()
            raise ExecutionError(f"still running after {timeout_s:g} s", reason="timeout") from error
        except (ConnectionError, asyncio.IncompleteReadError, InternalError) as error:
            raise ExecutionError(await self._cause_of_death(error), reason="crashed") from error
        except asyncio.CancelledError:
            await self.kill()
            raise
        finally:
            self.is_busy, self._watch, self.used_at = False, None, time.monotonic()

    def checkpoint_now(self) -> None:
        """Let what trains write a checkpoint after the step that it is at; harmless where nothing trains."""
        self._tell(frames.Pace(now=True))

    def note_kept(self, behind_s: float) -> None:
        """Tell what trains how long its last checkpoint took until the mesh held it."""
        self._tell(frames.Pace(behind_s=behind_s))

    def _tell(self, pace: frames.Pace) -> None:
        if self.kind == "train" and self.is_busy and self._writer is not None:
            self._writer.write(frames.pack(pace))

    async def _follow(self, watch: Watch, limit: asyncio.Timeout, timeout_s: float) -> None:
        while True:
            frame = await self._next_frame()
            match frame:
                case frames.Settled():
                    watch.on_settled(frame)
                case frames.Line():
                    for line in frame.text.splitlines():
                        watch.on_line(line)
                case frames.Checkpointed():
                    watch.on_checkpoint(frame)
                case frames.Loaded():
                    self.resident = frame.resident
                    limit.reschedule(asyncio.get_running_loop().time() + timeout_s if timeout_s else None)
                    watch.on_loaded(frame)
                case frames.Finished():
                    self.resident = frame.resident
                    await asyncio.sleep(0)  # lines printed before the end are in the pipe already
                    return
                case _:
                    raise InternalError("an executor does not send that")

    async def _next_frame(self) -> frames.Frame:
        assert self._reader is not None
        prefix = await self._reader.readexactly(4)
        return frames.unpack(await self._reader.readexactly(frames.length(prefix)))

    async def _read_lines(self) -> None:
        """Hand what the process prints to the batch that runs; cut lines that are too long; never stop reading."""
        assert self._process is not None
        assert self._process.stdout is not None
        stream, rest = self._process.stdout, b""
        while chunk := await stream.read(LINE_MAX_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > LINE_MAX_BYTES:
                lines, rest = [*lines, rest], b""
            if self._watch is not None:
                for line in lines:
                    self._watch.on_line(line[:LINE_MAX_BYTES].decode(errors="replace"))
        if rest and self._watch is not None:
            self._watch.on_line(rest.decode(errors="replace"))

    async def _cause_of_death(self, error: BaseException) -> str:
        assert self._process is not None
        await self.kill()
        code = self._process.returncode
        if code is not None and code < 0 and code != -signal.SIGKILL:
            return f"the {self.kind} process died of {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            return f"the {self.kind} process was killed; the machine may have run out of memory"
        return f"the {self.kind} process ended with code {code} ({type(error).__name__})"

    async def kill(self) -> None:
        """End the process and all its children; harmless when it is dead."""
        if self._process is None:
            return
        process, writer = self._process, self._writer
        self._writer = None
        # A user's supervisor ends its functions on SIGTERM; anything that is left dies with its session.
        if self.kind == "user" and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILL_GRACE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if writer is not None:
            writer.close()
        if self._pipes is not None:
            # A grandchild may still hold the pipe open.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pipes, 0.5)
