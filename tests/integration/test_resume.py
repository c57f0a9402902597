"""Trainings on a real mesh whose node, then whose leader, is killed: they go on from what the mesh holds, to the same bits."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.resume import disturbed, results_of, small_model, workflow

from flowmesh_cas.pack_store import PackStore
from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_mesh.checkpoints import PIN
from flowmesh_mesh.client import connect

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


def held(folder: Path) -> list[str]:
    """Return the owners of the pins on checkpoints at the hub."""
    owners = []
    for packs in folder.rglob("packs"):
        with PackStore(packs.parent) as store:
            owners += [pin.owner for pin in store.all_pins() if pin.owner.startswith(f"{PIN}:")]
    return owners
