"""What the mesh relies on in a broker, held on the real one and on the model of it that simulations run on.

Where the two differ, the model is wrong.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.faults.broker_model import BrokerModel
from tests.faults.connection import Network
from tests.fixtures_broker import MeshBroker, make_streams

from flowmesh_cas.errors import FencedError, FlowmeshError, InternalError, TransientError, UsageError
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import (
    AlreadyStoredError,
    Bus,
    Delivery,
    Expect,
    NoAnswerError,
    StoredMessage,
    UnknownOutcomeError,
)
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.streams import SECOND_NS, ConsumerConfig, StreamConfig


class ModelBroker(MeshBroker):
    """The model behind the face of the real broker."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        loop = asyncio.get_running_loop()
        self.model = BrokerModel(loop, random.Random(1), now_us)
        self.model.mesh_account = self.keyring.mesh_account
        self.network = Network(loop, self.model, random.Random(2))

    @property
    def url(self) -> str:
        return "model"

    async def restart(self) -> None:
        self.model.stop()
        await asyncio.sleep(0.01)
        self.model.start()


class RealBroker(MeshBroker):
    """The broker that the mesh runs on."""

    async def restart(self) -> None:
        assert self.broker.child is not None
        self.broker.child.kill()
        self.broker.child.wait()
        await asyncio.to_thread(self.broker.start)


AnyBroker = ModelBroker | RealBroker


@pytest_asyncio.fixture(params=["real", "model"])
async def any_broker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AnyBroker]:
    if request.param == "model":
        model = ModelBroker(tmp_path)
        monkeypatch.setattr(Bus, "make_connection", model.network.connection)
        async with model.stack:
            yield model
        return
    real = RealBroker(tmp_path)
    real.broker.start()
    try:
        async with real.stack:
            yield real
    finally:
        real.broker.stop(budget_s=1.0)


@pytest_asyncio.fixture
async def mesh(any_broker: AnyBroker) -> AnyBroker:
    await make_streams(await any_broker.scheduler())
    return any_broker


