"""From a context to an open connection as one of its tenants."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flowmesh_mesh.context import Context, find_context
from flowmesh_mesh.names import check_name

if TYPE_CHECKING:
    from flowmesh_mesh.bus import Bus

CONNECT_DEADLINE_S = 3.0


async def connect_tenant(context: Context | str | os.PathLike[str] | None, tenant: str | None) -> Bus:
    """Return a connection with a tenant's credentials; raise TransientError when no broker answers."""
    if tenant is not None:
        check_name(tenant, "tenant")
    found = context if isinstance(context, Context) else find_context(context)
    entry = found.tenant(tenant or "")

    from flowmesh_mesh.bus import Bus
    from flowmesh_mesh.credentials import Credentials

    credentials = Credentials.load(entry.credentials)
    return await Bus.connect(
        found.urls, credentials, name="flowmesh client", inbox=credentials.inbox, deadline_s=CONNECT_DEADLINE_S
    )
