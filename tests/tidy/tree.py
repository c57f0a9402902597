"""The tree that the tidy tests read: files that git tracks (or, outside a checkout, all of them), packages, modules."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    name: ROOT / folder / name
    for folder, name in (
        ("mesh", "flowmesh_mesh"),
        ("scheduler", "flowmesh_scheduler"),
        ("node", "flowmesh_node"),
        ("cas", "flowmesh_cas"),
        ("deploy", "flowmesh_deploy"),
    )
}
BINARY_SUFFIXES = {".gz", ".parquet", ".png", ".safetensors", ".whl", ".bin", ".car"}


@cache
def tracked_files() -> tuple[Path, ...]:
    """Return the files that belong to the project."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        skipped = {".venv", "__pycache__", "node_modules", "out", "dist", "build", ".git"}
        return tuple(path for path in ROOT.rglob("*") if path.is_file() and not skipped.intersection(path.parts))
    return tuple(path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file())


@cache
def text_of(path: Path) -> str:
    """Return a file's text, empty for what is not text."""
    if path.suffix in BINARY_SUFFIXES:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def modules() -> list[Path]:
    """Return every Python module of the five packages."""
    return sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def shown(path: Path) -> str:
    """Return a path as it stands in messages."""
    return str(path.relative_to(ROOT))
