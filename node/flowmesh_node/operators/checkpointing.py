"""Checkpoints of a trainer: taken between two steps, written beside the next ones, and gone on from to the same bits.

Between two steps only copies are made: of the trained tensors, the optimizer's state and the random generators'. A thread then
turns them into files, safetensors and JSON (never a pickle), each synced, the manifest with their digests last; a rename makes
the folder complete. A checkpoint that is due while the former is still being written waits for a later step.

The trainer's own way to go on would read pickles, take what is missing for granted, and begin the count of tokens anew. So its
readers are replaced by those here; where it skips the batches that were trained on, and sets the random generators, is its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from flowmesh_cas.errors import ExecutionError, FlowmeshError, IntegrityError
from flowmesh_mesh.checkpoints import FORMAT, MANIFEST, CheckpointManifest, File, decode_manifest, encode_manifest
from flowmesh_mesh.clock import monotonic_ns, monotonic_s
from flowmesh_node.operators import engine
from flowmesh_node.operators.base import Batch, Item, Saving
from flowmesh_node.operators.cadence import Cadence

WEIGHTS, OPTIMIZER, GENERATORS = "weights.safetensors", "optimizer.safetensors", "generators.safetensors"
SCALARS, HISTORY = "state.json", "history.jsonl"
FILES = frozenset({WEIGHTS, OPTIMIZER, GENERATORS, SCALARS, HISTORY})

MADE_BY = ("torch", "transformers", "trl", "peft", "accelerate")
_KERNELS = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")

Log = Callable[[str], None]


def made_by() -> dict[str, str]:
    """Return what numbers depend on beside data and parameters: an attempt goes on only where all of it is the same."""
    found = {name: metadata.version(name) for name in MADE_BY}
    found |= {name: os.environ.get(name, "") for name in _KERNELS}
    return found | {"device": engine.device_name(), "machine": platform.machine()}


@dataclass(slots=True)
class Snapshot:
    """Copies of all that a training needs to go on, of one moment: tensors by file, and what is JSON."""

    step: int
    tensors: dict[str, dict[str, Any]]
    scalars: dict[str, Any]
    history: list[dict[str, Any]]


# --- taking ----------------------------------------------------------------------------------------------------------


def take(trainer: Any) -> Snapshot:
    """Copy the state of a trainer between two steps."""
    torch = engine.torch_module()
    optimizer = trainer.optimizer.state_dict()
    tensors: dict[str, dict[str, Any]] = {WEIGHTS: {}, OPTIMIZER: {}, GENERATORS: {"cpu": torch.get_rng_state()}}
    for name, parameter in _trained(trainer.model):
        tensors[WEIGHTS][name] = _copy(torch, parameter.detach())
    others: dict[str, dict[str, Any]] = {}
    for index, state in optimizer["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[OPTIMIZER][f"{index}.{name}"] = _copy(torch, value)
            else:
                others.setdefault(str(index), {})[name] = value
    if torch.cuda.is_available():
        tensors[GENERATORS]["cuda"] = torch.cuda.get_rng_state()
    # What the fields hold is replaced, never changed, so a shallow copy is one of this moment; the history only grows.
    trained = {each.name: getattr(trainer.state, each.name) for each in dataclasses.fields(trainer.state)}
    history = list(trained.pop("log_history"))
    scalars = {
        "trainer": trained,
        "tokens": getattr(trainer, "_total_train_tokens", 0),
        "groups": optimizer["param_groups"],
        "optimizer": others,
        "schedule": trainer.lr_scheduler.state_dict(),
        "python": random.getstate(),
        "numpy": _numpy_state(),
    }
    # Turned into text at once: some of it is the trainer's own and changes with the next step.
    return Snapshot(trainer.state.global_step, tensors, json.loads(json.dumps(scalars)), history)


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _copy(torch: Any, tensor: Any) -> Any:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _numpy_state() -> list[Any]:
    import numpy

    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return [kind, keys.tolist(), *rest]  # type: ignore[union-attr]


# --- writing ---------------------------------------------------------------------------------------------------------


def write(snapshot: Snapshot, history: bytes, folder: Path, manifest: CheckpointManifest) -> None:
    """Write a checkpoint to ``folder``, all of it or nothing: files and manifest synced under another name, then renamed."""
    from safetensors.torch import save

    partial = folder.with_name(f".{folder.name}")
    partial.mkdir(parents=True)
    files: dict[str, File] = {}
    for name, tensors in snapshot.tensors.items():
        files[name] = _write_file(partial / name, save(tensors))
    files[SCALARS] = _write_file(partial / SCALARS, _json(snapshot.scalars))
    files[HISTORY] = _write_file(partial / HISTORY, history)
    _write_file(partial / MANIFEST, encode_manifest(msgspec.structs.replace(manifest, files=files)))
    _sync_folder(partial)
    partial.rename(folder)
    _sync_folder(folder.parent)


def _json(value: Any) -> bytes:
    # The standard library's: it keeps every float to the bit, and numbers that are none.
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _write_file(path: Path, data: bytes) -> File:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return File(hashlib.sha256(data).hexdigest(), len(data))


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Keeper:
    """Takes checkpoints of one training when they are due and hands them to the agent."""

    def __init__(self, batch: Batch, index: int, steps: int, folder: Path, saving: Saving, log: Log) -> None:
        item = batch.items[index]
        self._manifest = CheckpointManifest(
            FORMAT, item.key, item.generation, item.attempt, batch.type, batch.models["model"].digest, 0, steps, made_by(), {}
        )
        self._index = index
        self._folder = folder
        self._saving = saving
        self._log = log
        self._cadence = Cadence(batch.cadence_s, batch.hazard_per_hour)
        self._is_wanted = False
        self._rested_since_s = monotonic_s()
        self._writing: threading.Thread | None = None
        self._is_writing = False
        self._write_s = 0.0
        # One line per step: what earlier checkpoints wrote is the beginning of this file, so stores hold it once.
        self._history = bytearray()
        self._rows = 0

    def is_due(self, step: int) -> bool:
        """Tell, after a step, whether to take one now. There is none after the last step: the result follows."""
        is_wanted, behind_s = self._saving.pace()
        if behind_s:
            self._cadence.note_kept(self._write_s + behind_s)
        self._is_wanted = self._is_wanted or is_wanted
        if step >= self._manifest.steps or self._is_writing:
            return False
        return self._is_wanted or monotonic_s() - self._rested_since_s >= self._cadence.pause_s

    def begin(self) -> None:
        """Count from now: the first step begins."""
        self._rested_since_s = monotonic_s()

    def keep(self, trainer: Any) -> None:
        """Take a checkpoint; training goes on as soon as everything is copied."""
        began_ns = monotonic_ns()
        self._is_wanted = False
        try:
            snapshot = take(trainer)
        except (TypeError, ValueError, RuntimeError) as error:
            # The training itself is sound: it goes on without, and begins anew if its node is lost.
            self._log(f"no checkpoint of step {trainer.state.global_step}: {error}")
            self._rested_since_s = monotonic_s()
            return
        stall_us = (monotonic_ns() - began_ns) // 1000
        self._is_writing = True
        self._writing = threading.Thread(target=self._write, args=(snapshot, stall_us), name="checkpoint", daemon=True)
        self._writing.start()
        self._cadence.note_stall((monotonic_ns() - began_ns) / 1e9)
        self._rested_since_s = monotonic_s()

    def _write(self, snapshot: Snapshot, stall_us: int) -> None:
        folder, began_s = self._folder / str(snapshot.step), monotonic_s()
        try:
            self._history += b"".join(_json(row) + b"\n" for row in snapshot.history[self._rows :])
            self._rows = len(snapshot.history)
            write(snapshot, bytes(self._history), folder, msgspec.structs.replace(self._manifest, step=snapshot.step))
        except Exception as error:
            self._log(f"no checkpoint of step {snapshot.step}: {error}")
            return
        finally:
            self._is_writing = False
        self._write_s = monotonic_s() - began_s
        self._saving.keep(self._index, str(folder), snapshot.step, self._manifest.steps, stall_us)

    def finish(self) -> None:
        """Wait for what is being written: after this no thread of ours runs."""
        if self._writing is not None:
            self._writing.join()


# --- going on --------------------------------------------------------------------------------------------------------


def read_manifest(item: Item, batch: Batch, steps: int) -> CheckpointManifest:
    """Return the manifest of an item's checkpoint; raise FlowmeshError unless it fits and every file is whole."""
    folder = Path(item.checkpoint)
    try:
        manifest = decode_manifest((folder / MANIFEST).read_bytes())
        if misfit := manifest.misfit(operator=item.key, generation=item.generation, made_by=made_by()):
            raise ExecutionError(misfit)
        if (manifest.type, manifest.model, manifest.steps) != (batch.type, batch.models["model"].digest, steps):
            raise ExecutionError("it is of a training with another model or other steps")
        if manifest.files.keys() != FILES:
            raise IntegrityError(f"it should hold {', '.join(sorted(FILES))}, and holds {', '.join(sorted(manifest.files))}")
        for name, file in manifest.files.items():
            if _file_of(folder / name) != file:
                raise IntegrityError(f"its file {name} is not what the manifest says")
    except OSError as error:
        raise IntegrityError(f"a file of it cannot be read: {error.strerror}") from error
    return manifest


