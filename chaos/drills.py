"""Fail-over drills: one thing is broken at a time, again and again, and timed by the broker's own timestamps.

Every time counts from the moment of the fault to the first write that shows the mesh to be over it; both are read on this
machine's clock. Each drill ends with the checker over everything that was seen meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

from chaos import report
from chaos.checker import DOUBLED, LOST, STALE, WRONG, check
from chaos.network import Mode
from chaos.processes import Shape
from chaos.report import Figure
from chaos.stage import Load, Stage
from chaos.traffic import now_us
from flowmesh_cas.errors import FencedError, FlowmeshError, TransientError
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Expect
from flowmesh_mesh.messages import Assignment, encode

LEADER_KILLS = 20
LEADER_STOPS = 20
NODE_KILLS = 20
NODE_STOPS = 5
NODE_CUTS = 5
BROKER_KILLS = 3
WIPES = 3
REPLICATED_KILLS = 5
OUTSTANDING = 500
"""Operators under way while the leader is hit; never more than 1,000."""

PATIENCE_S = 30.0
INTERRUPTED = 130


def _say(text: str) -> None:
    print(f"drill: {text}", file=sys.stderr, flush=True)


# --- the leader ------------------------------------------------------------------------------------------------------


async def leader_kills(stage: Stage, times: int = LEADER_KILLS) -> list[float]:
    """Kill the leader again and again; return the seconds to the first fenced assignment of each successor."""
    found = []
    for number in range(times):
        leader = await stage.steady()
        began_us = now_us()
        stage.mesh.processes[leader].kill()
        took_s = await stage.first_assignment_after(began_us, leader, PATIENCE_S)
        found.append(took_s)
        _say(f"leader killed {number + 1}: {took_s:.2f} s")
        stage.mesh.processes[leader].start()
    return found


async def leader_stops(stage: Stage, times: int = LEADER_STOPS) -> tuple[list[float], int, int]:
    """Pause the leader until another one has taken over, then let it go on.

    Return the seconds to the successor's first fenced assignment, in how many cases every write under the old fence was
    refused, and in how many of them the resumed process tried one itself (its log says that it was fenced).
    """
    found, refused, tried = [], 0, 0
    for number in range(times):
        leader = await stage.steady()
        fences = stage.fences()
        log_bytes = len(stage.mesh.log_text(leader))
        began_us = now_us()
        stage.mesh.processes[leader].signal(signal.SIGSTOP)
        try:
            took_s = await stage.first_assignment_after(began_us, leader, PATIENCE_S)
        finally:
            stage.mesh.processes[leader].signal(signal.SIGCONT)
        found.append(took_s)
        await asyncio.sleep(1.0)
        is_refused = await refuses(stage, fences, f"zombie{number}")
        refused += is_refused
        tried += "fenced" in stage.mesh.log_text(leader)[log_bytes:]
        _say(f"leader paused {number + 1}: {took_s:.2f} s, its fence {'refused' if is_refused else 'HELD'}")
    return found, refused, tried


async def refuses(stage: Stage, fences: dict[str, int], name: str) -> bool:
    """Tell whether the broker refuses writes to both guarded streams that name a deposed leader's epoch records."""
    forged = {
        subjects.LEDGER: (f"led.cancelled.{name}.{name}", b"forged", subjects.LEDGER_EPOCHS),
        subjects.ASSIGN: (
            subjects.assign(name, name),
            encode(Assignment(0, name, name, "flow.noop", 1, "", ())),
            subjects.ASSIGN_EPOCHS,
        ),
    }
    for stream, (subject, data, epochs) in forged.items():
        for _ in range(20):
            try:
                await stage.bus.store(subject, data, expect=Expect(fences[stream], epochs))
            except FencedError:
                break
            except TransientError:
                await asyncio.sleep(0.2)  # a write of the new leader is in flight, or the broker is busy
            else:
                return False
        else:
            return False
    return True


