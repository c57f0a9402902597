"""What must work whichever of two builds a process is of. Each scenario asserts, and returns nothing."""

from __future__ import annotations

import asyncio
import signal
import time

from tests.versions.builds import Build
from tests.versions.rig import Rig

SLEEP_S = 1.0
SPOOLED_S = 3.0


def _clear(rig: Rig, *nodes: str) -> None:
    """Let nodes leave, so that no later leader counts on them, and end the scheduler."""
    for name in nodes:
        rig.kill(name, signal.SIGTERM)
    rig.kill("scheduler")


def everything(rig: Rig, client: Build, nonce: int) -> None:
    """A client of any build gets right results: rows, shards, a chain, a function, a cancelled run, lineage."""
    found = rig.tenant(client, "everything", nonce)
    assert found["rows"] == [f"row-{nonce} {n}" for n in (1, 2, 3)]
    assert found["call"] == 2 * nonce
    assert found["chain"] >= 300_000
    assert found["cancelled"] == ["cancelled", "cancelled", "team-a"]
    assert found["records"] == 8  # split, two parts, concat, three of the chain, the function


def trio(rig: Rig, scheduler: Build, node: Build, client: Build, nonce: int) -> None:
    """A scheduler, a node and a client, each of any build."""
    rig.scheduler(scheduler)
    rig.node(node, f"n-{nonce}")
    asyncio.run(rig.until_active(client, f"n-{nonce}"))
    everything(rig, client, nonce)
    _clear(rig, f"n-{nonce}")


def change_of_leader(rig: Rig, before: Build, after: Build, nodes: tuple[Build, Build], client: Build, nonce: int) -> None:
    """The leader is killed while operators run on a node of each build; one of the other build goes on, nothing runs twice."""
    names = [f"{build.name}-{nonce}-{place}" for place, build in enumerate(nodes)]
    rig.scheduler(before)
    for name, build in zip(names, nodes, strict=True):
        rig.node(build, name)
    asyncio.run(rig.until_active(client, *names))
    run = rig.tenant(client, "submit", 8, SLEEP_S, nonce)["run"]
    rig.kill("scheduler")
    rig.scheduler(after)
    found = rig.tenant(client, "result", run)
    assert found["state"] == "succeeded", found
    assert {row[2] for row in found["rows"]} == set(names), "both nodes worked"
    assert all(row[3] == 1 for row in found["rows"]), found
    _clear(rig, *names)


def spool(rig: Rig, before: Build, after: Build, node: Build, client: Build, nonce: int) -> None:
    """Nobody leads when a node has its result; the node dies and comes back; a leader of the other build takes the result."""
    name = f"{node.name}-{nonce}"
    rig.scheduler(before)
    rig.node(node, name)
    asyncio.run(rig.until_active(client, name))
    run = rig.tenant(client, "submit", 1, SPOOLED_S, nonce)["run"]
    rig.kill("scheduler")
    folder = rig.folder / "nodes" / name / "spool"
    deadline_s = time.monotonic() + 30.0
    while not list(folder.glob("*.done")):
        assert time.monotonic() < deadline_s, f"{name} spooled nothing\n{rig.words()}"
        time.sleep(0.05)
    rig.kill(name)
    rig.node(node, name)
    rig.scheduler(after)
    found = rig.tenant(client, "result", run)
    assert found["state"] == "succeeded", found
    assert [row[1:] for row in found["rows"]] == [["done", name, 1]], "the spooled result was taken, nothing ran again"
    _clear(rig, name)
