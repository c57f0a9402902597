"""The client against a fake leader on a real broker: what it does when events are lost, answers are late or blocks are wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.fake_leader import FakeLeader

from flowmesh_cas.cid import RAW, cid_of, cid_text
from flowmesh_cas.errors import ExecutionError, IntegrityError, NotFoundError, TransientError, UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_cas.unixfs import import_bytes
from flowmesh_deploy.broker import Broker
from flowmesh_mesh import content, subjects, sync
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.client import Mesh, connect, submission
from flowmesh_mesh.client import events as client_events
from flowmesh_mesh.compiler import compile_document
from flowmesh_mesh.manifest import Ref
from flowmesh_mesh.messages import INLINE_MAX_BYTES, Blocks, RunEvent, Submit, encode
from flowmesh_mesh.names import is_name

WORKFLOW: dict[str, Any] = {
    "apiVersion": "flowmesh/v1",
    "name": "one",
    "operators": {"a": {"type": "flow.noop", "with": {"nonce": 1}}},
    "outputs": {"out": "a.out"},
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path / "broker")
    made.start()
    yield made
    made.stop()


@pytest.fixture
async def leader(broker: Broker) -> AsyncIterator[FakeLeader]:
    made = await FakeLeader.start(broker.url)
    yield made
    await made.close()


@pytest.fixture
async def mesh(broker: Broker, leader: FakeLeader, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    _without_credentials(broker.url, monkeypatch)
    async with connect() as made:
        yield made


def _without_credentials(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def plain(*_: object) -> Bus:
        return await Bus.connect(url, None, name="client", inbox="_INBOX_client", deadline_s=2)

    monkeypatch.setattr("flowmesh_mesh.client.entry.connect_tenant", plain)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_events, "SILENCE_S", 0.1)


def _plain(ref: Ref) -> dict[str, Any]:
    return {"kind": ref.kind, "cid": cid_text(ref.cid), "digest": ref.digest.hex(), "size": ref.size, "rows": ref.rows}


async def test_a_small_workflow_travels_in_one_message_with_its_manifest(mesh: Mesh, leader: FakeLeader) -> None:
    run = await mesh.submit(WORKFLOW)
    assert len(leader.submissions) == 1
    submit = leader.submissions[0]
    assert submit.run == run.id
    assert submit.manifest in [cid_of(0x71, block) for block in submit.blocks]
    assert not leader.puts
    assert is_name(run.id)
    assert len(run.id) == 26


async def test_a_result_comes_with_the_end_and_its_blocks_are_fetched(mesh: Mesh, leader: FakeLeader) -> None:
    ref = content.put_value(leader.store, {"answer": 42})

    def finish(submit: Submit) -> None:
        leader.emit(submit.run, "accepted", {"name": "one", "operators": 1})
        leader.end(submit.run, outputs={"out": [_plain(ref)]}, saved_us=7)

    leader.on_submit = finish
    results = await (await mesh.submit(WORKFLOW)).result(timeout_s=30)
    assert list(results) == ["out"]
    assert "other" not in results
    assert results.saved_us == 7
    assert await results["out"].value() == {"answer": 42}
    with pytest.raises(NotFoundError, match="no output 'other'"):
        results["other"]


async def test_tables_and_files_are_exported_with_their_endings(mesh: Mesh, leader: FakeLeader, tmp_path: Path) -> None:
    rows = content.put_rows(leader.store, [{"n": 1}, {"n": 2}])
    blob = import_bytes(leader.store, b"x" * 3_000_000)
    outputs = {"table": [_plain(rows), _plain(rows)], "blob": [_plain(Ref("file", blob.cid, blob.digest, blob.size))]}
    leader.on_submit = lambda submit: leader.end(submit.run, outputs=outputs)
    results = await (await mesh.submit(WORKFLOW)).result(timeout_s=30)
    assert await results["table"].rows() == [{"n": 1}, {"n": 2}] * 2
    paths = [*await results["table"].export(tmp_path / "made"), *await results["blob"].export(tmp_path / "made")]
    assert [path.name for path in paths] == ["table.0.jsonl", "table.1.jsonl", "blob"]
    assert paths[2].read_bytes() == b"x" * 3_000_000


def _large(tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"n":{n}}}\n' for n in range(100_000)))
    return {
        "apiVersion": "flowmesh/v1",
        "name": "large",
        "operators": {"a": {"type": "data.load", "inputs": {"file": {"path": str(rows)}}}},
        "outputs": {"out": "a.rows"},
    }


async def test_what_the_mesh_lost_between_put_and_acceptance_is_put_again(mesh: Mesh, leader: FakeLeader, tmp_path: Path) -> None:
    def lose_it_once(submit: Submit) -> None:
        if len(leader.submissions) == 1:
            leader.store = MemoryStore()  # as if another leader had taken over, or its disk had gone bad
            leader.emit(submit.run, "rejected", {"error": "1 contents are not held", "absent": True})
        else:
            leader.emit(submit.run, "accepted", {"name": "large", "operators": 1})

    leader.on_submit = lose_it_once
    run = await mesh.submit(_large(tmp_path))
    first, second = leader.submissions
    assert (run.id, second.manifest) == (second.run, first.manifest)
    assert leader.store.has(second.manifest)


async def test_what_the_mesh_loses_every_time_is_given_up(mesh: Mesh, leader: FakeLeader, tmp_path: Path) -> None:
    leader.on_submit = lambda submit: leader.emit(submit.run, "rejected", {"error": "1 contents are not held", "absent": True})
    with pytest.raises(UsageError, match="not held"):
        await mesh.submit(_large(tmp_path))
    assert len(leader.submissions) == 3


async def test_a_large_workflow_is_put_first_and_only_what_the_mesh_lacks_is_sent(
    mesh: Mesh, leader: FakeLeader, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"n":{n}}}\n' for n in range(300_000)))
    document = {
        "apiVersion": "flowmesh/v1",
        "name": "large",
        "operators": {"a": {"type": "data.load", "inputs": {"file": {"path": str(rows)}}}},
        "outputs": {"out": "a.rows"},
    }
    await mesh.submit(document)
    sent = sum(len(block) for put in leader.puts for block in put.blocks)
    assert sent > rows.stat().st_size > INLINE_MAX_BYTES
    assert leader.submissions[0].blocks == ()
    assert leader.store.has(leader.submissions[0].manifest)
    assert leader.puts[-1].last
    leader.puts.clear()
    await mesh.submit(document)
    assert sum(len(block) for put in leader.puts for block in put.blocks) == 0
    assert len(leader.puts) == 1


async def test_a_compiled_workflow_whose_content_the_mesh_holds_is_submitted_by_its_manifest(
    mesh: Mesh, leader: FakeLeader, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"n":{n}}}\n' for n in range(300_000)))
    operators = {"a": {"type": "data.load", "inputs": {"file": {"path": str(rows)}}}}
    compiled = compile_document(
        {**WORKFLOW, "operators": operators, "outputs": {"out": "a.rows"}}, base=tmp_path, store=leader.store
    )
    run = await mesh.submit(compiled)
    assert leader.submissions[0].run == run.id
    assert leader.submissions[0].blocks == (compiled.block,)
    assert not leader.puts


async def test_an_unacceptable_document_is_refused_before_anything_is_sent(mesh: Mesh, leader: FakeLeader) -> None:
    with pytest.raises(UsageError) as found:
        await mesh.submit({**WORKFLOW, "operators": {"a": {"type": "flow.nop"}}})
    assert "flow.nop" in str(found.value)
    assert not leader.submissions


async def test_a_rejected_run_raises_with_every_problem(mesh: Mesh, leader: FakeLeader) -> None:
    body = {"error": "no node can run it", "problems": [{"message": "operator a: no GPU"}, "operator b: no GPU"]}
    leader.on_submit = lambda submit: leader.emit(submit.run, "rejected", body)
    with pytest.raises(UsageError, match=r"no node can run it(.|\n)*a: no GPU(.|\n)*b: no GPU"):
        await mesh.submit(WORKFLOW)


async def test_a_failed_run_raises_with_its_reason(mesh: Mesh, leader: FakeLeader) -> None:
    leader.on_submit = lambda submit: leader.end(submit.run, "failed", reason="user-error", detail="operator a: ValueError: no")
    run = await mesh.submit(WORKFLOW)
    with pytest.raises(ExecutionError, match="ValueError: no") as found:
        await run.result(timeout_s=30)
    assert found.value.reason == "user-error"
    assert (await run.wait()).state == "failed"


async def test_events_come_in_order_and_a_gap_becomes_a_state(mesh: Mesh, leader: FakeLeader) -> None:
    run = await mesh.submit(WORKFLOW)
    leader.emit(run.id, "operators", {"changes": [[0, "ready", None, None, False]], "counts": {"ready": 1}}, is_lost=True)
    leader.emit(run.id, "operators", {"changes": [[0, "assigned", "n1", None, False]], "counts": {"assigned": 1}})
    leader.end(run.id)
    seen = [event async for event in run.events()]
    assert [event.kind for event in seen[:2]] == ["accepted", "state"]
    assert seen[-1].kind == "ended"
    assert [event.seq for event in seen] == sorted(event.seq for event in seen)


async def test_events_are_replayed_to_whoever_asks_twice(mesh: Mesh, leader: FakeLeader) -> None:
    run = await mesh.submit(WORKFLOW)
    leader.emit(run.id, "operators", {"changes": [], "counts": {}})
    leader.end(run.id)
    first = [event.seq async for event in run.events()]
    assert first == [event.seq async for event in run.events()] == [1, 2, 3]


@pytest.mark.usefixtures("impatient")
async def test_a_lost_end_is_noticed(mesh: Mesh, leader: FakeLeader) -> None:
    run = await mesh.submit(WORKFLOW)
    leader.end(run.id, is_lost=True)
    assert (await run.result(timeout_s=30)).state == "succeeded"


@pytest.mark.usefixtures("impatient")
async def test_a_lost_acceptance_is_noticed(mesh: Mesh, leader: FakeLeader) -> None:
    leader.on_submit = lambda submit: leader.emit(submit.run, "accepted", {"name": "one", "operators": 1}, is_lost=True)
    assert (await asyncio.wait_for(mesh.submit(WORKFLOW), 30)).id == leader.submissions[0].run


@pytest.mark.usefixtures("impatient")
async def test_submitting_the_same_id_again_is_the_same_run(mesh: Mesh, leader: FakeLeader) -> None:
    first = await mesh.submit(WORKFLOW, run="mine")
    leader.states["mine"]["manifest"] = cid_text(leader.submissions[0].manifest)
    second = await mesh.submit(WORKFLOW, run="mine")
    assert first.id == second.id == "mine"
    with pytest.raises(UsageError, match="another workflow"):
        await mesh.submit({**WORKFLOW, "name": "two"}, run="mine")


async def test_a_run_that_nobody_accepts_ends_the_wait_and_says_so(
    mesh: Mesh, leader: FakeLeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "STORE_TIMEOUT_S", 0.2)
    leader.on_submit = lambda submit: None
    with pytest.raises(TransientError, match=r"not accepted within 0\.5 s"):
        await mesh.submit(WORKFLOW, deadline_s=0.5)


async def test_a_wait_ends_at_its_timeout(mesh: Mesh) -> None:
    run = await mesh.submit(WORKFLOW)
    with pytest.raises(TransientError, match=r"not ended within 0\.05 s"):
        await run.result(timeout_s=0.05)


@pytest.mark.parametrize("name", ["a.b", "a*", "a b", "", "x" * 300, "-a", ">"])
async def test_names_that_would_widen_a_subject_are_refused(mesh: Mesh, leader: FakeLeader, name: str) -> None:
    with pytest.raises(UsageError, match="not allowed"):
        await mesh.submit(WORKFLOW, run=name)
    with pytest.raises(UsageError, match="not allowed"):
        await mesh.run(name)
    assert not leader.submissions


async def test_a_run_is_found_by_the_beginning_of_its_id(mesh: Mesh, leader: FakeLeader) -> None:
    for run in ("abc1", "abd2"):
        leader.emit(run, "accepted")
    assert (await mesh.run("abc")).id == "abc1"
    with pytest.raises(UsageError, match="2 runs begin with 'ab'"):
        await mesh.run("ab")
    with pytest.raises(NotFoundError, match="no run 'zz'"):
        await mesh.run("zz")


async def test_cancel_stores_the_request_and_returns_how_the_run_ended(mesh: Mesh, leader: FakeLeader) -> None:
    run = await mesh.submit(WORKFLOW)
    assert (await run.cancel()).state == "cancelled"
    assert leader.cancelled == [run.id]
    await run.cancel()
    assert leader.cancelled == [run.id]


async def test_a_run_of_somebody_else_can_be_followed_from_its_present_state(mesh: Mesh, leader: FakeLeader) -> None:
    leader.emit("other", "accepted", {"name": "w", "operators": 1})
    run = await mesh.run("other")
    follower = asyncio.create_task(run.result(timeout_s=30))
    await asyncio.sleep(0.1)
    leader.end("other")
    assert (await follower).state == "succeeded"


async def test_fetched_blocks_that_do_not_belong_are_refused(mesh: Mesh, leader: FakeLeader) -> None:
    root = import_bytes(leader.store, bytes(range(256)) * 20_000).cid
    leader.spoil = lambda answer: Blocks((b"evil", *answer.blocks[1:]), (RAW, *answer.codecs[1:]), answer.cursor)
    with pytest.raises(IntegrityError, match="no part of"):
        await mesh.fetch(root, MemoryStore())


async def test_a_holder_that_makes_no_progress_is_left(mesh: Mesh, leader: FakeLeader) -> None:
    root = import_bytes(leader.store, bytes(range(256)) * 20_000).cid
    leader.spoil = lambda answer: Blocks(answer.blocks, answer.codecs, 0)
    with pytest.raises(IntegrityError, match="no progress"):
        await mesh.fetch(root, MemoryStore())


async def test_missing_content_is_told(mesh: Mesh, leader: FakeLeader) -> None:
    root = import_bytes(leader.store, bytes(range(256)) * 20_000).cid
    with pytest.raises(NotFoundError, match="not held"):
        await mesh.fetch(cid_of(RAW, b"never held"), MemoryStore())
    leader.spoil = lambda answer: Blocks((*answer.blocks[:1], None), answer.codecs, answer.cursor)
    with pytest.raises(NotFoundError, match="no longer holds"):
        await mesh.fetch(root, MemoryStore())
    leader.spoil = lambda answer: Blocks(answer.blocks, answer.codecs, -1)
    with pytest.raises(NotFoundError, match="did not come"):
        await mesh.fetch(root, MemoryStore())


async def test_errors_of_the_leader_keep_their_class(mesh: Mesh) -> None:
    with pytest.raises(UsageError, match="unknown question"):
        await mesh.status()
    with pytest.raises(NotFoundError):
        await (await mesh.run("abc")).status()


async def test_a_question_without_a_leader_ends_at_its_deadline(broker: Broker) -> None:
    from flowmesh_mesh.client.questions import ask

    bus = await Bus.connect(broker.url, None, name="client", inbox="_INBOX_client")
    with pytest.raises(TransientError, match=r"nobody answered fm\.ask within 0\.5 s"):
        await ask(bus, "status", deadline_s=0.5)
    await bus.close()


async def test_events_in_json_are_read_too(mesh: Mesh, leader: FakeLeader) -> None:
    leader.emit("bare", "accepted")
    run = await mesh.run("bare")
    follower = asyncio.create_task(run.result(timeout_s=30))
    await asyncio.sleep(0.1)
    event = b'{"v":1,"run":"bare","seq":9,"at_us":1,"kind":"ended","state":"succeeded","outputs":{}}'
    leader.bus.post(subjects.tenant_run_event("bare"), event)
    assert (await follower).state == "succeeded"


async def test_unreadable_events_are_passed_over(mesh: Mesh, leader: FakeLeader) -> None:
    run = await mesh.submit(WORKFLOW)
    for payload in (b"", b"{", b"{}", b"\xff\xff", encode(RunEvent(run.id, 99, 1, "operators"))[:-3]):
        leader.bus.post(subjects.tenant_run_event(run.id), payload)
    leader.end(run.id)
    assert (await run.result(timeout_s=30)).state == "succeeded"


def test_the_synchronous_twin_does_the_same(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_credentials(broker.url, monkeypatch)
    ready = threading.Event()
    stops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def lead() -> None:
        leader = await FakeLeader.start(broker.url)
        ref = content.put_value(leader.store, [1, 2])

        def finish(submit: Submit) -> None:
            leader.emit(submit.run, "accepted", {"name": "one", "operators": 1})
            leader.end(submit.run, outputs={"out": [_plain(ref)]})

        leader.on_submit = finish
        stop = asyncio.Event()
        stops.append((asyncio.get_running_loop(), stop))
        ready.set()
        await stop.wait()
        await leader.close()

    thread = threading.Thread(target=lambda: asyncio.run(lead()))
    thread.start()
    assert ready.wait(5)
    try:
        with sync.connect() as mesh:
            run = mesh.submit(WORKFLOW)
            results = run.result(timeout_s=30)
            assert results["out"].value() == [1, 2]
            assert [path.name for path in results["out"].export(tmp_path)] == ["out.json"]
            assert [event.kind for event in run.events()] == ["accepted", "ended"]
            assert [row["run"] for row in mesh.runs()] == [run.id]
            with pytest.raises(NotFoundError):
                mesh.run("zz")
        with pytest.raises(UsageError, match="closed"):
            mesh.runs()
    finally:
        loop, stop = stops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def test_the_twin_has_every_public_method_of_the_client() -> None:
    from flowmesh_mesh import client, results

    own = {"Mesh": {"open", "bus", "keep", "forget", "local", "text_lines", "listen", "remember"}}
    own["Mesh"] |= {"settle", "submit_prepared", "plan_prepared"}
    own["Run"] = {"follow", "accepted", "end"}
    for twin, behind in ((sync.Mesh, client.Mesh), (sync.Run, client.Run), (sync.Output, results.Output)):
        names = {name for name in vars(behind) if not name.startswith("_")} - own.get(behind.__name__, set())
        missing = {name for name in names if not hasattr(twin, name)} - {"refs", "source"}
        assert not missing, f"{behind.__name__}: {missing}"
