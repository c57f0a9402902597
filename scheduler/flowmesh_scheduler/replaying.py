"""``flowmesh replay``: what a replay came to, as text or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flowmesh_cas.errors import NotFoundError
from flowmesh_mesh.cli.output import clean, moment, print_json, print_table

DIFFERS = 1
"""Exit code of a replay that does not make the recorded assignments."""

_SHOWN = 20


def replay(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="An event log, or a folder of them: the newest counts.")],
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", "-w", metavar="NAME=VALUE", help="A setting to change, as `price_per_hour=0.8`; may be repeated."
        ),
    ] = None,
    is_all: Annotated[bool, typer.Option("--all", help=f"All assignments, not only the first {_SHOWN}.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Run a recorded event log (`flowmesh up --record`) through the core; exit 1 if it does not choose as it was recorded.

    With --weight each round of placement is made a second time, from the same state, by the changed settings, and the choices are
    compared. The recorded choices go on, because the events that follow belong to them: differences do not add up, and only the
    placement is repeated, so settings of leases, retries and fairness change nothing here. Dollars and seconds are predictions,
    each side's by its own settings, for the operators that both place in the same round.
    """
    from flowmesh_scheduler.comparison import Comparison, changed
    from flowmesh_scheduler.core.placement import place
    from flowmesh_scheduler.recording import EventLog
    from flowmesh_scheduler.replay import replay as run

    path = _newest(log)
    compared = Comparison(changed(EventLog(path).settings(), weight)) if weight else None
    told = run(path, place if compared is None else compared)
    document = {"log": str(path), **told.plain(), **({} if compared is None else {"compared": compared.plain(weight or ())})}
    if as_json:
        print_json(document)
    else:
        _print(document, is_all=is_all)
    if not told.is_same:
        raise typer.Exit(DIFFERS)


def _newest(path: Path) -> Path:
    """Return a log; of a folder the newest in it."""
    from flowmesh_scheduler.recording import logs_in

    if not path.is_dir():
        return path
    found = logs_in(path)
    if not found:
        raise NotFoundError(f"there is no event log in {path}", hint="Record with `flowmesh up --record`.")
    return found[-1]


def _print(document: dict[str, Any], *, is_all: bool) -> None:
    rows = document["assignments"]
    shown = rows if is_all else rows[:_SHOWN]
    if shown:
        columns = ("AT", "ASSIGNMENT", "NODE", "TYPE", ">OPERATORS", "FIRST")
        print_table(columns, ((moment(r["at_us"]), r["id"], r["node"], r["type"], len(r["keys"]), r["first"]) for r in shown))
    if len(rows) > len(shown):
        print(f"... and {len(rows) - len(shown)} more: --all")
    print(clean(f"\nlog        {document['log']}, epoch {document['epoch']}, version {document['version']}"))
    print(f"replayed   {document['steps']} events, {len(rows)} assignments of {document['operators']} operators")
    print(clean(f"log ends   {document['ended'] or 'in the middle: its process was killed, or still writes'}"))
    print(f"digest     {document['digest'] or '-'}")
    print(f"recorded   {document['recorded_digest'] or '-'}")
    found = document["divergence"]
    if found is not None:
        at = f"event {found['step']} ({found['kind']}, {moment(found['at_us'])})"
        print(f"DIFFERENT  from {at} on: this build chooses otherwise than the one that recorded it")
    else:
        print("the same assignments, hash for hash" if rows else "nothing was assigned in it")
    if "compared" in document:
        _print_comparison(document["compared"])


def _print_comparison(found: dict[str, Any]) -> None:
    print(clean(f"\nwith {', '.join(found['weights'])}: {found['rounds_changed']} of {found['rounds']} rounds choose otherwise"))
    counts = (
        ("as recorded", found["same"]),
        ("on another node", found["elsewhere"]),
        ("same node, another batch", found["other_batch"]),
        ("held back by the changed settings", found["only_recorded"]),
        ("begun earlier by the changed settings", found["earlier"]),
    )
    for name, count in counts:
        print(f"  {count:>8} operators {name}")
    before, after = found["before"], found["after"]
    print_table(("PREDICTED", ">OPERATORS", ">NODE SECONDS", ">DOLLARS"), _sides(before, after))


def _sides(before: dict[str, Any], after: dict[str, Any]) -> Sequence[tuple[Any, ...]]:
    return [
        (name, side["operators"], f"{side['node_s']:.3f}", f"{side['usd']:.6f}")
        for name, side in (("recorded", before), ("changed", after))
    ]
