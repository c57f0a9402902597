"""What tenants have of the mesh: their share, how far behind it they are, what they use; and whether a run is within a quota."""

from __future__ import annotations

from typing import Any

from flowmesh_cas.errors import UsageError
from flowmesh_scheduler.core import fairness
from flowmesh_scheduler.core.state import State


def rows(state: State, names: dict[str, str], asking: str, *, all_tenants: bool) -> list[dict[str, Any]]:
    """Return a row per tenant, by name; ``names`` by account key. Others than the asking one only where all may be seen."""
    ready, running = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for run in state.runs.values():
        if run.end is None:
            ready[run.tenant] = ready.get(run.tenant, 0) + run.counts.get("ready", 0)
            running[run.tenant] = running.get(run.tenant, 0) + run.counts.get("assigned", 0)
    busy = {tenant for tenant in ready if ready[tenant] or running[tenant]}
    found = []
    for tenant in ready:
        if all_tenants or tenant == asking:
            weights = sum(state.shares.weight(each) for each in {*busy, tenant})
            row = _row(state, tenant, names.get(tenant, tenant), state.shares.weight(tenant) / weights)
            found.append({**row, "ready": ready[tenant], "running": running[tenant]})
    return sorted(found, key=lambda row: str(row["tenant"]))


def _row(state: State, tenant: str, name: str, share: float) -> dict[str, Any]:
    account, limits = state.shares.account(tenant), state.shares.limits(tenant)
    return {
        "tenant": name,
        "weight": limits.weight,
        "share": round(share, 4),
        "lag_s": round(state.shares.lag_s(tenant), 3),
        "used_s": round(account.used_us / 1e6, 3),
        "runs": account.runs,
        "operators": account.operators,
        "slots": account.slots,
        "limits": {"runs": limits.max_runs, "operators": limits.max_operators, "slots": limits.max_slots},
    }


def check_quota(state: State, tenant: str, operators: int) -> None:
    """Raise UsageError where one more run with so many operators is beyond what its tenant may have at a time."""
    refusal = fairness.refusal(state, tenant, operators)
    if refusal:
        raise UsageError(
            refusal, hint="Submit it again when some have ended (`flowmesh ls`), or let the mesh's operator raise it."
        )
