"""Settings of the core; read once, passed down."""

from __future__ import annotations

from typing import Annotated

import msgspec


class TenantSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one tenant may have. Limits of 0 do not limit."""

    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Share of the mesh in proportion to the weights of the other tenants that have work at the time."""

    max_runs: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Most runs that have not ended; a submission beyond is rejected."""

    max_operators: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Most operators of those runs that have not ended, ready and running ones among them; a submission beyond is rejected."""

    max_slots: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Most assignments that run at once and have operators of this tenant in them; more of its work waits."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may be tuned about decisions. Unknown keys are an error."""

    node_lease_us: int = 5_000_000
    """A node that sent no heartbeat for this long has lost what it held. Five beats of one second."""

    suspicion_us: int = 300_000
    """After the broker saw a node's connection end, cheap work is started elsewhere once this has passed."""

    nodes_lost_limit: int = 3
    """An operator that took this many nodes with it is poison: it is not tried again."""

    results_lost_limit: int = 10
    """An operator whose result was lost this many times in one run is not computed again: somebody claims what he never has."""

    batch_limit: dict[str, int] = msgspec.field(
        default_factory=lambda: {"inline": 500, "data": 32, "engine": 16, "train": 1, "user": 8}
    )
    """Most operators in one assignment, by kind of executor: bounds what one lost node costs."""

    batch_floor: dict[str, int] = msgspec.field(
        default_factory=lambda: {"inline": 64, "data": 1, "engine": 1, "train": 1, "user": 1}
    )
    """Fewest operators in one assignment while there are more: a message to the broker costs more than some of them."""

    quick_batch_s: float = 0.05
    """The floor holds only while the smallest batch takes less than this: slow work is spread however little there is."""

    depth_limit: dict[str, int] = msgspec.field(
        default_factory=lambda: {"inline": 3, "data": 2, "engine": 1, "train": 1, "user": 2}
    )
    """Most assignments of a kind outstanding on one node; above 1 hides the round trip behind the work."""

    bandwidth_bytes_per_s: float = 100e6
    """Assumed rate of a transfer between nodes until it has been measured."""

    model_load_s: float = 10.0
    """Assumed time to load a model that is not resident, until it has been measured."""

    operator_s: float = 0.1
    """Assumed time of one operator of a type never seen."""

    price_per_hour: float = 0.5
    """Dollars per hour of a node that names no price: keeps the terms of the utility comparable."""

    lease_s: float = 10.0
    """Lease of an assignment as told to the node, renewed by its heartbeat."""

    run_history: int = 200
    """Ended runs that stay in memory for questions; older ones are read from the ledger again."""

    tenants: dict[str, TenantSettings] = {}
    """Weights and quotas by tenant: in ``scheduler.json`` by its name, in the core by the key of its account."""
