"""``python.call``: each function in a fresh process of its own, watched for time, memory and output, and cleared away whole.

This runs in the ``user`` executor. It is the reaper of all that a function leaves behind: children that outlive their
parent come to it, however they detached themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import CallParams
from flowmesh_node.function import GivenInput, Request, Status
from flowmesh_node.operators.base import Batch, Content, Emit, Failed, Input, Item, Produced
from flowmesh_node.operators.text import params_of

Log = Callable[[str], None]

LOOK_S = 0.05
"""How often memory and the number of processes are looked at."""

OUTPUT_MAX_BYTES = 1_000_000
PROCESSES_MAX = 256
CLEAR_S = 5.0
_DATA_HEADROOM_BYTES = 512 * 2**20
_CHUNK_BYTES = 64 * 1024
_PR_SET_CHILD_SUBREAPER = 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_PASSED_ON = ("PATH", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV")
_PASSED_ON_PREFIXES = ("LC_", "OMP_", "MKL_", "OPENBLAS_", "SSL_CERT_", "HF_HUB_OFFLINE", "PYTHONHASHSEED")


class Call:
    """Runs python.call."""

    types: tuple[str, ...] = ("python.call",)

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGTERM, _end)

    def load(self, batch: Batch) -> None:
        """Lay out the source."""
        if batch.code is None:
            raise ExecutionError("no source came with this call", reason="internal")
        (Path(batch.scratch) / "code.py").write_bytes(batch.code.read_bytes())

    def run(self, batch: Batch, emit: Emit, log: Log) -> None:
        """Call the function for each item."""
        for index, item in enumerate(batch.items):
            began_ns = time.monotonic_ns()
            try:
                content = _called(item, Path(batch.scratch) / str(index), batch, log)
            except ExecutionError as error:
                emit(index, Failed(error.reason, error.message))
                continue
            spent_us = (time.monotonic_ns() - began_ns) // 1000
            emit(index, Produced({"out": [content]}, rows=max(content.rows, 0), exec_us=spent_us))


def _end(_number: int, _frame: FrameType | None) -> None:
    clear()
    os._exit(1)


def _called(item: Item, folder: Path, batch: Batch, log: Log) -> Content:
    params = params_of(item, CallParams)
    work = folder / "work"
    work.mkdir(parents=True)
    limit_bytes = batch.memory_bytes
    request = Request(
        params.function,
        params.args,
        {port: [_given(each, folder / f"in-{port}-{n}") for n, each in enumerate(all_)] for port, all_ in item.inputs.items()},
        params.returns,
        params.requires,
        params.python,
        limit_bytes + limit_bytes // 2 + _DATA_HEADROOM_BYTES if limit_bytes else 0,
        os.getpid(),
    )
    (folder / "request.json").write_bytes(msgspec.json.encode(request))
    process = subprocess.Popen(
        [sys.executable, "-P", "-u", "-m", "flowmesh_node.function", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=work,
        env=_environment(folder),
        start_new_session=True,
    )
    try:
        ending = _Watched(process, batch.timeout_s, limit_bytes, log).wait()
    finally:
        clear()
    return _content(ending, folder, params.returns)


def _given(each: Input, path: Path) -> GivenInput:
    if each.data is not None:
        path.write_bytes(each.data)
        return GivenInput(each.kind, str(path))
    return GivenInput(each.kind, each.path)


def _environment(folder: Path) -> dict[str, str]:
    """Return what a function sees of the environment: nothing that could be a secret of the node."""
    passed = {name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)}
    temporary = folder / "tmp"
    temporary.mkdir()
    return passed | {"TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended: its exit code, or why it was ended."""

    code: int
    reason: str = ""
    error: str = ""


