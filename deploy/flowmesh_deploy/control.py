"""Starting, asking and stopping the supervisor of a mesh from another process."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_deploy.layout import Layout, kind_of, read_json
from flowmesh_deploy.process import is_running, signal_process, spawn, wait_gone

if TYPE_CHECKING:
    from flowmesh_deploy.keyring import Keyring
    from flowmesh_mesh.bus import Bus

START_S = 60.0
CONNECT_S = 1.0
"""How long one attempt to reach the broker may take; between two the supervisor is looked at again."""

STOP_S = 30.0
"""Longer than the supervisor's own budgets together; then everything is killed."""

_SCHEDULER_FAILURES = 3
"""A scheduler that ends this often in a row does not become ready."""

Progress = Callable[[str], None]


@contextmanager
def preparing(layout: Layout) -> Iterator[None]:
    """Hold the folder while its files are made: two `up` at once must not make two sets of keys."""
    try:
        layout.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(layout.folder / "prepare.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(f"cannot make the folder {layout.folder}: {error.strerror}", hint="Name another with --dir.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_up(layout: Layout) -> bool:
    """Tell whether a supervisor holds the mesh's lock."""
    try:
        descriptor = os.open(layout.lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def launch(layout: Layout, *, is_attached: bool = False) -> subprocess.Popen[bytes]:
    """Start the supervisor; when attached it ends with the calling process."""
    layout.state.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "flowmesh_deploy.supervisor", str(layout.folder)]
    return spawn(command, layout.logs / "supervisor.log", death_signal=signal.SIGTERM if is_attached else 0)


async def reload(layout: Layout) -> None:
    """Let the supervisor read the wishes again, once it has read them a first time."""
    deadline = time.monotonic() + 10.0
    while True:
        state = read_json(layout.state)
        if state.get("phase") != "starting" or time.monotonic() > deadline:
            signal_process(state.get("supervisor", {}), signal.SIGUSR1)
            return
        await asyncio.sleep(0.005)


def stop(layout: Layout, budget_s: float = STOP_S) -> bool:
    """Stop the mesh, by force where needed; tell whether anything ran. Only processes of our own records are touched."""
    deadline = time.monotonic() + 2.0
    while not (state := read_json(layout.state)) and is_up(layout) and time.monotonic() < deadline:
        time.sleep(0.005)  # a supervisor that has just begun
    supervisor = state.get("supervisor", {})
    others = list(state.get("processes", {}).values())
    was_up = signal_process(supervisor, signal.SIGTERM)
    if was_up and not wait_gone([supervisor], budget_s):
        signal_process(supervisor, signal.SIGKILL)
    _await_unlocked(layout, 2.0)
    left = [record for record in read_json(layout.state).get("processes", {}).values() if is_running(record)]
    left += [record for record in others if is_running(record)]
    for record in left:
        signal_process(record, signal.SIGKILL)
    wait_gone(left, 5.0)
    return was_up or bool(left)


def _await_unlocked(layout: Layout, budget_s: float) -> None:
    deadline = time.monotonic() + budget_s
    while is_up(layout) and time.monotonic() < deadline:
        time.sleep(0.005)


def last_lines(layout: Layout, name: str, count: int = 8) -> str:
    """Return the end of the log of one process."""
    try:
        lines = (layout.logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "\n".join(f"  {line[:300]}" for line in lines[-count:])


class _Start:
    """A start that is being waited for."""

    def __init__(
        self,
        layout: Layout,
        expect: list[str] | None,
        supervisor: subprocess.Popen[bytes] | None,
        timeout_s: float,
        progress: Progress,
    ) -> None:
        self.layout = layout
        self.supervisor = supervisor
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s
        self.progress = progress
        self._expect = expect
        self._gone_before = {name: record for name, record in self.processes().items() if record["state"] == "gone"}

    def processes(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = read_json(self.layout.state).get("processes", {})
        return found

    def wanted(self) -> set[str]:
        """Return the nodes that must be active: those expected, else those that run."""
        if self._expect is not None:
            return set(self._expect)
        return {name for name, record in self.processes().items() if kind_of(name) == "node" and is_running(record)}

    def check(self, missing: str) -> dict[str, Any]:
        """Return the supervisor's state; raise TransientError when the start has failed or lasts too long."""
        state = read_json(self.layout.state)
        hint = f"Look into {self.layout.logs}."
        if state.get("phase") == "failed":
            raise TransientError(f"the mesh did not start: {state.get('error')}", hint=hint)
        if self.supervisor is not None and self.supervisor.poll() is not None and not is_up(self.layout):
            raise TransientError(f"the supervisor ended\n{last_lines(self.layout, 'supervisor')}", hint=hint)
        for name, record in state.get("processes", {}).items():
            is_lost = record["state"] == "gone" and self._gone_before.get(name) != record and name in self.wanted()
            if is_lost or (kind_of(name) == "scheduler" and record["failures"] >= _SCHEDULER_FAILURES):
                raise TransientError(f"{name} ended with status {record['status']}\n{last_lines(self.layout, name)}", hint=hint)
        if time.monotonic() > self.deadline:
            words = last_lines(self.layout, "scheduler", 4)
            raise TransientError(f"the mesh is not ready after {self.timeout_s:g} s: {missing}\n{words}".rstrip(), hint=hint)
        return state


async def wait_ready(
    layout: Layout,
    *,
    expect: list[str] | None = None,
    supervisor: subprocess.Popen[bytes] | None = None,
    timeout_s: float = START_S,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Wait until a leader answers and counts the nodes of ``expect`` (default: those that run) as active; return its status.

    Raise TransientError with the end of the log when something ends that should not, or when it lasts too long.
    """
    start = _Start(layout, expect, supervisor, timeout_s, progress)
    progress("starting the brokers" if len(layout.brokers()) > 1 else "starting the broker")
    while True:
        if start.check("the broker does not become ready").get("phase") == "up":
            break
        await asyncio.sleep(0.002)
    from flowmesh_mesh.bus import Bus
    from flowmesh_mesh.context import load_context
    from flowmesh_mesh.credentials import Credentials

    context = load_context(layout.context)
    credentials = Credentials.load(context.tenant().credentials)
    while True:
        start.check("the broker does not answer")
        try:
            bus = await Bus.connect(context.urls, credentials, name="flowmesh-up", inbox=credentials.inbox, deadline_s=CONNECT_S)
            break
        except TransientError:
            await asyncio.sleep(0.05)  # what went wrong is told by the next check: the mesh may be on its way down
    try:
        return await _wait_leader(start, bus)
    finally:
        await bus.close()


async def _wait_leader(start: _Start, bus: Bus) -> dict[str, Any]:
    missing = "the scheduler does not answer"
    while True:
        start.check(missing)
        status = await ask_status(bus)
        if status is None:
            start.progress("starting the scheduler")
        else:
            wanted = start.wanted()
            seen = {row["node"] for row in status.get("nodes", []) if row.get("state") == "active"}
            if wanted <= seen and status.get("leader"):
                return status
            missing = f"no word from {', '.join(sorted(wanted - seen))}"
            start.progress(f"starting nodes: {len(wanted & seen)} of {len(wanted)}")
        await asyncio.sleep(0.005)


async def ask_status(bus: Bus) -> dict[str, Any] | None:
    """Return the leader's status, None while nobody leads."""
    from flowmesh_mesh import subjects
    from flowmesh_mesh.messages import Answer, Ask, decode, encode

    try:
        answer = decode(await bus.request(subjects.TENANT_ASK, encode(Ask("status")), timeout_s=1.0), Answer)
    except TransientError:
        return None
    except FlowmeshError as error:
        raise TransientError(f"the scheduler answers nonsense: {error.message}") from error
    return answer.body if not answer.error and isinstance(answer.body, dict) else None


async def register_tenants(layout: Layout, keyring: Keyring, names: list[str]) -> None:
    """Hand the accounts of new tenants to the brokers that are running; one that is away learns of them when it is back."""
    import msgspec

    from flowmesh_cas.errors import InternalError
    from flowmesh_deploy.asking import ask_all
    from flowmesh_mesh.bus import Bus

    credentials = keyring.registrar()
    urls = read_json(layout.state)["urls"]
    bus = await Bus.connect(urls, credentials, name="flowmesh-up", inbox=credentials.inbox)
    try:
        for name in names:
            answers = await ask_all(bus, "$SYS.REQ.CLAIMS.UPDATE", keyring.tenant_jwt(name).encode(), len(urls), timeout_s=5.0)
            if not answers:
                raise TransientError(f"no broker takes the account of tenant {name}", hint="Try again.")
            for answer in answers:
                if msgspec.json.decode(answer, type=dict[str, Any]).get("error"):
                    raise InternalError(f"the broker refuses the account of tenant {name}: {answer.decode()[:300]}")
    finally:
        await bus.close()
