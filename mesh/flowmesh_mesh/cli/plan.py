"""``plan``: what a workflow would share and take, before it is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowmesh_mesh.cli.options import AsJson, ContextOption, TenantOption, on_mesh
from flowmesh_mesh.cli.output import clean, print_json, print_table, span
from flowmesh_mesh.cli.workflows import FileArgument, ParamOption, print_settled, read_params

if TYPE_CHECKING:
    from flowmesh_mesh.client import Mesh
    from flowmesh_mesh.client.submission import Prepared
    from flowmesh_mesh.sharding import Settled


def plan(
    file: FileArgument,
    param: ParamOption = None,
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Tell what a workflow would share and take, in seconds and dollars, without submitting it.

    Keys are computed as on submission, so what is shared is certain, and more may be: what another operator has yet to produce
    is unknown. Seconds come from learned costs, as if nothing else ran; work never measured here is marked as a prior.
    """
    from flowmesh_mesh.client.scratch import scratch
    from flowmesh_mesh.client.submission import prepare

    with scratch() as store:
        prepared = prepare(file, read_params(param), store)
        settled, found = on_mesh(context, tenant, lambda mesh: _plan(mesh, prepared))
    if as_json:
        print_json(found)
        return
    _print(found, settled)
    print(f"next:\n  flowmesh submit {file}" + "".join(f" -p {entry}" for entry in param or ()))


async def _plan(mesh: Mesh, prepared: Prepared) -> tuple[Sequence[Settled], dict[str, Any]]:
    prepared = await mesh.settle(prepared)
    return prepared.settled, await mesh.plan_prepared(prepared)


def _print(found: dict[str, Any], settled: Sequence[Settled] = ()) -> None:
    print(clean(f"workflow   {found['name']}, {found['operators']} operators"))
    print_settled(settled)
    print(
        f"shared     {found['hits']} have results, {found['in_flight']} run already, {found['merged']} are equal to others in it"
    )
    saved = f"; the results there took {_seconds(found['saved_s'])}" if found["saved_s"] else ""
    print(f"to run     {found['to_run']}{saved}")
    nodes = f"on {len(found['nodes'])} of the nodes, " if found["nodes"] else ""
    print(f"seconds    {_seconds(found['makespan_s'])} {nodes}at least {_seconds(found['critical_path_s'])} on any number")
    print(f"dollars    {found['usd']:.6f} for {_seconds(found['node_s'])} of nodes")
    if found["queued"]:
        print(f"ahead      {found['queued']} operators are ready now; they are not counted")
    print()
    columns = (
        "TYPE",
        "MODEL",
        ">OPERATORS",
        ">HITS",
        ">RUNNING",
        ">EQUAL",
        ">TO RUN",
        ">BATCHES",
        ">SECONDS",
        ">DOLLARS",
        "COSTS",
    )
    print_table(columns, map(_row, found["rows"]))
    for note in _notes(found):
        print(clean(note))


def _row(row: dict[str, Any]) -> tuple[Any, ...]:
    shared = (row["operators"], row["hits"], row["in_flight"], row["merged"], row["to_run"], row["batches"])
    return row["type"], row["model"], *shared, f"{row['node_s']:.3f}", f"{row['usd']:.6f}", _basis(row)


def _basis(row: dict[str, Any]) -> str:
    """Return what the figures of a row rest on."""
    if not row["node_s"]:
        return ""
    if not row["samples"]:
        return "prior: never measured"
    return f"{row['samples']} batches, +-{100 * row['spread']:.0f} %"


def _notes(found: dict[str, Any]) -> list[str]:
    notes = []
    if any(row["node_s"] and not row["samples"] for row in found["rows"]):
        notes.append("priors are guesses from the devices' figures: right in the order of magnitude at best")
    if found["unknown_sizes"]:
        notes.append(f"inputs that others have yet to produce are taken to be small: those of {found['unknown_sizes']} operators")
    for each in found["lacking"]:
        lacks = "; ".join(f"{name}: {', '.join(what)}" for name, what in each["nodes"].items())
        missing = f"lacking are {lacks}" if lacks else "the mesh has no nodes"
        notes.append(f"nobody can run {each['first']} ({each['operators']} of type {each['type']}): {missing}")
    if found["unplaced"]:
        notes.append(f"{found['unplaced']} operators are left out of seconds and dollars: they, or what they need, cannot run")
    for reference, reason in found["unknown_models"].items():
        notes.append(f"model {reference} is unknown, so nothing that uses it is found to be shared: {reason}")
    return notes


def _seconds(seconds: float) -> str:
    return span(seconds * 1e6)
