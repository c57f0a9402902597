"""What concerns every tenant and only some may ask for: withhold a node, trust it again, try a quarantined operator again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.standing import CORDONED

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

_REASON_MAX = 200


def cordon(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Give a node no new work; what runs on it goes on."""
    return _set(leader, tenant, args, is_on=True)


def uncordon(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Trust a node again, whoever withheld it."""
    return _set(leader, tenant, args, is_on=False)


def _set(leader: Leader, tenant: str, args: dict[str, Any], *, is_on: bool) -> dict[str, Any]:
    actor = authorised(leader, tenant)
    name = args.get("node")
    node = leader.state.nodes.get(name) if isinstance(name, str) else None
    if node is None:
        raise NotFoundError(f"no node {name!r}", hint="`flowmesh nodes` lists them.")
    reason = str(args.get("reason") or "")[:_REASON_MAX]
    before = node.health.state
    if is_on != (before == CORDONED and node.health.by != "scheduler") or reason:
        leader.apply(e.CordonRequested(node.name, is_on, actor, reason))
    usable = [n for n in leader.state.nodes.values() if n.is_usable and n.health.state != CORDONED]
    found = leader.state.nodes[node.name]
    return {"node": found.name, "health": found.health.plain(), "before": before, "nodes_left": len(usable)}


def unquarantine(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Let an operator that took nodes with it be tried again."""
    actor = authorised(leader, tenant)
    held = leader.state.ward.quarantine
    text = str(args.get("key") or "").lower()
    found = [key for key in held if key.hex().startswith(text)] if len(text) >= 8 else []
    if len(found) != 1:
        known = ", ".join(key.hex()[:16] for key in held) or "none"
        raise NotFoundError(f"no quarantined operator key {text!r}", hint=f"Give at least 8 digits of one of these: {known}.")
    quarantine = held[found[0]]
    leader.apply(e.QuarantineLifted(found[0], actor))
    return {"key": found[0].hex(), "operator": quarantine.operator, "nodes": list(quarantine.nodes)}


def may_act_for_all(leader: Leader, tenant: str) -> bool:
    """Tell whether a tenant may do what concerns everybody."""
    return leader.config.tenants_may_cordon or leader.tenant_names.get(tenant, tenant) in leader.config.operators


def authorised(leader: Leader, tenant: str) -> str:
    """Return the name of a tenant who may do what concerns everybody; raise UsageError for any other."""
    name = leader.tenant_names.get(tenant, tenant)
    if may_act_for_all(leader, tenant):
        return name
    raise UsageError(
        f"tenant {name} may not do what concerns every tenant of this mesh",
        hint='Whoever runs the mesh can: name a tenant in "operators" of the scheduler\'s scheduler.json, and start it again.',
    )