async def wipes(stage: Stage, times: int = WIPES) -> tuple[int, int, list[float]]:
    """Remove the broker's store under a paused leader.

    Return how often all its later writes were refused, how often nodes worked for the new leader, and after how many seconds.
    """
    refused = served = 0
    took_s: list[float] = []
    for number in range(times):
        leader = await stage.steady()
        fences = stage.fences()
        stage.mesh.processes[leader].signal(signal.SIGSTOP)
        broker = stage.mesh.processes["broker-1"]
        broker.kill()
        stage.mesh.wipe("broker-1")
        stage.note_wipe()
        began_us = now_us()
        broker.start()
        try:
            with contextlib.suppress(TimeoutError):
                await stage.first_assignment_after(began_us, leader, PATIENCE_S)
                served += await stage.serves(PATIENCE_S)
                took_s.append((now_us() - began_us) / 1e6)
        finally:
            stage.mesh.processes[leader].signal(signal.SIGCONT)
        await asyncio.sleep(1.0)
        refused += await refuses(stage, fences, f"wiped{number}")
        _say(f"store wiped {number + 1}: {refused} refused, {served} served")
    return refused, served, took_s


# --- brokers and nodes -----------------------------------------------------------------------------------------------


async def broker_kills(stage: Stage, times: int = BROKER_KILLS) -> list[float]:
    """Kill the broker that leads the ledger, of three; return the longest gap between writes around each."""
    found = []
    for number in range(times):
        await stage.steady()
        name = await _ledger_leader(stage)
        began_us = now_us()
        stage.mesh.processes[name].kill()
        await asyncio.sleep(15.0)
        gap_s = stage.longest_gap_s("LEDGER", began_us)
        found.append(gap_s)
        _say(f"{name} killed {number + 1}: longest gap {gap_s:.2f} s")
        stage.mesh.processes[name].start()
        await asyncio.sleep(5.0)
    return found


async def _ledger_leader(stage: Stage) -> str:
    with contextlib.suppress(FlowmeshError):
        answer = json.loads(await stage.bus.request("$JS.API.STREAM.INFO.LEDGER"))
        name = str(answer.get("cluster", {}).get("leader") or "")
        if name in stage.mesh.processes:
            return name
    return "broker-1"


async def node_losses(stage: Stage, times: int, how: str) -> list[float]:
    """Lose a node that holds operators; return the seconds until the last of them was given to another (or done)."""
    found = []
    for number in range(times):
        await stage.steady()
        node, keys = await stage.busy_node()
        began_us = now_us()
        _lose(stage, node, how)
        try:
            took_s = await stage.given_elsewhere(node, keys, began_us, PATIENCE_S)
        finally:
            _bring_back(stage, node, how)
        found.append(took_s)
        _say(f"{node} {how} {number + 1}: its {len(keys)} operators elsewhere after {took_s:.2f} s")
        await stage.finished()
    return found


def _lose(stage: Stage, node: str, how: str) -> None:
    if how == "killed":
        stage.mesh.processes[node].kill()
    elif how == "stopped":
        stage.mesh.processes[node].signal(signal.SIGSTOP)
    else:
        for link in stage.mesh.network.of(node):
            link.turn(Mode.HOLE)


def _bring_back(stage: Stage, node: str, how: str) -> None:
    if how == "killed":
        stage.mesh.processes[node].start()
    elif how == "stopped":
        stage.mesh.processes[node].signal(signal.SIGCONT)
    else:
        stage.mesh.network.open_all()


# --- all of them -----------------------------------------------------------------------------------------------------


async def _leaders(folder: Path) -> list[Figure]:
    async with Stage(folder, Shape(1, 3, 3, has_links=False), Load(OUTSTANDING)) as stage:
        killed = await leader_kills(stage)
        stopped, refused, tried = await leader_stops(stage)
        figures = _verdict(stage, await stage.conclude())
    return [
        Figure("leader_kill_takeover_s_median", median(killed), "s", 0.5, None, tuple(killed)),
        Figure("leader_kill_takeover_s_max", max(killed), "s", 1.5),
        Figure("leader_stop_takeover_s_max", max(stopped), "s", 3.5, None, tuple(stopped)),
        Figure("zombie_writes_refused", refused, f"of {LEADER_STOPS}", LEADER_STOPS, LEADER_STOPS),
        Figure("zombies_that_tried_themselves", tried, f"of {LEADER_STOPS}"),
        *figures,
    ]


async def _replicated(folder: Path) -> list[Figure]:
    """A killed leader where every write needs two brokers of three: told beside the other, nothing is demanded of it."""
    async with Stage(folder, Shape(3, 3, 2, has_links=False), Load(200)) as stage:
        killed = await leader_kills(stage, REPLICATED_KILLS)
        figures = _verdict(stage, await stage.conclude(), "replicated")
    return [Figure("replicated_leader_kill_takeover_s_median", median(killed), "s", None, None, tuple(killed)), *figures]


