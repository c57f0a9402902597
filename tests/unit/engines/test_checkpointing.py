"""Checkpoints of a real, small training: gone on from to the same bits, refused when anything about them is wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bench.resume import MAX_LENGTH, ROWS, small_model

from flowmesh_cas.errors import FlowmeshError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import content
from flowmesh_mesh.checkpoints import MANIFEST, check_stored, decode_manifest, encode_manifest
from flowmesh_mesh.clock import monotonic_s
from flowmesh_node.operators import checkpointing, engine
from flowmesh_node.operators.base import Batch, Failed, Input, Item, Model, Produced, Row, decode_rows, encode_rows

_LACKING = [name for name in ("torch", "transformers", "trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.torch,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(_LACKING), reason=f"the node extra is not installed (no {', '.join(_LACKING)})"),
]
engine.prepare_environment()

STEPS = 9
EPOCH = 6  # steps of two of the eleven rows
TAKEN = (2, EPOCH, 7)
KEY = "ab" * 32


@dataclass
class Agent:
    """The agent's side of a training: wants checkpoints after these steps, and keeps what comes.

    The next step waits until what was wanted has come, unless it never does: one at a time is written.
    """

    wanted: Iterable[int] = ()
    comes: bool = True
    kept: dict[int, Path] = field(default_factory=dict)
    step: int = 0
    asked: int = 0

    def keep(self, index: int, path: str, step: int, steps: int, stall_us: int) -> None:
        assert (index, steps) == (0, STEPS)
        assert stall_us > 0
        self.kept[step] = Path(path)

    def pace(self) -> tuple[bool, float]:
        self.step += 1
        until_s = monotonic_s() + 60
        while self.comes and len(self.kept) < self.asked and monotonic_s() < until_s:
            time.sleep(0.01)
        self.asked += self.step in self.wanted
        return self.step in self.wanted, 0.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = small_model(tmp_path_factory.mktemp("model"))
    return Model(path, "sha256:small", path)


def batch_of(model: Model, kind: str, checkpoint: str = "", scratch: Path = Path(), key: str = KEY) -> Batch:
    data = encode_rows(ROWS)
    rows = Input("rows", hashlib.sha256(data).hexdigest(), len(data), len(ROWS), data)
    lora = {"r": 4, "dropout": 0.1}
    params = {"model": model.reference, "steps": STEPS, "batch_size": 2, "learning_rate": 2e-3, "max_length": MAX_LENGTH}
    item = Item(key, "train", {**params, "lora": lora, "seed": 5, "chat": False}, {"rows": [rows]}, 0, 1, checkpoint)
    return Batch(kind, 1, [item], {"model": model}, scratch=str(scratch), cadence_s=1e6)


@dataclass
class Trained:
    """What a training gave."""

    adapter: bytes
    metrics: list[Row]
    lines: list[str]


def train(batch: Batch, agent: Agent) -> Trained:
    from flowmesh_node.operators.train import Train

    operator, settled, lines = Train(), dict[int, Produced | Failed](), list[str]()
    operator.attach(agent)
    operator.load(batch)
    operator.run(batch, settled.__setitem__, lines.append)
    result = settled[0]
    assert isinstance(result, Produced), result
    adapter = Path(result.outputs["adapter"][0].path, "adapter_model.safetensors").read_bytes()
    return Trained(adapter, decode_rows(result.outputs["metrics"][0].data or b""), lines)


@dataclass
class Left:
    """A training left alone, with the checkpoints that it wrote."""

    kind: str
    trained: Trained
    checkpoints: dict[int, Path]


@pytest.fixture(scope="module", params=["train.sft", "train.dpo"])
def left(model: Model, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Left:
    agent = Agent(TAKEN)
    trained = train(batch_of(model, request.param, scratch=tmp_path_factory.mktemp("left")), agent)
    return Left(request.param, trained, agent.kept)


@pytest.fixture(scope="module")
def sft(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Left:
    agent = Agent(TAKEN)
    trained = train(batch_of(model, "train.sft", scratch=tmp_path_factory.mktemp("sft")), agent)
    return Left("train.sft", trained, agent.kept)


def test_checkpoints_come_when_they_are_wanted_and_not_after_the_last_step(left: Left) -> None:
    assert tuple(left.checkpoints) == TAKEN


@pytest.mark.parametrize("step", TAKEN)
def test_a_training_that_goes_on_ends_as_one_left_alone(left: Left, model: Model, tmp_path: Path, step: int) -> None:
    again = train(batch_of(model, left.kind, str(left.checkpoints[step]), tmp_path), Agent())
    assert f"going on after step {step} of {STEPS}, from the checkpoint of attempt 1" in again.lines
    assert sum(line.startswith("step ") for line in again.lines) == STEPS - step, "no step was repeated"
    assert again.metrics[step] == left.trained.metrics[step], "the very next step"
    assert again.metrics == left.trained.metrics
    assert again.adapter == left.trained.adapter


def test_writing_checkpoints_changes_nothing(sft: Left, model: Model, tmp_path: Path) -> None:
    undisturbed = train(batch_of(model, "train.sft", scratch=tmp_path), Agent())
    assert undisturbed.adapter == sft.trained.adapter
    assert undisturbed.metrics == sft.trained.metrics


def test_a_checkpoint_is_plain_files_that_its_manifest_names(sft: Left) -> None:
    folder = sft.checkpoints[2]
    manifest = decode_manifest((folder / MANIFEST).read_bytes())
    names = {path.name for path in folder.iterdir()}
    assert names == {MANIFEST, *manifest.files} == {MANIFEST, *checkpointing.FILES}
    assert {Path(name).suffix for name in names} == {".json", ".jsonl", ".safetensors"}
    assert (manifest.operator, manifest.generation, manifest.attempt, manifest.step) == (KEY, 0, 1, 2)
    assert manifest.made_by["torch"]
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_has_not_changed_is_held_once(sft: Left) -> None:
    history = [(sft.checkpoints[step] / checkpointing.HISTORY).read_bytes() for step in TAKEN]
    assert history[1].startswith(history[0])


def damaged(folder: Path, target: Path, damage: Callable[[Path], None]) -> str:
    shutil.copytree(folder, target)
    damage(target)
    return str(target)


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])

    return cut


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _flip(folder: Path) -> None:
    data = bytearray((folder / checkpointing.OPTIMIZER).read_bytes())
    data[-5] ^= 1
    (folder / checkpointing.OPTIMIZER).write_bytes(data)


def _say(**said: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        plain = json.loads((folder / MANIFEST).read_bytes()) | said
        (folder / MANIFEST).write_bytes(encode_manifest(decode_manifest(json.dumps(plain).encode())))

    return change


def _forget(folder: Path) -> None:
    """Leave a file out, in the manifest too: what the trainer itself would take for granted."""
    plain = json.loads((folder / MANIFEST).read_bytes())
    del plain["files"][checkpointing.OPTIMIZER]
    (folder / MANIFEST).write_bytes(json.dumps(plain).encode())
    (folder / checkpointing.OPTIMIZER).unlink()


def _later(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b'"format": 1', b'"format": 2'))


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"{name} cut": _cut(name) for name in sorted(checkpointing.FILES | {MANIFEST})},
    **{f"{name} gone": _remove(name) for name in sorted(checkpointing.FILES | {MANIFEST})},
    "one bit of the optimizer": _flip,
    "no optimizer, and the manifest agrees": _forget,
    "of another operator": _say(operator="cd" * 32),
    "of another generation": _say(generation=1),
    "made by another torch": _say(made_by={"torch": "1.0"}),
    "of another model": _say(model="sha256:other"),
    "of more steps": _say(steps=STEPS + 1),
    "past the end": _say(step=STEPS),
    "of a later format": _later,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_is_not_right_is_refused(sft: Left, model: Model, tmp_path: Path, name: str) -> None:
    path = damaged(sft.checkpoints[2], tmp_path / "checkpoint", DAMAGES[name])
    batch = batch_of(model, "train.sft", path)
    with pytest.raises(FlowmeshError):
        checkpointing.read_manifest(batch.items[0], batch, STEPS)


def test_a_training_without_a_sound_checkpoint_begins_at_the_beginning_and_says_why(
    sft: Left, model: Model, tmp_path: Path
) -> None:
    path = damaged(sft.checkpoints[7], tmp_path / "checkpoint", _flip)
    again = train(batch_of(model, "train.sft", path, tmp_path / "scratch"), Agent())
    why = "its file optimizer.safetensors is not what the manifest says"
    assert f"beginning at the beginning, not from the checkpoint: {why}" in again.lines
    assert again.adapter == sft.trained.adapter
    assert again.metrics == sft.trained.metrics


def test_files_that_cannot_be_written_leave_no_checkpoint_and_do_no_harm(
    sft: Left, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(manifest: object) -> bytes:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(checkpointing, "encode_manifest", full)
    agent = Agent(TAKEN, comes=False)
    trained = train(batch_of(model, "train.sft", scratch=tmp_path), agent)
    assert agent.kept == {}
    assert not [path for path in tmp_path.rglob("*") if path.name in map(str, TAKEN)]
    assert any("no checkpoint of step 2" in line for line in trained.lines)
    assert trained.adapter == sft.trained.adapter


@pytest.mark.parametrize("name", [name for name in DAMAGES if " cut" in name or " gone" in name or "bit" in name])
def test_whoever_stores_it_sees_that_it_is_not_whole(sft: Left, tmp_path: Path, name: str) -> None:
    store = MemoryStore()
    whole = content.put_folder(store, sft.checkpoints[2])
    assert check_stored(store, whole.cid).step == 2
    torn = content.put_folder(store, Path(damaged(sft.checkpoints[2], tmp_path / "checkpoint", DAMAGES[name])))
    with pytest.raises(FlowmeshError):
        check_stored(store, torn.cid)
