"""The bus on a real broker: streams, conditions, batches, pulls, replays, and every way in which a link is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.fixtures_broker import MeshBroker

from flowmesh_cas.errors import FencedError, InternalError, NotFoundError, TransientError, UsageError
from flowmesh_deploy.broker import Broker
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import (
    AlreadyStoredError,
    Bus,
    CredentialsRefusedError,
    Delivery,
    Expect,
    NoAnswerError,
    StoredMessage,
    UnknownOutcomeError,
)
from flowmesh_mesh.streams import StreamConfig


async def _until(what: str, check: object, deadline_s: float = 30.0) -> None:
    """Wait until ``check`` is true; fail naming ``what``."""
    assert callable(check)
    deadline = time.monotonic() + deadline_s
    while not check():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


async def _all(messages: AsyncIterator[StoredMessage]) -> list[StoredMessage]:
    return [message async for message in messages]


# --- core messages


async def test_a_question_is_answered(broker: MeshBroker) -> None:
    one, two = await broker.scheduler(), await broker.scheduler()

    async def answer(delivery: Delivery) -> None:
        await delivery.respond(delivery.data[::-1])

    await one.subscribe("q.*", answer)
    await one.flush()
    assert await two.request("q.a", b"abc") == b"cba"
    answers = await asyncio.gather(*(two.request("q.a", b"<%d" % number) for number in range(100)))
    assert answers == [(b"<%d" % number)[::-1] for number in range(100)]


async def test_nobody_there_is_told_at_once(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    began = time.monotonic()
    with pytest.raises(NoAnswerError):
        await bus.request("q.none", b"", timeout_s=60)
    assert time.monotonic() - began < 30


async def test_a_late_answer_is_an_unknown_outcome(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    await bus.subscribe("q.slow", lambda _: None)
    await bus.flush()
    with pytest.raises(UnknownOutcomeError):
        await bus.request("q.slow", b"", timeout_s=0.1)


async def test_a_failing_callback_does_not_end_its_subscription(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    seen: list[bytes] = []

    async def fragile(delivery: Delivery) -> None:
        seen.append(delivery.data)
        raise ValueError("on purpose")

    def fragile_plain(delivery: Delivery) -> None:
        seen.append(delivery.data)
        raise ValueError("on purpose")

    await bus.subscribe("a", fragile)
    await bus.subscribe("b", fragile_plain)
    for subject in ("a", "b", "a", "b"):
        await bus.publish(subject, subject.encode())
    await bus.flush()
    await _until("four messages", lambda: len(seen) == 4)


async def test_messages_of_a_subscription_stay_in_order(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    seen: list[int] = []

    async def slow(delivery: Delivery) -> None:
        await asyncio.sleep(0.001 if delivery.data == b"0" else 0)
        seen.append(int(delivery.data))

    await bus.subscribe("ordered", slow)
    for number in range(500):
        await bus.publish("ordered", b"%d" % number)
    await _until("all messages", lambda: len(seen) == 500)
    assert seen == list(range(500))


async def test_a_queue_group_shares_messages(broker: MeshBroker) -> None:
    one, two = await broker.scheduler(), await broker.scheduler()
    seen: list[str] = []
    await one.subscribe("work", lambda _: seen.append("one"), queue="w")
    await two.subscribe("work", lambda _: seen.append("two"), queue="w")
    await asyncio.gather(one.flush(), two.flush())
    for _ in range(200):
        await one.publish("work", b"")
    await _until("all messages", lambda: len(seen) == 200)
    await asyncio.sleep(0.05)
    assert len(seen) == 200
    assert set(seen) == {"one", "two"}


async def test_an_ended_subscription_hears_nothing(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    seen: list[bytes] = []
    subscription = await bus.subscribe("x", lambda delivery: seen.append(delivery.data))
    await bus.publish("x", b"1")
    await bus.flush()
    await subscription.unsubscribe()
    await bus.publish("x", b"2")
    await bus.flush()
    assert seen == [b"1"]


@pytest.mark.parametrize("subject", ["", "a b", "a..b", ".a", "a.", "a\r\nPUB b 0", "a\tb"])
async def test_a_bad_subject_never_reaches_the_broker(broker: MeshBroker, subject: str) -> None:
    bus = await broker.scheduler()
    with pytest.raises(UsageError):
        await bus.publish(subject, b"")
    with pytest.raises(UsageError):
        await bus.subscribe(subject, lambda _: None)
    assert bus.connected


async def test_a_message_that_is_too_large_with_its_headers_is_refused_here(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    body = b"x" * (bus.max_payload_bytes - 10)
    await bus.publish("big", body)
    with pytest.raises(UsageError, match="bytes"):
        await bus.publish("big", body, headers={"A": "b" * 20})
    await bus.flush()
    assert bus.connected


async def test_headers_given_by_the_caller_are_not_changed(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    headers = {"A": "b"}
    await bus.store("fm.nodes.n1", b"x", headers=headers, message_id="m", expect=Expect(0))
    assert headers == {"A": "b"}


# --- streams


async def test_streams_are_made_once_and_keep_their_first_sequence(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    for now_ms in (1_000, 5_000):
        for config in streams.mesh_streams(now_ms):
            await bus.ensure_stream(config)
    assert await bus.store("led.result.a.0", b"r") == 1_000
    state = await bus.stream_state(subjects.ASSIGN)
    assert state is not None
    assert state.first_seq == 1_000


async def test_a_stream_is_brought_to_its_configuration(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    await bus.ensure_stream(StreamConfig("S", ["s.a"], max_bytes=1_000_000, first_seq=7))
    await bus.store("s.a", b"kept")
    await bus.ensure_stream(StreamConfig("S", ["s.a", "s.b"], max_bytes=2_000_000, first_seq=9))
    assert await bus.store("s.b", b"") == 8
    info = await bus.stream_info("S")
    assert info is not None
    assert (info.config["max_bytes"], info.state.messages) == (2_000_000, 2)


async def test_a_write_once_subject_takes_one_message(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    first = await bus.store("led.result.a.0", b"one")
    with pytest.raises(AlreadyStoredError):
        await bus.store("led.result.a.0", b"two")
    found = await bus.last_message(subjects.LEDGER, "led.result.a.0")
    assert found is not None
    assert (found.data, found.seq) == (b"one", first)
    assert await bus.message(subjects.LEDGER, first) == found


async def test_a_stale_condition_is_fenced(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    epoch = await bus.store("led.epoch.1", b"", expect=Expect(0, subjects.LEDGER_EPOCHS))
    await bus.store("led.result.a.0", b"", expect=Expect(epoch, subjects.LEDGER_EPOCHS))
    newer = await bus.store("led.epoch.2", b"", expect=Expect(epoch, subjects.LEDGER_EPOCHS))
    with pytest.raises(FencedError):
        await bus.store("led.result.b.0", b"", expect=Expect(epoch, subjects.LEDGER_EPOCHS))
    with pytest.raises(FencedError):
        await bus.store_batch([("led.result.c.0", b""), ("led.result.d.0", b"")], expect=Expect(epoch, subjects.LEDGER_EPOCHS))
    assert await bus.last_message(subjects.LEDGER, "led.result.c.0") is None
    await bus.store("led.result.b.0", b"", expect=Expect(newer, subjects.LEDGER_EPOCHS))


async def test_a_message_id_stores_once(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    subject = subjects.submit(mesh_broker.account("team-a"))
    assert len({await bus.store(subject, b"x", message_id="same") for _ in range(3)}) == 1
    state = await bus.stream_state(subjects.SUBMIT)
    assert state is not None
    assert state.messages == 1


async def test_no_stream_for_a_subject_is_told_at_once(broker: MeshBroker) -> None:
    bus = await broker.scheduler()
    with pytest.raises(NoAnswerError):
        await bus.store("nowhere", b"")


async def test_a_batch_is_stored_whole_and_in_order(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    messages = [(f"asg.node.n1.{number}", b"%d" % number) for number in range(1000)]
    last = await bus.store_batch(messages)
    found = await _all(bus.read_stream(subjects.ASSIGN))
    assert [(message.subject, message.data) for message in found] == messages
    assert found[-1].seq == last


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_small_batches_work_too(mesh_broker: MeshBroker, count: int) -> None:
    bus = await mesh_broker.scheduler()
    assert await bus.store_batch([(f"led.x.{number}", b"") for number in range(count)]) == 1_000_000 + count - 1


async def test_a_batch_with_one_taken_subject_stores_nothing(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await bus.store("led.result.b.0", b"first")
    with pytest.raises((AlreadyStoredError, TransientError, InternalError)):
        await bus.store_batch([("led.result.a.0", b""), ("led.result.b.0", b""), ("led.result.c.0", b"")])
    assert await bus.last_message(subjects.LEDGER, "led.result.a.0") is None


async def test_a_batch_has_a_size(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    with pytest.raises(UsageError):
        await bus.store_batch([(f"led.x.{number}", b"") for number in range(1001)])


async def test_a_key_with_a_time_to_live_leaves_a_marker(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await bus.store(subjects.LEASE_SUBJECT, b"me", ttl_s=1, expect=Expect(0))
    with pytest.raises(FencedError):
        await bus.store(subjects.LEASE_SUBJECT, b"you", ttl_s=1, expect=Expect(0))
    deadline = time.monotonic() + 30
    while True:
        found = await bus.last_message(subjects.LEASE_STREAM, subjects.LEASE_SUBJECT)
        if found is None or "Nats-Marker-Reason" in found.headers:
            break
        assert time.monotonic() < deadline, "the key does not expire"
        await asyncio.sleep(0.05)


async def test_nothing_stored_is_none_and_no_stream_is_not_found(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    assert await bus.last_message(subjects.LEDGER, "led.none") is None
    assert await bus.message(subjects.LEDGER, 5) is None
    assert await bus.stream_state("NONE") is None
    with pytest.raises(NotFoundError):
        await _all(bus.read_stream("NONE"))


async def test_messages_and_subjects_can_be_deleted(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    seqs = [await bus.store(f"asg.node.n{number % 2}.{number}", b"") for number in range(10)]
    assert await bus.delete_message(subjects.ASSIGN, seqs[0])
    assert not await bus.delete_message(subjects.ASSIGN, seqs[0])
    await bus.purge(subjects.ASSIGN, "asg.node.n1.*")
    state = await bus.stream_state(subjects.ASSIGN, subjects="asg.node.*.*")
    assert state is not None
    assert state.subjects == {f"asg.node.n0.{number}": 1 for number in (2, 4, 6, 8)}


# --- reading a stream


@pytest.mark.parametrize("retention", ["limits", "workqueue"])
async def test_a_replay_gives_everything_up_to_now_and_leaves_no_consumer(broker: MeshBroker, retention: str) -> None:
    bus = await broker.scheduler()
    await bus.ensure_stream(StreamConfig("R", ["r.>"], retention=retention, allow_atomic=True, first_seq=1_000_000))
    for block in range(3):
        await bus.store_batch([(f"r.{block}-{number}", b"d") for number in range(700)])
    seen: list[int] = []
    async for message in bus.read_stream("R"):
        if not seen:
            await bus.store("r.later", b"")
        seen.append(message.seq)
    assert seen == list(range(1_000_000, 1_000_000 + 2100))
    state = await bus.stream_state("R")
    assert state is not None
    assert state.consumer_count == 0


@pytest.mark.parametrize("retention", ["limits", "workqueue"])
async def test_a_replay_can_be_filtered_and_begin_later(broker: MeshBroker, retention: str) -> None:
    bus = await broker.scheduler()
    await bus.ensure_stream(StreamConfig("R", ["r.>"], retention=retention, allow_atomic=True, first_seq=1_000_000))
    await bus.store_batch([(f"r.{'ab'[number % 2]}.{number}", b"") for number in range(100)])
    found = await _all(bus.read_stream("R", "r.b.*", from_seq=1_000_050))
    assert [message.subject for message in found] == [f"r.b.{number}" for number in range(51, 100, 2)]
    assert await _all(bus.read_stream("R", "r.none.*")) == []
    assert await _all(bus.read_stream("R", from_seq=2_000_000)) == []


async def test_an_abandoned_replay_leaves_no_consumer(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await bus.store_batch([(f"led.x.{number}", b"") for number in range(1000)])
    replay = bus.read_stream(subjects.LEDGER)
    await anext(replay)
    await replay.aclose()
    state = await bus.stream_state(subjects.LEDGER)
    assert state is not None
    assert state.consumer_count == 0


async def test_a_long_replay_is_complete(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    for block in range(10):
        await bus.store_batch([(f"led.x.{block}-{number}", b"d" * 200) for number in range(1000)])
    assert len({message.seq async for message in bus.read_stream(subjects.LEDGER)}) == 10_000


# --- pulling


async def _work_queue(bus: Bus) -> None:
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader"))


async def test_a_pull_delivers_what_is_there_and_what_comes(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await _work_queue(bus)
    seen: list[bytes] = []

    async def take(delivery: Delivery) -> None:
        seen.append(delivery.data)
        await delivery.ack()

    for number in range(20):
        await bus.store("fm.ready.x", b"%d" % number)
    await bus.pull(subjects.READY, "leader", take, batch=7)
    await _until("what was there", lambda: len(seen) == 20)
    for number in range(20, 60):
        await bus.store("fm.ready.x", b"%d" % number)
    await _until("what came", lambda: len(seen) == 60)
    assert seen == [b"%d" % number for number in range(60)]
    await _until_empty(bus)


async def _until_empty(bus: Bus) -> None:
    deadline = time.monotonic() + 30
    while (state := await bus.stream_state(subjects.READY)) is None or state.messages:
        assert time.monotonic() < deadline, "messages are left"
        await asyncio.sleep(0.01)


async def test_a_pull_is_renewed_when_it_expires(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await _work_queue(bus)
    seen: list[bytes] = []

    def take(delivery: Delivery) -> None:
        seen.append(delivery.data)
        delivery.post_ack()

    await bus.pull(subjects.READY, "leader", take, expires_s=0.5)
    for number in range(4):
        await asyncio.sleep(0.4)
        await bus.store("fm.ready.x", b"%d" % number)
    await _until("all messages", lambda: len(seen) == 4, 3)


async def test_what_a_callback_refuses_or_fails_on_comes_again(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader", ack_wait_s=0.5))
    seen: list[tuple[bytes, int]] = []

    async def take(delivery: Delivery) -> None:
        seen.append((delivery.data, delivery.delivered))
        if delivery.delivered == 1 and delivery.data == b"nak":
            await delivery.nak(0.1)
        elif delivery.delivered == 1:
            raise ValueError("on purpose")
        else:
            await delivery.ack()

    await bus.pull(subjects.READY, "leader", take)
    await bus.store("fm.ready.x", b"nak")
    await bus.store("fm.ready.x", b"raise")
    await _until("both again", lambda: {(b"nak", 2), (b"raise", 2)} <= set(seen), 5)


async def test_a_pull_waits_for_a_consumer_that_does_not_exist_yet(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    seen: list[bytes] = []
    await bus.pull(subjects.READY, "leader", lambda delivery: seen.append(delivery.data))
    await bus.store("fm.ready.x", b"x")
    await asyncio.sleep(0.1)
    await _work_queue(bus)
    await _until("the message", lambda: seen == [b"x"])


async def test_a_pull_outlives_the_deletion_of_its_consumer(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await _work_queue(bus)
    seen: list[bytes] = []

    def take(delivery: Delivery) -> None:
        seen.append(delivery.data)
        delivery.post_ack()

    await bus.pull(subjects.READY, "leader", take)
    await asyncio.sleep(0.05)
    await bus.delete_consumer(subjects.READY, "leader")
    await bus.delete_consumer(subjects.READY, "leader")
    await _work_queue(bus)
    await bus.store("fm.ready.x", b"x")
    await _until("the message", lambda: seen == [b"x"])


async def test_a_stopped_pull_leaves_messages_to_the_next(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader", ack_wait_s=1))
    first: list[bytes] = []
    pull = await bus.pull(subjects.READY, "leader", lambda delivery: first.append(delivery.data))
    await asyncio.sleep(0.05)
    await pull.stop()
    await bus.store("fm.ready.x", b"x")
    second: list[bytes] = []
    await bus.pull(subjects.READY, "leader", lambda delivery: second.append(delivery.data))
    await _until("the message", lambda: second == [b"x"])
    assert first == []


# --- lost links


async def test_a_pull_and_its_messages_survive_a_killed_broker(mesh_broker: MeshBroker) -> None:
    events: list[str] = []
    bus = await mesh_broker.scheduler(
        on_disconnect=lambda: events.append("lost"),
        on_reconnect=lambda: events.append("back"),
    )
    await bus.ensure_consumer(subjects.SUBMIT, streams.leader_consumer("leader"))
    seen: list[bytes] = []

    async def take(delivery: Delivery) -> None:
        seen.append(delivery.data)
        await delivery.ack()

    await bus.pull(subjects.SUBMIT, "leader", take)
    url = mesh_broker.url
    for round_number in range(2):
        await bus.store("fm.submit.T", b"%d" % round_number, timeout_s=5)
        await _until("the message", lambda: len(seen) > round_number, 5)  # noqa: B023
        assert mesh_broker.broker.child is not None
        mesh_broker.broker.child.send_signal(signal.SIGKILL if round_number else signal.SIGTERM)
        mesh_broker.broker.child.wait()
        await asyncio.to_thread(mesh_broker.broker.start)
        assert mesh_broker.url == url
    await bus.store("fm.submit.T", b"2", timeout_s=5)
    await _until("the last message", lambda: b"2" in seen, 5)
    assert events == ["lost", "back", "lost", "back"]


async def test_a_call_in_flight_fails_at_once_when_the_link_is_lost(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    await bus.subscribe("q.slow", lambda _: None)
    await bus.flush()
    call = asyncio.create_task(bus.request("q.slow", b"", timeout_s=90))
    await asyncio.sleep(0.05)
    assert mesh_broker.broker.child is not None
    began = time.monotonic()
    mesh_broker.broker.child.kill()
    with pytest.raises(UnknownOutcomeError):
        await call
    assert time.monotonic() - began < 30


async def test_without_a_broker_a_call_waits_for_its_deadline_and_says_that_nothing_was_sent(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    assert mesh_broker.broker.child is not None
    mesh_broker.broker.child.kill()
    await _until("the loss", lambda: not bus.connected)
    with pytest.raises(TransientError) as caught:
        await bus.store("fm.nodes.n1", b"", timeout_s=0.3)
    assert not getattr(caught.value, "unknown_outcome", False)


async def test_a_store_waits_for_a_broker_that_comes_back(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    assert mesh_broker.broker.child is not None
    mesh_broker.broker.child.kill()
    await _until("the loss", lambda: not bus.connected)
    call = asyncio.create_task(bus.store("fm.nodes.n1", b"x", timeout_s=10))
    await asyncio.to_thread(mesh_broker.broker.start)
    assert await call == 1


async def test_a_replay_goes_on_after_the_broker_was_killed(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    for block in range(5):
        await bus.store_batch([(f"led.x.{block}-{number}", b"d" * 100) for number in range(1000)])
    seen: list[int] = []
    url = mesh_broker.url
    async for message in bus.read_stream(subjects.LEDGER):
        seen.append(message.seq)
        if len(seen) == 10:
            assert mesh_broker.broker.child is not None
            mesh_broker.broker.child.kill()
            await asyncio.to_thread(mesh_broker.broker.start)
            assert mesh_broker.url == url
    assert seen == list(range(1_000_000, 1_005_000))


async def test_a_frozen_broker_is_noticed_and_close_ends(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    child = mesh_broker.broker.child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)
    try:
        for _ in range(64):
            bus.post("x", b"y" * 60_000)
        with pytest.raises(UnknownOutcomeError):
            await bus.store("fm.nodes.n1", b"", timeout_s=0.2)
        began = time.monotonic()
        await bus.close()
        assert time.monotonic() - began < 30
    finally:
        os.kill(child.pid, signal.SIGCONT)


async def test_expired_credentials_are_renewed_without_losing_the_connection_for_ever(broker: MeshBroker) -> None:
    from flowmesh_mesh.credentials import Credentials, user_jwt

    signer = broker.keyring._roles["scheduler"]
    base = broker.keyring.scheduler()

    def until(seconds: float) -> str:
        return user_jwt(
            signer, base.public_key, "scheduler", broker.keyring.mesh_account, expires_at_s=int(time.time() + seconds)
        )

    credentials = Credentials(until(2), base.seed)
    events: list[str] = []
    bus = await broker.connect(credentials, on_reconnect=lambda: events.append("back"))
    seen: list[bytes] = []
    await bus.subscribe("tick", lambda delivery: seen.append(delivery.data))
    credentials.jwt = until(600)
    await _until("a reconnection", lambda: events, 8)
    await bus.publish("tick", b"x")
    await _until("the subscription", lambda: seen == [b"x"])


# --- connecting


async def test_no_broker_is_told_within_the_deadline() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TransientError, match="no broker answers"):
            await Bus.connect(url, None, name="x", inbox="_INBOX_x", deadline_s=0.5)
        assert time.monotonic() - began < 30


async def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        with pytest.raises(TransientError):
            await Bus.connect(url, None, name="x", inbox="_INBOX_x", deadline_s=0.5)
    finally:
        server.close()


async def test_refused_credentials_are_named_at_once(broker: MeshBroker, tmp_path: Path) -> None:
    from flowmesh_deploy.keyring import Keyring

    stranger = Keyring.open(tmp_path / "other.json", "other").scheduler()
    began = time.monotonic()
    with pytest.raises(CredentialsRefusedError):
        await Bus.connect(broker.url, stranger, name="x", inbox=stranger.inbox)
    with pytest.raises(CredentialsRefusedError):
        await Bus.connect(broker.url, None, name="x", inbox="_INBOX_x")
    assert time.monotonic() - began < 30


# --- the broker itself


def test_two_brokers_never_share_a_folder(broker_process: MeshBroker) -> None:
    with pytest.raises(UsageError, match="another broker"):
        Broker(broker_process.broker.folder).start()


def test_a_taken_port_is_given_up_for_a_free_one(broker_process: MeshBroker) -> None:
    url = broker_process.url
    broker_process.broker.stop()
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        thief.listen()
        assert broker_process.broker.start() != url


def test_a_broken_configuration_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="status 1"):
        Broker(tmp_path, security="nonsense {").start()


def test_the_broker_listens_on_loopback_only_and_its_folder_is_private(broker_process: MeshBroker) -> None:
    child = broker_process.broker.child
    assert child is not None
    assert broker_process.url.startswith("nats://127.0.0.1:")
    import psutil

    listening = [entry.laddr.ip for entry in psutil.Process(child.pid).net_connections() if entry.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert broker_process.broker.folder.stat().st_mode & 0o077 == 0


async def test_the_consumers_of_a_stream_are_listed_past_the_first_page(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    names = [f"n{number}" for number in range(1030)]
    quick = [msgspec.structs.replace(streams.assign_consumer(name), mem_storage=True) for name in names]
    await asyncio.gather(*(bus.ensure_consumer(subjects.ASSIGN, config) for config in quick))
    assert sorted(await bus.consumer_names(subjects.ASSIGN)) == sorted(subjects.assign_consumer(name) for name in names)
    assert await bus.consumer_names("NOTHING") == []
