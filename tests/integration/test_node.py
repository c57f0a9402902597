"""A real node process under a small leader: what it answers, keeps, refuses, survives, and how it leaves."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from tests.integration.node_leader import NodeProcess, SmallLeader, ended, one_node, small_mesh

from flowmesh_cas.cid import DAG_CBOR, cid_of
from flowmesh_mesh import content, subjects
from flowmesh_mesh.manifest import ResultManifest, decode_record
from flowmesh_mesh.messages import Commit, Located, Reason, Resolve, Resolved, decode, encode

Mesh = tuple[SmallLeader, NodeProcess]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with one_node(tmp_path_factory.mktemp("mesh")) as found:
        yield found


pytestmark = pytest.mark.asyncio(loop_scope="module")


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowmesh_node", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


# --- answers


async def test_the_node_says_what_it_is(mesh: Mesh) -> None:
    leader, _ = mesh
    record = leader.nodes["n1"]
    assert record.cpus > 0
    assert record.memory_bytes > 2**28
    assert {"flow.noop", "python.call", "data.split"} <= set(record.types)
    assert record.public_key.startswith("U")
    first = leader.beats["n1"].at_us
    await leader.until(lambda: leader.beats["n1"].at_us > first, 3)


async def test_a_result_comes_with_its_blocks_and_a_receipt(mesh: Mesh) -> None:
    leader, _ = mesh
    (outcome,) = await leader.run("n1", "flow.noop", [leader.item({"nonce": 1, "bytes": 100})])
    assert outcome.reason == Reason.SUCCEEDED
    manifest = leader.store.get(outcome.result)
    assert cid_of(DAG_CBOR, manifest) == outcome.result
    ref = decode_record(manifest, ResultManifest).outputs["out"][0]
    assert ref == outcome.outputs["out"][0]
    assert ref.size == 100
    assert len(content.read_bytes(leader.store, ref)) == 100


async def test_a_large_batch_is_answered_in_parts_each_item_once(mesh: Mesh) -> None:
    leader, _ = mesh
    leader.dones.clear()
    items = [leader.item({"nonce": n, "bytes": 1000}) for n in range(900)]
    outcomes = await leader.run("n1", "flow.noop", items)
    assert len(leader.dones) >= 4
    assert [done.last for done in leader.dones] == [False] * (len(leader.dones) - 1) + [True]
    assert sum(len(done.outcomes) for done in leader.dones) == 900
    assert len({outcome.result for outcome in outcomes}) == 900


async def test_sleeping_items_do_not_hold_up_the_others(mesh: Mesh) -> None:
    leader, _ = mesh
    leader.dones.clear()
    items = [leader.item({"nonce": 1, "sleep_s": 0.6}), leader.item({"nonce": 2}), leader.item({"nonce": 3, "sleep_s": 0.3})]
    began_s = time.monotonic()
    name = await leader.assign("n1", "flow.noop", items)
    await asyncio.wait_for(leader.closed[name].wait(), 30)
    assert time.monotonic() - began_s > 0.55
    told = [outcome.key for done in leader.dones for outcome in done.outcomes]
    assert told == [items[1].key, items[2].key, items[0].key], "as they ended, side by side"
    assert len(leader.dones) == 3


async def test_one_bad_item_fails_alone(mesh: Mesh) -> None:
    leader, _ = mesh
    good, bad = leader.rows([{"n": 1}]), leader.rows([{"m": 1}])
    items = [leader.item({"columns": {"x": "{{ n }}"}}, {"rows": [each]}) for each in (good, bad, good)]
    outcomes = await leader.run("n1", "data.map", items)
    assert [outcome.reason for outcome in outcomes] == [Reason.SUCCEEDED, Reason.USER_ERROR, Reason.SUCCEEDED]
    assert "'n' is undefined" in outcomes[1].error
    assert outcomes[0].result == outcomes[2].result


async def test_large_tables_go_in_and_out_by_reference(mesh: Mesh) -> None:
    leader, _ = mesh
    rows = [{"n": n, "text": "x" * 500} for n in range(6000)]
    (outcome,) = await leader.run("n1", "data.concat", [leader.item({}, {"rows": [leader.rows(rows)]})])
    assert outcome.reason == Reason.SUCCEEDED, outcome.error
    ref = outcome.outputs["rows"][0]
    assert ref.rows == 6000
    assert outcome.metered.bytes_fetched > 3_000_000
    data = await leader.fetched(ref, "n1")
    assert data == content.encode_rows(rows)[0]


async def test_an_input_that_nobody_has_fails_only_the_item_that_needs_it(mesh: Mesh) -> None:
    leader, _ = mesh
    here = leader.rows([{"n": 1}])
    gone = Located(content.put_rows(type(leader.store)(), [{"n": 2}]), ("n9",))
    items = [leader.item({}, {"rows": [here, gone]}), leader.item({}, {"rows": [here]})]
    outcomes = await leader.run("n1", "data.concat", items)
    assert outcomes[0].reason == Reason.INPUT_MISSING
    assert outcomes[0].missing == (gone.ref.cid,)
    assert outcomes[1].reason == Reason.SUCCEEDED


async def test_what_the_node_cannot_run_is_refused_with_a_reason(mesh: Mesh) -> None:
    leader, _ = mesh
    (outcome,) = await leader.run("n1", "no.such.type", [leader.item({})])
    assert outcome.reason == Reason.UNSATISFIABLE


async def test_the_node_resolves_models_or_says_why_not(mesh: Mesh, tmp_path: Path) -> None:
    leader, _ = mesh
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    for reference, is_good in ((str(folder), True), (str(tmp_path / "nothing"), False), ("hf:bad", False)):
        answer = await leader.bus.request(subjects.node_control("n1"), encode(Resolve(reference)), timeout_s=5)
        resolved = decode(answer, Resolved)
        assert resolved.reference == reference
        assert resolved.digest.startswith("sha256:") if is_good else resolved.error


# --- authority


async def test_a_repeated_assignment_runs_once(mesh: Mesh) -> None:
    leader, _ = mesh
    leader.dones.clear()
    item = leader.item({"nonce": 1, "sleep_s": 0.3})
    name = await leader.assign("n1", "flow.noop", [item])
    await leader.assign("n1", "flow.noop", [item], id=name)
    await asyncio.wait_for(leader.closed[name].wait(), 30)
    await asyncio.sleep(0.5)
    assert len(leader.dones) == 1


async def test_a_message_of_a_deposed_leader_has_no_effect(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (leader, node):
        await leader.run("n1", "flow.noop", [leader.item({})])
        leader.epoch = 2_000
        await leader.run("n1", "flow.noop", [leader.item({})])
        stale = await leader.assign("n1", "flow.noop", [leader.item({})], epoch=1_999)
        held = await leader.assign("n1", "flow.noop", [leader.item({"sleep_s": 1.0})])
        await leader.until(lambda: held in leader.beats["n1"].held)
        leader.bus.post(subjects.node_control("n1"), encode(Commit(1_000, held)))
        await asyncio.wait_for(leader.closed[held].wait(), 30)
        assert stale not in leader.outcomes
        # The memory of it survives the agent.
        node.process.kill()
        await node.process.wait()
        again = await leader.start_node("n1")
        stale = await leader.assign("n1", "flow.noop", [leader.item({})], epoch=1_999)
        await leader.run("n1", "flow.noop", [leader.item({})])
        await asyncio.sleep(0.2)
        assert stale not in leader.outcomes
        await ended(again)


async def test_an_aborted_item_is_cancelled_and_the_rest_goes_on(mesh: Mesh) -> None:
    leader, _ = mesh
    items = [leader.item({"sleep_s": 0.5}), leader.item({"sleep_s": 0.5})]
    name = await leader.assign("n1", "flow.noop", items)
    await leader.until(lambda: name in leader.beats["n1"].held)
    leader.abort("n1", name, (items[0].key,))
    await asyncio.wait_for(leader.closed[name].wait(), 30)
    reasons = {outcome.key: outcome.reason for outcome in leader.outcomes[name]}
    assert reasons == {items[0].key: Reason.CANCELLED, items[1].key: Reason.SUCCEEDED}


# --- what is not lost


async def test_an_assignment_is_acknowledged_only_when_the_leader_closes_it(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (leader, _):
        leader.confirms = False
        name = await leader.assign("n1", "flow.noop", [leader.item({})])
        await asyncio.wait_for(leader.closed[name].wait(), 30)
        await leader.until(lambda: name in leader.beats["n1"].held)
        state = await leader.bus.consumer_state(subjects.ASSIGN, subjects.assign_consumer("n1"))
        assert state is not None
        assert state.num_ack_pending == 1
        leader.confirm("n1", name)
        await leader.until(lambda: name not in leader.beats["n1"].held)
        async with asyncio.timeout(3):
            while state is None or state.num_ack_pending:
                state = await leader.bus.consumer_state(subjects.ASSIGN, subjects.assign_consumer("n1"))


async def test_an_unconfirmed_result_is_offered_again(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (leader, _):
        leader.confirms = False
        name = await leader.assign("n1", "flow.noop", [leader.item({})])
        await leader.until(lambda: sum(done.assignment == name for done in leader.dones) >= 2, 10)
        leader.confirm("n1", name)
        await leader.until(lambda: name not in leader.beats["n1"].held)
        count = len(leader.dones)
        await asyncio.sleep(4)
        assert len(leader.dones) == count


async def test_a_killed_agent_offers_its_unconfirmed_results_when_it_is_back(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (leader, node):
        leader.confirms = False
        item = leader.item({"function": "f", "args": {}, "returns": "value"})
        source = leader.source("import time\ndef f(): return time.time()")
        name = await leader.assign("n1", "python.call", [item], code=source)
        await asyncio.wait_for(leader.closed[name].wait(), 30)
        first = leader.outcomes[name][0]
        await leader.until(lambda: list((node.folder / "spool").glob("*.done")), 5)
        node.process.kill()
        await node.process.wait()
        leader.dones.clear()
        again = await leader.start_node("n1")
        await leader.until(lambda: leader.dones, 5)
        assert leader.dones[0].outcomes[0].result == first.result
        leader.confirm("n1", name)
        await leader.until(lambda: not list((node.folder / "spool").glob("*.done")), 5)
        await ended(again)


async def test_a_broker_that_restarts_loses_no_result(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (leader, _):
        name = await leader.assign("n1", "flow.noop", [leader.item({"sleep_s": 1.0, "nonce": n}) for n in range(3)])
        await leader.until(lambda: name in leader.beats["n1"].held)
        await asyncio.to_thread(leader.broker.stop)
        await asyncio.sleep(1.2)
        await asyncio.to_thread(leader.broker.start)
        await leader.begin_again()
        await asyncio.wait_for(leader.closed[name].wait(), 30)
        assert [outcome.reason for outcome in leader.outcomes[name]] == [Reason.SUCCEEDED] * 3


async def test_children_die_with_a_killed_agent(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (leader, node):
        marker = tmp_path / "pids"
        source = f"""
