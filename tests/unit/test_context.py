"""How commands find the mesh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_mesh.context import Context, TenantEntry, find_context, load_context, save_context


def _write(folder: Path, mesh: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entry = TenantEntry("ACCOUNT", "credentials/team-a.creds")
    save_context(Context(mesh, ["nats://127.0.0.1:1"], str(folder), {"team-a": entry}, "team-a"), folder / "context.json")
    return folder / "context.json"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder without any mesh."""
    monkeypatch.delenv("FLOWMESH_CONTEXT", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inner = tmp_path / "work" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    return tmp_path


def test_what_is_nearer_wins(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no mesh found") as caught:
        find_context()
    assert "flowmesh up" in caught.value.hint
    _write(places / "home" / ".flowmesh", "home")
    assert find_context().mesh == "home"
    _write(places / "work" / ".flowmesh", "above")
    assert find_context().mesh == "above"
    _write(places / "work" / "inner" / ".flowmesh", "here")
    assert find_context().mesh == "here"
    monkeypatch.setenv("FLOWMESH_CONTEXT", str(_write(places / "other", "named")))
    assert find_context().mesh == "named"
    assert find_context(_write(places / "third", "given")).mesh == "given"
    assert find_context(places / "third").mesh == "given", "a folder stands for the file in it"


def test_a_named_context_that_is_missing_is_no_reason_to_take_another(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(places / "work" / ".flowmesh", "above")
    monkeypatch.setenv("FLOWMESH_CONTEXT", str(places / "none.json"))
    with pytest.raises(NotFoundError, match=r"none\.json"):
        find_context()


def test_credentials_lie_beside_the_context_wherever_it_is_moved(places: Path) -> None:
    path = _write(places / "mesh", "m")
    assert load_context(path).tenant().credentials == str(places / "mesh" / "credentials" / "team-a.creds")
    with pytest.raises(NotFoundError) as caught:
        load_context(path).tenant("nobody")
    assert "team-a" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"mesh": 1}', '{"mesh":"m","urls":[],"dir":"","tenants":{},"default_tenant":"","x":1}']
)
def test_what_is_no_context_is_told(places: Path, text: str) -> None:
    path = places / "context.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="not a context file"):
        load_context(path)


def test_a_context_of_a_later_version_is_refused(places: Path) -> None:
    path = _write(places / "mesh", "m")
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(UsageError, match="version 2"):
        load_context(path)
