"""The whole mesh, real processes: sharing between tenants, lost nodes, lost results, restarts, identity of runs and results."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from flowmesh_cas.cid import cid_parse, cid_text
from flowmesh_cas.dag import walk
from flowmesh_cas.store import MemoryStore
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.credentials import Credentials, verify
from flowmesh_mesh.identity import operator_key
from flowmesh_mesh.manifest import ResultManifest, ResultRecord, decode_record
from flowmesh_mesh.receipts import statement

TENANTS = ("team-a", "team-b")
DEADLINE_S = 40.0


def workflow(operators: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"apiVersion": "flowmesh/v1", "name": "test", "operators": operators, **fields}


def noop(nonce: int, **params: Any) -> dict[str, Any]:
    inputs = params.pop("inputs", None)
    return {"type": "flow.noop", "with": {"nonce": nonce, **params}, **({"inputs": inputs} if inputs else {})}


@pytest_asyncio.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[EmbeddedMesh]:
    async with embedded_mesh(tmp_path / "mesh", nodes=2, tenants=list(TENANTS)) as found:
        yield found


@pytest_asyncio.fixture
async def team_a(mesh: EmbeddedMesh) -> AsyncIterator[Mesh]:
    async with connect(context=mesh, tenant="team-a") as found:
        yield found


@pytest_asyncio.fixture
async def team_b(mesh: EmbeddedMesh) -> AsyncIterator[Mesh]:
    async with connect(context=mesh, tenant="team-b") as found:
        yield found


async def finish(client: Mesh, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a workflow to success and return its operators."""
    run = await client.submit(document)
    results = await run.result(timeout_s=DEADLINE_S)
    assert results.state == "succeeded", results.detail
    return await run.operators()


def by_name(operators: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in operators}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what only the mesh can tell."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until_gone(client: Mesh, node: str) -> None:
    async def is_gone() -> bool:
        return all(n["node"] != node or n["state"] != "active" for n in await client.nodes())

    await until(is_gone)


async def test_operators_that_two_tenants_ask_for_at_once_run_once(team_a: Mesh, team_b: Mesh) -> None:
    common = {f"step{i}": noop(i, sleep_s=0.5) for i in range(6)}
    first = await team_a.submit(workflow(common))
    second = await team_b.submit(workflow({**common, "own": noop(99, inputs={"after": "step0.out"})}))
    await asyncio.gather(first.result(timeout_s=DEADLINE_S), second.result(timeout_s=DEADLINE_S))
    rows = by_name(await second.operators())
    shared = {name for name, row in rows.items() if row["shared"]}
    assert shared == set(common)
    assert (await team_a.status())["totals"]["executed"] == len(common) + 1
    assert {row["result"] for row in await first.operators()} == {rows[name]["result"] for name in common}


async def test_a_later_run_of_another_tenant_is_served_from_results(team_a: Mesh, team_b: Mesh) -> None:
    await finish(team_a, workflow({"a": noop(1), "b": noop(2, inputs={"after": "a.out"})}))
    rows = by_name(await finish(team_b, workflow({"x": noop(1), "c": noop(3, inputs={"after": "x.out"})})))
    assert rows["x"]["shared"]
    assert not rows["c"]["shared"]


async def test_private_operators_of_two_tenants_are_not_shared(team_a: Mesh, team_b: Mesh) -> None:
    document = workflow({"a": {**noop(5), "share": "private"}})
    first, second = await finish(team_a, document), await finish(team_b, document)
    assert first[0]["key"] != second[0]["key"]
    assert not second[0]["shared"]


async def test_a_killed_node_costs_only_what_it_had_in_flight(mesh: EmbeddedMesh, team_a: Mesh) -> None:
    await finish(team_a, workflow({"warm": noop(1000, sleep_s=0.1)}))
    run = await team_a.submit(workflow({f"n{i}": noop(i, sleep_s=1.0) for i in range(8)}))

    async def both_work() -> bool:
        return len({row["node"] for row in await run.operators() if row["state"] == "assigned"}) == 2

    await until(both_work)
    mesh.kill_node("node-1")
    results = await run.result(timeout_s=DEADLINE_S)
    assert results.counts == {"done": 8}
    rows = await run.operators()
    assert {row["node"] for row in rows} == {"node-2"}
    assert sum(row["attempt"] > 1 for row in rows) == sum(row["attempt"] - 1 for row in rows)


async def make_and_lose(mesh: EmbeddedMesh, client: Mesh, *, is_output: bool) -> tuple[dict[str, Any], str]:
    """Let one node make a result too large to travel inline, and kill that node; return the row and the node."""
    document = workflow({"big": noop(7, bytes=100_000), "end": noop(8, inputs={"after": "big.out"})})
    document["outputs"] = {"end": "end.out", **({"big": "big.out"} if is_output else {})}
    rows = by_name(await finish(client, document))
    node = rows["big"]["node"]
    mesh.kill_node(node)
    await until_gone(client, node)
    return rows["big"], node


