"""The wheel as a stranger installs it: into an empty environment, run from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.tidy.tree import PACKAGES, ROOT

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("wheel")]


def _run(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)], target)
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_the_five_packages_and_nothing_beside_them(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == set(PACKAGES)
    assert all(f"{package}/py.typed" in names for package in PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_commands_run_from_an_empty_environment_and_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    folder.mkdir()
    _run([sys.executable, "-m", "venv", str(environment)], folder)
    python = str(environment / "bin" / "python")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *constraints, str(wheel)], folder)
    assert "submit" in _run([str(environment / "bin" / "flowmesh"), "--help"], folder)
    assert "join" in _run([str(environment / "bin" / "flowmesh-node"), "--help"], folder)
    installed = _run([python, "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"], folder)
    assert "torch==" not in installed
    assert not any(folder.iterdir()), "asking for help left something behind"
