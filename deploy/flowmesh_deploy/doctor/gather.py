"""Looking and asking: everything that can be found out about a mesh within a few seconds.

Whoever has only a context asks the leader. Whoever has the folder of the mesh also asks the brokers and their streams, and hears
heartbeats. What cannot be asked is noted with its reason, and never fails the rest.
"""

from __future__ import annotations

import asyncio
import re
from datetime import datetime
from typing import Any

import msgspec

from flowmesh_cas.errors import FlowmeshError, TransientError
from flowmesh_deploy.asking import ANSWER_S, ask_all
from flowmesh_deploy.doctor.facts import Facts, Server
from flowmesh_deploy.doctor.local import configured, look
from flowmesh_deploy.layout import Layout
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.client import connect
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.context import Context
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.messages import Beat, NodeRecord, SchedulerBeat, decode

LISTEN_S = 2.2
"""Heartbeats come every second."""

CONNECT_S = 3.0


# --- brokers and their streams


async def _ask(bus: Bus, subject: str, expected: int) -> list[tuple[dict[str, Any], float]]:
    """Return what the brokers answer, with how far the clock of each is from ours, in seconds."""
    bodies = [msgspec.json.decode(answer, type=dict[str, Any]) for answer in await ask_all(bus, subject, b"", expected)]
    return [(body, _skew_s(str(body.get("server", {}).get("time", "")))) for body in bodies]


def _skew_s(time: str) -> float:
    """Return the broker's clock, as it writes it, less ours."""
    try:
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", time)).timestamp() - now_us() / 1e6
    except ValueError:
        return 0.0


async def ask_brokers(facts: Facts, layout: Layout, urls: list[str]) -> None:
    """Ask every broker how it is set up and how it is."""
    try:
        credentials = Credentials.load(layout.inspector)
        bus = await Bus.connect(urls, credentials, name="flowmesh-doctor", inbox=credentials.inbox, deadline_s=CONNECT_S)
    except (FlowmeshError, OSError) as error:
        facts.silent["brokers"] = getattr(error, "message", str(error))
        return
    try:
        setups = await _ask(bus, "$SYS.REQ.SERVER.PING.VARZ", facts.brokers)
        healths = await _ask(bus, "$SYS.REQ.SERVER.PING.HEALTHZ", facts.brokers)
    finally:
        await bus.close()
    ills = {body["server"]["name"]: _illness(body) for body, _ in healths}
    facts.servers = [_server(body, skew_s, ills) for body, skew_s in setups]
    if facts.brokers > 1:
        asked = {server.name for server in facts.servers}
        facts.servers += [server for server in configured(layout) if server.name not in asked]


def _illness(body: dict[str, Any]) -> str:
    data = body.get("data") or body.get("error") or {}
    return "" if data.get("status") == "ok" else str(data.get("error") or data.get("description") or data.get("status") or "?")


def _server(body: dict[str, Any], skew_s: float, ills: dict[str, str]) -> Server:
    name, data = body["server"]["name"], body.get("data", {})
    is_synced = bool((data.get("jetstream", {}).get("config") or {}).get("sync_always"))
    return Server(name, is_synced, str(data.get("version", "")), skew_s, ills.get(name, "it does not say"))


async def ask_streams(facts: Facts, layout: Layout, urls: list[str]) -> None:
    """Look at every stream, read the records of the nodes, and listen to heartbeats for a while."""
    wanted = [config.name for config in streams.mesh_streams(0, facts.replicas)]
    try:
        credentials = Credentials.load(layout.credentials / "scheduler.creds")
        bus = await Bus.connect(
            urls, credentials, name="flowmesh-doctor", inbox=subjects.inbox_prefix("scheduler"), deadline_s=CONNECT_S
        )
    except (FlowmeshError, OSError) as error:
        facts.silent["streams"] = getattr(error, "message", str(error))
        return
    try:
        listening = asyncio.create_task(_listen(facts, bus))
        try:
            facts.streams = {name: await bus.stream_info(name) for name in wanted}
            facts.nodes = await _records(bus, facts.streams)
            await listening
            await _look_again(facts, bus)
        except TransientError as error:
            facts.silent["streams"] = error.message
            await listening
    finally:
        await bus.close()


async def _look_again(facts: Facts, bus: Bus, times: int = 3) -> None:
    """Ask again for streams with a copy that is not up to date: while something is written, one often is not for a moment."""
    for _ in range(times):
        behind = [
            name
            for name, info in facts.streams.items()
            if info is not None and info.cluster is not None and not all(copy.current for copy in info.cluster.replicas)
        ]
        for name in behind:
            facts.streams[name] = await bus.stream_info(name)
        if behind:
            await asyncio.sleep(0.3)


async def _records(bus: Bus, found: dict[str, Any]) -> dict[str, NodeRecord]:
    """Return the last record of every node that has not left."""
    if found.get(subjects.NODES) is None:
        return {}
    info = await bus.stream_info(subjects.NODES, subjects="fm.nodes.*")
    records = {}
    for subject in sorted(info.state.subjects if info is not None else ()):
        message = await bus.last_message(subjects.NODES, subject)
        try:
            record = decode(message.data, NodeRecord) if message is not None else None
        except FlowmeshError:
            continue
        if record is not None:
            records[record.node] = record
    return records


async def _listen(facts: Facts, bus: Bus) -> None:
    def hear(delivery: Delivery) -> None:
        is_node = delivery.subject.startswith("fm.node.")
        try:
            beat = decode(delivery.data, Beat) if is_node else decode(delivery.data, SchedulerBeat)
        except FlowmeshError:
            return
        name = beat.node if isinstance(beat, Beat) else beat.scheduler
        if isinstance(beat, SchedulerBeat):
            facts.beats[name] = beat
        skew_s = (beat.at_us - now_us()) / 1e6
        known = facts.skews_s.get(name)
        facts.skews_s[name] = skew_s if known is None or abs(skew_s) < abs(known) else known

    for subject in (subjects.node_beat("*"), subjects.scheduler_beat("*")):
        await bus.subscribe(subject, hear)
    await asyncio.sleep(LISTEN_S)


# --- the leader


async def ask_leader(facts: Facts, context: Context) -> None:
    """Ask the leader as any client may."""
    try:
        async with asyncio.timeout(CONNECT_S + ANSWER_S), connect(context) as mesh:
            facts.status = await mesh.status()
    except TimeoutError:
        facts.silent["mesh"] = f"no answer at {', '.join(context.urls) or 'no known address'}"
    except TransientError as error:
        if not error.message.startswith("no broker answers"):
            return  # brokers are there: nobody leads
        facts.silent["mesh"] = error.message
    except FlowmeshError as error:
        facts.silent["mesh"] = error.message


async def gather(context: Context | None, layout: Layout | None) -> Facts:
    """Return everything that could be found out.

    ``layout`` is the folder of the mesh, if it is on this machine. Without a context (the folder of a broker that joined others)
    nobody can be asked.
    """
    facts = Facts(now_us() / 1e6)
    if layout is not None:
        look(facts, layout)
        facts.servers = configured(layout)
    if context is None:
        return facts
    facts.urls = list(context.urls)
    asking = [ask_leader(facts, context)]
    if layout is not None:
        asking += [ask_brokers(facts, layout, facts.urls), ask_streams(facts, layout, facts.urls)]
    await asyncio.gather(*asking)
    active = {row["node"] for row in facts.status.get("nodes", []) if row.get("state") != "gone"}
    facts.nodes = {name: record for name, record in facts.nodes.items() if not facts.status or name in active}
    return facts
