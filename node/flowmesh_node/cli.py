"""``flowmesh-node``: join a mesh with this machine, look at the node, leave.

Exit codes are those of the error classes: 0 well, 2 usage, 4 not found, 5 try again, 70 a bug.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError

app = typer.Typer(
    name="flowmesh-node",
    help="Run a node of a FlowMesh: join with a join file, look at it, leave.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

NOTICE_MARGIN_S = 5.0
"""How long before it is taken away a node hands over what still runs."""

INTERRUPT_DRAIN_S = 2.0
"""How long Ctrl-C waits for what is running; SIGTERM and ``leave`` wait as long as they are told."""

Folder = Annotated[Path | None, typer.Option("--dir", help="The node's folder (store, spool, socket).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]


@app.command()
def join(
    join_file: Annotated[Path, typer.Argument(help="The join file that the mesh's operator gave you.")],
    folder: Folder = None,
    name: Annotated[str, typer.Option(help="Expected node name; the join file decides it.")] = "",
    price: Annotated[
        float | None,
        typer.Option(min=0.0, help="Dollars per hour; else FLOWMESH_PRICE, or DPH_TOTAL / VAST_DPH_TOTAL as on Vast.ai."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Engine and training batches at the same time.")] = 1,
    site: Annotated[str, typer.Option(help="Where it is, a word of yours; else FLOWMESH_SITE.")] = "",
    drain_s: Annotated[float, typer.Option(min=0.0, help="Seconds that SIGTERM waits for what is running.")] = 10.0,
    notice_file: Annotated[
        Path | None,
        typer.Option(help="A file that appears when this machine is to be taken away; it may tell in how many seconds."),
    ] = None,
    notice_url: Annotated[str, typer.Option(help="Metadata address that tells the same, as AWS, GCP and Azure have it.")] = "",
    notice_anywhere: Annotated[bool, typer.Option(help="Let that address be another machine than this one.")] = False,
    allow_hub: Annotated[bool, typer.Option(help="Let executors download from the Hugging Face hub.")] = False,
    as_json: Json = False,
) -> None:
    """Join a mesh and work for it until told to stop."""
    from flowmesh_mesh.credentials import Credentials
    from flowmesh_node.settings import Settings, default_folder, number_from, read_join_file
    from flowmesh_node.witness import call_witness

    if notice_url:
        from flowmesh_node.notices import check_address

        check_address(notice_url, anywhere=notice_anywhere)
    joined = read_join_file(join_file)
    Credentials.parse(joined.credentials)
    if name and name != joined.node:
        raise UsageError(
            f"the join file is for node {joined.node!r}, not {name!r}",
            hint="A credential is bound to one name: leave --name out, or ask for a join file of that name.",
        )
    witness = call_witness(joined.urls, joined.credentials, joined.node)
    from flowmesh_node.inventory import take_inventory  # after the fork: what it loads is not the witness's

    found = take_inventory(price_per_hour=price, site=site)
    settings = Settings(
        node=joined.node,
        mesh=joined.mesh,
        urls=tuple(joined.urls),
        credentials=joined.credentials,
        folder=(folder or default_folder(joined.node)).absolute(),
        slots=slots,
        user_slots=max(1, int(found.cpus)),
        drain_s=drain_s,
        notice_file=notice_file,
        notice_url=notice_url,
        allow_hub=allow_hub,
        checkpoint_s=(number_from(os.environ, ("FLOWMESH_CHECKPOINT_S",)) or (0.0,))[0],
    )
    logging.basicConfig(
        level=os.environ.get("FLOWMESH_LOG", "WARNING").upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    if not allow_hub:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    asyncio.run(_serve(settings, found, witness, as_json))


async def _serve(settings: Any, found: Any, witness: Any, as_json: bool) -> None:
    from flowmesh_node import control
    from flowmesh_node.agent import Agent

    with control.owned(settings.folder, settings.node):
        agent = Agent(settings, found)
        witness.begin(agent.started_at_us)
        _say(_found_text(agent), _found(agent), as_json)
        asked: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
        _on_signals(asked, settings.drain_s)
        starting = asyncio.create_task(agent.start())
        first = asyncio.create_task(asked.get())
        await asyncio.wait({starting, first}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            witness.release()
            return
        starting.result()
        server = await control.serve(settings.folder, lambda command: _answer(agent, asked, command))
        _say(f"joined {settings.mesh or 'the mesh'} as {settings.node}", {"event": "joined", "node": settings.node}, as_json)
        noticed = asyncio.create_task(_watch_notices(agent, settings, asked, as_json))
        refused = asyncio.create_task(agent.is_refused.wait())
        await asyncio.wait({first, refused}, return_when=asyncio.FIRST_COMPLETED)
        refused.cancel()
        noticed.cancel()
        if agent.refusal is not None and not first.done():
            first.cancel()
            witness.release()
            await agent.stop()
            server.close()
            raise UsageError(agent.refusal.why, hint=agent.refusal.hint)
        reason, budget_s = await first
        await _leave(agent, asked, reason, budget_s, as_json)
        witness.release()
        server.close()


async def _watch_notices(agent: Any, settings: Any, asked: asyncio.Queue[tuple[str, float]], as_json: bool) -> None:
    """Leave in time when this machine is to be taken away."""
    from flowmesh_mesh.clock import now_us
    from flowmesh_node.notices import wait_for_notice

    if settings.notice_file is None and not settings.notice_url:
        return
    at_us = await wait_for_notice(settings.notice_file, settings.notice_url)
    left_s = max(0.0, (at_us - now_us()) / 1e6)
    _say(f"this machine is to be taken away in {left_s:.0f} s", {"event": "notice", "leaving_at_us": at_us}, as_json)
    agent.notice(at_us)
    asked.put_nowait(("to be taken away", max(0.0, left_s - NOTICE_MARGIN_S)))


async def _leave(agent: Any, asked: asyncio.Queue[tuple[str, float]], reason: str, budget_s: float, as_json: bool) -> None:
    """Drain within the budget; a second request to stop ends the waiting."""
    _say(f"{reason}: finishing what is running (at most {budget_s:g} s)", {"event": "draining", "budget_s": budget_s}, as_json)
    draining = asyncio.create_task(agent.drain(budget_s))
    again = asyncio.create_task(asked.get())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    is_clean = draining.done() and not draining.cancelled() and draining.result()
    for task in (draining, again):
        task.cancel()
    await agent.stop()
    text = "left" if is_clean else "left with work unfinished; other nodes take it over"
    _say(text, {"event": "left", "clean": bool(is_clean)}, as_json)


def _on_signals(asked: asyncio.Queue[tuple[str, float]], drain_s: float) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, asked.put_nowait, ("SIGTERM", drain_s))
    loop.add_signal_handler(signal.SIGINT, asked.put_nowait, ("interrupted", min(drain_s, INTERRUPT_DRAIN_S)))


async def _answer(agent: Any, asked: asyncio.Queue[tuple[str, float]], command: dict[str, Any]) -> dict[str, Any]:
    match command.get("what"):
        case "status":
            status: dict[str, Any] = agent.status()
            return status
        case "leave":
            asked.put_nowait(("asked to leave", float(command.get("budget_s", 600.0))))
            return {"ok": True}
        case "drain" | "cordon" | "uncordon" as wish:
            if agent.state in ("active", "draining", "cordoned") and agent.taking_leave is False:
                await {"drain": agent.pause, "cordon": agent.cordon, "uncordon": agent.resume}[wish]()
                return {"ok": True, "state": agent.state}
            return {"error": f"the node is {agent.state}, and leaves"}
        case other:
            return {"error": f"unknown command {other!r}"}


def _found(agent: Any) -> dict[str, Any]:
    record, found = agent.record(), agent.inventory
    return {
        "event": "found",
        "node": record.node,
        "mesh": agent.settings.mesh,
        "cpus": record.cpus,
        "memory_bytes": record.memory_bytes,
        "devices": [{"kind": each.kind, "name": each.name, "memory_bytes": each.memory_bytes} for each in record.devices],
        "price_per_hour": record.price_per_hour,
        "price_source": found.price_source,
        "site": record.site,
        "slots": record.slots,
        "types": list(record.types),
        "missing": agent.missing(),
        "notes": list(found.notes),
        "dir": str(agent.settings.folder),
    }


def _found_text(agent: Any) -> str:
    found = _found(agent)
    price = f"${found['price_per_hour']:g} per hour (by {found['price_source']})" if found["price_per_hour"] else "not given"
    lines = [f"node {found['node']}", *(f"  {note}" for note in found["notes"]), f"  price {price}"]
    lines.append(f"  runs {', '.join(found['types'])}")
    lines += [f"  cannot run {name}: lacks {', '.join(lacks)}" for name, lacks in found["missing"].items()]
    return "\n".join(lines)


def _say(text: str, body: dict[str, Any], as_json: bool) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(body) if as_json else text, flush=True)


def _one_folder(folder: Path | None) -> Path:
    """Return the folder meant: the one given, or the only one in which a node runs."""
    from flowmesh_node import control
    from flowmesh_node.settings import default_folder

    if folder is not None:
        return folder.absolute()
    home = default_folder("x").parent
    alive = [each for each in sorted(home.iterdir()) if control.running(each)] if home.is_dir() else []
    if len(alive) > 1:
        raise UsageError("several nodes run here", hint=f"Choose one with --dir: {', '.join(map(str, alive))}.")
    return alive[0] if alive else home


@app.command()
def status(folder: Folder = None, as_json: Json = False) -> None:
    """Show the node that runs on this machine."""
    from flowmesh_node import control

    answer = control.ask(_one_folder(folder), {"what": "status"})
    if as_json:
        print(json.dumps(answer))
        return
    link = "connected" if answer["connected"] else "not connected"
    print(f"node {answer['node']}: {answer['state']}, {link}, pid {answer['pid']}")
    print(f"  {answer['taken']} assignments taken, {len(answer['assignments'])} held, {answer['unconfirmed']} unconfirmed")
    for held in answer["assignments"]:
        print(f"  {held['assignment']} {held['type']} x{held['items']}: {held['state']} for {held['for_s']} s")
    for executor in answer["executors"]:
        print(f"  {executor['kind']} process {executor['pid']}: {'busy' if executor['busy'] else 'idle'}")


def _turn(folder: Path | None, wish: str, as_json: bool) -> Path:
    from flowmesh_node import control

    where = _one_folder(folder)
    answer = control.ask(where, {"what": wish})
    if answer.get("error"):
        raise UsageError(str(answer["error"]), hint="Look with `flowmesh-node status`.")
    _say(str(answer["state"]), {"event": wish, "state": answer["state"]}, as_json)
    return where


@app.command()
def drain(
    folder: Folder = None,
    wait_s: Annotated[float, typer.Option(min=0.0, help="Seconds to wait until nothing runs; 0 does not wait.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Take nothing new, give back what has not begun, finish the rest; the node stays until `leave` or `uncordon`."""
    from flowmesh_node import control

    where = _turn(folder, "drain", as_json)
    deadline_s = time.monotonic() + wait_s
    while wait_s and control.ask(where, {"what": "status"})["assignments"]:
        if time.monotonic() > deadline_s:
            raise TransientError(f"the node in {where} still runs something", hint="Look with `flowmesh-node status`.")
        time.sleep(0.2)


@app.command()
def cordon(folder: Folder = None, as_json: Json = False) -> None:
    """Take nothing new, and go on with all that is held; `uncordon` ends it."""
    _turn(folder, "cordon", as_json)


@app.command()
def uncordon(folder: Folder = None, as_json: Json = False) -> None:
    """Take work again after `cordon` or `drain`."""
    _turn(folder, "uncordon", as_json)


@app.command()
def leave(
    folder: Folder = None,
    budget_s: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for what is running.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Make the node finish what it holds, and leave the mesh."""
    from flowmesh_node import control

    where = _one_folder(folder)
    control.ask(where, {"what": "leave", "budget_s": budget_s})
    deadline_s = time.monotonic() + budget_s + 20.0
    while control.running(where) is not None:
        if time.monotonic() > deadline_s:
            raise TransientError(f"the node in {where} is still leaving", hint="Look with `flowmesh-node status`.")
        time.sleep(0.05)
    _say("left", {"event": "left"}, as_json)


def main() -> NoReturn:
    """Run the command line; print an error of ours in two lines and exit by its class."""
    try:
        app(standalone_mode=True)
    except FlowmeshError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)
