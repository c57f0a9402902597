"""``shards: auto`` on a mesh of real processes: asked for, settled, run, and the same rows as without."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.errors import UsageError
from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.client.questions import ask

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
DEADLINE_S = 60.0
ROWS = 4_000
REWARD = {"rules": [{"kind": "length", "target": 5}], "completion": "{{ text }}"}


def document(folder: Path, shards: Any) -> dict[str, Any]:
    """Return a workflow over a file of many rows."""
    reward = {"type": "reward.score", "inputs": {"rows": "marked.rows"}, "with": REWARD, "shards": shards}
    marked = {"type": "data.map", "inputs": {"rows": "table.rows"}, "with": {"columns": {"mark": "{{ n }}!"}}, "shards": shards}
    return {
        "apiVersion": "flowmesh/v1",
        "name": "sharded",
        "operators": {
            "table": {"type": "data.load", "inputs": {"file": {"path": str(folder / "t.jsonl")}}},
            "marked": marked,
            "scored": reward,
        },
    }


def write_rows(folder: Path) -> None:
    lines = (json.dumps({"n": n, "text": "word " * (n % 11)}) + "\n" for n in range(ROWS))
    (folder / "t.jsonl").write_text("".join(lines))


def configure(folder: Path, **settings: Any) -> None:
    """Change settings of the scheduler of a mesh that is down."""
    path = next(folder.rglob("scheduler.json"))
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "settings": {**config.get("settings", {}), **settings}}))


async def outcome(client: Mesh, workflow: dict[str, Any]) -> tuple[list[str], Any]:
    """Run a workflow; return the names of its operators, and the content that came out."""
    run = await client.submit(workflow)
    results = await run.result(timeout_s=DEADLINE_S)
    assert results.state == "succeeded", results.detail
    rows = await run.operators()
    (found,) = [row["outputs"]["rows"] for row in rows if row["name"] == "scored"]
    return [row["name"] for row in rows], [(ref["rows"], ref["digest"]) for ref in found]


def command(context: str, *arguments: str) -> str:
    environment = {**os.environ, "NO_COLOR": "1", "FLOWMESH_CONTEXT": context}
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_hand(context: str, folder: Path) -> None:
    """Validate, plan and submit from the command line: each tells what it knows of the shards."""
    file = str(folder / "auto.json")
    Path(file).write_text(json.dumps({**document(folder, "auto"), "name": "by-hand"}))
    assert "shards: auto of marked, scored is settled at submission" in command(context, "validate", file)
    valid = json.loads(command(context, "validate", file, "--json"))
    assert (valid["auto"], valid["manifest"], valid["operators"]) == (["marked", "scored"], None, 3)
    assert "shards     marked: " in command(context, "plan", file)
    submitted = json.loads(command(context, "submit", file, "--json"))
    assert {each["operator"] for each in submitted["shards"]} == {"marked", "scored"}
    assert submitted["operators"] == 3 + sum(each["shards"] + 1 for each in submitted["shards"] if each["shards"] > 1)
    assert "shards     marked: " in command(context, "submit", file)


async def foreign_client(client: Mesh) -> None:
    """Ask as clients in other languages do: plain data in, plain data out; numbers only in what is submitted."""
    wish = {"type": "llm.generate", "params": {"max_new_tokens": 64}, "models": {"model": "hf:nobody/knows@1"}, "rows": 50_000}
    (choice,) = (await ask(client.bus, "shards", {"operators": [wish]}))["choices"]
    assert choice["shards"] > 1
    assert choice["samples"] == 0
    for wrong in ([{"type": "data.concat", "rows": 5}], [{"type": "data.map", "row": 5}], None):
        with pytest.raises(UsageError):
            await ask(client.bus, "shards", {"operators": wrong})


async def test_shards_that_the_mesh_chose_give_the_rows_of_one(tmp_path: Path) -> None:
    write_rows(tmp_path)
    folder = tmp_path / "mesh"
    async with embedded_mesh(folder, nodes=2):
        pass
    configure(folder, shard_s=0.02, shard_overhead=0.95, shard_fixed_s=0.001)
    async with embedded_mesh(folder, nodes=2) as mesh, connect(context=mesh) as client:
        planned = await client.plan(document(tmp_path, "auto"))
        chosen = {each["operator"]: each["shards"] for each in planned["shards"]}
        assert set(chosen) == {"marked", "scored"}
        assert all(number > 1 for number in chosen.values()), planned["shards"]
        assert all(each["rows"] == ROWS for each in planned["shards"])
        names, found = await outcome(client, document(tmp_path, "auto"))
        assert {"marked-split", "marked-0", "scored-split", "scored-0"} <= set(names)
        whole_names, whole = await outcome(client, document(tmp_path, 1))
        assert whole_names == ["table", "marked", "scored"]
        assert found == whole
        assert found[0][0] == ROWS
        await foreign_client(client)
        await asyncio.to_thread(by_hand, str(mesh.path), tmp_path)
