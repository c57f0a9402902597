"""Trainings on a real mesh whose node, then whose leader, is killed: they go on from what the mesh holds, to the same bits."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.resume import ROWS, disturbed, results_of, small_model, workflow

from flowmesh_cas.pack_store import PackStore
from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_mesh.checkpoints import MANIFEST, PIN, decode_manifest
from flowmesh_mesh.client import connect
from flowmesh_node.executor import Executor, Watch
from flowmesh_node.executors import executor_environment
from flowmesh_node.frames import Checkpointed
from flowmesh_node.operators.base import Batch, Input, Item, Model, encode_rows

_LACKING = [name for name in ("torch", "transformers", "trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.torch,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(_LACKING), reason=f"the node extra is not installed (no {', '.join(_LACKING)})"),
]

CADENCE_S = 0.5
STEPS = 150


@pytest.fixture(autouse=True)
def cadence() -> Iterator[None]:
    os.environ["FLOWMESH_CHECKPOINT_S"] = str(CADENCE_S)
    yield
    del os.environ["FLOWMESH_CHECKPOINT_S"]


async def test_a_training_outlives_its_node_and_then_its_leader(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    async with embedded_mesh(tmp_path / "mesh", nodes=2) as mesh, connect(context=mesh) as client:
        # Two trainings of the same numbers under two keys, side by side: the one that is left alone tells what must come out.
        alone = await client.submit(workflow(model, "train.sft", STEPS, 0))
        run = await client.submit(workflow(model, "train.sft", STEPS, 1))
        outcome = await disturbed(mesh, run, STEPS // 2, then=lambda: mesh.signal("scheduler", signal.SIGKILL))
        assert outcome.results == await results_of(alone)
        assert 0 < outcome.resumed_at <= outcome.killed_at
        assert outcome.repeated_s <= CADENCE_S + 2.0, "the steps of one cadence, and what the machine was late"
        assert outcome.nodes[0] != outcome.nodes[1]
        (row,) = await run.operators()
        assert row["attempt"] == 2, "a leader that is lost costs no attempt"
        async with asyncio.timeout(30):  # nothing of a checkpoint is kept after the result
            while await asyncio.to_thread(held, tmp_path / "mesh"):  # noqa: ASYNC110
                await asyncio.sleep(0.2)


async def test_a_training_writes_a_checkpoint_when_it_is_told_to(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    data = encode_rows(ROWS)
    rows = Input("rows", hashlib.sha256(data).hexdigest(), len(data), len(ROWS), data)
    params = workflow(model, "train.sft", 100_000, 0)["operators"]["train"]["with"]
    item = Item("ab" * 32, "train", params, {"rows": [rows]}, 0, 1)
    (tmp_path / "scratch").mkdir()
    models = {"model": Model(model, "sha256:small", model)}
    batch = Batch("train.sft", 1, [item], models, scratch=str(tmp_path / "scratch"), cadence_s=1e6)
    executor = Executor("train", executor_environment(cpus=1, slots=1, allow_hub=False))
    await executor.start()
    came: asyncio.Future[Checkpointed] = asyncio.get_running_loop().create_future()

    def hear(line: str) -> None:
        if line.startswith("step 3 "):
            executor.checkpoint_now()

    running = asyncio.create_task(executor.run(batch, Watch(lambda frame: None, hear, lambda frame: None, came.set_result)))
    try:
        async with asyncio.timeout(200):
            frame = await came
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert frame.step > 3
    data = await asyncio.to_thread(Path(frame.path, MANIFEST).read_bytes)
    assert decode_manifest(data).step == frame.step


def held(folder: Path) -> list[str]:
    """Return the owners of the pins on checkpoints at the hub."""
    owners = []
    for packs in folder.rglob("packs"):
        with PackStore(packs.parent) as store:
            owners += [pin.owner for pin in store.all_pins() if pin.owner.startswith(f"{PIN}:")]
    return owners
