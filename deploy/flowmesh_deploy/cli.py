"""``flowmesh up`` and ``flowmesh down``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from subprocess import Popen

    from flowmesh_deploy.keyring import Keyring
    from flowmesh_deploy.layout import Layout

DEFAULT_FOLDER = "./.flowmesh"

_Folder = Annotated[str, typer.Option("--dir", metavar="DIR", help="Folder of the mesh: keys, state, logs.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def up(
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=0, metavar="N", help="Nodes to run; 1, or as many as last time.")
    ] = None,
    brokers: Annotated[
        int | None, typer.Option("--brokers", metavar="N", help="Brokers of a new mesh: 1, or 3 of which any may fail.")
    ] = None,
    schedulers: Annotated[
        int | None, typer.Option("--schedulers", metavar="N", help="Schedulers to run, one leads; 1, or as many as last time.")
    ] = None,
    folder: _Folder = DEFAULT_FOLDER,
    tenants: Annotated[str, typer.Option("--tenants", metavar="A,B", help="Tenants to make credentials for.")] = "",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of a new mesh.")] = "",
    is_foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and stop the mesh on Ctrl-C.")] = False,
    is_recorded: Annotated[
        bool | None,
        typer.Option("--record/--no-record", help="Keep logs of events for `flowmesh replay`; off, or as last time."),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", metavar="S", help="Seconds to wait until it is ready.")] = 60.0,
    as_json: _AsJson = False,
) -> None:
    """Start a mesh on this machine: brokers, schedulers, nodes. A mesh that is up gains nodes, schedulers and tenants."""
    from flowmesh_deploy.control import is_up, launch, preparing
    from flowmesh_deploy.layout import Layout, prepare

    layout = Layout(folder)
    wanted = [tenant.strip() for tenant in tenants.split(",") if tenant.strip()]
    _exit_on_terminate()
    supervisor = None
    try:
        with preparing(layout):
            was_up = is_up(layout)
            keyring, fresh = prepare(
                layout,
                nodes=nodes,
                tenants=wanted,
                name=name,
                is_up=was_up,
                is_recorded=is_recorded,
                brokers=brokers,
                schedulers=schedulers,
            )
            if not was_up:
                _check_start(layout)
                with _interrupts_held():
                    supervisor = launch(layout, is_attached=is_foreground)
                _await_lock(layout, supervisor)
        is_changed = nodes is not None or bool(fresh) or is_recorded is not None or schedulers is not None
        status = _bring_up(layout, keyring, fresh, supervisor, is_changed=is_changed, timeout_s=timeout_s)
        _tell(layout, status, was_up=was_up, as_json=as_json)
        if is_foreground and supervisor is not None:
            _stay(supervisor)
    except BaseException:
        if supervisor is not None:
            _stop_started(layout, supervisor)
        raise


def down(folder: _Folder = DEFAULT_FOLDER, as_json: _AsJson = False) -> None:
    """Stop the mesh that `up` started; its state stays for the next `up`."""
    import json

    from flowmesh_cas.errors import NotFoundError
    from flowmesh_deploy.control import stop
    from flowmesh_deploy.layout import Layout

    layout = Layout(folder)
    if not layout.desired.exists():
        raise NotFoundError(f"no mesh in {layout.folder}", hint="Name its folder with --dir.")
    was_up = stop(layout)
    if as_json:
        print(json.dumps({"dir": str(layout.folder), "stopped": was_up}))
    else:
        print("the mesh is down" if was_up else "the mesh was not up")


def _check_start(layout: Layout) -> None:
    """Refuse to start what would break a promise, and warn of what may; the rest is for `flowmesh doctor`."""
    from flowmesh_cas.errors import UsageError
    from flowmesh_deploy.doctor.start import at_start

    refusal, warnings = at_start(layout)
    for warning in warnings:
        print(f"warning: {warning.finding}. {warning.why} {warning.mend}", file=sys.stderr)
    if refusal is not None:
        raise UsageError(f"{refusal.finding}: {refusal.why}", hint=refusal.mend)


def _bring_up(
    layout: Layout, keyring: Keyring, fresh: list[str], supervisor: Popen[bytes] | None, *, is_changed: bool, timeout_s: float
) -> dict[str, Any]:
    """Wait for a mesh that starts, or change one that runs; return the leader's status."""
    import asyncio

    from flowmesh_deploy.control import register_tenants, reload, wait_ready
    from flowmesh_deploy.layout import read_json

    async def bring() -> dict[str, Any]:
        if supervisor is None and fresh:
            await register_tenants(layout, keyring, fresh)
        if supervisor is None and is_changed:
            await reload(layout)
        expect = read_json(layout.desired)["nodes"] if supervisor is not None or is_changed else None
        return await wait_ready(layout, expect=expect, supervisor=supervisor, timeout_s=timeout_s, progress=_progress)

    try:
        return asyncio.run(bring())
    finally:
        _progress("")