async def test_a_result_of_a_lost_node_is_a_hit_while_a_holder_is_left(mesh: EmbeddedMesh, team_a: Mesh, team_b: Mesh) -> None:
    before, _ = await make_and_lose(mesh, team_a, is_output=True)
    rows = by_name(await finish(team_b, workflow({"big": noop(7, bytes=100_000), "other": noop(9, inputs={"after": "big.out"})})))
    assert rows["big"]["shared"]
    assert rows["big"]["result"] == before["result"]


async def test_a_result_that_nobody_holds_is_computed_again(mesh: EmbeddedMesh, team_a: Mesh, team_b: Mesh) -> None:
    before, lost = await make_and_lose(mesh, team_a, is_output=False)
    rows = by_name(await finish(team_b, workflow({"big": noop(7, bytes=100_000), "other": noop(9, inputs={"after": "big.out"})})))
    assert not rows["big"]["shared"]
    assert rows["big"]["node"] != lost
    assert rows["big"]["result"] == before["result"]


async def test_an_input_that_is_lost_under_way_is_made_again(mesh: EmbeddedMesh, team_a: Mesh) -> None:
    document = workflow(
        {
            "big": noop(7, bytes=100_000),
            "wait": noop(1, sleep_s=1.5, inputs={"after": "big.out"}),
            "end": noop(8, inputs={"after": ["big.out", "wait.out"]}),
        },
        outputs={"end": "end.out"},
    )
    run = await team_a.submit(document)

    async def waits() -> bool:
        return bool(by_name(await run.operators())["wait"]["state"] == "assigned")

    await until(waits)
    mesh.kill_node(by_name(await run.operators())["big"]["node"])
    results = await run.result(timeout_s=DEADLINE_S)
    assert results.state == "succeeded"


async def test_state_survives_a_killed_scheduler_in_the_middle_of_a_run(mesh: EmbeddedMesh, team_a: Mesh) -> None:
    done = await team_a.submit(workflow({"a": noop(1)}))
    await done.result(timeout_s=DEADLINE_S)
    run = await team_a.submit(workflow({f"n{i}": noop(i, sleep_s=1.0) for i in range(4)}))
    mesh.signal("scheduler", signal.SIGKILL)
    assert (await run.result(timeout_s=DEADLINE_S)).state == "succeeded"
    assert {row["run"] for row in await team_a.runs()} == {done.id, run.id}
    assert [row["attempt"] for row in await run.operators()] == [1, 1, 1, 1]


async def test_a_broker_that_is_killed_restarts_no_operator(mesh: EmbeddedMesh, team_a: Mesh) -> None:
    run = await team_a.submit(workflow({f"n{i}": noop(i, sleep_s=2.0) for i in range(4)}))
    await asyncio.sleep(0.5)
    mesh.signal("broker", signal.SIGKILL)
    assert (await run.result(timeout_s=DEADLINE_S)).state == "succeeded"
    assert [row["attempt"] for row in await run.operators()] == [1, 1, 1, 1]


async def test_state_survives_down_and_up(tmp_path: Path) -> None:
    document = workflow({"a": noop(1, bytes=50_000), "b": noop(2, inputs={"after": "a.out"})})
    async with (
        embedded_mesh(tmp_path / "mesh", nodes=1, tenants=list(TENANTS)) as mesh,
        connect(context=mesh, tenant="team-a") as client,
    ):
        run = await client.submit(document)
        before = await run.result(timeout_s=DEADLINE_S)
    async with (
        embedded_mesh(tmp_path / "mesh", nodes=1, tenants=list(TENANTS)) as mesh,
        connect(context=mesh, tenant="team-a") as client,
    ):
        again = await client.run(run.id)
        assert {row["state"] for row in await again.operators()} == {"done"}
        assert (await again.result(timeout_s=DEADLINE_S)).outputs.keys() == before.outputs.keys()
        assert all(row["shared"] for row in await finish(client, document))


async def test_the_same_run_id_is_accepted_once(team_a: Mesh) -> None:
    document = workflow({"a": noop(1, sleep_s=0.2)})
    first = await team_a.submit(document, run="mine")
    second = await team_a.submit(document, run="mine")
    assert first.id == second.id
    assert (await second.result(timeout_s=DEADLINE_S)).state == "succeeded"
    assert len(await team_a.runs()) == 1


async def test_ten_thousand_operators_are_submitted_in_one_message(mesh: EmbeddedMesh, team_a: Mesh) -> None:
    layout = mesh.layout.folder
    credentials = Credentials.load(next(layout.glob("**/scheduler.creds")))
    bus = await Bus.connect(mesh.urls, credentials, name="counter", inbox=subjects.inbox_prefix("scheduler"))
    try:
        before = await bus.stream_state(subjects.SUBMIT)
        run = await team_a.submit(
            workflow({"n": {"type": "flow.noop", "foreach": {"range": 10_000}, "with": {"nonce": "${item}"}}})
        )
        results = await run.result(timeout_s=DEADLINE_S)
        after = await bus.stream_state(subjects.SUBMIT)
    finally:
        await bus.close()
    assert before is not None
    assert after is not None
    assert after.last_seq - before.last_seq == 1
    assert results.counts == {"done": 10_000}


