"""Any NATS client can submit: the official JavaScript client from npm, plain JSON, no code of ours on that side."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh.client import connect

HERE = Path(__file__).with_name("javascript")
INSTALL_TIMEOUT_S = 90.0
RUN_TIMEOUT_S = 75.0

pytestmark = pytest.mark.npm


@pytest.fixture(scope="module")
def project() -> Path:
    """Return a folder with the script and its packages, installed once into a cache outside the repository."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    sources = [HERE / "package.json", HERE / "submit.mjs"]
    digest = hashlib.sha256(sources[0].read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowmesh-tests" / f"javascript-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copy(source, cache)
    if not (cache / "node_modules" / ".complete").exists():
        command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
        try:
            done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pytest.skip("npm could not install the client in time (offline?)")
        if done.returncode != 0:
            pytest.skip(f"npm could not install the client (offline?): {done.stderr.strip()[-200:]}")
        (cache / "node_modules" / ".complete").touch()
    return cache


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[EmbeddedMesh]:
    async with embedded_mesh(tmp_path / "mesh", nodes=1, tenants=("team-a", "team-b")) as made:
        yield made


def _run(project: Path, mesh: EmbeddedMesh, submission: dict[str, Any], output: str) -> dict[str, Any]:
    file = Path(mesh.dir).with_name("submission.json")
    file.write_text(json.dumps(submission))
    entry = mesh.tenant("team-a")
    command = ["node", "submit.mjs", mesh.urls[0], entry.credentials, str(file), output]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def test_the_official_javascript_client_submits_and_follows_a_run_to_its_result(project: Path, mesh: EmbeddedMesh) -> None:
    workflow = {
        "apiVersion": "flowmesh/v1",
        "name": "from-javascript",
        "params": {"factor": {"type": "int", "default": 1}},
        "operators": {
            "first": {"type": "flow.noop", "with": {"nonce": 1}},
            "second": {"type": "flow.noop", "with": {"nonce": "${params.factor}"}, "inputs": {"after": "first.out"}},
        },
        "outputs": {"result": "second.out"},
    }
    submission = {"v": 1, "run": "javascript-1", "workflow": workflow, "params": {"factor": 7}}
    found = _run(project, mesh, submission, "result")
    assert found["ack"]["stream"] == "SUBMIT"
    assert found["kinds"][-1] == "ended"
    assert "accepted" in found["kinds"]
    assert found["end"]["state"] == "succeeded"
    assert found["state"] == "succeeded"
    async with connect(mesh, "team-a") as tenant:
        run = await tenant.run("javascript-1")
        results = await run.result(timeout_s=10)
        assert await results["result"].value() == found["value"]
        again = await tenant.submit(workflow, params={"factor": 7})
        same = await again.status()
    assert same["manifest"] == (await _manifest(mesh, "javascript-1")), "the same workflow by any road has one CID"


async def _manifest(mesh: EmbeddedMesh, run: str) -> str:
    async with connect(mesh, "team-a") as tenant:
        return str((await (await tenant.run(run)).status())["manifest"])


async def test_a_wrong_document_in_json_is_rejected_with_every_problem(project: Path, mesh: EmbeddedMesh) -> None:
    workflow = {
        "apiVersion": "flowmesh/v1",
        "name": "wrong",
        "operators": {"a": {"type": "flow.nop"}, "b": {"type": "flow.noop", "with": {"bites": 1}}},
    }
    found = _run(project, mesh, {"v": 1, "run": "javascript-2", "workflow": workflow}, "")
    assert found["kinds"] == ["rejected"] or found["kinds"][-1] == "rejected"
    told = json.dumps(found["end"]["problems"])
    assert "flow.nop" in told
    assert "bites" in told
