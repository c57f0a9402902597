"""Run the benchmarks: rounds of every peer in turn, so that a busy minute of the machine hits all of them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import growth, prediction, start
from bench.report import Ledger, Record, show, write
from bench.round import PEERS
from bench.workloads import WORKLOADS, Figure
from flowmesh_scheduler.sim.verdict import commit

ROUND_TIMEOUT_S = 900.0
HELP_BAR_S = 0.3
COLD_BAR_S = 3.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    rounds = int(os.environ.get("BENCH_ROUNDS", "5"))
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds per peer; medians over them (default %(default)s)")
    parser.add_argument("--only", default=",".join([*WORKLOADS, "start", "prediction", "decision"]), help="of %(default)s")
    parser.add_argument("--peers", default=",".join(PEERS), help="of %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the operators, for a quick look; bars hold at 1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/bench.jsonl"))
    return parser.parse_args()


def _round(peer: str, workloads: list[str], scale: float, seed: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.jsonl"
        command = [sys.executable, "-m", "bench.round", peer, ",".join(workloads), str(scale), str(seed), str(path)]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=ROUND_TIMEOUT_S, check=False
            ).returncode
        for line in path.read_text().splitlines() if path.exists() else []:
            yield Figure(**json.loads(line))
        if code:
            print(f"round of {peer} failed with {code}:\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)


def _starts(seed: int, rounds: int) -> list[Record]:
    help_s, cold_s = start.help_s(max(3, rounds)), [start.cold_s() for _ in range(max(1, rounds))]
    return [
        _start_record("start.help", help_s, HELP_BAR_S, seed),
        _start_record("start.cold_up_to_result", cold_s, COLD_BAR_S, seed),
    ]


def _start_record(name: str, took_s: list[float], bar_s: float, seed: int) -> Record:
    value = start.typical(took_s)
    return Record(name, value, "s", f"<= {bar_s:g} s", value <= bar_s, seed, commit(), tuple(took_s))


def _predictions(seed: int) -> list[Record]:
    """Return how far predictions are off, for each kind of work of the demo."""
    print("prediction", file=sys.stderr, flush=True)
    found = []
    for figure in prediction.measure():
        is_asked = figure.name in prediction.OF_THE_DEMO
        bar, ok = (f"<= {prediction.BAR:g}", figure.value <= prediction.BAR) if is_asked else ("", None)
        found.append(Record(figure.name, figure.value, figure.unit, bar, ok, seed, commit()))
    return found


def main() -> int:
    """Run, print, append to the file; return 1 when a bar is missed or a round failed."""
    args = _arguments()
    wanted = args.only.split(",")
    workloads = [name for name in wanted if name in WORKLOADS]
    peers = args.peers.split(",")
    ledger = Ledger(args.seed)
    for number in range(args.rounds if workloads else 0):
        for peer in peers:
            print(f"round {number + 1} of {args.rounds}: {peer}", file=sys.stderr, flush=True)
            for figure in _round(peer, workloads, args.scale, args.seed * 1000 + number):
                ledger.add(peer, figure)
    extra = _starts(args.seed, args.rounds) if "start" in wanted else []
    extra += _predictions(args.seed) if "prediction" in wanted else []
    is_complete = ledger.complete(peers, workloads, args.rounds)
    if "decision" in wanted:
        found, is_measured = growth.figures([count for count in growth.COUNTS if count <= args.scale * growth.COUNTS[-1]])
        growth.write_plot(found, args.out.with_name("decision.svg"))
        extra += growth.records(found, args.seed)
        is_complete = is_complete and is_measured
    records = ledger.records() + extra
    write(records, args.out)
    show(ledger, extra)
    return 1 if any(record.ok is False for record in records) or not is_complete else 0


if __name__ == "__main__":
    raise SystemExit(main())
