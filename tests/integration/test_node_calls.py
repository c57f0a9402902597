"""Users' functions on a real node, the bad ones above all: each ends with the right reason, and the node goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from tests.integration.node_leader import NodeProcess, SmallLeader, one_node

from flowmesh_mesh.messages import Outcome, Reason

Mesh = tuple[SmallLeader, NodeProcess]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with one_node(tmp_path_factory.mktemp("mesh")) as found:
        yield found


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def _survives(leader: SmallLeader) -> None:
    """The node still works, and says so in time."""
    good = await leader.call("n1", "def f(x): return x + 1", args={"x": 41})
    assert leader.value(good.outputs["out"][0]) == 42
    assert time.time_ns() // 1000 - leader.beats["n1"].at_us < 3_000_000


async def test_a_function_returns_a_value(mesh: Mesh) -> None:
    outcome = await mesh[0].call("n1", "def f(x, y): return {'sum': x + y}", args={"x": 1, "y": 2})
    assert outcome.reason == Reason.SUCCEEDED, outcome.error
    assert mesh[0].value(outcome.outputs["out"][0]) == {"sum": 3}
    assert outcome.log is None
    assert outcome.metered.exec_us > 0


async def test_a_function_sees_rows_and_may_yield_rows(mesh: Mesh) -> None:
    leader, _ = mesh
    source = "def f(left, right):\n    for a, b in zip(left, right):\n        yield {'z': a['x'] * b['y']}\n"
    inputs = {"left": [leader.rows([{"x": 2}, {"x": 3}])], "right": [leader.rows([{"y": 5}, {"y": 7}])]}
    item = leader.item({"function": "f", "args": {}, "returns": "rows"}, inputs)
    (outcome,) = await leader.run("n1", "python.call", [item], code=leader.source(source))
    ref = outcome.outputs["out"][0]
    assert (ref.kind, ref.rows) == ("rows", 2)
    assert await leader.fetched(ref, "n1") == b'{"z":10}\n{"z":21}\n'


async def test_an_exception_is_told_with_the_users_traceback_only(mesh: Mesh) -> None:
    outcome = await mesh[0].call("n1", "def f():\n    secret = 1\n    raise ValueError('no such luck')\n")
    assert outcome.reason == Reason.USER_ERROR
    assert "ValueError: no such luck" in outcome.error
    assert "line 3, in f\n    raise ValueError" in outcome.error
    assert "flowmesh_node" not in outcome.error
    await _survives(mesh[0])


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("import sys\ndef f(): sys.exit(3)", "sys.exit(3)"),
        ("import os\ndef f(): os._exit(7)", "exit code 7"),
        ("import os, signal\ndef f(): os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os, signal\ndef f(): os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
async def test_a_function_that_ends_its_process_is_a_crash(mesh: Mesh, source: str, word: str) -> None:
    outcome = await mesh[0].call("n1", source)
    assert outcome.reason == Reason.CRASHED
    assert word in outcome.error
    await _survives(mesh[0])


async def test_a_function_that_leaks_memory_is_stopped_at_its_limit(mesh: Mesh) -> None:
    source = "def f():\n    kept = []\n    while True:\n        kept.append(bytearray(b'x' * 4_000_000))\n"
    outcome = await mesh[0].call("n1", source, memory_bytes=200 * 2**20)
    assert outcome.reason == Reason.OOM, outcome
    await _survives(mesh[0])


async def test_one_huge_allocation_is_refused(mesh: Mesh) -> None:
    outcome = await mesh[0].call("n1", "def f(): return len(bytearray(8 * 2**30))", memory_bytes=200 * 2**20)
    assert outcome.reason == Reason.OOM
    assert "MemoryError" in outcome.error


async def test_memory_of_children_counts_too(mesh: Mesh) -> None:
    source = """
import os, time
def f():
    for _ in range(4):
        if os.fork() == 0:
            held = bytearray(b'x' * 100_000_000)
            time.sleep(60)
    time.sleep(60)
"""
    outcome = await mesh[0].call("n1", source, memory_bytes=250 * 2**20)
    assert outcome.reason == Reason.OOM


async def test_printing_100_mb_neither_stops_the_function_nor_fills_the_log(mesh: Mesh) -> None:
    leader, node = mesh
    source = "def f():\n    for _ in range(100):\n        print('x' * 1_000_000)\n    return 'done'\n"
    agent = psutil.Process(node.process.pid)
    before_bytes = agent.memory_info().rss
    outcome = await leader.call("n1", source)
    assert outcome.reason == Reason.SUCCEEDED, outcome.error
    assert leader.value(outcome.outputs["out"][0]) == "done"
    assert outcome.log is not None
    assert 900_000 < outcome.log.size < 1_200_000
    text = (await leader.fetched(outcome.log, "n1")).decode()
    assert "output cut: 99" in text[-200:]
    assert agent.memory_info().rss - before_bytes < 60 * 2**20
    assert sum(len(line) for log in leader.logs for line in log.lines) < 8 * 2**20
    await _survives(leader)


async def test_a_million_short_lines_are_sampled(mesh: Mesh) -> None:
    leader, _ = mesh
    leader.logs.clear()
    outcome = await leader.call("n1", "def f():\n    for n in range(1_000_000): print(n)\n")
    assert outcome.reason == Reason.SUCCEEDED
    lines = [line for log in leader.logs for line in log.lines]
    assert lines[0] == "0"
    assert 100 < len(lines) < 5000
    assert any("left out" in line for line in lines)


async def test_a_function_that_never_returns_is_stopped(mesh: Mesh) -> None:
    began_s = time.monotonic()
    outcome = await mesh[0].call("n1", "def f():\n    while True: pass\n", timeout_s=1.0)
    assert outcome.reason == Reason.TIMEOUT
    assert "1 s" in outcome.error
    assert time.monotonic() - began_s < 30
    await _survives(mesh[0])


async def test_nothing_survives_a_function_that_forks_and_detaches(mesh: Mesh, tmp_path: Path) -> None:
    marker = tmp_path / "pids"
    source = f"""
