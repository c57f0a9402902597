"""``get`` and ``lineage``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowmesh_cas.cid import cid_parse
from flowmesh_cas.errors import UsageError
from flowmesh_mesh.cli.options import AsJson, ContextOption, TenantOption, on_mesh
from flowmesh_mesh.cli.output import clean, print_json
from flowmesh_mesh.names import check_name

if TYPE_CHECKING:
    from flowmesh_mesh.client import Mesh

_CID_MIN_LENGTH = 50


def is_cid(text: str) -> bool:
    """Tell whether a text that a person typed is meant as a CID (no run has so long a name with such a beginning)."""
    try:
        cid_parse(text)
    except UsageError:
        if text.startswith(("bafy", "bafk")) and len(text) >= _CID_MIN_LENGTH:
            raise
        return False
    return True


def split_target(text: str) -> tuple[str, str | None]:
    """Return run and output or operator of RUN[.NAME]; raise UsageError for what cannot be either."""
    run, mark, name = text.partition(".")
    check_name(run, "run")
    if not mark:
        return run, None
    return run, check_name(name, "output or operator")


def get(
    subject: Annotated[str, typer.Argument(metavar="RUN[.NAME]|CID", help="A run, one of its outputs or operators, or a CID.")],
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write; made if it does not exist.")
    ] = Path("."),
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Write results into a folder. Every block is checked against its CID before it is used."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="Name a folder with -o.")
    is_content = is_cid(subject)
    run, name = (subject, None) if is_content else split_target(subject)

    async def fetch(mesh: Mesh) -> list[Path]:
        if is_content:
            return [await mesh.get(subject, folder)]
        return await (await mesh.run(run)).get(name, folder)

    paths = on_mesh(context, tenant, fetch)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
        return
    for path in paths:
        print(path)
    if not paths:
        print("the run has no outputs; name an operator: `flowmesh get RUN.OPERATOR -o DIR`")


def lineage(
    subject: Annotated[str, typer.Argument(metavar="RUN|CID", help="A run, or a content or record by CID.")],
    as_json: AsJson = False,
    context: ContextOption = None,
    tenant: TenantOption = None,
) -> None:
    """Show every operator, input and model that led to a result, each with its CID or digest."""
    if not is_cid(subject):
        check_name(subject, "run")
    found = on_mesh(context, tenant, lambda mesh: mesh.lineage(subject))
    if as_json:
        print_json(found)
        return
    for line in lineage_lines(found):
        print(line)


def lineage_lines(found: dict[str, Any]) -> list[str]:
    """Return the lineage as a tree of text, from the results back to the inputs; what was shown before is only named."""
    records = {record["record"]: record for record in found.get("records") or ()}
    lines: list[str] = []
    shown: set[str] = set()
    # An explicit stack: chains may be longer than the interpreter's.
    stack: list[tuple[int, str, str, str | None]] = [(0, "", root, root) for root in reversed(found.get("roots") or ())]
    while stack:
        depth, port, cid, record_cid = stack.pop()
        indent = "  " * depth + (f"{port} <- " if port else "")
        record = records.get(record_cid) if record_cid else None
        if record is None:
            lines.append(clean(f"{indent}{'record' if record_cid else 'input'} {record_cid or cid}"))
            continue
        again = record["record"] in shown
        where = f" on {record['node']}" if record.get("node") else ""
        lines.append(
            clean(
                f"{indent}{record.get('name') or '-'} ({record['type']}) {record['result']}{where}"
                + ("  (as above)" if again else "")
            )
        )
        if again:
            continue
        shown.add(record["record"])
        lines += [clean(f"{'  ' * (depth + 1)}model {role}: {digest}") for role, digest in (record.get("models") or {}).items()]
        inputs = record.get("inputs") or ()
        stack.extend((depth + 1, str(origin["port"]), str(origin["cid"]), origin.get("record")) for origin in reversed(inputs))
    given = found.get("inputs") or ()
    models = found.get("models") or {}
    lines += ["", f"{len(records)} records, {len(given)} inputs given by the author, {len(models)} models"]
    lines += [f"input {cid}" for cid in given]
    cids = found.get("model_cids") or {}
    lines += [clean(f"model {cids.get(reference) or digest} ({reference}, {digest})") for reference, digest in models.items()]
    return lines
