"""``ls``, ``show``, ``watch``, ``logs``, ``cancel``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.cli.options import AsJson, ContextOption, RunArgument, TenantOption, on_mesh
from flowmesh_mesh.cli.output import clean, counts_text, moment, print_json, print_table, size, span
from flowmesh_mesh.names import check_name

if TYPE_CHECKING:
    from flowmesh_mesh.client import Mesh, Run

OPERATORS_SHOWN = 200


def ls(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="How many runs at most.")] = 50,
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """List the tenant's runs, newest first."""
    rows = on_mesh(context, tenant, lambda mesh: mesh.runs(limit))
    if as_json:
        print_json(rows)
    elif not rows:
        print("no runs yet; submit one with `flowmesh submit FILE`")
    else:
        columns = ("RUN", "NAME", "STATE", "REASON", "ACCEPTED", ">TOOK", "OPERATORS")
        print_table(columns, (_run_row(row) for row in rows))


def _run_row(row: dict[str, Any]) -> tuple[Any, ...]:
    took = (row["ended_at_us"] or 0) - (row["accepted_at_us"] or 0) if row.get("ended_at_us") else -1
    reason = row.get("reason") or ""
    accepted = moment(row.get("accepted_at_us"))
    return row["run"], row.get("name") or "", row["state"], reason, accepted, span(took), counts_text(row.get("counts"))


def show(
    run: RunArgument,
    is_all: Annotated[bool, typer.Option("--all", help=f"All operators, not only the first {OPERATORS_SHOWN}.")] = False,
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Show one run: how it stands, each operator, the outputs."""
    check_name(run, "run")

    async def fetch(mesh: Mesh) -> dict[str, Any]:
        handle = await mesh.run(run)
        state = await handle.status(limit=OPERATORS_SHOWN)
        if (is_all or as_json) and int(state.get("total") or 0) > len(state.get("operators") or ()):
            state["operators"] = await handle.operators()
        return state

    state = on_mesh(context, tenant, fetch)
    if as_json:
        print_json(state)
        return
    _print_run(state)


def _print_run(state: dict[str, Any]) -> None:
    facts = [("run", state["run"]), ("name", state.get("name")), ("state", state["state"])]
    if state.get("reason"):
        facts.append(("reason", f"{state['reason']}" + (f", by {state['actor']}" if state.get("actor") else "")))
    facts += [("detail", state.get("detail")), ("manifest", state.get("manifest"))]
    facts += [("accepted", moment(state.get("accepted_at_us"))), ("ended", moment(state.get("ended_at_us")))]
    facts += [("operators", counts_text(state.get("counts"))), ("saved", span(state.get("saved_us") or -1))]
    for name, value in facts:
        if value:
            print(f"{name:<10} {clean(value)}")
    rows = state.get("operators") or []
    if rows:
        print()
        print_table(
            ("OPERATOR", "TYPE", "STATE", "NODE", ">TRY", "REASON", ">RAN", ">LOADED", "RESULT"), map(_operator_row, rows)
        )
    hidden = int(state.get("total") or 0) - len(rows)
    if hidden > 0:
        print(f"... and {hidden} more operators: `flowmesh show {state['run']} --all`")
    for row in rows:
        if row.get("error"):
            print(f"\n{clean(row['name'])}: {clean(row['error'])}")
        for end in row.get("attempts") or ():
            print(f"{clean(row['name'])}: {clean(attempt_text(end))}")
    outputs = state.get("outputs") or {}
    if outputs:
        print()
        parts = [(name, ref) for name, refs in outputs.items() for ref in refs]
        print_table(("OUTPUT", "KIND", ">ROWS", ">SIZE", "CID"), (_output_row(name, ref) for name, ref in parts))


def attempt_text(end: dict[str, Any]) -> str:
    """Return one line about an attempt that gave no result."""
    detail = f": {end['detail']}" if end["detail"] else ""
    return f"attempt {end['attempt']} on {end['node']} ended {moment(end['at_us'])} as {end['reason']}, by {end['actor']}{detail}"


def _operator_row(row: dict[str, Any]) -> tuple[Any, ...]:
    reason = row.get("reason") or ""
    reason = "shared" if row.get("shared") else "" if reason == "succeeded" else reason
    ran, loaded = span(row.get("exec_us") or -1), span(row.get("load_us") or -1)
    attempt = row.get("attempt") or ""
    return row["name"], row["type"], row["state"], row.get("node") or "", attempt, reason, ran, loaded, row.get("result") or ""


def _output_row(name: str, ref: dict[str, Any]) -> tuple[Any, ...]:
    rows = ref.get("rows", -1)
    return name, ref.get("kind"), rows if rows >= 0 else "", size(ref.get("size")), ref.get("cid")


def watch(run: RunArgument, as_json: AsJson = False, context: ContextOption = None, tenant: TenantOption = None) -> None:
    """Follow a run to its end: live on a terminal, as lines elsewhere; exit 3 if it did not succeed. Ctrl-C leaves it running."""
    check_name(run, "run")

    async def follow(mesh: Mesh) -> None:
        handle = await mesh.run(run)
        await to_end(handle, {"run": handle.id}, as_json=as_json)

    on_mesh(context, tenant, follow)


async def to_end(run: Run, document: dict[str, Any], *, as_json: bool) -> None:
    """Follow a run to its end, print it and what to type next; raise ExecutionError if it did not succeed."""
    from flowmesh_mesh.cli.progress import follow
    from flowmesh_mesh.cli.workflows import print_next
    from flowmesh_mesh.client.run import failure

    await follow(run, is_quiet=as_json)
    results = await run.wait()
    if as_json:
        body = run.end.body if run.end else {}
        print_json({**document, **body, "exit_code": 0 if results.state == "succeeded" else 3})
    if results.state != "succeeded":
        if as_json:
            raise typer.Exit(3)
        raise failure(results)
    if not as_json:
        if results.saved_us:
            print(f"shared work saved {span(results.saved_us)}")
        print_next(run.id, ("get", " -o results"), ("lineage", ""))


def logs(
    run: RunArgument,
    operator: Annotated[str | None, typer.Argument(metavar="[OP]", help="Name of an operator; all if left out.")] = None,
    is_followed: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until the run ends.")] = False,
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Print what operators printed; with several, each line begins with the operator's name."""
    check_name(run, "run")
    if operator is not None:
        check_name(operator, "operator")
    if is_followed and as_json:
        raise UsageError("--json prints one document, so it cannot follow", hint="Leave out -f or --json.")

    async def read(mesh: Mesh) -> list[dict[str, str]]:
        handle = await mesh.run(run)
        lines = []
        async for name, line in handle.logs(operator, follow=is_followed):
            if as_json:
                lines.append({"operator": name, "line": line})
            else:
                print(clean(line if operator else f"{name} | {line}"), flush=is_followed)
        return lines

    lines = on_mesh(context, tenant, read)
    if as_json:
        print_json(lines)


def cancel(run: RunArgument, as_json: AsJson = False, context: ContextOption = None, tenant: TenantOption = None) -> None:
    """End a run. Operators that other runs wait for go on."""
    check_name(run, "run")

    async def end(mesh: Mesh) -> dict[str, Any]:
        handle = await mesh.run(run)
        results = await handle.cancel()
        return {"run": handle.id, "state": results.state, "reason": results.reason, "actor": results.actor}

    found = on_mesh(context, tenant, end)
    if as_json:
        print_json(found)
    elif found["state"] == "cancelled":
        print(f"run {found['run']} cancelled")
    else:
        print(f"run {found['run']} had ended already: {found['state']}")
