"""The lease and the fence on real brokers: lost answers, leases that run out, wiped stores, elections among three brokers."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.fixtures_broker import MeshBroker, make_streams
from tests.integration.test_brokers import Three, three, three_processes
from tests.unit.scheduler.flows import operator, workflow

from flowmesh_cas.errors import FencedError, TransientError, UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus, UnknownOutcomeError
from flowmesh_mesh.clock import monotonic_s
from flowmesh_mesh.manifest import encode_record, record_cid
from flowmesh_mesh.messages import Answer, Ask, Beat, NodeRecord, decode, encode
from flowmesh_scheduler import takeover
from flowmesh_scheduler.config import Config
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.guarded import GuardedStream, patiently
from flowmesh_scheduler.lease import LEASE_S, Change, SchedulerLease, TaskKeeper, ThreadKeeper, look
from flowmesh_scheduler.service import Leader
from flowmesh_scheduler.standbys import Highest, LeaseWatch, Vacancy, digest_of_secret

__all__ = ["three", "three_processes"]

DEADLINE_S = 30.0


class Guarded:
    """A leader's guarded stream, and what became of it."""

    def __init__(self, bus: Bus, *, is_replicated: bool = False) -> None:
        self.faults: list[Exception] = []
        self.stored: dict[str, int] = {}
        self.stream = GuardedStream(
            bus,
            subjects.LEDGER,
            subjects.LEDGER_EPOCHS,
            subjects.ledger_epoch,
            self.faults.append,
            is_replicated=is_replicated,
        )

    def write(self, name: str) -> None:
        subject = f"led.result.{name}.0"
        self.stream.write(subject, name.encode(), lambda seq: self.stored.__setitem__(name, seq))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.stored) < count and not self.faults:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def until_vacant(watch: LeaseWatch) -> Vacancy:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await watch.turn()
            if found is not None:
                return found
            await asyncio.sleep(0.02)


# --- the lease


