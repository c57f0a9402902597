"""The event log: every event survives it, and a replay makes the recorded choices again, whatever befell the mesh."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property import test_placement
from tests.property.test_scheduler import KINDS
from tests.unit.scheduler import world as worlds
from tests.unit.scheduler.workload import random_requests
from tests.unit.scheduler.world import World

from flowmesh_cas.errors import IntegrityError, UsageError
from flowmesh_mesh.identity import private_salt
from flowmesh_mesh.manifest import Manifest
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.comparison import Comparison, changed
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step
from flowmesh_scheduler.recording import MAGIC, EventLog, Recording, decode_event, encode_event, logs_in
from flowmesh_scheduler.replay import replay

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    bytes: st.binary(max_size=40),
    str: st.text(max_size=10),
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    NoneType: st.none(),
    Any: PLAIN,
}


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for a type as events and messages use it."""
    if kind in LEAVES:
        return LEAVES[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of(*map(of_type, inner))
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return st.lists(of_type(inner[0]), max_size=2).map(tuple)
        return st.tuples(*map(of_type, inner))
    if origin in (list, Sequence):
        return st.lists(of_type(inner[0]), max_size=2)
    if origin in (dict, Mapping):
        return st.dictionaries(of_type(inner[0]), of_type(inner[1]), max_size=2)
    assert is_dataclass(kind) or issubclass(kind, msgspec.Struct), kind
    hints = get_type_hints(kind)
    names = hints if is_dataclass(kind) else kind.__struct_fields__
    return st.builds(kind, **{name: of_type(hints[name]) for name in names})


EVENTS = get_args(e.Event)


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
def test_every_event_survives_the_log_exactly(kind: type[e.Event]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(of_type(kind))
    def survives(event: e.Event) -> None:
        name, data = encode_event(event)
        again = decode_event(name, data)
        assert type(again) is type(event)
        assert again == event

    survives()


def test_an_event_that_this_version_does_not_know_is_refused() -> None:
    with pytest.raises(IntegrityError, match="Rumour"):
        decode_event("Rumour", b"\x80")
    with pytest.raises(IntegrityError, match="Committed"):
        decode_event("Committed", b"\x80")


class Recorder:
    """Records every leader of a world; each epoch has a log."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.logs: dict[int, Recording] = {}
        self.assigned = 0
        note_given = World._note_given

        def note_and_record(state: State, manifest: Manifest) -> None:
            before = {root for root, names in state.places.items() if HUB in names}
            note_given(state, manifest)
            if id(state) in self.logs:
                held = (root for root, names in state.places.items() if HUB in names and root not in before)
                self.logs[id(state)].note_held(held)

        monkeypatch.setattr(World, "_note_given", staticmethod(note_and_record))
        monkeypatch.setattr(worlds, "step", self.step)
        self._states: list[State] = []

    def step(self, state: State, event: e.Event, now_us: int) -> list[c.Command]:
        recording = self.logs.get(id(state))
        if recording is None:
            self._states.append(state)  # keeps its id from being another's
            recording = self.logs[id(state)] = Recording(self.folder, state, now_us, max_bytes=1 << 30)
        commands = step(state, event, now_us)
        recording.note(now_us, event, commands)
        self.assigned += sum(isinstance(command, c.Assign) for command in commands)
        return commands

    def close(self) -> list[Path]:
        for recording in self.logs.values():
            asyncio.run(recording.close("the world has ended"))
        return logs_in(self.folder)


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder(tmp_path / "logs", monkeypatch)
    yield made
    made.close()


def play(kind: str, seed: int, settings: Settings = worlds.SETTINGS) -> World:
    draw = random.Random(f"{kind} {seed}")
    world = World(seed, KINDS[kind], nodes=3, settings=settings)
    for request in random_requests(draw, count=6):
        world.submit(request, at_s=draw.random() * 8)
    world.run_until_calm()
    return world


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_makes_the_assignments_that_were_recorded(kind: str, recorder: Recorder) -> None:
    for seed in range(3):
        play(kind, seed)
        paths = recorder.close()
        made = 0
        for path in paths:
            told = replay(path)
            assert told.is_same, f"seed {seed}, {path.name}: {told.divergence}"
            assert told.ended == "the world has ended"
            made += len(told.made)
            path.unlink()
        assert made == recorder.assigned > 0
        recorder.assigned = 0
        recorder.logs.clear()


def test_a_replay_of_unequal_nodes_with_models_and_quotas_chooses_the_same(recorder: Recorder) -> None:
    for kind in ("dying nodes", "everything"):
        for seed in range(2):
            test_placement.play(kind, seed)
            for path in recorder.close():
                told = replay(path)
                assert told.is_same, f"{kind}, seed {seed}, {path.name}: {told.divergence}"
                path.unlink()
            assert recorder.assigned > 10
            recorder.assigned = 0
            recorder.logs.clear()


def test_no_tenants_secret_nor_what_is_derived_from_it_stands_in_a_log(recorder: Recorder) -> None:
    for seed in range(8):
        play("calm", seed)
    private = 0
    for path in recorder.close():
        data = path.read_bytes()
        for tenant, secret in (("ta", b"secret a"), ("tb", b"secret b")):
            assert secret not in data
            assert private_salt(secret, tenant) not in data
        private += sum(len(recorded.private) for recorded in EventLog(path).steps())
    assert private, "no private operator was recorded: the worlds prove nothing"


def test_a_log_that_breaks_off_counts_up_to_there(recorder: Recorder) -> None:
    play("calm", 1)
    (path,) = recorder.close()
    whole, data = replay(path), path.read_bytes()
    draw = random.Random(1)
    for _ in range(15):
        cut = path.with_name("1234.events")
        cut.write_bytes(data[: draw.randrange(len(data) * 2 // 3, len(data))])
        told = replay(cut)
        assert told.is_same
        assert told.steps < whole.steps
        assert told.ended == ""
        assert told.made == whole.made[: len(told.made)]


def test_a_log_that_lacks_an_event_is_found_out(recorder: Recorder) -> None:
    play("calm", 2)
    (path,) = recorder.close()
    frames, data = [], path.read_bytes()[len(MAGIC) :]
    while data:
        length = 4 + int.from_bytes(data[:4], "big")
        frames.append(data[:length])
        data = data[length:]
    joined = next(i for i, frame in enumerate(frames) if b"NodeJoined" in frame)
    path.write_bytes(MAGIC + b"".join(frames[:joined] + frames[joined + 1 :]))
    told = replay(path)
    assert not told.is_same
    assert told.divergence is not None


def test_unchanged_settings_choose_the_same_in_a_decision_replay(recorder: Recorder) -> None:
    for seed in range(4):
        play("unreliable messages", seed)
    for path in recorder.close():
        compared = Comparison(worlds.SETTINGS)
        told = replay(path, compared)
        assert told.is_same
        assert compared.rounds > 0
        assert compared.same == compared.before.operators == compared.after.operators
        assert (compared.rounds_changed, compared.elsewhere, compared.only_recorded, compared.earlier) == (0, 0, 0, set())
        assert compared.before == compared.after


def test_changed_settings_choose_otherwise_and_leave_the_recorded_choices_alone(recorder: Recorder) -> None:
    uncopied = changed(worlds.SETTINGS, ["speculation_share=0"])  # copies of stragglers are no choice of a round
    play("calm", 4, uncopied)
    (path,) = recorder.close()
    compared = Comparison(changed(uncopied, ["depth_limit.inline=0", "batch_limit.data=1"]))
    told = replay(path, compared)
    assert told.is_same
    assert told.made == replay(path).made
    assert compared.rounds_changed > 0
    assert compared.only_recorded > 0
    assert compared.same + compared.elsewhere + compared.other_batch + compared.only_recorded == told.operators
    assert compared.before.operators == told.operators - compared.only_recorded
    assert compared.examples


def test_a_weight_must_name_a_number_among_the_settings() -> None:
    made = changed(Settings(), ["price_per_hour=2", "batch_limit.engine=3"])
    assert (made.price_per_hour, made.batch_limit["engine"]) == (2.0, 3)
    assert changed(made, []) == made
    for wrong in ("price_per_hour", "colour=3", "batch_limit=3", "batch_limit.engine=many", "batch_limit.engine.x=1"):
        with pytest.raises(UsageError):
            changed(Settings(), [wrong])


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"flowmesh", MAGIC, MAGIC + b"\0\0\0\x03abc"):
        (tmp_path / "1.events").write_bytes(content)
        with pytest.raises((UsageError, IntegrityError)):
            EventLog(tmp_path / "1.events")
    with pytest.raises(UsageError):
        EventLog(tmp_path / "none.events")
