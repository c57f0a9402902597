"""Run the drills, then chaos over seeds; append figures, write the report, and end with 1 when a promise was seen broken."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path

from chaos import drills, report
from chaos.processes import Shape
from chaos.running import outcomes_of, run
from chaos.seed import Outcome

REPORT = Path("docs/fault-report.md")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="minutes of faults over all seeds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="run this one only")
    parser.add_argument("--first", type=int, default=1, help="number of the first seed (default %(default)s)")
    parser.add_argument("--brokers", type=int, default=3, choices=(1, 3))
    parser.add_argument("--schedulers", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=1, help="seeds to run side by side (default %(default)s)")
    parser.add_argument("--no-drills", action="store_true", help="leave the fail-over drills out")
    parser.add_argument("--folder", type=Path, default=None, help="where the meshes live; failing seeds stay there")
    parser.add_argument("--out", type=Path, default=Path("out/chaos.jsonl"))
    parser.add_argument("--report", type=Path, default=None, help=f"write the page here (default {REPORT}, for whole runs only)")
    return parser.parse_args()


def _say(outcome: Outcome, folder: Path, args: argparse.Namespace) -> None:
    counts = outcome.verdict.counts
    faults = sum(count for name, count in counts.items() if name.startswith("fault "))
    state = "good" if outcome.is_good else "FAILED"
    text = f"{counts['accepted']} accepted, {counts['verified']} verified, {counts['unknown']} unknown, {faults} faults"
    print(f"seed {outcome.seed}: {state}, {outcome.took_s:.0f} s: {text} {outcome.error}", file=sys.stderr, flush=True)
    for violation in outcome.verdict.violations[: report.SHOWN_VIOLATIONS]:
        print(f"  {violation.kind}: {violation.subject}: {violation.what}", file=sys.stderr)
    if not outcome.is_good:
        minutes = outcome.window_s / 60
        print(f"  kept in {folder}; again: make chaos SEED={outcome.seed} MINUTES={minutes:g}", file=sys.stderr, flush=True)


def main() -> int:
    """Run everything; return 1 when a promise was seen broken or a bar is missed."""
    args = _arguments()
    home = args.folder or Path(tempfile.mkdtemp(prefix="flowmesh-chaos-"))
    window_s = args.minutes * 60 / args.seeds
    seeds = [args.seed] * args.seeds if args.seed is not None else list(range(args.first, args.first + args.seeds))
    figures = [] if args.no_drills or args.seed is not None else run(drills.run_all(home / "drills"))
    outcomes: list[Outcome] = []
    for outcome in outcomes_of(seeds, window_s, home, Shape(args.brokers, args.schedulers, args.nodes), args.at_once):
        folder = home / f"seed-{outcome.seed}"
        outcomes.append(outcome)
        _say(outcome, folder, args)
        if outcome.is_good:
            shutil.rmtree(folder, ignore_errors=True)
    outcomes.sort(key=lambda outcome: outcome.seed)
    figures += report.of_seeds(outcomes)
    report.write(figures, seeds[0], args.out)
    report.show(figures)
    is_whole = args.seed is None and not args.no_drills
    page = args.report or (REPORT if is_whole else None)
    if page is not None:
        page.write_text(report.page(figures, outcomes), encoding="utf-8")
    if args.folder is None and all(outcome.is_good for outcome in outcomes):
        shutil.rmtree(home, ignore_errors=True)
    # A short run is not the hour that is asked for: it fails by what it finds alone.
    short = {"seeds", "minutes"} if os.environ.get("CHAOS_SHORT") or args.seed is not None else set()
    return 1 if any(figure.ok is False and figure.name not in short for figure in figures) else 0


def guarded_main() -> int:
    """Run everything; an interruption has ended and removed all that was started, and is no error."""
    try:
        return main()
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        return drills.INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(guarded_main())
