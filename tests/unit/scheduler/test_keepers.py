"""Who keeps an accepted run: standbys first, then nodes; others when one is lost; nobody once the run has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio
from tests.unit.scheduler.flows import chain, node_record

from flowmesh_cas.cid import DAG_CBOR, cid_of
from flowmesh_cas.errors import TransientError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import seals, subjects
from flowmesh_mesh.keeping import pair_of
from flowmesh_mesh.manifest import Acceptance, encode_record
from flowmesh_mesh.messages import Guard, Guarded, Recall, Recalled, SchedulerBeat, Unguard, decode, encode
from flowmesh_scheduler import keepers as module
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step
from flowmesh_scheduler.hub import Hub
from flowmesh_scheduler.keepers import Keepers

SECRET = b"s" * 32
MANIFEST = encode_record(chain(1))
ROOT = cid_of(DAG_CBOR, MANIFEST)
Asked = Guard | Recall | Unguard


def acceptance(run: str, blocks: list[bytes] | None = None) -> bytes:
    return encode_record(Acceptance("ta", run, ROOT, 1, blocks=[MANIFEST] if blocks is None else blocks))


class Holders:
    """The other side of the bus: what each holder was asked to keep, and what it says it keeps; and a ledger."""

    def __init__(self) -> None:
        self.guarded: dict[str, list[str]] = {}
        self.let_go: dict[str, list[str]] = {}
        self.offers: dict[str, tuple[tuple[bytes, bytes], ...]] = {}
        self.ledger: dict[str, bytes] = {}
        self.failing: set[str] = set()

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        name = subject.removeprefix("fm.ctl.")
        if name in self.failing or not subject.startswith("fm.ctl."):
            raise TransientError(f"{name} does not answer")
        message: Asked = decode(data, Asked)  # type: ignore[arg-type]
        if isinstance(message, Recall):
            offers = self.offers.get(name, ())
            if message.what == "runs":
                return encode(Recalled(name, runs=tuple(pair_of(record) for record, _ in offers)))
            return encode(Recalled(name, offers))
        assert isinstance(message, Guard)
        for record in (message.acceptance, *(each.acceptance for each in message.others)):
            self.guarded.setdefault(name, []).append(pair_of(record)[1] if record else "")
        return encode(Guarded(name))

    def post(self, subject: str, data: bytes) -> None:
        runs = [run for _, run in decode(data, Unguard).runs]
        self.let_go.setdefault(subject.removeprefix("fm.ctl."), []).extend(runs)

    async def last_message(self, stream: str, subject: str) -> Any:
        assert stream == subjects.LEDGER
        return SimpleNamespace(data=self.ledger[subject]) if subject in self.ledger else None


class Stage:
    """A leader as far as its keepers see it: a core with nodes, a bus, a hub."""

    def __init__(self, *nodes: str, keepers: int = 2, replicas: int = 1) -> None:
        self.name, self.secret, self.memory = "scheduler-1", SECRET, None
        self.config = SimpleNamespace(keepers=keepers, replicas=replicas)
        self.bus = Holders()
        self.state = State(Settings(), epoch=7)
        self.hub = Hub(cast("Any", self.bus), MemoryStore())
        others: dict[str, Any] = {}
        self.presence = SimpleNamespace(others=others, standbys=lambda: sorted(others))
        self.requests = SimpleNamespace(is_accepting=lambda _: False)
        self.feeds = SimpleNamespace(feed=lambda *_: None, open=lambda _: None)
        self.ledger = SimpleNamespace(write=self._write)
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.tasks: list[asyncio.Task[Any]] = []
        self.keepers = Keepers(cast("Any", self))
        for node in nodes:
            self.join(node)

    def join(self, *nodes: str) -> None:
        for node in nodes:
            self.apply(e.NodeJoined(node_record(node, types=(), wire=2)))

    def stand_by(self, name: str) -> None:
        self.presence.others[name] = SimpleNamespace(beat=SchedulerBeat(name, 1, "standby", started_at_us=1, wire=2))

    def accept(self, run: str, share: str = "mesh") -> None:
        record = acceptance(run)
        self.bus.ledger[subjects.ledger_accepted("ta", run)] = record
        found = Acceptance("ta", run, ROOT, 1, share=share)
        self.apply(e.Reinstated([e.RecoveredRun(found, chain(1))]))
        self.keepers.accepted(("ta", run), record)

    def apply(self, event: e.Event) -> None:
        step(self.state, event, self.state.now_us + 1)

    def hub_holds(self, roots: Any) -> None:
        list(roots)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    def _write(self, subject: str, data: bytes, then: Any) -> None:
        self.bus.ledger[subject] = data
        then(1)


@pytest_asyncio.fixture
async def quick(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Stage]]:
    """Stages to be closed; keepers without pauses."""
    for name in ("SETTLE_S", "RECOVERED_SETTLE_S", "STRUCK_S"):
        monkeypatch.setattr(module, name, 0.0)
    monkeypatch.setattr(module, "TICK_S", 0.01)
    stages: list[Stage] = []
    yield stages
    for task in (task for stage in stages for task in stage.tasks):
        task.cancel()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def begun(stage: Stage, stages: list[Stage]) -> Stage:
    stages.append(stage)
    stage.keepers.begin()
    return stage


async def test_standbys_keep_first_and_nodes_fill_up(quick: list[Stage]) -> None:
    stage = Stage("n1", "n2", "n3")
    stage.stand_by("scheduler-2")
    begun(stage, quick)
    stage.accept("r")
    await until(lambda: len(stage.keepers.guards_of(("ta", "r"))) == 2)
    assert stage.bus.guarded["scheduler-2"] == ["r"]
    assert "hub-scheduler-2" in stage.keepers.guards_of(("ta", "r"))


async def test_private_work_is_kept_by_nodes_only_where_no_scheduler_stands_by(quick: list[Stage]) -> None:
    stage = Stage("n1", "n2")
    stage.stand_by("scheduler-2")
    begun(stage, quick)
    stage.accept("secret", share="private")
    stage.accept("open")
    await until(lambda: len(stage.keepers.guards_of(("ta", "open"))) == 2)
    assert stage.keepers.guards_of(("ta", "secret")) == {"hub-scheduler-2"}
    assert stage.keepers.possible(("ta", "secret")) == 1
    alone = begun(Stage("n1", "n2"), quick)
    alone.accept("secret", share="private")
    await until(lambda: alone.keepers.guards_of(("ta", "secret")) == {"n1", "n2"})


async def test_many_runs_travel_in_few_messages_and_are_spread_over_the_nodes(quick: list[Stage]) -> None:
    stage = begun(Stage("n1", "n2", "n3", "n4", keepers=1), quick)
    for number in range(100):
        stage.accept(f"r{number}")
    await until(lambda: all(stage.keepers.guards_of(("ta", f"r{number}")) for number in range(100)))
    assert sorted(run for runs in stage.bus.guarded.values() for run in runs) == sorted(f"r{number}" for number in range(100))
    assert all(len(runs) > 5 for runs in stage.bus.guarded.values())
    assert len(stage.bus.guarded) == 4


async def test_a_run_that_ends_at_once_is_kept_by_nobody(quick: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.2)
    stage = begun(Stage("n1"), quick)
    stage.accept("r")
    stage.keepers.ended(("ta", "r"))
    await asyncio.sleep(0.4)
    assert stage.bus.guarded == {}


async def test_another_is_found_for_one_that_is_lost_or_fails(quick: list[Stage]) -> None:
    stage = Stage("n1", "n2", keepers=1)
    stage.bus.failing = {"n1", "n2"}
    begun(stage, quick)
    stage.accept("r")
    await asyncio.sleep(0.1)
    stage.bus.failing = {"n1"}
    await until(lambda: stage.keepers.guards_of(("ta", "r")) == {"n2"})
    stage.bus.failing = set()
    stage.state.nodes["n2"].disconnected_at_us = 1
    await until(lambda: stage.keepers.guards_of(("ta", "r")) == {"n1"})


async def test_whoever_keeps_a_run_hears_of_its_end(quick: list[Stage]) -> None:
    stage = begun(Stage("n1", "n2"), quick)
    stage.accept("r")
    await until(lambda: len(stage.keepers.guards_of(("ta", "r"))) == 2)
    stage.keepers.ended(("ta", "r"))
    await until(lambda: stage.bus.let_go == {"n1": ["r"], "n2": ["r"]})


async def test_a_run_that_only_a_keeper_knows_is_written_back_and_planned(quick: list[Stage]) -> None:
    stage = Stage("n1")
    record = acceptance("lost")
    stage.bus.offers["n1"] = ((record, seals.seal(SECRET, record)),)
    begun(stage, quick)
    await until(lambda: ("ta", "lost") in stage.state.runs)
    assert stage.bus.ledger[subjects.ledger_accepted("ta", "lost")] == record
    assert stage.keepers.returning.restored == {("ta", "lost"): "n1"}


@pytest.mark.parametrize("forged", [b"", b"x" * 32, seals.seal(b"another mesh".ljust(32), acceptance("forged"))])
async def test_an_acceptance_without_our_seal_is_not_taken(quick: list[Stage], forged: bytes) -> None:
    stage = Stage("n1")
    stage.bus.offers["n1"] = ((acceptance("forged"), forged),)
    begun(stage, quick)
    await asyncio.sleep(0.1)
    assert stage.state.runs == {}
    assert stage.bus.ledger == {}


async def test_a_keeper_that_slept_through_the_end_of_a_run_is_told_when_it_is_back(quick: list[Stage]) -> None:
    stage = begun(Stage(), quick)
    stage.apply(e.GivenUp(Acceptance("ta", "over", ROOT, 1), "it was given up"))
    record = acceptance("over")
    stage.bus.offers["n1"] = ((record, seals.seal(SECRET, record)),)
    stage.join("n1")
    await until(lambda: stage.bus.let_go.get("n1") == ["over"])
    assert stage.state.runs == {}


async def test_a_run_whose_manifest_nobody_has_waits_and_is_given_up_with_a_reason(quick: list[Stage]) -> None:
    stage = Stage("n1")
    record = acceptance("gone", blocks=[])
    stage.bus.offers["n1"] = ((record, seals.seal(SECRET, record)),)
    begun(stage, quick)
    await until(lambda: ("ta", "gone") in stage.keepers.returning.lost)
    assert any("nobody has it" in each for each in stage.keepers.warnings())
    stage.keepers.returning.give_up(("ta", "gone"))
    end, _ = stage.state.ended["ta", "gone"]
    assert (end.reason, end.actor) == ("input-missing", "audit")


async def test_a_manifest_that_comes_late_lets_its_run_begin(quick: list[Stage]) -> None:
    stage = begun(Stage(), quick)
    stage.keepers.begin([(Acceptance("ta", "late", ROOT, 1), "")])
    assert ("ta", "late") not in stage.state.runs
    await stage.hub.put([(ROOT, MANIFEST)])
    await stage.keepers.returning.seek_lost()
    await until(lambda: ("ta", "late") in stage.state.runs)
    assert stage.keepers.returning.lost == {}


async def test_a_large_submission_waits_for_a_second_holder_only_where_there_may_be_one(quick: list[Stage]) -> None:
    alone = begun(Stage("n1"), quick)
    assert await alone.keepers.copied(("ta", "r"), [ROOT])
    assert alone.bus.guarded == {}
    replicated = begun(Stage("n1", replicas=3), quick)
    assert await replicated.keepers.copied(("ta", "r"), [ROOT])
    assert replicated.bus.guarded == {"n1": [""]}
    assert replicated.keepers.warnings() == []


async def test_a_mesh_that_lost_its_other_holders_goes_on_and_says_so(quick: list[Stage]) -> None:
    stage = Stage("n1", replicas=3)
    stage.bus.failing = {"n1"}
    begun(stage, quick)
    assert not await stage.keepers.copied(("ta", "r"), [ROOT])
    stage.accept("r")
    assert any("one holder" in each for each in stage.keepers.warnings())
