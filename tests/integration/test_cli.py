"""The command line against a whole embedded mesh: from submission to result, and what it says when something goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh import sync

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
WORKFLOW = """\
apiVersion: flowmesh/v1
name: tiny
params: {n: {type: int, default: 1}}
operators:
  people: {type: data.load, inputs: {file: {path: people.jsonl}}}
  adults: {type: data.sql, inputs: {people: people.rows}, with: {query: "select name from people where age >= 18 order by name"}}
  first: {type: flow.noop, with: {nonce: "${params.n}"}}
outputs: {adults: adults.rows, nothing: first.out}
"""
SLOW = """\
apiVersion: flowmesh/v1
name: slow
params: {n: {type: int}}
operators: {a: {type: flow.noop, with: {nonce: "${params.n}", sleep_s: 30}}}
outputs: {out: a.out}
"""
TALKS = """\
apiVersion: flowmesh/v1
name: talks
operators: {talk: {type: python.call, function: "words.py:talk"}}
outputs: {out: talk.out}
"""


class Shell:
    """Runs commands in a folder with workflows, on one mesh."""

    def __init__(self, folder: Path, context: str) -> None:
        self.folder = folder
        self.environment = {**os.environ, "FLOWMESH_CONTEXT": context, "NO_COLOR": "1"}
        self.environment.pop("FLOWMESH_TENANT", None)

    def run(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        command = [COMMAND, *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def json(self, *arguments: str, code: int = 0) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedMesh]:
    with asyncio.Runner() as runner:
        around = embedded_mesh(tmp_path_factory.mktemp("mesh") / "m", nodes=1, tenants=("team-a", "team-b"))
        made = runner.run(around.__aenter__())
        try:
            yield made
        finally:
            runner.run(around.__aexit__(None, None, None))


@pytest.fixture
def shell(mesh: EmbeddedMesh, tmp_path: Path) -> Shell:
    (tmp_path / "people.jsonl").write_text('{"name": "Ann", "age": 40}\n{"name": "Bo", "age": 9}\n{"name": "Al", "age": 18}\n')
    (tmp_path / "w.yaml").write_text(WORKFLOW)
    (tmp_path / "slow.yaml").write_text(SLOW)
    (tmp_path / "talks.yaml").write_text(TALKS)
    (tmp_path / "words.py").write_text("def talk():\n    print('one')\n    print('two\\x1b[2J')\n    return 1\n")
    return Shell(tmp_path, mesh.path)


def test_a_workflow_goes_from_file_to_files(shell: Shell, tmp_path: Path) -> None:
    done = shell.run("submit", "w.yaml", "--watch", "--param", "n=11")
    assert done.returncode == 0, done.stderr
    assert "adults done" in done.stdout
    run = done.stdout.rpartition("flowmesh get ")[2].split()[0]
    state = shell.json("show", run)
    assert state["state"] == "succeeded"
    assert {row["name"]: row["state"] for row in state["operators"]} == {"people": "done", "adults": "done", "first": "done"}
    files = shell.json("get", run[:10], "-o", "made")["files"]
    assert sorted(Path(file).name for file in files) == ["adults.jsonl", "nothing.json"]
    assert [json.loads(line) for line in (tmp_path / "made/adults.jsonl").read_text().splitlines()] == [
        {"name": "Al"},
        {"name": "Ann"},
    ]
    assert shell.json("get", f"{run}.people", "-o", "made")["files"] == ["made/people.jsonl"]
    assert shell.json("get", f"{run}.nobody", "-o", "made", code=4)["error"]["kind"] == "NotFoundError"
    table = shell.run("show", run).stdout
    assert state["outputs"]["adults"][0]["cid"] in table


def test_every_cid_that_the_lineage_names_can_be_fetched_and_verifies(shell: Shell, tmp_path: Path) -> None:
    run = shell.json("submit", "w.yaml", "--watch", "--param", "n=12")["run"]
    lineage = shell.json("lineage", run)
    assert {record["type"] for record in lineage["records"]} == {"data.load", "data.sql", "flow.noop"}
    assert len(lineage["inputs"]) == 1
    cids = {*lineage["roots"], *lineage["inputs"]}
    for record in lineage["records"]:
        cids |= {record["record"], record["result"], *(ref["cid"] for refs in record["outputs"].values() for ref in refs)}
    for cid in sorted(cids):
        (path,) = shell.json("get", cid, "-o", "cids")["files"]
        assert (tmp_path / path).stat().st_size > 0
    assert (tmp_path / "cids" / lineage["inputs"][0]).read_bytes() == (tmp_path / "people.jsonl").read_bytes()
    result = next(record for record in lineage["records"] if record["name"] == "adults")
    by_content = shell.json("lineage", result["outputs"]["rows"][0]["cid"])
    assert {record["name"] for record in by_content["records"]} == {"people", "adults"}
    assert "people (data.load)" in shell.run("lineage", run).stdout


def test_an_input_of_several_megabytes_is_put_first_and_comes_back_whole(shell: Shell, tmp_path: Path) -> None:
    lines = [json.dumps({"name": f"person {number}", "age": number % 90}) for number in range(100_000)]
    (tmp_path / "people.jsonl").write_text("\n".join(lines) + "\n")
    document = shell.json("submit", "w.yaml", "--watch")
    assert document["state"] == "succeeded"
    (rows,) = document["outputs"]["adults"]
    assert rows["rows"] == sum(number % 90 >= 18 for number in range(100_000))
    (given,) = shell.json("lineage", document["run"])["inputs"]
    (path,) = shell.json("get", given, "-o", "back")["files"]
    assert (tmp_path / path).read_bytes() == (tmp_path / "people.jsonl").read_bytes()
    shell.json("get", document["run"], "-o", "back")
    with (tmp_path / "back/adults.jsonl").open() as table:
        assert sum(1 for _ in table) == rows["rows"]


def test_the_synchronous_twin_works_on_a_mesh(mesh: EmbeddedMesh) -> None:
    workflow = {
        "apiVersion": "flowmesh/v1",
        "name": "twin",
        "operators": {"a": {"type": "flow.noop", "with": {"nonce": 5, "bytes": 10}}},
        "outputs": {"out": "a.out"},
    }
    with sync.connect(mesh, "team-a") as client:
        run = client.submit(workflow)
        results = run.result(timeout_s=30)
        assert len(results["out"].value()) == 8
        assert run.operator("a")["state"] == "done"
        assert run.id in [row["run"] for row in client.runs()]


def test_the_mesh_and_its_runs_are_shown(shell: Shell) -> None:
    run = shell.json("submit", "w.yaml")["run"]
    assert run in [row["run"] for row in shell.json("ls")]
    assert run in shell.run("ls").stdout
    status = shell.json("status")
    assert status["leader"]["id"]
    assert [node["state"] for node in status["nodes"]] == ["active"]
    node = shell.json("nodes")[0]["node"]
    assert node in shell.run("status").stdout
    assert "BEHIND" in shell.run("status", "--tenants").stdout
    assert node in shell.run("nodes").stdout


def test_another_tenant_sees_neither_runs_nor_contents(shell: Shell) -> None:
    run = shell.json("submit", "w.yaml", "--watch", "--param", "n=13")["run"]
    cid = shell.json("show", run)["outputs"]["adults"][0]["cid"]
    assert run not in [row["run"] for row in shell.json("ls", "--tenant", "team-b")]
    for arguments in (("show", run), ("get", run, "-o", "x"), ("get", cid, "-o", "x"), ("lineage", run), ("lineage", cid)):
        assert shell.json(*arguments, "--tenant", "team-b", code=4)["error"]["kind"] == "NotFoundError"
    assert shell.json("show", run, "--tenant", "nobody", code=4)["error"]["message"] == "no credentials of tenant 'nobody'"


def test_a_run_is_cancelled_and_says_by_whom(shell: Shell) -> None:
    run = shell.json("submit", "slow.yaml", "--param", "n=1")["run"]
    found = shell.json("cancel", run)
    assert (found["state"], found["reason"]) == ("cancelled", "cancelled")
    assert found["actor"]
    watched = shell.run("watch", run)
    assert watched.returncode == 3
    assert "cancelled" in watched.stderr


def test_submitting_the_same_id_twice_is_one_run(shell: Shell) -> None:
    assert shell.json("submit", "w.yaml", "--run", "twice")["run"] == "twice"
    assert shell.json("submit", "w.yaml", "--run", "twice")["run"] == "twice"
    other = shell.json("submit", "w.yaml", "--run", "twice", "--param", "n=99", code=2)
    assert "another workflow" in other["error"]["message"]


def test_a_function_that_raises_fails_the_run_with_its_message(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text("def talk():\n    print('before')\n    raise ValueError('no good')\n")
    done = shell.run("submit", "talks.yaml", "--watch")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "no good" in done.stderr
    run = shell.json("ls")[0]["run"]
    assert shell.json("show", run)["operators"][0]["reason"] == "user-error"
    assert "before" in shell.run("logs", run).stdout


def test_logs_are_printed_and_cannot_drive_the_terminal(shell: Shell) -> None:
    run = shell.json("submit", "talks.yaml", "--watch")["run"]
    assert [entry["line"] for entry in shell.json("logs", run, "talk")][:2] == ["one", "two\x1b[2J"]
    assert shell.run("logs", run, "talk").stdout.splitlines()[:2] == ["one", "two\N{REPLACEMENT CHARACTER}[2J"]
    assert shell.run("logs", run, "-f").stdout.splitlines()[0] == "talk | one"
    assert shell.json("logs", run, "nobody", code=4)["error"]["kind"] == "NotFoundError"


def test_ctrl_c_leaves_the_run_alone(shell: Shell) -> None:
    process = subprocess.Popen(
        [COMMAND, "submit", "slow.yaml", "--watch", "--run", "left-alone", "--param", "n=2"],
        cwd=shell.folder,
        env=shell.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "left-alone" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.strip() == "interrupted"
    assert shell.json("show", "left-alone")["state"] == "accepted"
    shell.json("cancel", "left-alone")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_a_run_is_drawn_live_on_a_terminal(shell: Shell) -> None:
    ours, theirs = pty.openpty()
    environment = {**shell.environment, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [COMMAND, "submit", "w.yaml", "--watch", "--param", "n=14"],
        cwd=shell.folder,
        env=environment,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if select.select([ours], [], [], 0.1)[0]:
            seen += _read(ours)
    if process.poll() is None:
        process.kill()
    while part := _read(ours):
        seen += part
    os.close(ours)
    assert process.wait(timeout=10) == 0, seen.decode(errors="replace")
    assert b"succeeded" in seen
    assert b"3 done" in seen
    assert b"flowmesh get" in seen


def test_a_mesh_that_is_down_is_told_as_such(shell: Shell, mesh: EmbeddedMesh, tmp_path: Path) -> None:
    context = json.loads(Path(mesh.path).read_text())
    context["urls"] = ["nats://127.0.0.1:1"]
    entries = context["tenants"].values()
    for entry in entries:
        entry["credentials"] = str(Path(mesh.path).parent / entry["credentials"])
    (tmp_path / "down.json").write_text(json.dumps(context))
    failed = shell.json("ls", "--context", "down.json", code=5)
    assert "no broker answers" in failed["error"]["message"]
    assert "flowmesh up" in failed["error"]["hint"]
