"""``cordon``, ``uncordon``, ``unquarantine``: what concerns every tenant; the mesh says who may."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flowmesh_mesh.cli.options import AsJson, ContextOption, TenantOption, on_mesh
from flowmesh_mesh.cli.output import clean, print_json
from flowmesh_mesh.names import check_name

NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Name of a node, as in `flowmesh nodes`.")]


def cordon(
    node: NodeArgument,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; `flowmesh nodes` shows it.")] = "",
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Give a node no new work, until `flowmesh uncordon`; what runs on it goes on. Survives a change of leader."""
    check_name(node, "node")
    found = on_mesh(context, tenant, lambda mesh: mesh.cordon(node, reason))
    if as_json:
        print_json(found)
        return
    was = " already" if found["before"] == "cordoned" else ""
    print(clean(f"node {node} is{was} cordoned; give it work again with `flowmesh uncordon {node}`"))
    if not found["nodes_left"]:
        print("no other node takes work now: everything waits")


def uncordon(node: NodeArgument, as_json: AsJson = False, context: ContextOption = None, tenant: TenantOption = None) -> None:
    """Give a node work again, whether somebody or the scheduler had withheld it."""
    check_name(node, "node")
    found = on_mesh(context, tenant, lambda mesh: mesh.uncordon(node))
    if as_json:
        print_json(found)
    elif found["before"] == "ok":
        print(clean(f"node {node} was not cordoned"))
    else:
        print(clean(f"node {node} takes work again"))


def unquarantine(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Operator key in hex, or at least 8 digits of its beginning.")],
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Let an operator be tried again that took nodes with it, before its quarantine is over."""
    found: dict[str, Any] = on_mesh(context, tenant, lambda mesh: mesh.unquarantine(key))
    if as_json:
        print_json(found)
    else:
        print(clean(f"operator {found['operator']} ({found['key'][:16]}) may run again; submit its workflow once more"))