def _file_of(path: Path) -> File:
    with path.open("rb") as file:
        return File(hashlib.file_digest(file, "sha256").hexdigest(), file.seek(0, os.SEEK_END))


def prepare(trainer: Any, folder: Path, scratch: Path) -> str:
    """Let a fresh trainer go on from a checkpoint whose files are whole; return what to hand to ``train``."""
    from safetensors.torch import load_file

    scalars = json.loads((folder / SCALARS).read_text(encoding="utf-8"))
    history = [json.loads(line) for line in (folder / HISTORY).read_text(encoding="utf-8").splitlines()]
    tensors = {name: load_file(folder / name) for name in (WEIGHTS, OPTIMIZER, GENERATORS)}
    _check_weights(trainer, tensors[WEIGHTS])
    scratch.mkdir()
    (scratch / "trainer_state.json").write_text(json.dumps(scalars["trainer"] | {"log_history": history}), encoding="utf-8")
    # Each is read once, and let go then.
    trainer._load_from_checkpoint = lambda path, model=None: _load_weights(trainer, tensors.pop(WEIGHTS))
    trainer._load_optimizer_and_scheduler = lambda path: _load_optimizer(trainer, tensors.pop(OPTIMIZER), scalars)
    trainer._load_rng_state = lambda path: _load_generators(tensors.pop(GENERATORS), scalars)
    trainer._load_scaler = lambda path: None
    trainer._total_train_tokens = scalars["tokens"]
    return str(scratch)


