"""``flowmesh sim``: compare scheduling policies over made-up fleets and workloads; ``--full`` is the whole study."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flowmesh_scheduler.sim.study import Outcome


def sim(
    workload: Annotated[str, typer.Option("--workload", help="Workloads, by comma; default: all.")] = "",
    policy: Annotated[str, typer.Option("--policy", help="Policies, by comma; default: all.")] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds.")] = 3,
    first_seed: Annotated[
        int, typer.Option("--first-seed", min=1, help="First seed: 1 to 9 for tuning, 1001 on for results.")
    ] = 1,
    overlap: Annotated[float, typer.Option("--overlap", min=0, max=1, help="Share that tenants of `mix` have in common.")] = 0.4,
    ablate: Annotated[str, typer.Option("--ablate", help="Parts of ours to switch off, each by itself, by comma.")] = "",
    full: Annotated[bool, typer.Option("--full", help="The whole study: sweep of overlaps, ablations, bars.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for sim.jsonl and plots.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Simulate scheduling policies; exit with 1 when a bar of the study is missed."""
    from rich.console import Console

    from flowmesh_scheduler.sim import plots, report, study, verdict
    from flowmesh_scheduler.sim.policies import NAMES
    from flowmesh_scheduler.sim.workloads import WORKLOADS

    workloads = _chosen(workload, tuple(WORKLOADS), "--workload")
    policies = _chosen(policy, NAMES, "--policy")
    parts = _chosen(ablate, study.ABLATIONS, "--ablate") if ablate else ()
    if full:
        first_seed = study.EVALUATION_SEED
        numbers = range(first_seed, first_seed + seeds)
        todo = study.whole_study(numbers, numbers[: max(1, seeds // 4)])
    else:
        numbers = range(first_seed, first_seed + seeds)
        todo = study.every_job(workloads, policies, numbers, overlap)
        todo += [study.Job(name, "ours", seed, overlap, part) for part in parts for name in workloads for seed in numbers]
    outcomes = study.run_all(todo, jobs, _progress)
    table = verdict.Table(outcomes)
    found = verdict.records(table, first_seed) if full else []
    if out is not None:
        if found:
            verdict.write(found, out / "sim.jsonl")
        plots.draw(table, out)
    if as_json:
        runs = [_plain_outcome(outcome) for outcome in outcomes]
        print(json.dumps({"runs": runs, "records": [asdict(record) for record in found]}))
    else:
        console = Console(width=None if sys.stdout.isatty() else 170)
        report.show(table, found, console)
        for line in report.shares(table):
            console.print(line)
    if any(record.ok is False for record in found):
        raise typer.Exit(1)


def _plain_outcome(outcome: Outcome) -> dict[str, Any]:
    job = asdict(outcome.job)
    measured = {"overlap_measured": outcome.shared.between_tenants, "cpu_s": round(outcome.cpu_s, 3)}
    return {**job, **outcome.figures.plain(), **measured}


def _chosen(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    if not text:
        return known
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not known; choose from {', '.join(known)}", param_hint=option)
    return names


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} runs", end="" if done < total else "\n", file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 20) == 0:
        print(f"{done} of {total} runs", file=sys.stderr, flush=True)
