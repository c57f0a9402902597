"""``audit``: what the mesh should have against what it has."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flowmesh_mesh.cli.options import AsJson, ContextOption, TenantOption, on_mesh
from flowmesh_mesh.cli.output import clean, print_json

SHOWN = 100


def audit(
    is_repairing: Annotated[
        bool, typer.Option("--repair", help="Mend what is found; for who may do what concerns every tenant.")
    ] = False,
    is_thorough: Annotated[bool, typer.Option("--thorough", help="Look up every result of the ledger, too.")] = False,
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Compare manifests, ledger, streams, stores and keepers; exit 1 if something is found and not repaired."""
    found: dict[str, Any] = on_mesh(context, tenant, lambda mesh: mesh.audit(is_repairing=is_repairing, is_thorough=is_thorough))
    left = sum(not each["repaired"] for each in found["findings"])
    if as_json:
        print_json({**found, "exit_code": 1 if left else 0})
    else:
        _print(found, left, is_repairing=is_repairing)
    if left:
        raise typer.Exit(1)


def _print(found: dict[str, Any], left: int, *, is_repairing: bool) -> None:
    rows = found["findings"]
    for each in rows[:SHOWN]:
        mark = "repaired" if each["repaired"] else "found"
        print(clean(f"{mark:<9} {each['kind']}: {each['what']}"))
        print(clean(f"          why: {each['why']}"))
        print(clean(f"          {'done' if each['repaired'] else 'repair'}: {each['repair']}"))
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN} more (--json has all)")
    if not rows:
        print(f"nothing found: {found['runs']} runs, ledger, streams, stores and keepers fit together")
    elif left:
        print(
            f"{left} of {len(rows)} findings are left" + ("" if is_repairing else "; `flowmesh audit --repair` mends what can be")
        )
    else:
        print(f"all of {len(rows)} findings are repaired")
