"""The broker's whole store is lost: every accepted run completes, what had ended does not run again, nothing has two results."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.client import Run, connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.results import Results

TENANTS = ("team-a", "team-b")
DEADLINE_S = 90.0
SLOW_S = 5.0
LARGE_ROWS = 60_000


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def slow(number: int, **settings: Any) -> dict[str, Any]:
    return {"type": "flow.delay", "with": {"nonce": number, "batch_s": SLOW_S + number / 100}, **settings}


def document(name: str, operators: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "flowmesh/v1", "name": name, "operators": operators, "outputs": {"out": f"{next(iter(operators))}.out"}}


@dataclass
class Runs:
    """What was submitted before the store was lost."""

    live: dict[str, Run]
    ended: Run
    ended_at_us: int
    cancelled: Run


async def submit_all(team_a: Mesh, team_b: Mesh, folder: Path) -> Runs:
    """Submit runs of every kind; those that live still wait or run when this returns, and keepers hold them."""
    table = folder / "large.jsonl"
    table.write_text(
        "".join(f'{{"text": "row {number} of what travels apart from its manifest"}}\n' for number in range(LARGE_ROWS))
    )
    large = {
        "slow": slow(2),
        "table": {"type": "data.load", "inputs": {"file": {"path": str(table)}}},
        "first": {"type": "data.sql", "inputs": {"t": "table.rows"}, "with": {"query": "select count(*) as n from t"}},
    }
    ended = await team_a.submit(document("ended", {"a": {"type": "flow.noop", "with": {"nonce": 7}}}))
    assert (await ended.result(DEADLINE_S)).state == "succeeded"
    cancelled = await team_a.submit(document("cancelled", {"a": slow(9)}))
    assert (await cancelled.cancel()).state == "cancelled"
    live = {
        "small": await team_a.submit(document("small", {"a": slow(1), "b": {"type": "flow.noop", "inputs": {"after": "a.out"}}})),
        "large": await team_a.submit(document("large", large)),
        "private": await team_b.submit(document("private", {"a": slow(3, share="private")})),
    }

    async def is_kept() -> bool:
        keepers = (await team_a.status())["keepers"]
        return bool(keepers["guarded"] >= len(live) and keepers["waiting"] == 0)

    await until(is_kept)
    await asyncio.sleep(1.5)  # the journal is written once a second
    return Runs(live, ended, int((await ended.status())["ended_at_us"]), cancelled)


def lose_the_store(mesh: EmbeddedMesh) -> None:
    """Kill the broker and delete everything that it kept."""
    mesh.kill("broker", is_held=True)
    shutil.rmtree(mesh.layout.broker_folder("broker") / "jetstream")


def lose_what_the_scheduler_has(mesh: EmbeddedMesh) -> None:
    """Kill the scheduler and delete all of its folder that is not the mesh's secret or its configuration."""
    mesh.kill("scheduler", is_held=True)
    for name in ("store", "journal", "kept"):
        shutil.rmtree(mesh.layout.scheduler_folder("scheduler") / name)


async def ledger(mesh: EmbeddedMesh) -> dict[str, bytes]:
    """Return the entries of the ledger by subject."""
    credentials = Credentials.load(mesh.layout.credentials / "scheduler.creds")
    bus = await Bus.connect(mesh.urls, credentials, name="test", inbox=subjects.inbox_prefix("scheduler"))
    try:
        return {message.subject: message.data async for message in bus.read_stream(subjects.LEDGER)}
    finally:
        await bus.close()


def assert_single_results(entries: dict[str, bytes]) -> None:
    generations = [subject.rpartition(".")[2] for subject in entries if subject.startswith("led.result.")]
    assert generations
    assert set(generations) == {"0"}


@pytest.mark.parametrize("is_scheduler_lost", [False, True], ids=["schedulers keep theirs", "schedulers lose theirs too"])
async def test_no_accepted_run_is_lost_with_the_whole_store_of_the_broker(tmp_path: Path, is_scheduler_lost: bool) -> None:
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(embedded_mesh(tmp_path / "mesh", nodes=2, tenants=list(TENANTS)))
        team_a = await stack.enter_async_context(connect(mesh, "team-a"))
        team_b = await stack.enter_async_context(connect(mesh, "team-b"))
        runs = await submit_all(team_a, team_b, tmp_path)
        waiting = {name: asyncio.create_task(run.wait(DEADLINE_S)) for name, run in runs.live.items()}
        lose_the_store(mesh)
        if is_scheduler_lost:
            lose_what_the_scheduler_has(mesh)
        # nobody asks a client's journal here: what is proved is what the mesh itself still knows
        team_a.journal = team_b.journal = None
        await mesh.start("broker")
        if is_scheduler_lost:
            await mesh.start("scheduler")
        results: dict[str, Results] = {name: await task for name, task in waiting.items()}
        assert {name: each.state for name, each in results.items()} == dict.fromkeys(results, "succeeded")
        rows = await (await team_a.run(runs.live["large"].id)).outputs("first")
        assert rows
        entries = await ledger(mesh)
        assert_single_results(entries)
        known = {row["run"]: row for row in await team_a.runs()}
        if not is_scheduler_lost:
            assert known[runs.ended.id]["ended_at_us"] == runs.ended_at_us
            assert known[runs.cancelled.id]["state"] == "cancelled"
        else:
            assert runs.ended.id not in known  # its end is gone with every folder that knew it, and so is its acceptance
            assert runs.cancelled.id not in known