import os, time
def f():
    if os.fork() == 0:
        os.setsid()
    open({str(marker)!r}, 'a').write(f'{{os.getpid()}}\\n')
    time.sleep(600)
"""
        item = leader.item({"function": "f", "args": {}, "returns": "value"})
        await leader.assign("n1", "python.call", [item], code=leader.source(source))
        await leader.until(lambda: marker.exists() and len(marker.read_text().split()) == 2)
        children = [child.pid for child in psutil.Process(node.process.pid).children(recursive=True)]
        pids = [*children, *(int(line) for line in marker.read_text().split())]
        assert len(set(pids)) >= 3
        node.process.kill()
        await node.process.wait()
        await leader.until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 5)


async def test_two_nodes_pull_from_each_other(tmp_path: Path) -> None:
    async with small_mesh(tmp_path) as leader:
        first, second = await leader.start_node("n1"), await leader.start_node("n2")
        try:
            (made,) = await leader.run("n1", "flow.noop", [leader.item({"nonce": 5, "bytes": 3_000_000})])
            ref = made.outputs["out"][0]
            assert not leader.store.has(ref.cid)
            source = leader.source("def f(x): return len(x)")
            item = leader.item({"function": "f", "args": {}, "returns": "value"}, {"x": [Located(ref, ("n1",))]})
            (outcome,) = await leader.run("n2", "python.call", [item], code=source)
            assert outcome.reason == Reason.SUCCEEDED, outcome.error
            assert leader.value(outcome.outputs["out"][0]) == 3_000_000 - 2
        finally:
            await asyncio.gather(ended(first), ended(second))


# --- leaving


async def test_sigterm_finishes_what_runs_and_says_goodbye(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (leader, node):
        name = await leader.assign("n1", "flow.noop", [leader.item({"sleep_s": 0.8})])
        await leader.until(lambda: name in leader.beats["n1"].held)
        node.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(node.process.wait(), 30) == 0
        assert leader.outcomes[name][0].reason == Reason.SUCCEEDED
        await leader.until(lambda: leader.nodes["n1"].state == "left")
        assert (await node.output()).strip().endswith("left")


async def test_sigterm_ends_within_its_budget(tmp_path: Path) -> None:
    async with one_node(tmp_path, "--drain-s", "0.5") as (leader, node):
        source = leader.source("import time\ndef f(): time.sleep(600)")
        item = leader.item({"function": "f", "args": {}, "returns": "value"})
        name = await leader.assign("n1", "python.call", [item], code=source)
        await leader.until(lambda: name in leader.beats["n1"].held)
        began_s = time.monotonic()
        node.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(node.process.wait(), 30) == 0
        assert time.monotonic() - began_s < 30
        assert "unfinished" in await node.output()


async def test_ctrl_c_is_clean(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (_, node):
        node.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(node.process.wait(), 30) == 0
        assert not (node.folder / "agent.json").exists()


async def test_status_and_leave_talk_to_the_agent(tmp_path: Path) -> None:
    async with one_node(tmp_path) as (_, node):
        where = ["--dir", str(node.folder)]
        shown = await asyncio.to_thread(_command, "status", *where, "--json")
        assert shown.returncode == 0, shown.stderr
        status = json.loads(shown.stdout)
        assert (status["node"], status["state"], status["connected"]) == ("n1", "active", True)
        second = await asyncio.to_thread(_command, "join", str(tmp_path / "n1.join"), *where)
        assert second.returncode == 2
        assert "runs in" in second.stderr
        left = await asyncio.to_thread(_command, "leave", *where)
        assert left.returncode == 0, left.stderr
        assert node.process.returncode is not None or await asyncio.wait_for(node.process.wait(), 30) == 0
        gone = await asyncio.to_thread(_command, "status", *where)
        assert gone.returncode == 4
        assert "no node runs" in gone.stderr


# --- bad beginnings


async def _joined(tmp_path: Path, body: Any) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "bad.join"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return await asyncio.to_thread(_command, "join", str(path), "--dir", str(tmp_path / "dir"))


async def test_a_bad_join_file_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    good = {"urls": ["nats://127.0.0.1:1"], "credentials": "x", "node": "n1", "mesh": "m"}
    for body, word in (
        ("not json", "not a join file"),
        ({**good, "node": "a*b"}, "node name"),
        ({**good, "node": "n" * 300}, "node name"),
        ({**good, "urls": []}, "no address"),
        (good, "credentials"),
    ):
        result = await _joined(tmp_path, body)
        assert result.returncode == 2, result
        assert word in result.stderr
        assert "Traceback" not in result.stderr
    missing = await asyncio.to_thread(_command, "join", str(tmp_path / "none"))
    assert missing.returncode == 2
    assert "cannot read" in missing.stderr
    assert not (tmp_path / "dir").exists()


async def test_a_credential_of_another_mesh_is_refused(tmp_path: Path) -> None:
    async with small_mesh(tmp_path) as leader:
        from flowmesh_deploy.keyring import Keyring

        path = leader.join_file("n1")
        body = json.loads(path.read_text())
        body["credentials"] = Keyring.open(tmp_path / "other.json", "other").node("n1").text()
        result = await _joined(tmp_path, body)
        assert result.returncode == 2
        assert "credentials" in result.stderr


async def test_a_node_reads_its_price_from_the_environment(tmp_path: Path) -> None:
    async with small_mesh(tmp_path) as leader:
        node = await leader.start_node("n1", "--json", environment={"DPH_TOTAL": "0.31", "FLOWMESH_SITE": "attic"})
        record = leader.nodes["n1"]
        assert (record.price_per_hour, record.site) == (0.31, "attic")
        await ended(node)
        found = json.loads((await node.output()).splitlines()[0])
        assert found["price_source"] == "DPH_TOTAL"
        assert found["cpus"] == record.cpus
