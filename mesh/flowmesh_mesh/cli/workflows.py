"""``validate`` and ``submit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.cli.options import AsJson, ContextOption, TenantOption, on_mesh
from flowmesh_mesh.cli.output import clean, print_json
from flowmesh_mesh.names import check_name, is_identifier

if TYPE_CHECKING:
    from flowmesh_mesh.client import Mesh
    from flowmesh_mesh.client.submission import Prepared
    from flowmesh_mesh.sharding import Settled

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The workflow: YAML or JSON.")]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="NAME=VALUE", help="A parameter of the workflow; NAME=@FILE takes the text of a file."),
]


def read_params(given: list[str] | None) -> dict[str, str]:
    """Return parameters given as NAME=VALUE; raise UsageError for another form or a name given twice."""
    params: dict[str, str] = {}
    for entry in given or ():
        name, mark, value = entry.partition("=")
        if not mark or not is_identifier(name):
            raise UsageError(f"--param {clean(entry[:60])!r} is not NAME=VALUE", hint="Write it like `--param samples=4`.")
        if name in params:
            raise UsageError(f"parameter {name!r} is given twice", hint="Give each parameter once.")
        params[name] = _file_text(name, value[1:]) if value.startswith("@") else value
    return params


def _file_text(name: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read parameter {name!r} from {path}: {error}", hint="Name a readable text file after '@'."
        ) from error


def describe(prepared: Prepared) -> dict[str, Any]:
    """Return what a compiled workflow is, in plain data."""
    from flowmesh_cas.cid import cid_text

    manifest = prepared.compiled.manifest
    return {
        "name": manifest.name,
        "operators": len(manifest.operators),
        "outputs": list(manifest.outputs),
        "manifest": cid_text(prepared.compiled.cid),
    }


def validate(file: FileArgument, param: ParamOption = None, as_json: AsJson = False) -> None:
    """Check a workflow without a mesh: keys, ports, types, references, cycles, files, parameters; all problems at once."""
    from flowmesh_mesh.client.scratch import scratch
    from flowmesh_mesh.client.submission import prepare

    with scratch() as store:
        prepared = prepare(file, read_params(param), store)
        found, auto = describe(prepared), prepared.draft.auto if prepared.draft is not None else []
    if auto:
        found["manifest"] = None  # it depends on the numbers
    if as_json:
        print_json({"valid": True, **found, "auto": auto})
        return
    print(f"{file} is valid: {found['name']}, {found['operators']} operators, outputs: {', '.join(found['outputs']) or 'none'}")
    if auto:
        print(f"shards: auto of {', '.join(auto)} is settled at submission; each counts as one operator here")
        print(f"next:\n  flowmesh plan {file}" + "".join(f" -p {entry}" for entry in param or ()))
    else:
        print(f"manifest {found['manifest']}")


def submit(
    file: FileArgument,
    param: ParamOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Follow the run to its end; exit 3 if it does not succeed.")
    ] = False,
    run: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="Id of the run; submitting the same id again changes nothing.")
    ] = None,
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Submit a workflow and return once the mesh has accepted it (it is then never lost)."""
    from flowmesh_mesh.client.scratch import scratch
    from flowmesh_mesh.client.submission import prepare

    if run is not None:
        check_name(run, "run")
    with scratch() as store:
        prepared = prepare(file, read_params(param), store)
        on_mesh(context, tenant, lambda mesh: _submit(mesh, prepared, run, is_watched=watch, as_json=as_json))


async def _submit(mesh: Mesh, prepared: Prepared, run: str | None, *, is_watched: bool, as_json: bool) -> None:
    from flowmesh_mesh.cli.runs import to_end

    prepared = await mesh.settle(prepared)
    if not as_json:
        print_settled(prepared.settled)
    handle = await mesh.submit_prepared(prepared, run)
    found = describe(prepared)
    document = {"run": handle.id, **found, "state": "accepted", "shards": [each.plain() for each in prepared.settled]}
    del document["outputs"]  # names here, contents once the run has ended
    if is_watched:
        await to_end(handle, document, as_json=as_json)
    elif as_json:
        print_json(document)
    else:
        print(f"run {handle.id} accepted: {found['name']}, {found['operators']} operators")
        print_next(handle.id, ("watch", ""), ("show", ""), ("get", " -o results"))


SETTLED_SHOWN = 20


def print_settled(settled: Sequence[Settled]) -> None:
    """Print which numbers of shards were chosen, and why."""
    for each in settled[:SETTLED_SHOWN]:
        print(clean(f"shards     {each.text}"))
    if len(settled) > SETTLED_SHOWN:
        print(f"shards     and of {len(settled) - SETTLED_SHOWN} other operators (--json has all)")


def print_next(run: str, *commands: tuple[str, str]) -> None:
    """Print what one may type next."""
    print("next:")
    for command, rest in commands:
        print(f"  flowmesh {command} {run}{rest}")