class _Watched:
    """A running function: its output is passed on up to a size and swallowed beyond, its limits are enforced."""

    def __init__(self, process: subprocess.Popen[bytes], timeout_s: float, limit_bytes: int, log: Log) -> None:
        self._process = process
        self._timeout_s = timeout_s
        self._limit_bytes = limit_bytes
        self._log = log
        self._room_bytes = OUTPUT_MAX_BYTES
        self._cut_bytes = 0
        self._rest = b""

    def wait(self) -> Ending:
        """Return when the process has ended, by itself or by us."""
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        os.set_blocking(output, False)
        pidfd = os.pidfd_open(self._process.pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(output, select.POLLIN)
        try:
            ending = self._watch(poll, pidfd, output)
        finally:
            os.close(pidfd)
        self._drain(output)
        self._say_rest()
        self._process.stdout.close()
        return ending

    def _watch(self, poll: select.poll, pidfd: int, output: int) -> Ending:
        began_s = time.monotonic()
        look_at_s = began_s
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(LOOK_S * 1000)}
            if output in ready and not self._take(output):
                poll.unregister(output)
            if pidfd in ready:
                return Ending(self._process.wait())
            now_s = time.monotonic()
            if self._timeout_s and now_s - began_s > self._timeout_s:
                return self._ended("timeout", f"still running after {self._timeout_s:g} s")
            if now_s >= look_at_s:
                look_at_s = now_s + LOOK_S
                excess = self._excess()
                if excess:
                    return self._ended(*excess)

    def _ended(self, reason: str, error: str) -> Ending:
        clear()
        return Ending(self._process.wait(), reason, error)

    def _excess(self) -> tuple[str, str] | None:
        tree = list(descendants(os.getpid()))
        if len(tree) > PROCESSES_MAX:
            return "crashed", f"the function started {len(tree)} processes; {PROCESSES_MAX} are allowed"
        if not self._limit_bytes or sum(map(resident_bytes, tree)) <= self._limit_bytes:
            return None
        used_bytes = sum(map(own_bytes, tree))  # exact, and slow: only when the rough figure is too large
        if used_bytes > self._limit_bytes:
            used, limit = used_bytes // 2**20, self._limit_bytes // 2**20
            return "oom", f"the function used {used} MiB of memory; {limit} MiB are allowed"
        return None

    def _take(self, output: int) -> bool:
        """Read what is there; tell whether more can come."""
        try:
            chunk = os.read(output, _CHUNK_BYTES)
        except BlockingIOError:
            return True
        kept = chunk[: self._room_bytes]
        self._room_bytes -= len(kept)
        self._cut_bytes += len(chunk) - len(kept)
        if kept:
            lines, newline, rest = (self._rest + kept).rpartition(b"\n")
            if newline:
                self._log(lines.decode(errors="replace"))
            self._rest = rest
            if len(rest) > _CHUNK_BYTES:
                self._say_rest()
        return bool(chunk)

    def _drain(self, output: int) -> None:
        """Take what is still in the pipe, but wait for nobody who may hold it open."""
        deadline_s = time.monotonic() + 1.0
        while time.monotonic() < deadline_s and select.select([output], [], [], 0)[0] and self._take(output):
            pass

    def _say_rest(self) -> None:
        if self._rest:
            self._log(self._rest.decode(errors="replace"))
            self._rest = b""
        if self._cut_bytes and self._process.returncode is not None:
            self._log(f"[output cut: {self._cut_bytes} more bytes than the {OUTPUT_MAX_BYTES} that are kept]")


def _content(ending: Ending, folder: Path, returns: str) -> Content:
    """Return what the function left, or raise ExecutionError saying how it failed."""
    if ending.reason:
        raise ExecutionError(ending.error, reason=ending.reason)
    try:
        status = msgspec.json.decode((folder / "status.json").read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError):
        raise ExecutionError(_last_words(ending.code), reason="crashed") from None
    if status.reason:
        raise ExecutionError(status.error, reason=status.reason)
    return Content(returns, path=str(folder / "result"), rows=status.rows)


def _last_words(code: int) -> str:
    if code >= 0:
        return f"the function's process ended with exit code {code} before the function returned"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
    return f"the function's process died of {name}{hint}"


# --- the tree of processes -------------------------------------------------------------------------------------------


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes below ``pid``, those included that left its session."""
    pending = [pid]
    seen: set[int] = set()
    while pending:
        for child in _children(pending.pop()):
            if child not in seen:
                seen.add(child)
                yield child
                pending.append(child)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; pages that several share are counted with each."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def own_bytes(pid: int) -> int:
    """Return the resident memory of a process, of shared pages only its part."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return resident_bytes(pid)


def clear() -> None:
    """Kill and reap every process below this one."""
    deadline_s = time.monotonic() + CLEAR_S
    while time.monotonic() < deadline_s:
        left = list(descendants(os.getpid()))
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)
