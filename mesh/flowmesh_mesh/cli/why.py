"""``why``: the terms of a choice, the best alternatives, and what would have turned it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.cli.options import AsJson, ContextOption, TenantOption, on_mesh
from flowmesh_mesh.cli.output import clean, moment, print_json, print_table, span
from flowmesh_mesh.cli.runs import attempt_text
from flowmesh_mesh.names import check_name

_FLIPS_SHOWN = 3
_TIE = 1e-9
_KEY_PREFIX_MIN = 6


def why(
    subject: Annotated[str, typer.Argument(metavar="OP", help="RUN/OPERATOR, or the beginning of an operator key (hex).")],
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Tell why an operator runs where it does: terms of the utility in dollars, the best alternatives, what would flip it.

    Of an operator that waits: what it waits for. Of one whose result was there already: where it came from.
    """
    run, operator, key = split_operator(subject)
    found = on_mesh(context, tenant, lambda mesh: mesh.why(run, operator, key=key))
    if as_json:
        print_json(found)
    else:
        _print(found)


def split_operator(text: str) -> tuple[str, str, str]:
    """Return run, operator and key of RUN/OPERATOR or KEY; raise UsageError for what is neither."""
    run, mark, name = text.partition("/")
    if mark:
        return check_name(run, "run"), check_name(name, "operator"), ""
    if len(text) < _KEY_PREFIX_MIN or not set(text.lower()) <= set("0123456789abcdef"):
        hint = "Write RUN/OPERATOR as `flowmesh show RUN` lists them, or hex digits of a key."
        raise UsageError(f"{clean(text[:60])!r} names no operator", hint=hint)
    return "", "", text.lower()


def _print(found: dict[str, Any]) -> None:
    print(clean(f"operator   {found['run']}/{found['operator']} ({found['type']}), {found['state']}"))
    print(clean(f"key        {found['key'] or 'not known before its inputs are'}"))
    if found["node"]:
        began = f", {moment(found['started_at_us'])}" if found["started_at_us"] else ""
        print(clean(f"node       {found['node']}, attempt {found['attempt']}{began}"))
    for end in found.get("attempts") or ():
        print(clean(f"before     {attempt_text(end)}"))
    source = found["source"]
    if source:
        at = moment(source["committed_at_us"])
        print(clean(f"result     made on {source['node']} in {span(source['exec_us'])}, generation {source['generation']}, {at}"))
        print(clean(f"record     {source['record']}"))
    print(clean(f"why        {found['text']}"))
    waiting = found["waiting"]
    if waiting and waiting["nodes"]:
        print()
        print_table(("NODE", "CANNOT RUN IT FOR WANT OF"), ((name, ", ".join(lacks)) for name, lacks in waiting["nodes"].items()))
    if found["decision"]:
        _print_decision(found["decision"])
    if found["state"] in ("waiting", "ready", "assigned"):
        print(f"next:\n  flowmesh watch {found['run']}")


def _print_decision(decision: dict[str, Any]) -> None:
    others = decision["alternatives"]
    print()
    columns = ("TERM (µ$)", f">{decision['node']} x{decision['count']}", *(f">{_name(decision, other)}" for other in others))
    candidates = [decision, *others]
    rows = [
        (name, *(_micro(each["terms_usd"][name]) for each in candidates))
        for name in decision["terms_usd"]
        if any(each["terms_usd"][name] for each in candidates)
    ]
    rows.append(("= score", *(_micro(each["score_usd"]) for each in candidates)))
    if others:
        rows.append(("gap", "", *(_micro(other["gap_usd"]) for other in others)))
    print_table(columns, rows)
    print()
    for other in others:
        shown = other["flips"][: _FLIPS_SHOWN if abs(other["gap_usd"]) > _TIE * abs(decision["score_usd"]) else 1]
        for each in shown:
            print(clean(each["words"]))
        if not other["flips"]:
            print(clean(_without_flip(decision, other)))
    if not others:
        print("nothing else was there to choose from")


def _without_flip(decision: dict[str, Any], other: dict[str, Any]) -> str:
    if other["gap_usd"] < 0:
        return f"{_name(decision, other)} was worth more by itself; it was not to be had any more when this was chosen"
    return f"{_name(decision, other)} could not have won by one change alone"


def _name(decision: dict[str, Any], other: dict[str, Any]) -> str:
    if other["queue"] == decision["queue"]:
        return f"{other['node']} x{other['count']}"
    return str(other["label"])


def _micro(usd: float) -> str:
    """Return dollars in millionths, with as many digits as tell something."""
    value = usd * 1e6
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value else "0"
