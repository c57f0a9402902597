"""Executor processes, real ones: lent, kept, ended to make room, dead by accident."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from flowmesh_cas.errors import ExecutionError
from flowmesh_node import frames
from flowmesh_node.executor import Executor, Watch
from flowmesh_node.executors import Executors, executor_environment
from flowmesh_node.operators.base import Batch, Input, Item, Produced, encode_rows

ENVIRONMENT = executor_environment(cpus=2, slots=1, allow_hub=False)


class _Heard:
    """What an executor says."""

    def __init__(self) -> None:
        self.settled: list[frames.Settled] = []
        self.lines: list[str] = []
        self.loaded = asyncio.Event()

    def watch(self) -> Watch:
        return Watch(self.settled.append, self.lines.append, lambda frame: self.loaded.set())


def _split(scratch: Path, count: int = 1) -> Batch:
    data = encode_rows([{"n": 1}])
    items = [Item(str(n), "x", {"parts": 1}, {"rows": [Input("rows", "d", len(data), 1, data=data)]}) for n in range(count)]
    scratch.mkdir(exist_ok=True)
    return Batch("data.split", 1, items, scratch=str(scratch))


def _slow(scratch: Path) -> Batch:
    scratch.mkdir(exist_ok=True)
    query = "SELECT sum(a.range * b.range) AS s FROM range(1000000) a, range(1000000) b"
    return Batch("data.sql", 1, [Item("0", "x", {"query": query})], scratch=str(scratch))


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[Executors]:
    made = Executors(ENVIRONMENT, slots=1, user_slots=2, memory_bytes=2**40)
    yield made
    await made.close()


async def test_a_process_stays_for_the_next_batch(pool: Executors, tmp_path: Path) -> None:
    pids = []
    for number in range(2):
        heard = _Heard()
        async with pool.lent("data") as executor:
            await executor.run(_split(tmp_path / str(number), 3), heard.watch())
            pids.append(executor.pid)
        assert sorted(frame.index for frame in heard.settled) == [0, 1, 2]
        assert all(isinstance(frame.produced, Produced) for frame in heard.settled)
    assert pids[0] == pids[1]


async def test_a_dead_process_is_replaced(pool: Executors, tmp_path: Path) -> None:
    async with pool.lent("data") as executor:
        first = executor.pid
    os.kill(first, signal.SIGKILL)
    await asyncio.sleep(0.1)
    async with pool.lent("data") as executor:
        assert executor.pid != first
        heard = _Heard()
        await executor.run(_split(tmp_path / "s"), heard.watch())
        assert len(heard.settled) == 1


async def test_a_process_that_dies_at_work_is_told_as_a_crash(pool: Executors, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    heard = _Heard()
    async with pool.lent("data") as executor:
        running = asyncio.create_task(executor.run(_slow(tmp_path / "s"), heard.watch()))
        await asyncio.wait_for(heard.loaded.wait(), 20)
        os.kill(executor.pid, signal.SIGSEGV)
        with pytest.raises(ExecutionError, match="SIGSEGV") as raised:
            await running
    assert raised.value.reason == "crashed"


async def test_a_process_that_hangs_is_killed_and_the_lane_is_free_again(pool: Executors, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    heard = _Heard()
    async with pool.lent("data") as executor:
        pid = executor.pid
        with pytest.raises(ExecutionError, match=r"0\.5 s") as raised:
            await executor.run(_slow(tmp_path / "s"), heard.watch(), timeout_s=0.5)
    assert raised.value.reason == "timeout"
    assert not psutil.pid_exists(pid)
    async with pool.lent("data") as executor:
        await executor.run(_split(tmp_path / "t"), heard.watch())
    assert len(heard.settled) == 1


async def test_a_cancelled_batch_ends_its_process(pool: Executors, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    heard = _Heard()
    async with pool.lent("data") as executor:
        running = asyncio.create_task(executor.run(_slow(tmp_path / "s"), heard.watch()))
        await asyncio.wait_for(heard.loaded.wait(), 20)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not executor.is_alive


async def test_idle_processes_make_room_the_least_recently_used_first() -> None:
    pool = Executors(ENVIRONMENT, slots=1, user_slots=1, memory_bytes=1)
    try:
        async with pool.lent("data") as executor:
            data = executor.pid
            async with pool.lent("user") as other:
                user = other.pid
                assert psutil.pid_exists(data), "a process at work is left alone"
        async with pool.lent("train"):
            assert not psutil.pid_exists(data)
            assert not psutil.pid_exists(user)
    finally:
        await pool.close()


async def test_an_executor_has_nothing_open_of_ours(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        executor = Executor("data", ENVIRONMENT)
        await executor.start()
        try:
            heard = _Heard()
            await executor.run(_split(tmp_path / "s"), heard.watch())
            folder = f"/proc/{executor.pid}/fd"
            links = {os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}
            assert str(tmp_path / "secret") not in links
        finally:
            await executor.kill()


async def test_executors_run_offline_and_repeatably() -> None:
    assert ENVIRONMENT["PYTHONHASHSEED"] == os.environ.get("PYTHONHASHSEED", "0")
    assert ENVIRONMENT["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in executor_environment(cpus=2, slots=1, allow_hub=True) or "HF_HUB_OFFLINE" in os.environ