async def test_a_renewal_whose_answer_was_lost_is_no_lost_lease(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    lease = SchedulerLease("scheduler-a")
    assert await lease.take(bus, 0)
    before = lease.revision
    assert await lease.renew(bus) is Change.KEPT
    lease.revision = before  # what a renewal without an answer leaves behind
    assert await lease.renew(bus) is Change.KEPT


async def test_a_lease_that_ran_out_is_taken_again_by_its_holder_unless_another_has_it(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    first, second = SchedulerLease("scheduler-a"), SchedulerLease("scheduler-b")
    assert await first.take(bus, 0)
    await bus.purge(subjects.LEASE_STREAM)
    assert await first.renew(bus) is Change.RETAKEN
    await bus.purge(subjects.LEASE_STREAM)
    assert await second.take(bus, 0)
    assert await first.renew(bus) is Change.LOST


async def test_a_released_lease_is_free_at_once(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    lease = SchedulerLease("scheduler-a")
    await lease.take(bus, 0)
    watch = LeaseWatch(bus, "")
    await lease.release(bus)
    assert (await until_vacant(watch)).why == "it gave the lease back"


async def test_one_of_several_standbys_gets_a_free_lease(mesh_broker: MeshBroker) -> None:
    buses = [await mesh_broker.scheduler() for _ in range(5)]
    vacancies = await asyncio.gather(*(until_vacant(LeaseWatch(bus, "")) for bus in buses))
    leases = [SchedulerLease(f"scheduler-{number}") for number in range(5)]
    won = await asyncio.gather(*(lease.take(bus, v.seq) for lease, bus, v in zip(leases, buses, vacancies, strict=True)))
    assert sum(won) == 1


async def test_a_leader_that_is_connected_and_silent_is_replaced_when_its_lease_is_over(mesh_broker: MeshBroker) -> None:
    stopped, bus = await mesh_broker.scheduler(), await mesh_broker.scheduler()
    await stopped.subscribe(subjects.LEADER_ALIVE, lambda _: None)
    assert await SchedulerLease("scheduler-a").take(stopped, 0)
    began_s = monotonic_s()
    watch = LeaseWatch(bus, "")
    await until_vacant(watch)
    assert LEASE_S <= monotonic_s() - began_s < LEASE_S + 1.5
    assert watch.previous == "scheduler-a"


async def test_a_leader_whose_lease_ran_out_and_who_answers_may_take_it_again(mesh_broker: MeshBroker) -> None:
    leader, bus = await mesh_broker.scheduler(), await mesh_broker.scheduler()
    await leader.subscribe(subjects.LEADER_ALIVE, lambda delivery: delivery.post_respond(b"here"))
    lease = SchedulerLease("scheduler-a")
    assert await lease.take(leader, 0)
    watch = LeaseWatch(bus, "")
    assert await watch.turn() is None
    await bus.purge(subjects.LEASE_STREAM)
    assert await watch.turn() is None
    assert await lease.renew(leader) is Change.RETAKEN
    assert await watch.turn() is None


async def test_a_scheduler_with_another_secret_is_refused(mesh_broker: MeshBroker) -> None:
    bus = await mesh_broker.scheduler()
    assert await SchedulerLease("scheduler-a", digest_of_secret(b"one")).take(bus, 0)
    with pytest.raises(UsageError, match="another secret than scheduler-a"):
        await LeaseWatch(bus, digest_of_secret(b"other")).turn()


@pytest.mark.parametrize("kind", [TaskKeeper, ThreadKeeper])
async def test_a_kept_lease_outlives_its_time_and_ends_when_it_is_dropped(
    mesh_broker: MeshBroker, kind: type[TaskKeeper | ThreadKeeper]
) -> None:
    bus = await mesh_broker.scheduler()
    keyring = mesh_broker.keyring
    keeper = kind(lambda: Bus.connect(mesh_broker.url, keyring.scheduler(), name="lease", inbox=keyring.scheduler().inbox))
    await keeper.open()
    lease = SchedulerLease("scheduler-a")
    changes: list[Change] = []
    await lease.take(bus, 0)
    await keeper.hold(lease, changes.append)
    await asyncio.sleep(1.5)
    lease.beat()
    assert set(changes) == {Change.KEPT}
    assert (await look(bus)).holder == "scheduler-a"
    assert await bus.request(subjects.LEADER_ALIVE) == b"scheduler-a"
    await keeper.drop(is_released=True)
    assert (await look(bus)).is_released
    await keeper.close()


async def test_the_lease_of_a_leader_whose_loop_is_stuck_is_not_renewed(
    mesh_broker: MeshBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_scheduler.lease.STUCK_S", 0.5)
    bus = await mesh_broker.scheduler()
    keeper = TaskKeeper(mesh_broker.scheduler)
    await keeper.open()
    lease = SchedulerLease("scheduler-a")
    await lease.take(bus, 0)
    await keeper.hold(lease, lambda _: None)
    await asyncio.sleep(1.2)  # nobody shows a sign of life
    revision = lease.revision
    await asyncio.sleep(0.6)
    assert lease.revision == revision
    with pytest.raises(TransientError):
        await bus.request(subjects.LEADER_ALIVE, timeout_s=0.1)
    await keeper.close()


# --- the fence


async def test_an_epoch_whose_answer_was_lost_is_raised_once(mesh_broker: MeshBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = await mesh_broker.scheduler()
    store, tries = bus.store, 0

    async def loses_the_first_answer(*args: object, **options: object) -> int:
        nonlocal tries
        tries += 1
        sequence = await store(*args, **options)  # type: ignore[arg-type]
        if tries == 1:
            raise UnknownOutcomeError("the answer is lost")
        return sequence

    monkeypatch.setattr(bus, "store", loses_the_first_answer)
    guarded = Guarded(bus)
    assert await guarded.stream.raise_epoch(7, "scheduler-a", 1, 1) == 7
    guarded.write("aa")
    await guarded.until(1)
    assert not guarded.faults


async def test_a_batch_whose_answer_was_lost_is_stored_once(mesh_broker: MeshBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = await mesh_broker.scheduler()
    guarded = Guarded(bus, is_replicated=True)
    await guarded.stream.raise_epoch(1, "scheduler-a", 1, 1)
    store_batch, tries = bus.store_batch, 0

    async def loses_every_other_answer(*args: object, **options: object) -> int:
        nonlocal tries
        tries += 1
        sequence = await store_batch(*args, **options)  # type: ignore[arg-type]
        if tries % 2:
            raise UnknownOutcomeError("the answer is lost")
        return sequence

    monkeypatch.setattr(bus, "store_batch", loses_every_other_answer)
    names = [f"{number:04x}" for number in range(50)]
    for name in names:
        guarded.write(name)
    await guarded.until(50)
    assert not guarded.faults
    assert {name: (await bus.last_message(subjects.LEDGER, f"led.result.{name}.0")).seq for name in names} == guarded.stored  # type: ignore[union-attr]


async def test_writes_of_a_deposed_leader_are_refused_and_counted(mesh_broker: MeshBroker) -> None:
    old, new = Guarded(await mesh_broker.scheduler()), Guarded(await mesh_broker.scheduler())
    await old.stream.raise_epoch(1, "scheduler-a", 1, 1)
    await new.stream.raise_epoch(1, "scheduler-b", 2, 2)
    for number in range(3):
        old.write(f"{number:02x}")
    async with asyncio.timeout(DEADLINE_S):
        while old.stream.refused < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not old.stored
    assert all(isinstance(error, FencedError) for error in old.faults)
    assert not await old.stream.is_current()
    assert await new.stream.is_current()


async def test_after_a_wiped_store_epochs_go_on_and_the_earlier_leader_stays_fenced(broker: MeshBroker, tmp_path: Path) -> None:
    bus = await broker.scheduler()
    await make_streams(bus, now_ms=5_000_000)
    old = Guarded(bus)
    highest = Highest(tmp_path / "highest")
    await old.stream.raise_epoch(9_000, "scheduler-a", 1, 1)
    highest.note(old.stream.epoch, old.stream.fence_sequence)
    highest.write()
    broker.broker.stop(budget_s=1.0)
    shutil.rmtree(broker.folder / "broker" / "jetstream")
    broker.broker.start()
    assert await patiently(partial(takeover.lacking_streams, bus)) == [subjects.LEDGER, subjects.ASSIGN]
    remembered = Highest.load(tmp_path / "highest")
    earlier_ms = 1_000  # the clock was put back, too
    await takeover.make_streams(bus, max(earlier_ms, remembered.sequence + 1), 1)
    old.write("aa")
    async with asyncio.timeout(DEADLINE_S):
        while not old.stream.refused:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    new = Guarded(bus)
    assert await new.stream.raise_epoch(max(earlier_ms, remembered.epoch + 1), "scheduler-b", 1, 1) > 9_000
    assert new.stream.fence_sequence > old.stream.fence_sequence
    old.write("bb")
    new.write("cc")
    await new.until(1)
    assert not old.stored


def test_a_node_is_believed_once_a_minute_that_it_has_seen_a_higher_epoch(tmp_path: Path) -> None:
    highest = Highest(tmp_path / "highest")
    assert highest.accepts("node-1", 10)
    assert not highest.accepts("node-1", 11)
    assert highest.accepts("node-2", 11)
    assert not highest.accepts("node-3", 1 << 62)


# --- replicated streams


async def test_many_writes_at_once_on_a_replicated_stream_are_all_stored(three: Three) -> None:
    bus = await three.connect()
    await patiently(partial(takeover.make_streams, bus, 1_000_000, 1))
    await takeover.make_streams(bus, 1_000_000, 3)
    info = await bus.stream_info(subjects.LEDGER)
    assert info is not None
    assert info.config["num_replicas"] == 3
    await takeover.make_streams(bus, 1_000_000, 1)
    info = await bus.stream_info(subjects.LEDGER)
    assert info is not None
    assert info.config["num_replicas"] == 3, "a scheduler that was told less takes nothing away"
    guarded = Guarded(bus, is_replicated=True)
    await guarded.stream.raise_epoch(1, "scheduler-a", 1, 1)
    for number in range(200):
        guarded.write(f"{number:04x}")
        if number % 10 == 0:
            await asyncio.sleep(0.002)
    await guarded.until(200)
    assert not guarded.faults
    assert len(set(guarded.stored.values())) == 200


async def test_writes_wait_out_the_election_after_a_broker_was_killed(three: Three) -> None:
    bus = await three.connect()
    await patiently(partial(takeover.make_streams, bus, 1_000_000, 3))
    guarded = Guarded(bus, is_replicated=True)
    await guarded.stream.raise_epoch(1, "scheduler-a", 1, 1)
    guarded.write("first")
    await guarded.until(1)
    info = await bus.request(f"$JS.API.STREAM.INFO.{subjects.LEDGER}")
    leader = next(b for b in three.brokers if f'"leader":"{b.name}"'.encode() in info)
    three.signal(leader, signal.SIGKILL)
    names = [f"{number:04x}" for number in range(20)]
    for name in names:
        guarded.write(name)
        await asyncio.sleep(0.05)
    await guarded.until(21)
    assert not guarded.faults
    found = {m.subject async for m in bus.read_stream(subjects.LEDGER, "led.result.>")}
    assert found == {f"led.result.{name}.0" for name in ["first", *names]}


# --- taking over


def make_leader(broker: MeshBroker, bus: Bus, lease: SchedulerLease) -> Leader:
    config = Config(urls=[broker.url], credentials="", store="", mesh="test", tenants={})
    return Leader(bus, config, lease.leader, lease, MemoryStore(), bytes(32))


async def test_heartbeats_of_a_take_over_are_heard_when_the_assignments_are_known(
    mesh_broker: MeshBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, lease = await mesh_broker.scheduler(), SchedulerLease("scheduler-a")
    await lease.take(bus, 0)
    leader = make_leader(mesh_broker, bus, lease)
    heard: list[str] = []
    record = NodeRecord("node-1", "U", 1, (), "3.11", 1.0, 1)
    leader.apply(e.BeatReceived(Beat("node-1", 1, 1, ("held",))))
    leader.apply(e.NodeJoined(record))
    monkeypatch.setattr(leader, "apply", lambda event: heard.append(type(event).__name__))
    left = leader._rebuild(takeover.Found(e.Recovered([], [], [], [], []), [record]))
    assert heard == ["NodeJoined", "Recovered"]
    assert [type(event) for event in left] == [e.BeatReceived]
    await leader.close()


async def test_a_leader_that_stood_still_gives_nothing_out_until_its_lease_is_sure(mesh_broker: MeshBroker) -> None:
    bus, lease = await mesh_broker.scheduler(), SchedulerLease("scheduler-a")
    await lease.take(bus, 0)
    leader = make_leader(mesh_broker, bus, lease)
    leader.is_ready = True
    leader.apply(e.Tick())
    assert not leader.state.is_cut_off
    lease.held_until_s = 0.0  # the process was stopped for longer than the lease
    leader.apply(e.Tick())
    assert leader.state.is_cut_off
    leader.on_lease(await lease.renew(bus))
    assert not leader.is_cut_off
    assert not lease_state(leader)
    leader.on_lease(Change.LOST)
    assert leader.lost.result() == "the lease was taken by another scheduler"
    await leader.close()


def lease_state(leader: Leader) -> bool:
    return leader.state.is_cut_off


async def test_a_cancellation_stays_in_its_stream_until_the_ledger_shows_it(
    mesh_broker: MeshBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, lease = await mesh_broker.scheduler(), SchedulerLease("scheduler-a")
    await lease.take(bus, 0)
    leader = make_leader(mesh_broker, bus, lease)
    leader.is_ready = True
    manifest = workflow([operator("a")])
    leader.apply(e.Submitted("T", "r1", manifest, record_cid(encode_record(manifest))))
    written: dict[str, Callable[[int], None]] = {}
    monkeypatch.setattr(leader.ledger, "write", lambda subject, _, then: written.setdefault(subject, then))
    await bus.store(subjects.cancel("T"), b'{"run": "r1"}')
    await leader.requests.sweep()
    await leader.requests.sweep()
    state = await bus.stream_state(subjects.SUBMIT)
    assert state is not None
    assert state.messages == 1
    written[subjects.ledger_cancelled("T", "r1")](1)
    await leader.requests.sweep()
    await leader.requests.sweep()
    state = await bus.stream_state(subjects.SUBMIT)
    assert state is not None
    assert state.messages == 0
    await leader.close()


async def test_a_take_over_outlives_the_connection_that_was_lost_while_it_rebuilt(
    mesh_broker: MeshBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, lease = await mesh_broker.scheduler(), SchedulerLease("scheduler-a")
    await lease.take(bus, 0)
    leader = make_leader(mesh_broker, bus, lease)
    catch_up, tries = leader.reports.catch_up, 0

    async def loses_the_first_answer() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            await bus.connection.force_reconnect()
            raise UnknownOutcomeError("the connection was lost")
        await catch_up()

    monkeypatch.setattr(leader.reports, "catch_up", loses_the_first_answer)
    leading = asyncio.create_task(leader.run())
    client = await mesh_broker.client("team-a")
    async with asyncio.timeout(DEADLINE_S):
        while not leader.report.phases_s.get("listen"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    answer = decode(await client.request(subjects.TENANT_ASK, encode(Ask("nodes"))), Answer)
    assert not answer.error
    leader.stop("the test is over")
    await leading
    await leader.close()
