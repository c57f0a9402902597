"""`flowmesh up --brokers 3 --schedulers 3` as people use it: interrupted, killed, started again. Nothing must be left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowmesh_deploy.control import is_up, stop
from flowmesh_deploy.layout import Layout, read_json
from flowmesh_deploy.process import is_running

COMMAND = str(Path(sys.executable).with_name("flowmesh"))
NAMES = {"broker", "broker-2", "broker-3", "scheduler", "scheduler-2", "scheduler-3", "node-1", "node-2"}
THREE = ("--brokers", "3", "--schedulers", "3", "--nodes", "2")


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    made = Layout(tmp_path / "mesh")
    yield made
    stop(made)


def start(layout: Layout, *arguments: str) -> subprocess.Popen[str]:
    command = [COMMAND, "up", "--dir", str(layout.folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def up(layout: Layout, *arguments: str) -> dict[str, Any]:
    starting = start(layout, "--json", *arguments)
    output, errors = starting.communicate(timeout=90)
    assert starting.returncode == 0, errors
    found: dict[str, Any] = json.loads(output)
    return found


def down(layout: Layout) -> None:
    done = subprocess.run([COMMAND, "down", "--dir", str(layout.folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def processes(layout: Layout) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read_json(layout.state).get("processes", {})
    return found


def left_over(layout: Layout) -> list[str]:
    """Return the command lines of all processes that have to do with the folder of the mesh."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(layout.folder) in word for word in words) and process.pid != os.getpid():
            found.append(" ".join(words))
    return found


def until(what: str, check: Callable[[], bool], deadline_s: float = 60.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_three_of_each_come_up_go_down_and_come_up_again(layout: Layout) -> None:
    first = up(layout, *THREE)
    assert len(first["urls"]) == 3
    assert set(processes(layout)) == NAMES
    down(layout)
    assert left_over(layout) == []
    again = up(layout)
    assert again == first, "brokers, schedulers, nodes and addresses are those of before"
    assert set(processes(layout)) == NAMES
    pids = {name: record["pid"] for name, record in processes(layout).items()}

    os.kill(pids["broker-2"], signal.SIGKILL)
    until("another broker", lambda: processes(layout)["broker-2"].get("pid") not in (None, pids["broker-2"]))
    os.kill(pids["scheduler-3"], signal.SIGSTOP)
    os.kill(pids["node-2"], signal.SIGSTOP)
    assert {name: record["pid"] for name, record in processes(layout).items() if name != "broker-2"} == {
        name: pid for name, pid in pids.items() if name != "broker-2"
    }, "nobody else is started anew"
    down(layout)
    assert left_over(layout) == [], "what was frozen ends, too"


def test_schedulers_are_added_to_a_mesh_that_is_up(layout: Layout) -> None:
    up(layout, "--nodes", "0")
    before = processes(layout)["scheduler"]["pid"]
    up(layout, "--schedulers", "2")
    until("a second scheduler", lambda: is_running(processes(layout).get("scheduler-2", {})))
    assert processes(layout)["scheduler"]["pid"] == before
    done = subprocess.run(
        [COMMAND, "up", "--dir", str(layout.folder), "--brokers", "3"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "cannot change" in done.stderr
    assert "flowmesh up --dir NEW --brokers 3" in done.stderr


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "broker-2"),
        (signal.SIGTERM, "scheduler-2"),
        (signal.SIGHUP, "node-2"),
        (signal.SIGKILL, "scheduler-3"),
    ],
)
def test_a_start_of_three_that_is_interrupted_leaves_nothing_running(layout: Layout, number: int, moment: str) -> None:
    starting = start(layout, "--foreground", *THREE)
    until(moment, lambda: bool(processes(layout).get(moment, {}).get("pid")))
    starting.send_signal(number)
    starting.communicate(timeout=60)
    until("the end of all", lambda: not left_over(layout), 40.0)
    assert not is_up(layout)


def test_down_in_the_middle_of_a_start_of_three_ends_it(layout: Layout) -> None:
    starting = start(layout, *THREE)
    until("a broker", lambda: bool(processes(layout).get("broker-2", {}).get("pid")))
    down(layout)
    starting.communicate(timeout=60)
    assert left_over(layout) == []
    assert not is_up(layout)
