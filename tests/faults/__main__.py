"""``make sim-faults``: many seeds on several processes, figures in out/sim-faults.jsonl, histories of what failed beside it."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import msgspec
from tests.faults.seeds import OUT, line_of, run_one, write_history
from tests.faults.simulation import Report, simulate

SEEDS_OF_TESTS = 25
SEEDS_OF_A_PROCESS = 50
"""Processes that have run about so many make way for fresh ones: what the dead of a simulation had open is freed with them. (The
pool's own limit of tasks makes it hang in some releases of Python.)"""


def main() -> None:
    """Run what the command line asks for; exit with 1 if a promise was broken."""
    options = _parse()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.CRITICAL, format="%(levelname)s %(name)s %(message)s")
    kinds = tuple(options.kinds.split(",")) if options.kinds else None
    if options.seed is not None:
        report = simulate(options.seed, options.minutes, kinds)
        print(line_of(report))
        write_history(report, OUT)
        sys.exit(bool(report.problems))
    seeds = range(options.first, options.first + options.seeds)
    began_s = time.monotonic()
    reports: list[Report] = []
    block = SEEDS_OF_A_PROCESS * options.processes
    for start in range(0, len(seeds), block):
        reports += _run(seeds[start : start + block], options.minutes, kinds, options.processes)
        _write_figures(reports, time.monotonic() - began_s, options.minutes)
        if len(seeds) > block:
            print(f"{len(reports)} of {len(seeds)} seeds", file=sys.stderr, flush=True)
    failed = [report for report in reports if report.problems]
    print(f"{len(reports)} seeds of {options.minutes:g} minutes, {len(failed)} broke a promise; see {OUT / 'sim-faults.jsonl'}")
    sys.exit(bool(failed))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Simulate the mesh under faults.")
    parser.add_argument("--seed", type=int, help="run this one and write its history")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=SEEDS_OF_TESTS, help="how many")
    parser.add_argument("--minutes", type=float, default=10.0, help="virtual minutes of each")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", default="", help="kinds of faults, with commas; otherwise the seed chooses")
    parser.add_argument("--verbose", action="store_true", help="show what the mesh logs")
    return parser.parse_args()


def _run(seeds: range, minutes: float, kinds: tuple[str, ...] | None, processes: int) -> list[Report]:
    found: list[Report] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_one, seed, minutes, kinds) for seed in seeds]):
            report = done.result()
            found.append(report)
            if report.problems:
                print(line_of(report), flush=True)
    return sorted(found, key=lambda each: each.seed)


def _write_figures(reports: list[Report], wall_s: float, minutes: float) -> None:
    OUT.mkdir(exist_ok=True)
    commit = _commit()
    broken = sum(bool(report.problems) for report in reports)
    rows = [
        {"name": "seeds that broke a promise", "value": broken, "unit": "seeds", "bar": 0, "ok": broken == 0},
        {"name": "seeds", "value": len(reports), "unit": "seeds"},
        {"name": "virtual time of each", "value": minutes, "unit": "min"},
        {"name": "wall time", "value": round(wall_s, 1), "unit": "s"},
        {"name": "processor time of each", "value": round(sum(r.cpu_s for r in reports) / max(1, len(reports)), 2), "unit": "s"},
        {"name": "runs", "value": sum(r.orders for r in reports), "unit": "runs"},
        {"name": "executions", "value": sum(r.executions for r in reports), "unit": "operators"},
        {"name": "epochs", "value": sum(r.epochs for r in reports), "unit": "epochs"},
        {"name": "faults", "value": sum(sum(r.faults.values()) for r in reports), "unit": "faults"},
    ]
    seeds = f"{reports[0].seed}..{reports[-1].seed}" if reports else ""
    with (OUT / "sim-faults.jsonl").open("wb") as file:
        for row in rows:
            file.write(msgspec.json.encode({"bar": None, "ok": None, "seed": seeds, "commit": commit, **row}) + b"\n")
        for report in reports:
            row = {"name": "seed", "value": len(report.problems), "unit": "problems", "bar": 0, "ok": not report.problems}
            more = {"seed": report.seed, "commit": commit, "digest": report.digest, "problems": report.problems[:5]}
            file.write(msgspec.json.encode({**row, **more}) + b"\n")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, env=os.environ, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