async def _wiped(folder: Path) -> list[Figure]:
    async with Stage(folder, Shape(1, 2, 2, has_links=False), Load(100)) as stage:
        refused, served, took_s = await wipes(stage)
        stale = len(check(stage.history).of(STALE))
    return [
        Figure("wiped_store_zombie_writes_refused", refused, f"of {WIPES}", WIPES, WIPES),
        Figure("wiped_store_nodes_work_for_new_leader", served, f"of {WIPES}", WIPES, WIPES),
        Figure("wiped_store_stale_writes", stale, "writes", 0, 0),
        Figure("wiped_store_served_again_s_max", max(took_s, default=float(PATIENCE_S)), "s"),
    ]


async def _brokers(folder: Path) -> list[Figure]:
    async with Stage(folder, Shape(3, 2, 2, has_links=False), Load(100)) as stage:
        gaps = await broker_kills(stage)
        figures = _verdict(stage, await stage.conclude(), "broker_kill")
    return [Figure("broker_kill_gap_s_max", max(gaps), "s", 12.0, None, tuple(gaps)), *figures]


async def _nodes(folder: Path) -> list[Figure]:
    async with Stage(folder, Shape(1, 1, 4), Load(0)) as stage:
        killed = await node_losses(stage, NODE_KILLS, "killed")
        stopped = await node_losses(stage, NODE_STOPS, "stopped")
        cut = await node_losses(stage, NODE_CUTS, "cut off")
        figures = _verdict(stage, await stage.conclude(), "node_loss")
    return [
        Figure("node_kill_reassign_s_median", median(killed), "s", 1.0, None, tuple(killed)),
        Figure("node_kill_reassign_s_max", max(killed), "s"),
        Figure("node_stop_reassign_s_max", max(stopped), "s", 8.0, None, tuple(stopped)),
        Figure("node_cut_reassign_s_max", max(cut), "s", 8.0, None, tuple(cut)),
        *figures,
    ]


def _verdict(stage: Stage, left: list[str], prefix: str = "leader_loss") -> list[Figure]:
    """Return what the checker says of a drill; ``left`` are runs that did not end."""
    verdict = check(stage.history)
    for violation in verdict.violations:
        _say(f"{violation.kind}: {violation.subject}: {violation.what}")
    if left:
        _say(f"not ended: {', '.join(left)}")
    return [Figure(f"{prefix}_{kind}", len(verdict.of(kind)), "violations", 0, 0) for kind in (LOST, DOUBLED, STALE, WRONG)]


DRILLS: dict[str, Callable[[Path], Awaitable[list[Figure]]]] = {
    "leaders": _leaders,
    "nodes": _nodes,
    "brokers": _brokers,
    "replicated": _replicated,
    "wiped": _wiped,
}


async def run_all(folder: Path, only: tuple[str, ...] = tuple(DRILLS)) -> list[Figure]:
    """Run the drills; a drill that cannot be run to its end is a figure too, and the others go on."""
    figures: list[Figure] = []
    for name in only:
        _say(name)
        try:
            figures += await DRILLS[name](folder / name)
        except (FlowmeshError, TimeoutError, OSError) as error:
            _say(f"{name} could not be run to its end: {type(error).__name__}: {error}; kept in {folder / name}")
            figures.append(Figure(f"drill_{name}_failed", 1, "drills", 0, 0))
    return figures


def main() -> int:
    """Run the drills named, print and append their figures; return 1 when a bar is missed."""
    from chaos.running import run

    parser = argparse.ArgumentParser(prog="python -m chaos.drills", description=__doc__)
    parser.add_argument("--only", default=",".join(DRILLS), help="of %(default)s")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/chaos.jsonl"))
    args = parser.parse_args()
    home = args.folder or Path(tempfile.mkdtemp(prefix="flowmesh-drills-"))
    try:
        figures = run(run_all(home, tuple(args.only.split(","))))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    report.write(figures, 0, args.out)
    report.show(figures)
    is_good = all(figure.ok is not False for figure in figures)
    if args.folder is None and is_good:
        shutil.rmtree(home, ignore_errors=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