import os, time
def f():
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                with open({str(marker)!r}, 'a') as file:
                    file.write(f'{{os.getpid()}}\\n')
                time.sleep(600)
            os._exit(0)
    time.sleep(0.5)
    return 'parent is done'
"""
    outcome = await mesh[0].call("n1", source)
    assert outcome.reason == Reason.SUCCEEDED, outcome.error
    pids = [int(line) for line in marker.read_text().split()]
    assert len(pids) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_a_fork_bomb_is_stopped(mesh: Mesh) -> None:
    source = (
        "import os, time\ndef f():\n    for _ in range(400):\n        if os.fork() == 0: time.sleep(60)\n    time.sleep(60)\n"
    )
    outcome = await mesh[0].call("n1", source, timeout_s=30)
    assert outcome.reason == Reason.CRASHED
    assert "processes" in outcome.error
    await _survives(mesh[0])


async def test_an_aborted_function_ends_at_once(mesh: Mesh, tmp_path: Path) -> None:
    leader, _ = mesh
    marker = tmp_path / "pid"
    source = f"import os, time\ndef f():\n    open({str(marker)!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    item = leader.item({"function": "f", "args": {}, "returns": "value"})
    name = await leader.assign("n1", "python.call", [item], code=leader.source(source))
    await leader.until(lambda: marker.exists() and marker.read_text())
    leader.abort("n1", name)
    await asyncio.wait_for(leader.closed[name].wait(), 30)
    assert leader.outcomes[name][0].reason == Reason.CANCELLED
    pid = int(marker.read_text())
    await leader.until(lambda: not psutil.pid_exists(pid))
    await _survives(leader)


async def test_what_a_function_prints_comes_live_and_is_kept(mesh: Mesh) -> None:
    leader, _ = mesh
    leader.logs.clear()
    outcome = await leader.call("n1", "import sys\ndef f():\n    print('to out')\n    print('to err', file=sys.stderr)\n")
    assert [line for log in leader.logs for line in log.lines] == ["to out", "to err"]
    assert outcome.log is not None
    assert await leader.fetched(outcome.log, "n1") == b"to out\nto err\n"


@pytest.mark.parametrize(
    ("source", "more", "reason", "word"),
    [
        ("def g(): pass", {}, Reason.USER_ERROR, "defines no function 'f'"),
        ("def f(:", {}, Reason.USER_ERROR, "SyntaxError"),
        ("def f(): return object()", {}, Reason.USER_ERROR, "cannot be written as JSON"),
        ("def f(): return 1", {"returns": "rows"}, Reason.USER_ERROR, "must return rows"),
        ("def f(): return [1]", {"returns": "rows"}, Reason.USER_ERROR, "row 0 is not a dict"),
        ("def f(): pass", {"args": {"x": 1}}, Reason.USER_ERROR, "unexpected keyword argument 'x'"),
        ("import nothing_like_this\ndef f(): pass", {}, Reason.USER_ERROR, "ModuleNotFoundError"),
    ],
)
async def test_a_mistake_in_the_source_is_named(mesh: Mesh, source: str, more: dict[str, Any], reason: str, word: str) -> None:
    outcome: Outcome = await mesh[0].call("n1", source, **more)
    assert outcome.reason == reason
    assert word in outcome.error


async def test_a_function_needs_the_distributions_that_it_requires(mesh: Mesh) -> None:
    leader, _ = mesh
    for requires in (["no-such-thing==1.0"], ["msgspec==0.0.1"]):
        item = leader.item({"function": "f", "args": {}, "returns": "value", "requires": requires})
        (outcome,) = await leader.run("n1", "python.call", [item], code=leader.source("def f(): pass"))
        assert outcome.reason == Reason.UNSATISFIABLE
        assert requires[0] in outcome.error


async def test_a_function_does_not_see_the_nodes_secrets(mesh: Mesh) -> None:
    source = "import os\ndef f(): return sorted(os.environ)"
    outcome = await mesh[0].call("n1", source)
    names = mesh[0].value(outcome.outputs["out"][0])
    assert "TMPDIR" in names
    assert not [name for name in names if name.startswith(("FLOWMESH", "NATS", "VAST"))]
    outcome = await mesh[0].call(
        "n1",
        "import os\ndef f(): return [os.readlink(f'/proc/self/fd/{n}') for n in range(3, 64) "
        "if os.path.exists(f'/proc/self/fd/{n}')]",
    )
    assert mesh[0].value(outcome.outputs["out"][0]) == []
