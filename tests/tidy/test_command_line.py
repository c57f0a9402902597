"""The command line as people meet it: quick to start, light in what it imports, the same as the documents say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tidy.tree import ROOT, text_of, tracked_files

COMMAND = Path(sys.executable).with_name("flowmesh")
BUDGET_S = 0.3
HEAVY = ("torch", "transformers", "duckdb", "pyarrow", "nats", "yaml", "numpy", "ray", "asyncio")


def _cpu_s(arguments: list[str], folder: Path) -> float:
    """Return the processor seconds of one run: unlike wall time, they do not grow with what else the machine does."""
    before = os.times()
    subprocess.run([str(COMMAND), *arguments], cwd=folder, capture_output=True, check=True, timeout=60)
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


def test_help_comes_within_its_budget(tmp_path: Path) -> None:
    assert min(_cpu_s(["--help"], tmp_path) for _ in range(7)) <= BUDGET_S


def test_the_command_line_imports_nothing_heavy() -> None:
    script = "import sys, json, flowmesh_mesh.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(done.stdout))
    assert not loaded.intersection(HEAVY)


def test_importing_the_packages_pulls_in_no_engine() -> None:
    names = "flowmesh_cas, flowmesh_mesh, flowmesh_scheduler, flowmesh_node, flowmesh_deploy, flowmesh_mesh.client"
    script = f"import sys, json, {names}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "duckdb", "pyarrow", "ray"}.intersection(json.loads(done.stdout))


def _commands(executable: str) -> set[str]:
    path = Path(sys.executable).with_name(executable)
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run([str(path), "--help"], capture_output=True, text=True, check=True, timeout=60, env=environment)
    listed = done.stdout[done.stdout.index("Commands") :]
    return set(re.findall(r"^[\s│|]*([a-z][a-z-]*)\s{2,}\S", listed, re.MULTILINE))


@pytest.mark.parametrize("executable", ["flowmesh", "flowmesh-node"])
def test_documents_name_only_commands_that_exist(executable: str) -> None:
    known = _commands(executable)
    assert known, "no commands were listed by --help"
    pages = [path for path in tracked_files() if path.suffix == ".md" and path.parent != ROOT / "docs" / "adr"]
    wrong = []
    for page in pages:
        for line in text_of(page).splitlines():
            for name in re.findall(rf"(?:^|`|\$ ){executable} ([a-z][a-z-]+)", line):
                if name not in known:
                    wrong.append(f"{page.name}: {executable} {name}")
    assert not wrong


def test_published_schema_is_the_one_that_the_catalog_makes() -> None:
    from flowmesh_mesh.schema import SCHEMA_FILE, schema_text

    assert (ROOT / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text(), "write it anew with `make docs`"
