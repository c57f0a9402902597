"""Child processes that never outlive their parent, and records of them that never point at somebody else's process."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent(parent: int, death_signal: int) -> Callable[[], None]:
    """Return what a child runs before it becomes the program: a clean signal mask, and death with its parent."""

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        _libc.prctl(_PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return prepare


def spawn(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    death_signal: int = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own (Ctrl-C does not reach it), its output appended to ``log``.

    It gets ``death_signal`` when the calling thread's process dies.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
            preexec_fn=_die_with_parent(os.getpid(), death_signal),
        )


def started_ticks(pid: int) -> int:
    """Return when process ``pid`` began, in clock ticks since boot; 0 when it is not running (a zombie is not)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def identity(pid: int) -> dict[str, int]:
    """Return the record by which a process is found again: its number and when it began."""
    return {"pid": pid, "started_ticks": started_ticks(pid)}


def is_running(record: Mapping[str, Any]) -> bool:
    """Tell whether the very process of ``record`` still runs; a recycled number does not count."""
    pid, started = record.get("pid", 0), record.get("started_ticks", 0)
    return bool(pid and started and started_ticks(pid) == started)


def signal_process(record: Mapping[str, Any], number: int) -> bool:
    """Send a signal to the very process of ``record``; tell whether it was there."""
    if not is_running(record):
        return False
    try:
        os.kill(record["pid"], number)
    except ProcessLookupError:
        return False
    return True


def wait_gone(records: Sequence[Mapping[str, Any]], budget_s: float) -> bool:
    """Wait until no process of ``records`` runs; tell whether that was so within ``budget_s``."""
    deadline = time.monotonic() + budget_s
    while any(is_running(record) for record in records):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)
    return True


def stop_child(child: subprocess.Popen[bytes], budget_s: float) -> int:
    """Ask a child to end, force it after ``budget_s``; return its exit status."""
    if child.poll() is None:
        child.terminate()
        try:
            return child.wait(budget_s)
        except subprocess.TimeoutExpired:
            child.kill()
    return child.wait()