async def test_a_cancelled_run_ends_and_leaves_shared_work_to_the_others(team_a: Mesh, team_b: Mesh) -> None:
    common = {"slow": noop(1, sleep_s=1.5)}
    first = await team_a.submit(workflow({**common, "mine": noop(2, sleep_s=30)}))
    second = await team_b.submit(workflow(common))
    ended = await first.cancel()
    assert ended.state == "cancelled"
    assert (await second.result(timeout_s=DEADLINE_S)).state == "succeeded"

    async def rests() -> bool:
        return not sum(n["running"] for n in await team_a.nodes())

    await until(rests)


async def test_a_log_outlives_its_node(mesh: EmbeddedMesh, team_a: Mesh, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def speak():\n    print('hello from the node')\n    return 1\n")
    document = tmp_path / "w.json"
    operators = {"a": {"type": "python.call", "function": "code.py:speak"}}
    document.write_bytes(msgspec.json.encode(workflow(operators)))
    run = await team_a.submit(document)
    await run.result(timeout_s=DEADLINE_S)
    await asyncio.sleep(0.5)
    mesh.kill_node((await run.operators())[0]["node"])
    assert [line async for line in run.logs("a")] == [("a", "hello from the node")]
    (root,) = (await run.lineage())["roots"]
    assert await team_a.fetch(root, MemoryStore()) > 0


async def test_lineage_names_every_operator_input_and_signer(mesh: EmbeddedMesh, team_a: Mesh) -> None:
    rows = [{"q": f"question {i}"} for i in range(10)]
    operators = {
        "map": {"type": "data.map", "inputs": {"rows": {"rows": rows}}, "with": {"columns": {"p": "{{ q }}?"}}, "shards": 2},
        "count": {"type": "data.sql", "inputs": {"t": "map.rows"}, "with": {"query": "select count(*) as n from t"}},
    }
    run = await team_a.submit(workflow(operators))
    await run.result(timeout_s=DEADLINE_S)
    found = await run.lineage()
    assert {row["type"] for row in found["records"]} == {"data.split", "data.map", "data.concat", "data.sql"}
    assert len(found["records"]) == 5
    assert len(found["inputs"]) == 1
    records = {row["record"] for row in found["records"]}
    assert {i["record"] for row in found["records"] for i in row["inputs"] if i["record"]} <= records
    for row in found["records"]:
        receipt = row["receipt"]
        assert receipt["public_key"].startswith("U")

    store = MemoryStore()
    (root,) = found["roots"]
    await team_a.fetch(root, store)
    record = decode_record(store.get(cid_parse(root)), ResultRecord)
    assert decode_record(store.get(record.result), ResultManifest).outputs == record.outputs
    assert operator_key(store.get(record.operator)) == record.operator[4:]
    assert {cid_text(cid) for cid in walk(store, cid_parse(root))} >= records
    signed = record.receipt
    message = statement(signed.node, signed.assignment, signed.epoch, signed.root, signed.count)
    assert verify(signed.public_key, message, signed.signature)


async def test_a_ledger_record_is_fetched_with_outputs_that_lie_on_several_nodes(team_a: Mesh) -> None:
    await finish(team_a, workflow({"warm": noop(1000, sleep_s=0.1)}))
    parts = {f"n{i}": noop(i, bytes=300_000 + i, sleep_s=0.3) for i in range(4)}
    run = await team_a.submit(workflow({**parts, "end": noop(9, inputs={"after": [f"{name}.out" for name in parts]})}))
    await run.result(timeout_s=DEADLINE_S)
    found = await run.lineage()
    assert len({row["node"] for row in found["records"] if row["name"] in parts}) == 2
    store = MemoryStore()
    for root in found["roots"]:
        await team_a.fetch(root, store)
    held = set(store.cids())
    for row in found["records"]:
        assert {cid_parse(row["record"]), cid_parse(row["operator"]), cid_parse(row["result"])} <= held
        assert {cid_parse(ref["cid"]) for refs in row["outputs"].values() for ref in refs} <= held


async def test_a_tenant_reads_nothing_of_another(team_a: Mesh, team_b: Mesh, tmp_path: Path) -> None:
    run = await team_a.submit(workflow({"a": {"type": "flow.noop", "with": {"bytes": 50_000}, "share": "private"}}))
    results = await run.result(timeout_s=DEADLINE_S)
    cid = results["a"].cid
    assert (await team_a.get(cid, tmp_path / "mine")).exists()
    with pytest.raises(Exception, match=r"(?i)no such|not found|nobody"):
        await team_b.get(cid, tmp_path / "theirs")
    assert await team_b.runs() == []
