"""The broker's whole store is lost: every accepted run completes, what had ended does not run again, nothing has two results."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.cid import DAG_CBOR, cid_of
from flowmesh_cas.errors import UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.client import Run, connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.compiler import compile_document
from flowmesh_mesh.credentials import Credentials
from flowmesh_mesh.manifest import Acceptance, RunEnd, encode_record
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


def lose_what_a_scheduler_has(mesh: EmbeddedMesh, process: str = "scheduler") -> None:
    """Kill a scheduler and delete all of its folder that is not the mesh's secret or its configuration."""
    mesh.kill(process, is_held=True)
    for name in ("store", "journal", "kept"):
        shutil.rmtree(mesh.layout.scheduler_folder(process) / name)


async def has_standby(client: Mesh) -> bool:
    return any(each["role"] == "standby" for each in (await client.status())["schedulers"])


async def leading(mesh: EmbeddedMesh, client: Mesh) -> str:
    """Return the name of the process that leads."""
    identity = (await client.status())["leader"]["id"]
    names = {json.loads(mesh.layout.scheduler_file(name).read_text())["name"]: name for name in mesh.process_names("scheduler")}
    return names[identity]


def configure(mesh: EmbeddedMesh, **settings: Any) -> None:
    path = mesh.layout.scheduler_file("scheduler")
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def kinds(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    return [(each["kind"], each["run"], each["repaired"]) for each in found["findings"]]


async def audit_command(mesh: EmbeddedMesh, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the command as a person would; return its exit code and what it found."""
    command = str(Path(sys.executable).with_name("flowmesh"))
    arguments = ["audit", "--json", "--context", mesh.path, *options]
    process = await asyncio.create_subprocess_exec(command, *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    return process.returncode or 0, json.loads(output)["findings"]


async def plant(mesh: EmbeddedMesh, entries: dict[str, bytes]) -> None:
    """Write what no leader wrote into the streams."""
    credentials = Credentials.load(mesh.layout.credentials / "scheduler.creds")
    bus = await Bus.connect(mesh.urls, credentials, name="test", inbox=subjects.inbox_prefix("scheduler"))
    try:
        for subject, data in entries.items():
            await bus.store(subject, data)
    finally:
        await bus.close()


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


@dataclass(frozen=True)
class Loss:
    """What is lost along with the broker's store."""

    name: str
    schedulers: int
    is_leader_lost: bool

    @property
    def are_ends_lost(self) -> bool:
        return self.is_leader_lost and self.schedulers == 1


LOSSES = (
    Loss("nothing-else", 1, False),
    Loss("folder-of-the-only-scheduler", 1, True),
    Loss("folder-of-the-leader-beside-a-standby", 2, True),
)


async def test_no_accepted_run_is_lost_with_the_whole_store_of_the_broker(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group:  # side by side: they wait nearly all the time
        for loss in LOSSES:
            group.create_task(lose_and_recover(made(tmp_path / loss.name), loss), name=loss.name)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


async def lose_and_recover(folder: Path, loss: Loss) -> None:
    """Submit runs, lose the broker's store and what else is lost, and see every run through."""
    async with AsyncExitStack() as stack:
        meshes = embedded_mesh(folder / "mesh", nodes=2, tenants=list(TENANTS), schedulers=loss.schedulers)
        mesh = await stack.enter_async_context(meshes)
        team_a = await stack.enter_async_context(connect(mesh, "team-a"))
        team_b = await stack.enter_async_context(connect(mesh, "team-b"))
        if loss.schedulers > 1:
            await until(partial(has_standby, team_a))
        runs = await submit_all(team_a, team_b, folder)
        if loss.schedulers > 1:
            assert any(name.startswith("hub-") for name in (await team_a.status())["keepers"]["holders"])
        waiting = {name: asyncio.create_task(run.wait(DEADLINE_S)) for name, run in runs.live.items()}
        leader = await leading(mesh, team_a)
        lose_the_store(mesh)
        if loss.is_leader_lost:
            lose_what_a_scheduler_has(mesh, leader)
        # nobody asks a client's journal here: what is proved is what the mesh itself still knows
        team_a.journal = team_b.journal = None
        await mesh.start("broker")
        if loss.are_ends_lost:
            await mesh.start(leader)
        results: dict[str, Results] = {name: await task for name, task in waiting.items()}
        assert {name: each.state for name, each in results.items()} == dict.fromkeys(results, "succeeded")
        assert await (await team_a.run(runs.live["large"].id)).outputs("first")
        assert_single_results(await ledger(mesh))
        known = {row["run"]: row for row in await team_a.runs()}
        if loss.are_ends_lost:
            assert runs.ended.id not in known  # its end is gone with every folder that knew it, and so is its acceptance
            assert runs.cancelled.id not in known
        else:
            assert known[runs.ended.id]["ended_at_us"] == runs.ended_at_us
            assert known[runs.cancelled.id]["state"] == "cancelled"


async def test_a_client_that_waits_submits_again_what_only_it_still_knows(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(embedded_mesh(tmp_path / "mesh", nodes=1, tenants=["team-a"]))
        configure(mesh, keepers=0)
        await mesh.restart("scheduler")
        team_a = await stack.enter_async_context(connect(mesh, "team-a"))
        run = await team_a.submit(document("small", {"a": slow(1)}))
        forgotten = await team_a.submit(document("forgotten", {"a": slow(2)}))
        await forgotten.close()
        waiting = asyncio.create_task(run.wait(DEADLINE_S))
        lose_the_store(mesh)
        lose_what_a_scheduler_has(mesh)
        await mesh.start("broker")
        await mesh.start("scheduler")
        assert (await waiting).state == "succeeded"
        found = await team_a.audit()
        assert ("submission-lost", forgotten.id, False) in kinds(found)
        repaired = await team_a.audit(is_repairing=True)
        assert ("submission-lost", forgotten.id, True) in kinds(repaired)
        assert (await (await team_a.run(forgotten.id)).wait(DEADLINE_S)).state == "succeeded"
        assert [each for each in kinds(await team_a.audit()) if each[0] == "submission-lost"] == []


async def test_the_audit_finds_what_does_not_fit_and_repairs_what_can_be(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(embedded_mesh(tmp_path / "mesh", nodes=1, tenants=list(TENANTS)))
        team_a = await stack.enter_async_context(connect(mesh, "team-a"))
        team_b = await stack.enter_async_context(connect(mesh, "team-b"))
        await (await team_a.submit(document("ended", {"a": {"type": "flow.noop"}}))).result(DEADLINE_S)
        assert await audit_command(mesh) == (0, [])
        tenant = mesh.tenant("team-a").account
        planted = document("planted", {"a": {"type": "flow.noop", "with": {"nonce": 3}}})
        compiled = compile_document(planted, base=None, params={}, store=MemoryStore())
        gone = cid_of(DAG_CBOR, b"a manifest that nobody has")
        await plant(
            mesh,
            {
                subjects.ledger_accepted(tenant, "planted"): encode_record(
                    Acceptance(tenant, "planted", compiled.cid, 1, blocks=[compiled.manifest_block])
                ),
                subjects.ledger_accepted(tenant, "gone"): encode_record(Acceptance(tenant, "gone", gone, 1, name="gone")),
                subjects.ledger_ended(tenant, "unfounded"): encode_record(
                    RunEnd(tenant, "unfounded", "succeeded", "scheduler", 1)
                ),
                subjects.assign("ghost", "a.1"): b"an assignment of nobody",
            },
        )
        code, found = await audit_command(mesh)
        assert code == 1
        told = {(each["kind"], each["run"], each["repaired"]) for each in found}
        # the leader's own first audit may have met the unknown runs a moment earlier
        assert told - {("run-unknown", "planted", True), ("run-unknown", "gone", False)} == {
            ("manifest-gone", "gone", False),
            ("end-unfounded", "unfounded", True),
            ("assignment-astray", "", False),
        }
        assert (await (await team_a.run("planted")).wait(DEADLINE_S)).state == "succeeded"
        assert (await team_b.audit())["findings"] != []  # here every tenant may act for all
        code, found = await audit_command(mesh, "--repair")
        assert code == 0
        assert {each["kind"] for each in found} >= {"manifest-gone", "assignment-astray"}
        ended = await (await team_a.run("gone")).wait(DEADLINE_S)
        assert (ended.state, ended.reason, ended.actor) == ("failed", "input-missing", "audit")
        assert "manifest is gone" in ended.detail
        configure(mesh, tenants_may_cordon=False)
        await mesh.restart("scheduler")
        assert {each["run"] for each in (await team_b.audit())["findings"]} <= {""}
        with pytest.raises(UsageError, match="may not do what concerns every tenant"):
            await team_b.audit(is_repairing=True)