def _check_weights(trainer: Any, tensors: dict[str, Any]) -> None:
    wanted = {name: (parameter.dtype, parameter.shape) for name, parameter in _trained(trainer.model)}
    if wanted != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}:
        raise IntegrityError("it holds other tensors than are trained here")


def _load_weights(trainer: Any, tensors: dict[str, Any]) -> None:
    with engine.torch_module().no_grad():
        for name, parameter in _trained(trainer.model):
            parameter.copy_(tensors[name])


def _load_optimizer(trainer: Any, tensors: dict[str, Any], scalars: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars["optimizer"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = [{name: tuple(v) if name == "betas" else v for name, v in group.items()} for group in scalars["groups"]]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.lr_scheduler.load_state_dict(scalars["schedule"])


def _load_generators(tensors: dict[str, Any], scalars: dict[str, Any]) -> None:
    import numpy

    torch = engine.torch_module()
    version, internal, gauss = scalars["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = scalars["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def go_on(trainer: Any, batch: Batch, index: int, steps: int, folder: Path, log: Log) -> str | None:
    """Return what to hand to ``train``: the checkpoint that the item comes with, or None, to begin at the beginning.

    A checkpoint that does not fit, or is not whole, is said to be so and not used: the result is the same, only later.
    """
    item = batch.items[index]
    if not item.checkpoint:
        return None
    try:
        manifest = read_manifest(item, batch, steps)
        path = prepare(trainer, Path(item.checkpoint), folder / "resumed")
    except Exception as error:  # whatever is wrong with it, the training can do without
        text = error.message if isinstance(error, FlowmeshError) else f"{type(error).__name__}: {error}"
        log(f"beginning at the beginning, not from the checkpoint: {text}")
        return None
    log(f"going on after step {manifest.step} of {manifest.steps}, from the checkpoint of attempt {manifest.attempt}")
    return path
