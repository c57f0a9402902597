"""What is looked at before a mesh is started: without asking anybody, in milliseconds."""

from __future__ import annotations

from flowmesh_deploy.doctor import checks
from flowmesh_deploy.doctor.facts import Facts, Server
from flowmesh_deploy.doctor.findings import Finding, Severity
from flowmesh_deploy.doctor.local import look
from flowmesh_deploy.layout import Layout, sync_of


def at_start(layout: Layout) -> tuple[Finding | None, list[Finding]]:
    """Return why the mesh must not be started (None: it may), and what to warn of."""
    facts = Facts(0.0)
    look(facts, layout)
    facts.servers = [Server(name, sync_of(layout) == "always", is_asked=False) for name in layout.brokers()]
    sync = checks.sync(facts)[0]
    found = [sync, *checks.stores(facts), *checks.disks(facts), *checks.secrets(facts)]
    refusal = sync if sync.severity is Severity.FAIL else None
    return refusal, [finding for finding in found if finding is not refusal and finding.severity is not Severity.OK]
