"""This build and the previous release in one mesh, as real processes; `make versions` runs every combination."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.versions import scenarios
from tests.versions.builds import THIS, Build, make_previous, why_no_previous
from tests.versions.rig import Rig, rig

pytestmark = pytest.mark.skipif(bool(why_no_previous()), reason=why_no_previous())


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return make_previous(tmp_path_factory.mktemp("previous"))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path) as made:
        yield made


def test_an_old_client_and_an_old_node_work_under_a_new_leader(mesh: Rig, old: Build) -> None:
    scenarios.trio(mesh, THIS, old, old, 1000)


def test_a_new_client_and_a_new_node_work_under_an_old_leader(mesh: Rig, old: Build) -> None:
    scenarios.trio(mesh, old, THIS, THIS, 2000)


def test_a_rolling_upgrade_and_the_way_back_repeat_nothing(mesh: Rig, old: Build) -> None:
    scenarios.change_of_leader(mesh, old, THIS, (old, THIS), THIS, 3000)
    scenarios.change_of_leader(mesh, THIS, old, (old, THIS), old, 4000)


def test_the_spool_of_an_old_node_is_taken_by_a_new_leader(mesh: Rig, old: Build) -> None:
    scenarios.spool(mesh, old, THIS, old, THIS, 5000)