async def _until(what: str, check: Callable[[], object], deadline_s: float = 30.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not check():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


async def _all(messages: AsyncIterator[StoredMessage]) -> list[StoredMessage]:
    return [message async for message in messages]


# --- core messages and accounts


async def test_a_question_is_answered_and_nobody_there_is_told(any_broker: AnyBroker) -> None:
    one, two = await any_broker.scheduler(), await any_broker.scheduler()
    await one.subscribe("q.*.x", lambda d: d.post_respond(d.data[::-1]))
    await one.flush()
    assert await two.request("q.a.x", b"abc") == b"cba"
    with pytest.raises(NoAnswerError):
        await two.request("q.a.y", b"")


async def test_a_late_answer_is_an_unknown_outcome(any_broker: AnyBroker) -> None:
    bus = await any_broker.scheduler()
    await bus.subscribe("q.slow", lambda _: None)
    await bus.flush()
    with pytest.raises(UnknownOutcomeError):
        await bus.request("q.slow", b"", timeout_s=0.1)


async def test_wildcards_and_ended_subscriptions(any_broker: AnyBroker) -> None:
    bus = await any_broker.scheduler()
    seen: list[str] = []
    subscriptions = [
        await bus.subscribe(pattern, lambda d, p=pattern: seen.append(f"{p} {d.subject}"))  # type: ignore[misc]
        for pattern in ("a.*", "a.>", "a.b", "*.b")
    ]
    for subject in ("a.b", "a", "a.b.c"):
        await bus.publish(subject)
    await bus.flush()
    await subscriptions[0].unsubscribe()
    await bus.publish("a.c")
    await bus.flush()
    assert sorted(seen) == ["*.b a.b", "a.* a.b", "a.> a.b", "a.> a.b.c", "a.> a.c", "a.b a.b"]


async def test_a_queue_group_shares_messages(any_broker: AnyBroker) -> None:
    one, two = await any_broker.scheduler(), await any_broker.scheduler()
    seen: list[str] = []
    await one.subscribe("work", lambda _: seen.append("one"), queue="w")
    await two.subscribe("work", lambda _: seen.append("two"), queue="w")
    await asyncio.gather(one.flush(), two.flush())
    for _ in range(100):
        await one.publish("work")
    await _until("all messages", lambda: len(seen) == 100)
    assert set(seen) == {"one", "two"}


async def test_a_tenant_meets_the_mesh_under_its_own_key(mesh: AnyBroker) -> None:
    leader, client = await mesh.scheduler(), await mesh.client("team-a")
    other = await mesh.client("team-b")
    account, asked, heard, overheard = mesh.account("team-a"), list[str](), list[tuple[str, bytes]](), list[bytes]()

    def answer(delivery: Delivery) -> None:
        asked.append(delivery.subject)
        delivery.post_respond(b"yes")

    await leader.subscribe(subjects.ask("*"), answer)
    await client.subscribe(subjects.tenant_run_event("r1"), lambda d: heard.append((d.subject, d.data)))
    await other.subscribe("fm.runs.>", lambda d: overheard.append(d.data))
    await asyncio.gather(leader.flush(), client.flush(), other.flush())
    assert await client.request(subjects.TENANT_ASK, b"") == b"yes"
    assert asked == [subjects.ask(account)]
    leader.post(subjects.run_event(account, "r1"), b"event")
    await _until("the event", lambda: heard)
    assert heard == [("fm.runs.r1", b"event")]
    assert await client.store(subjects.TENANT_SUBMIT, b"doc", message_id="r1") > 0
    found = await leader.last_message(subjects.SUBMIT, subjects.submit(account))
    assert found is not None
    assert found.data == b"doc"
    assert overheard == []


async def test_the_watcher_hears_of_connections_that_end(mesh: AnyBroker) -> None:
    watcher, node = await mesh.watcher(), await mesh.node("n1")
    ended: list[dict[str, Any]] = []
    await watcher.subscribe("$SYS.ACCOUNT.*.DISCONNECT", lambda d: ended.append(json.loads(d.data)["client"]))
    await asyncio.gather(watcher.flush(), node.flush())
    await node.close()
    await _until("the end", lambda: ended)
    assert ended[0].get("nkey") or ended[0].get("user")


# --- streams


async def test_streams_keep_their_first_sequence_and_take_changes(any_broker: AnyBroker) -> None:
    bus = await any_broker.scheduler()
    for now_ms in (1_000, 5_000):
        for config in streams.mesh_streams(now_ms):
            await bus.ensure_stream(config)
    assert await bus.store("led.result.a.0", b"r") == 1_000
    await bus.ensure_stream(StreamConfig("S", ["s.a"], max_bytes=1_000_000, first_seq=7))
    await bus.store("s.a", b"kept")
    await bus.ensure_stream(StreamConfig("S", ["s.a", "s.b"], max_bytes=2_000_000, first_seq=9))
    assert await bus.store("s.b", b"") == 8
    info = await bus.stream_info("S")
    assert info is not None
    assert (info.config["max_bytes"], info.state.messages, info.state.first_seq, info.state.last_seq) == (2_000_000, 2, 7, 8)
    await bus.delete_stream("S")
    assert await bus.stream_info("S") is None


async def test_no_stream_for_a_subject_is_told_at_once(any_broker: AnyBroker) -> None:
    bus = await any_broker.scheduler()
    with pytest.raises(NoAnswerError):
        await bus.store("nowhere", b"")


async def test_a_write_once_subject_takes_one_message(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    first = await bus.store("led.result.a.0", b"one")
    with pytest.raises(AlreadyStoredError):
        await bus.store("led.result.a.0", b"two")
    found = await bus.last_message(subjects.LEDGER, "led.result.a.0")
    assert found is not None
    assert (found.data, found.seq) == (b"one", first)
    assert await bus.message(subjects.LEDGER, first) == found


async def test_a_condition_that_fails_goes_before_a_taken_subject(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    epoch = await bus.store("led.epoch.1", b"", expect=Expect(0, subjects.LEDGER_EPOCHS))
    await bus.store("led.result.a.0", b"", expect=Expect(epoch, subjects.LEDGER_EPOCHS))
    newer = await bus.store("led.epoch.2", b"", expect=Expect(epoch, subjects.LEDGER_EPOCHS))
    for subject in ("led.result.a.0", "led.result.b.0"):
        with pytest.raises(FencedError):
            await bus.store(subject, b"", expect=Expect(epoch, subjects.LEDGER_EPOCHS))
    with pytest.raises(AlreadyStoredError):
        await bus.store("led.result.a.0", b"", expect=Expect(newer, subjects.LEDGER_EPOCHS))
    await bus.store("led.result.b.0", b"", expect=Expect(newer, subjects.LEDGER_EPOCHS))


async def test_a_condition_on_the_subject_itself(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    one = await bus.store("fm.nodes.n1", b"1", expect=Expect(0))
    await bus.store("fm.nodes.n2", b"1", expect=Expect(0))
    two = await bus.store("fm.nodes.n1", b"2", expect=Expect(one))
    with pytest.raises(FencedError):
        await bus.store("fm.nodes.n1", b"3", expect=Expect(one))
    await bus.purge(subjects.NODES, "fm.nodes.n1")
    with pytest.raises(FencedError):
        await bus.store("fm.nodes.n1", b"3", expect=Expect(two))
    await bus.store("fm.nodes.n1", b"3", expect=Expect(0))


async def test_a_wiped_stream_refuses_the_condition_of_its_earlier_life(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    epoch = await bus.store("asg.epoch.1", b"", expect=Expect(0, subjects.ASSIGN_EPOCHS))
    await bus.delete_stream(subjects.ASSIGN)
    await bus.ensure_stream(streams.assign(2_000_000))
    with pytest.raises(FencedError):
        await bus.store("asg.node.n1.a", b"", expect=Expect(epoch, subjects.ASSIGN_EPOCHS))
    assert await bus.store("asg.epoch.2", b"", expect=Expect(0, subjects.ASSIGN_EPOCHS)) == 2_000_000


async def test_a_message_id_stores_once_and_is_forgotten_after_its_window(any_broker: AnyBroker) -> None:
    bus = await any_broker.scheduler()
    await bus.ensure_stream(StreamConfig("W", ["w.*"], duplicate_window=SECOND_NS // 2))
    assert {await bus.store(f"w.{n}", b"x", message_id="same") for n in range(3)} == {1}
    await asyncio.sleep(1.2)
    assert await bus.store("w.1", b"x", message_id="same") == 2


async def test_a_failed_condition_goes_before_a_known_message_id(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await bus.store("fm.nodes.n1", b"", expect=Expect(0), message_id="m")
    with pytest.raises(FencedError):
        await bus.store("fm.nodes.n1", b"", expect=Expect(0), message_id="m")


async def test_a_batch_is_stored_whole_in_order_and_under_its_condition(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    epoch = await bus.store("asg.epoch.1", b"", expect=Expect(0, subjects.ASSIGN_EPOCHS))
    messages = [(f"asg.node.n1.{number}", b"%d" % number) for number in range(300)]
    last = await bus.store_batch(messages, expect=Expect(epoch, subjects.ASSIGN_EPOCHS))
    found = await _all(bus.read_stream(subjects.ASSIGN, "asg.node.>"))
    assert [(message.subject, message.data) for message in found] == messages
    assert (found[0].seq, found[-1].seq) == (epoch + 1, last)
    await bus.store("asg.epoch.2", b"", expect=Expect(epoch, subjects.ASSIGN_EPOCHS))
    with pytest.raises(FencedError):
        await bus.store_batch([("asg.node.n1.x", b""), ("asg.node.n1.y", b"")], expect=Expect(epoch, subjects.ASSIGN_EPOCHS))
    assert await bus.last_message(subjects.ASSIGN, "asg.node.n1.x") is None


async def test_a_batch_with_one_taken_subject_stores_nothing(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await bus.store("led.result.b.0", b"first")
    with pytest.raises((AlreadyStoredError, TransientError, InternalError)):
        await bus.store_batch([("led.result.a.0", b""), ("led.result.b.0", b""), ("led.result.c.0", b"")])
    assert await bus.last_message(subjects.LEDGER, "led.result.a.0") is None


async def test_a_batch_that_names_a_subject_twice_stores_nothing_where_subjects_are_written_once(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    with pytest.raises((AlreadyStoredError, TransientError, InternalError)):
        await bus.store_batch([("led.result.a.0", b"1"), ("led.result.a.0", b"2")])
    assert await bus.last_message(subjects.LEDGER, "led.result.a.0") is None


async def test_a_batch_without_its_beginning_is_refused(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    fields = {"Nats-Batch-Id": "b", "Nats-Batch-Sequence": "2", "Nats-Batch-Commit": "1"}
    with pytest.raises(FlowmeshError):
        await bus.store("asg.node.n1.a", b"", headers=fields)
    assert await bus.last_message(subjects.ASSIGN, "asg.node.n1.a") is None


async def test_a_key_with_a_time_to_live_leaves_a_marker_that_goes_too(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    first = await bus.store(subjects.LEASE_SUBJECT, b"me", ttl_s=1, expect=Expect(0))
    renewed = await bus.store(subjects.LEASE_SUBJECT, b"me", ttl_s=1, expect=Expect(first)) if await _is_kept(bus) else 0
    markers: list[int] = []
    deadline = time.monotonic() + 30
    while (found := await bus.last_message(subjects.LEASE_STREAM, subjects.LEASE_SUBJECT)) is not None:
        if "Nats-Marker-Reason" in found.headers:
            assert found.data == b""
            markers.append(found.seq)
        assert time.monotonic() < deadline, "the key does not expire"
        await asyncio.sleep(0.02)
    assert set(markers) == {max(first, renewed) + 1}


async def _is_kept(bus: Bus) -> bool:
    """Tell whether a bucket of one message per key that takes nothing beyond lets its key be replaced."""
    info = await bus.stream_info(subjects.LEASE_STREAM)
    assert info is not None
    return bool(info.config["max_msgs_per_subject"] == 1)


async def test_a_lease_is_taken_over_its_marker_or_after_it(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    first = await bus.store(subjects.LEASE_SUBJECT, b"me", ttl_s=1, expect=Expect(0))
    with pytest.raises(FencedError):
        await bus.store(subjects.LEASE_SUBJECT, b"you", ttl_s=1, expect=Expect(0))
    deadline = time.monotonic() + 30
    while (found := await bus.last_message(subjects.LEASE_STREAM, subjects.LEASE_SUBJECT)) is not None and found.seq == first:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await bus.store(subjects.LEASE_SUBJECT, b"you", ttl_s=1, expect=Expect(found.seq if found else 0))


async def test_messages_are_read_by_sequence_by_subject_and_onwards(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    seqs = [await bus.store(f"asg.node.n{number % 2}.{number}", b"%d" % number) for number in range(6)]
    assert await bus.message(subjects.ASSIGN, 5) is None
    assert await bus.last_message(subjects.ASSIGN, "asg.node.n7.*") is None
    last = await bus.last_message(subjects.ASSIGN, "asg.node.n0.*")
    assert last is not None
    assert last.seq == seqs[4]
    following = await bus.next_message(subjects.ASSIGN, seqs[2], "asg.node.n1.*")
    assert following is not None
    assert following.seq == seqs[3]


async def test_messages_and_subjects_can_be_deleted(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    seqs = [await bus.store(f"asg.node.n{number % 2}.{number}", b"") for number in range(10)]
    assert await bus.delete_message(subjects.ASSIGN, seqs[0])
    assert not await bus.delete_message(subjects.ASSIGN, seqs[0])
    await bus.purge(subjects.ASSIGN, "asg.node.n1.*", below_seq=seqs[5])
    state = await bus.stream_state(subjects.ASSIGN, subjects="asg.node.*.*")
    assert state is not None
    left = [2, 4, 5, 6, 7, 8, 9]
    assert state.subjects == {f"asg.node.n{number % 2}.{number}": 1 for number in left}
    assert (state.messages, state.first_seq, state.last_seq) == (7, seqs[2], seqs[9])
    await bus.purge(subjects.ASSIGN)
    state = await bus.stream_state(subjects.ASSIGN)
    assert state is not None
    assert (state.messages, state.first_seq, state.last_seq) == (0, seqs[9] + 1, seqs[9])
    assert await bus.store("asg.node.n1.x", b"") == seqs[9] + 1


async def test_a_full_memory_stream_drops_the_oldest(any_broker: AnyBroker) -> None:
    bus = await any_broker.scheduler()
    await bus.ensure_stream(StreamConfig("M", ["m.*"], storage="memory", max_bytes=10_000))
    for number in range(30):
        await bus.store(f"m.{number}", b"x" * 1000)
    state = await bus.stream_state("M")
    assert state is not None
    assert state.last_seq == 30
    assert 20 < state.first_seq < 30


async def test_what_is_too_old_is_gone(any_broker: AnyBroker) -> None:
    bus = await any_broker.scheduler()
    await bus.ensure_stream(StreamConfig("O", ["o.*"], max_age=SECOND_NS // 2, duplicate_window=SECOND_NS // 4))
    await bus.store("o.a", b"")
    deadline = time.monotonic() + 30
    while await bus.last_message("O", "o.a") is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert await bus.store("o.a", b"") == 2


# --- consumers


@pytest.mark.parametrize("retention", ["limits", "workqueue"])
async def test_a_replay_is_complete_filtered_and_leaves_nothing(any_broker: AnyBroker, retention: str) -> None:
    bus = await any_broker.scheduler()
    await bus.ensure_stream(StreamConfig("R", ["r.>"], retention=retention, allow_atomic=True, first_seq=1_000_000))
    await bus.store_batch([(f"r.{'ab'[number % 2]}.{number}", b"") for number in range(100)])
    assert [message.seq async for message in bus.read_stream("R")] == list(range(1_000_000, 1_000_100))
    found = await _all(bus.read_stream("R", "r.b.*", from_seq=1_000_050))
    assert [message.subject for message in found] == [f"r.b.{number}" for number in range(51, 100, 2)]
    assert await _all(bus.read_stream("R", "r.none.*")) == []
    state = await bus.stream_state("R")
    assert state is not None
    assert state.consumer_count == 0


async def test_a_pull_delivers_what_is_there_and_what_comes_in_order(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader"))
    seen: list[tuple[bytes, int]] = []

    def take(delivery: Delivery) -> None:
        seen.append((delivery.data, delivery.delivered))
        delivery.post_ack()

    for number in range(20):
        await bus.store("fm.ready.x", b"%d" % number)
    await bus.pull(subjects.READY, "leader", take, batch=7)
    await _until("what was there", lambda: len(seen) == 20)
    for number in range(20, 60):
        await bus.store("fm.ready.x", b"%d" % number)
    await _until("what came", lambda: len(seen) == 60)
    assert seen == [(b"%d" % number, 1) for number in range(60)]
    deadline = time.monotonic() + 30
    while (state := await bus.stream_state(subjects.READY)) is None or state.messages:
        assert time.monotonic() < deadline, "a work queue keeps what was acknowledged"
        await asyncio.sleep(0.01)


async def test_a_pull_is_renewed_when_it_expires(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader"))
    seen: list[bytes] = []
    await bus.pull(subjects.READY, "leader", lambda delivery: seen.append(delivery.data), expires_s=1.0)
    await asyncio.sleep(1.5)
    await bus.store("fm.ready.x", b"1")
    await _until("the message", lambda: seen == [b"1"])


async def test_what_is_not_acknowledged_comes_again_and_what_is_in_progress_does_not(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer("n1", ack_wait_s=0.6))
    seen: list[tuple[bytes, int]] = []
    held: list[Delivery] = []

    async def take(delivery: Delivery) -> None:
        seen.append((delivery.data, delivery.delivered))
        if delivery.data == b"progress":
            held.append(delivery)
        elif delivery.data == b"nak" and delivery.delivered == 1:
            await delivery.nak(0.1)
        elif delivery.data == b"term":
            await delivery.term()
        elif delivery.delivered > 1:
            await delivery.ack()

    for body in (b"progress", b"nak", b"term", b"wait"):
        await bus.store(f"asg.node.n1.{body.decode()}", body)
    await bus.pull(subjects.ASSIGN, "node_n1", take)
    await _until("all once", lambda: len(seen) >= 4)
    for _ in range(8):
        await asyncio.sleep(0.2)
        await held[0].in_progress()
    assert sorted(seen) == [(b"nak", 1), (b"nak", 2), (b"progress", 1), (b"term", 1), (b"wait", 1), (b"wait", 2)]
    await _until("the end of progress", lambda: (b"progress", 2) in seen)


async def test_a_late_acknowledgement_settles_too(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader", ack_wait_s=0.3))
    seen: list[Delivery] = []
    await bus.pull(subjects.READY, "leader", seen.append)
    await bus.store("fm.ready.x", b"x")
    await _until("two deliveries", lambda: len(seen) == 2)
    seen[0].post_ack()
    deadline = time.monotonic() + 30
    while (state := await bus.stream_state(subjects.READY)) is None or state.messages:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_consumers_of_one_stream_get_what_they_filter(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    seen: dict[str, list[bytes]] = {"n1": [], "n2": []}
    for node in seen:
        assert await bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer(node)) == 0
        await bus.pull(subjects.ASSIGN, f"node_{node}", lambda d, n=node: seen[n].append(d.data))  # type: ignore[misc]
    await bus.store_batch([(f"asg.node.n{1 + number % 2}.{number}", b"%d" % number) for number in range(40)])
    await _until("all", lambda: sum(map(len, seen.values())) == 40)
    assert seen == {"n1": [b"%d" % n for n in range(0, 40, 2)], "n2": [b"%d" % n for n in range(1, 40, 2)]}
    state = await bus.consumer_state(subjects.ASSIGN, "node_n1")
    assert state is not None
    assert (state.num_pending, state.num_ack_pending) == (0, 20)
    await bus.purge(subjects.ASSIGN, "asg.node.n1.*")
    state = await bus.consumer_state(subjects.ASSIGN, "node_n1")
    assert state is not None
    assert state.num_ack_pending == 0


async def test_a_consumer_counts_what_waits_and_starts_where_it_is_told(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    last = await bus.store_batch([(f"asg.node.n1.{number}", b"") for number in range(10)])
    assert await bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer("n1")) == 10
    assert await bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer("n1")) == 10
    late = ConsumerConfig(
        "late", deliver_policy="by_start_sequence", opt_start_seq=last - 2, ack_policy="none", inactive_threshold=SECOND_NS
    )
    assert await bus.ensure_consumer(subjects.ASSIGN, late) == 3
    await bus.purge(subjects.ASSIGN, below_seq=last)
    state = await bus.consumer_state(subjects.ASSIGN, "node_n1")
    assert state is not None
    assert state.num_pending == 1
    assert await bus.consumer_state(subjects.ASSIGN, "none") is None
    deadline = time.monotonic() + 30
    while await bus.consumer_state(subjects.ASSIGN, "late") is not None:
        assert time.monotonic() < deadline, "an unused consumer stays"
        await asyncio.sleep(0.3)


async def test_a_work_queue_has_one_consumer(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader"))
    with pytest.raises((UsageError, InternalError)):
        await bus.ensure_consumer(subjects.READY, streams.leader_consumer("another"))


async def test_a_pull_outlives_the_deletion_of_its_consumer(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    seen: list[bytes] = []
    await bus.pull(subjects.READY, "leader", lambda d: seen.append(d.data))
    await bus.store("fm.ready.x", b"x")
    await asyncio.sleep(0.05)
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader"))
    await _until("the message", lambda: seen == [b"x"])
    await bus.delete_consumer(subjects.READY, "leader")
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader"))
    await bus.store("fm.ready.x", b"y")
    await _until("the next", lambda: b"y" in seen)


# --- the broker killed and started again


async def test_files_and_their_consumers_outlive_the_broker_and_memory_does_not(mesh: AnyBroker) -> None:
    events: list[str] = []
    bus = await mesh.scheduler(on_disconnect=lambda: events.append("lost"), on_reconnect=lambda: events.append("back"))
    node = await mesh.node("n1")
    epoch = await bus.store("asg.epoch.1", b"", expect=Expect(0, subjects.ASSIGN_EPOCHS))
    await bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer("n1", ack_wait_s=1))
    await bus.store("fm.node.n1.done", b"in memory")
    seen: list[tuple[bytes, int]] = []

    def take(delivery: Delivery) -> None:
        seen.append((delivery.data, delivery.delivered))
        if delivery.data == b"acked":
            delivery.post_ack()

    await node.pull(subjects.ASSIGN, "node_n1", take)
    await bus.store("asg.node.n1.a", b"acked")
    await bus.store("asg.node.n1.b", b"held")
    await _until("both", lambda: len(seen) == 2)
    await asyncio.sleep(0.3)
    await mesh.restart()
    await _until("the way back", lambda: events == ["lost", "back"])
    await bus.store("asg.node.n1.c", b"new", expect=Expect(epoch, subjects.ASSIGN_EPOCHS), timeout_s=5)
    await _until("the new and the unsettled", lambda: {(b"new", 1), (b"held", 2)} <= {(d, min(n, 2)) for d, n in seen})
    assert sum(data == b"acked" for data, _ in seen) == 1
    state = await bus.stream_state(subjects.DONE)
    assert state is None or state.messages == 0
    assert [m.data async for m in bus.read_stream(subjects.ASSIGN, "asg.node.>")] == [b"acked", b"held", b"new"]


async def test_which_streams_are_there_after_a_restart(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await mesh.restart()
    await _until("the way back", lambda: bus.connected)
    there = {config.name for config in streams.mesh_streams(1) if await bus.stream_info(config.name) is not None}
    assert there == {config.name for config in streams.mesh_streams(1) if config.storage == "file"}


async def test_a_message_id_is_known_after_a_restart(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    first = await bus.store("fm.submit.T", b"x", message_id="m")
    await mesh.restart()
    assert await bus.store("fm.submit.T", b"x", message_id="m", timeout_s=10) == first


async def test_a_call_in_flight_fails_when_the_link_is_lost(mesh: AnyBroker) -> None:
    bus = await mesh.scheduler()
    await bus.subscribe("q.slow", lambda _: None)
    await bus.flush()
    call = asyncio.create_task(bus.request("q.slow", b"", timeout_s=90))
    await asyncio.sleep(0.05)
    await mesh.restart()
    with pytest.raises(UnknownOutcomeError):
        await call


async def test_a_store_waits_for_a_broker_that_comes_back(mesh: AnyBroker) -> None:
    lost = asyncio.Event()
    bus = await mesh.scheduler(on_disconnect=lost.set)
    restarting = asyncio.create_task(mesh.restart())
    await lost.wait()
    assert await bus.store("fm.nodes.n1", b"x", timeout_s=10) == 1
    await restarting


async def test_what_is_published_without_a_link_arrives_with_the_next(mesh: AnyBroker) -> None:
    lost = asyncio.Event()
    bus = await mesh.scheduler(on_disconnect=lost.set)
    restarting = asyncio.create_task(mesh.restart())
    await lost.wait()
    bus.post("fm.nodes.n1", b"late")
    await restarting
    deadline = time.monotonic() + 30
    while not bus.connected or await bus.last_message(subjects.NODES, "fm.nodes.n1") is None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
