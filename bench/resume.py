"""Kill the node under a training at random points: what is repeated, and whether the adapter is that of a training left alone.

``python -m bench.resume`` writes out/resume.jsonl. Each training runs on a real mesh of two nodes; the one that trains is killed
with SIGKILL, and the other goes on from the last checkpoint that the mesh holds. The same training under another operator key
(its ``max_length`` differs, which cuts nothing here) is left alone first: the others are held against its adapter and metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import Record, write
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.run import Run
from flowmesh_scheduler.sim.verdict import commit

MAX_LENGTH = 96
DEADLINE_S = 240.0
ROWS = [
    {
        "prompt": f"Question {n}: what is {n} and {n}?",
        "completion": f"It is {n + n}.",
        "chosen": f"{n + n}",
        "rejected": f"maybe {n}",
    }
    for n in range(11)
]
_STEP = re.compile(r"step (\d+) of \d+: ")
_RESUMED = re.compile(r"going on after step (\d+) of \d+")


def small_model(folder: Path) -> str:
    """Make a language model of 0.2 million random weights that reads bytes; return its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {name: number for number, name in enumerate(["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def workflow(model: str, kind: str, steps: int, number: int) -> dict[str, Any]:
    """Return a document with one training; another ``number`` is another operator key for the same numbers."""
    params: dict[str, Any] = {
        "model": model,
        "steps": steps,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "max_length": MAX_LENGTH + number,
        "lora": {"r": 4, "dropout": 0.05},
        "seed": 5,
        "chat": False,
    }
    return {
        "apiVersion": "flowmesh/v1",
        "name": f"train-{number}",
        "operators": {"train": {"type": kind, "inputs": {"rows": {"rows": ROWS}}, "with": params}},
    }


@dataclass(slots=True)
class Watched:
    """What was seen of a training: when each step was told, where attempts went on, and the node of each."""

    told_s: dict[int, float] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    last_step: int = 0

    async def follow(self, run: Run) -> None:
        """Read the log of the training as it comes."""
        async for _, line in run.logs("train", follow=True):
            self.lines.append(line)
            if found := _STEP.match(line):
                self.last_step = int(found[1])
                self.told_s.setdefault(self.last_step, time.monotonic())
            elif found := _RESUMED.match(line):
                self.resumed.append(int(found[1]))

    async def reached(self, step: int) -> None:
        """Wait until a step was told."""
        while self.last_step < step:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A training that was disturbed: where it was killed, from where it went on, how long until then, and what came out."""

    killed_at: int
    resumed_at: int
    repeated_s: float
    idle_s: float
    results: dict[str, str]
    nodes: tuple[str, ...]


async def results_of(run: Run) -> dict[str, str]:
    """Return the digests of a training's outputs."""
    await run.result(timeout_s=DEADLINE_S)
    outputs = await run.outputs("train")
    return {name.rpartition(".")[2]: ref.digest.hex() for name, output in outputs.items() for ref in output.refs}


async def node_of(run: Run) -> str:
    """Wait until the training runs; return on which node."""
    while True:
        (row,) = await run.operators()
        if row["state"] == "assigned" and row["node"]:
            return str(row["node"])
        await asyncio.sleep(0.02)


async def disturbed(mesh: EmbeddedMesh, run: Run, kill_at: int, then: Callable[[], object] | None = None) -> Outcome:
    """Kill the node that trains once it has told of step ``kill_at``; return what became of the training.

    ``then`` is called when another node has gone on with it.
    """
    watched = Watched()
    following = asyncio.create_task(watched.follow(run))
    async with asyncio.timeout(DEADLINE_S):
        await watched.reached(kill_at)
        first = await node_of(run)
        mesh.kill_node(first)
        killed_s = time.monotonic()
        await asyncio.sleep(0.2)  # lines that were on their way
        killed_at, watched.last_step = watched.last_step, 0
        if then is not None:
            await watched.reached(1)
            then()
        results = await results_of(run)
        await following
    (row,) = await run.operators()
    resumed_at = watched.resumed[-1] if watched.resumed else 0
    seen_s = min((at_s for step, at_s in watched.told_s.items() if step >= max(1, resumed_at)), default=killed_s)
    new_s = min((at_s for at_s in watched.told_s.values() if at_s > killed_s + 0.2), default=killed_s)
    repeated_s = watched.told_s.get(killed_at, seen_s) - seen_s
    return Outcome(killed_at, resumed_at, max(0.0, repeated_s), new_s - killed_s, results, (first, str(row["node"])))


async def _rounds(folder: Path, seed: int, steps: int, cadence_s: float, plan: Iterable[tuple[str, int]]) -> list[Record]:
    model = small_model(folder / "model")
    draw, number, records = random.Random(seed), 0, list[Record]()
    async with embedded_mesh(folder / "mesh", nodes=2) as mesh, connect(context=mesh) as client:
        for kind, rounds in plan:
            alone = await results_of(await client.submit(workflow(model, kind, steps, number)))
            outcomes = []
            for _ in range(rounds):
                number += 1
                run = await client.submit(workflow(model, kind, steps, number))
                outcomes.append(await disturbed(mesh, run, draw.randrange(steps // 10, steps * 9 // 10)))
                print(f"{kind}: {outcomes[-1]}", flush=True)
                await mesh.start_node(outcomes[-1].nodes[0])
            number += 1
            records += _records(kind, outcomes, alone, cadence_s, seed)
    return records


def _records(kind: str, outcomes: list[Outcome], alone: dict[str, str], cadence_s: float, seed: int) -> list[Record]:
    def record(name: str, values: list[float], unit: str, bar: str = "", ok: bool | None = None) -> Record:
        return Record(f"resume.{kind}.{name}", median(values), unit, bar, ok, seed, commit(), tuple(values))

    equal = [float(outcome.results == alone) for outcome in outcomes]
    lost = [outcome.repeated_s / cadence_s for outcome in outcomes]
    steps = [float(outcome.killed_at - outcome.resumed_at) for outcome in outcomes]
    return [
        record("equal", equal, "of 1", "all", all(equal)),
        record("repeated", lost, "cadences", "worst <= 1", max(lost) <= 1.0),
        record("repeated_steps", steps, "steps"),
        record("idle", [outcome.idle_s for outcome in outcomes], "s"),
    ]


def main() -> None:
    """Run the drills and append their records; exit with 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cadence", type=float, default=1.0)
    parser.add_argument("--sft", type=int, default=5)
    parser.add_argument("--dpo", type=int, default=1)
    given = parser.parse_args()
    os.environ["FLOWMESH_CHECKPOINT_S"] = str(given.cadence)
    plan = (("train.sft", given.sft), ("train.dpo", given.dpo))
    with tempfile.TemporaryDirectory() as folder:
        records = asyncio.run(_rounds(Path(folder), given.seed, given.steps, given.cadence, plan))
    write(records, Path("out/resume.jsonl"))
    for record in records:
        print(record.name, record.rounds, record.unit, record.bar, "" if record.ok is None else "ok" if record.ok else "MISSED")
    raise SystemExit(0 if all(record.ok is not False for record in records) else 1)


if __name__ == "__main__":
    main()
