"""Every combination of this build and the previous release; a line each in out/versions.jsonl, status 1 when one fails."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.versions import scenarios
from tests.versions.builds import PREVIOUS, ROOT, THIS, Build, make_previous, why_no_previous
from tests.versions.rig import Rig, rig

from flowmesh_scheduler.sim.verdict import commit

NONCE = 1000
Case = tuple[str, Callable[[Rig], None]]


def cases(old: Build) -> Iterator[Case]:
    """Yield every scenario in every combination in which the builds are not all the same."""
    builds = (old, THIS)
    for s, n, c in itertools.product(builds, repeat=3):
        if not s is n is c:
            name = f"trio.scheduler-{s.name}.node-{n.name}.client-{c.name}"
            yield name, partial(scenarios.trio, scheduler=s, node=n, client=c, nonce=NONCE)
    for before, after in ((old, THIS), (THIS, old)):
        change = f"{before.name}-to-{after.name}"
        for c in builds:
            name = f"leader.{change}.client-{c.name}"
            yield name, partial(scenarios.change_of_leader, before=before, after=after, nodes=builds, client=c, nonce=NONCE)
        for n in builds:
            name = f"spool.{change}.node-{n.name}"
            yield name, partial(scenarios.spool, before=before, after=after, node=n, client=THIS, nonce=NONCE)


def main() -> int:
    """Run what is asked for; return 1 when something failed, 3 when there is no previous release to be had."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "versions.jsonl")
    args = parser.parse_args()
    if why := why_no_previous():
        print(why)
        return 3
    is_well = True
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="versions-") as folder, args.out.open("a") as out:
        old = make_previous(Path(folder) / "previous")
        for name, run in cases(old):
            if args.only not in name:
                continue
            began, error = time.perf_counter(), ""
            with rig(Path(folder) / name) as mesh:
                try:
                    run(mesh)
                except Exception:
                    is_well, error = False, traceback.format_exc()[-4000:]
            took_s = time.perf_counter() - began
            record = {"name": f"versions.{name}", "value": round(took_s, 3), "unit": "s", "bar": f"works with {PREVIOUS}"}
            out.write(json.dumps({**record, "ok": not error, "seed": 0, "commit": commit()}) + "\n")
            print(f"{'ok    ' if not error else 'FAILED'} {name} ({took_s:.1f} s)\n{error}".rstrip(), flush=True)
    return 0 if is_well else 1


if __name__ == "__main__":
    raise SystemExit(main())