def _await_lock(layout: Layout, supervisor: Popen[bytes]) -> None:
    """Wait until the supervisor holds its lock, so that nobody else starts a second one."""
    import time

    from flowmesh_deploy.control import is_up

    deadline = time.monotonic() + 10
    while not is_up(layout) and time.monotonic() < deadline and supervisor.poll() is None:
        time.sleep(0.002)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _tell(layout: Layout, status: dict[str, Any], *, was_up: bool, as_json: bool) -> None:
    from flowmesh_deploy.layout import read_json

    context = read_json(layout.context)
    names = [row["node"] for row in status.get("nodes", []) if row.get("state") == "active"]
    if as_json:
        import json

        document = {"mesh": context["mesh"], "was_up": was_up, "context": str(layout.context), "urls": context["urls"]}
        print(json.dumps({**document, "nodes": names, "tenants": list(context["tenants"])}))
        return
    already = "already " if was_up else ""
    print(f"mesh {context['mesh']} is {already}up at {context['urls'][0]}, with {', '.join(names) or 'no nodes'}")
    print(f"tenants {', '.join(context['tenants'])}; logs in {layout.logs}")
    if read_json(layout.scheduler).get("record"):
        print(f"event logs in {layout.events}, for `flowmesh replay`")
    print("next:")
    is_found = _is_found(layout)
    if not is_found:
        print(f"  export FLOWMESH_CONTEXT={layout.context}")
    for command, purpose in (
        ("validate workflow.yaml", "check a workflow"),
        ("submit workflow.yaml --watch", "run it and follow it"),
        ("status", "leader, nodes, queues, runs"),
        ("watch RUN", "follow a run"),
        ("down" if is_found else f"down --dir {layout.folder}", "stop the mesh"),
    ):
        print(f"  {f'flowmesh {command}':<40} {purpose}")


def _is_found(layout: Layout) -> bool:
    """Tell whether commands typed here find this mesh, and `down` too, without being told where it is."""
    from pathlib import Path

    return layout.folder == Path(DEFAULT_FOLDER).absolute()


def _exit_on_terminate() -> None:
    """Let SIGTERM and a closed terminal end this command as Ctrl-C does, so that what was begun is cleaned up."""
    import signal

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep what would interrupt this command until the end: a process begun here is known before anything can be raised."""
    import signal

    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _stay(supervisor: Popen[bytes]) -> None:
    """Wait for the supervisor to end; Ctrl-C interrupts this."""
    from flowmesh_cas.errors import TransientError

    if supervisor.wait() != 0:
        raise TransientError("the mesh ended by itself", hint="Look into its logs.")


def _stop_started(layout: Layout, supervisor: Popen[bytes]) -> None:
    """Stop what this command began; a second Ctrl-C does not interrupt it."""
    import signal

    from flowmesh_deploy.control import stop

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    supervisor.terminate()
    supervisor.wait()
    stop(layout)
