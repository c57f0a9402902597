"""What does not fit is told so, by name and in words, and does no harm."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.versions.builds import THIS, Build, pretend
from tests.versions.rig import DEADLINE_S, Rig, rig

from flowmesh_cas.errors import UsageError
from flowmesh_mesh import messages, wire


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path / "mesh") as made:
        yield made


@pytest.fixture
def later(tmp_path: Path) -> Build:
    """A build that understands nothing of today, and writes what nobody of today can read."""
    return pretend(tmp_path / "later", 9, 9, records=9)


def row(status: dict[str, Any], node: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in status["nodes"] if each["node"] == node)
    return found


def test_two_builds_fit_when_each_understands_the_other() -> None:
    assert wire.fits(2, 1, 1, 1)
    assert wire.fits(1, 1, 2, 1)
    assert not wire.fits(3, 2, 1, 1)
    assert not wire.fits(1, 1, 3, 2)
    assert wire.misfit("a", 2, 1, "b", 1, 1) == ("", "")


@pytest.mark.parametrize(("ours", "theirs", "older"), [((3, 3), (2, 1), "node n1"), ((2, 1), (3, 3), "the leader")])
def test_the_older_of_two_is_named_as_the_one_to_upgrade(ours: tuple[int, int], theirs: tuple[int, int], older: str) -> None:
    why, hint = wire.misfit("the leader", *ours, "node n1", *theirs)
    assert f"version {ours[0]}" in why
    assert f"version {theirs[0]}" in why
    assert f"on {older}:" in hint


def test_this_build_understands_itself_and_the_release_before() -> None:
    assert messages.WIRE_OLDEST <= messages.WIRE_VERSION
    assert wire.fits(messages.WIRE_VERSION, messages.WIRE_OLDEST, 1, 1)
    assert wire.RECORDS_NEED <= messages.WIRE_VERSION


def test_a_message_of_an_unknown_tag_is_refused_with_its_tag() -> None:
    data = messages.encode(messages.Ask("status")).replace(b"ask/1", b"ask/7")
    with pytest.raises(UsageError, match="ask/7") as refused:
        messages.decode(data, messages.Ask)
    assert "install" in refused.value.hint


def test_a_node_that_does_not_fit_ends_with_the_reason_and_is_shown_as_refused(mesh: Rig, later: Build) -> None:
    mesh.scheduler(THIS)
    mesh.node(THIS, "fits")
    asyncio.run(mesh.until_active(THIS, "fits"))
    mesh.node(later, "later")
    assert mesh.wait("later") == 2
    assert "node later version 9" in mesh.log("later")
    assert "hint: Install" in mesh.log("later")
    found = row(mesh.tenant(THIS, "status"), "later")
    assert found["state"] == "refused"
    assert "version 9" in found["refused"]["why"]
    run = mesh.tenant(THIS, "submit", 4, 0.1, 1)["run"]
    assert {each[2] for each in mesh.tenant(THIS, "result", run)["rows"]} == {"fits"}
    mesh.node(THIS, "later")
    asyncio.run(mesh.until_active(THIS, "later", "fits"))
    assert "refused" not in row(mesh.tenant(THIS, "status"), "later")


def test_a_client_that_does_not_fit_is_told_which_versions_meet(mesh: Rig, later: Build) -> None:
    mesh.scheduler(THIS)
    asyncio.run(mesh.until_active(THIS))
    script = Path(__file__).with_name("tenant.py")
    for what, arguments in (("status", "[]"), ("submit", "[1, 0.1, 1]")):
        command = later.python(str(script), str(mesh.context), str(mesh.folder), what, arguments)
        done = subprocess.run(command, env=later.environment(), capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode != 0
        assert "this client" in done.stderr
        assert "version 9" in done.stderr
        assert f"version {messages.WIRE_VERSION}" in done.stderr


def test_a_scheduler_that_cannot_read_the_streams_ends_and_leaves_the_lease_to_one_that_can(mesh: Rig, later: Build) -> None:
    mesh.scheduler(later, "first")
    asyncio.run(mesh.until_active(later))
    mesh.kill("first")
    mesh.scheduler(THIS, "outdated")
    assert mesh.wait("outdated") == 2
    assert "this scheduler reads up to" in mesh.log("outdated")
    mesh.scheduler(later, "second")
    asyncio.run(mesh.until_active(later))
