"""``flowmesh doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flowmesh_deploy.doctor.findings import Finding
    from flowmesh_deploy.layout import Layout
    from flowmesh_mesh.context import Context


def doctor(
    folder: Annotated[str | None, typer.Option("--dir", metavar="DIR", help="Folder of the mesh, or of a broker.")] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="PATH", help="Which mesh: its context file or folder.", envvar="FLOWMESH_CONTEXT"),
    ] = None,
    is_quiet: Annotated[bool, typer.Option("--quiet", help="Tell only what is not well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Check a mesh: what is wrong or soon will be, why that matters, and the command that mends it.

    Exit code 0: nothing is wrong (warnings may have been told); 1: something is.
    """
    import asyncio

    from flowmesh_deploy.doctor.checks import examine
    from flowmesh_deploy.doctor.findings import Severity, worst
    from flowmesh_deploy.doctor.gather import gather

    found_context, layout = _which(folder, context)
    facts = asyncio.run(gather(found_context, layout))
    findings = examine(facts, is_asked=found_context is not None)
    if as_json:
        import json

        mesh = found_context.mesh if found_context is not None else ""
        document = {"mesh": mesh, "worst": worst(findings), "findings": [each.plain() for each in findings]}
        print(json.dumps(document))
    else:
        _tell([each for each in findings if not is_quiet or each.severity is not Severity.OK])
        if found_context is None:
            print("only this machine was looked at; the mesh can be asked where `flowmesh broker init` was run")
        if layout is None:
            print("only the leader was asked; brokers, streams and files are looked at where the folder of the mesh is (--dir)")
    if worst(findings) is Severity.FAIL:
        raise typer.Exit(1)


def _which(folder: str | None, context: str | None) -> tuple[Context | None, Layout | None]:
    """Return the context meant, and the folder of its mesh where that is on this machine.

    The folder of a broker that joined others has no context: no credentials to ask with.
    """
    from flowmesh_deploy.layout import Layout
    from flowmesh_mesh.context import find_context, load_context

    if folder is not None:
        layout = Layout(folder)
        if (layout.folder / "broker.json").exists() and not layout.context.exists():
            return None, layout
        return load_context(layout.context), layout
    found = find_context(context)
    layout = Layout(found.dir)
    return found, layout if layout.inspector.exists() or layout.keys.exists() else None


def _tell(findings: list[Finding]) -> None:
    from flowmesh_deploy.doctor.findings import Severity
    from flowmesh_mesh.cli.output import clean

    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        print(clean(f"{finding.severity:<4}  {finding.check:<{width}}  {finding.finding}"))
        if finding.severity is not Severity.OK:
            print(clean(f"{'':{width + 8}}why:  {finding.why}"))
            print(clean(f"{'':{width + 8}}mend: {finding.mend}"))
