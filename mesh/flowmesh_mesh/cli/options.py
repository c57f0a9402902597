"""Options that many commands share, and the way from them to a connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from flowmesh_mesh.names import check_name

if TYPE_CHECKING:
    from flowmesh_mesh.client import Mesh

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ContextOption = Annotated[
    str | None,
    typer.Option("--context", metavar="PATH", help="Which mesh: its context file or folder.", envvar="FLOWMESH_CONTEXT"),
]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", metavar="NAME", help="Whose credentials to use.", envvar="FLOWMESH_TENANT")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, or the beginning of it.")]

T = TypeVar("T")


def on_mesh(context: str | None, tenant: str | None, work: Callable[[Mesh], Awaitable[T]]) -> T:
    """Connect, do ``work`` with the mesh, disconnect, and return what it returned."""
    import asyncio

    from flowmesh_mesh.client import connect

    if tenant is not None:
        check_name(tenant, "tenant")

    async def connected() -> T:
        async with connect(context, tenant) as mesh:
            return await work(mesh)

    return asyncio.run(connected())
