"""``costs``."""

from __future__ import annotations

from typing import Any

from flowmesh_mesh.cli.options import AsJson, ContextOption, TenantOption, on_mesh
from flowmesh_mesh.cli.output import print_json, print_table, size, span

_COLUMNS = (
    "TYPE", "MODEL", "DEVICE", ">SAMPLES", ">PER BATCH", ">PER STEP", ">PER UNIT", ">LOAD", ">PREDICTED", ">MEASURED", ">ERROR",
    ">AFTER 20",
)  # fmt: skip
_NODE_COLUMNS = ("NODE", ">AGAINST ITS CLASS", ">FETCH RATE")


def costs(as_json: AsJson = False, context: ContextOption = None, tenant: TenantOption = None) -> None:
    """Show what running costs, as learned: per operator type, model and class of device, predicted against measured.

    A batch takes PER BATCH + PER STEP x the most steps of an operator (new tokens, optimizer steps) + PER UNIT x all its work
    (tokens, rows, operators). PREDICTED and MEASURED are medians of the last 50 batches. ERROR is the median relative error of
    the last 20 predictions, AFTER 20 that of the last 200, without the first 20 of the class.
    """
    found = on_mesh(context, tenant, lambda mesh: mesh.costs())
    if as_json:
        print_json(found)
        return
    rows, nodes = found.get("rows") or [], found.get("nodes") or []
    if not rows:
        print("nothing has run yet; `flowmesh submit FILE --watch` runs a workflow")
        return
    print_table(_COLUMNS, map(_row, rows))
    if nodes:
        print()
        print_table(_NODE_COLUMNS, ((n["node"], f"{n['ratio']:.2f} x", f"{size(n['bandwidth_bytes_per_s'])}/s") for n in nodes))


def seconds(value: float | None) -> str:
    """Return seconds for people, down to the nanosecond; a dash for nothing."""
    if not value:
        return "-"
    if value < 1e-6:
        return f"{value * 1e9:.1f} ns"
    if value < 1e-3:
        return f"{value * 1e6:.1f} us"
    return span(value * 1e6)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _row(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        row["type"],
        row["model"] or "-",
        row["device"],
        row["samples"],
        seconds(row["fixed_s"]),
        seconds(row["step_s"]),
        seconds(row["unit_s"]),
        seconds(row["load_s"]),
        seconds(row["predicted_s"]),
        seconds(row["measured_s"]),
        _percent(row["error_last"]),
        _percent(row["error_settled"]),
    )
