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
        default_factory=lambda: {"inline": 500, "data": 32, "engine": 256, "train": 1, "user": 8}
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

    batch_max_s: float = 60.0
    """Most seconds that a batch of several operators is predicted to take: bounds what a lost node costs, and a tenant's wait."""

    batch_overhead: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    """A batch whose fixed costs are a smaller share of its time than this gains nothing by being larger: what is left stays for
    whichever node is free first."""

    shard_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Most seconds that a shard of ``shards: auto`` is predicted to take: what a lost node costs."""

    shard_overhead: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    """Most of the time of such an operator that may be spent on no row: longer shards rather than more overhead."""

    shard_fixed_s: Annotated[float, msgspec.Meta(ge=0)] = 0.02
    """What a shard costs beside its execution: its assignment, its commit, its place in the split and the concat."""

    memory_waves: float = 4.0
    """How many times what fits into a device's memory beside the model a batch may hold: the engine takes the rest as places come
    free, and larger batches would gain nothing."""

    feed_ahead_s: float = 0.25
    """A node whose batch is predicted to end this soon gets the next one of the same kind: it begins without a round trip."""

    linger_s: dict[str, float] = msgspec.field(default_factory=lambda: {"engine": 1.0, "train": 0.0})
    """Longest wait of a batch for others to join it, by kind; it waits only while what arrives saves more than the wait costs."""

    hold_back_max_s: float = 300.0
    """Longest wait for a better kind of node that is busy, while a worse one is idle."""

    residency_s: float = 60.0
    """For so long a loaded model is taken to stay: what arrives for it meanwhile shares the cost of the load."""

    bandwidth_bytes_per_s: float = 100e6
    """Assumed rate of a transfer between nodes until it has been measured."""

    price_per_hour: float = 0.5
    """Dollars per hour of a node that names no price: keeps the terms of the utility comparable."""

    energy_usd_per_kwh: float = 0.0
    """Price of electricity, where the price of a node does not hold it: rented ones do."""

    value_margin: float = 2.0
    """Worth of an operator in what it costs on a usual node: above 1, so that work is worth doing on a worse node too."""

    hold_s: float = 1.0
    """Worth of ending an operator's wait, in seconds of a usual node: short work goes before long work of the same worth."""

    delay_weight: float = 0.5
    """What a second of waiting costs a run, in seconds of a usual node: less saves money, more saves time."""

    age_s: float = 200.0
    """After so long the operators of a run are wanted twice as much as at first, after twice that three times; 0: never more."""

    deadline_weight: float = 4.0
    """By how much more work is wanted as the slack to its stage's deadline goes to nothing."""

    fair_burst_s: float = 10.0
    """Virtual seconds by which a tenant with little to do may be ahead of its exact share, and as many that are kept for it of
    what it left to others: so what comes now and then is hardly held up by a flood. Any other may end so much later. 0: exact."""

    fair_slack_s: float = 1.0
    """Virtual seconds by which a tenant may be ahead of another with work for the same nodes and yet go first."""

    fair_loads: float = 3.0
    """That many loads of a model longer where the other's model would have to be loaded first."""

    fair_scale_s: float = 2.0
    """Work of a tenant that is so much further than the one furthest behind (virtual seconds) is wanted half as much."""

    fair_floor: float = 1 / 64
    """Least factor by which fairness lowers how much work is wanted."""

    ablate: tuple[str, ...] = ()
    """Parts switched off, to measure what they bring: batching, locality, learning, fairness."""

    fold_hops: int = 64
    """Most operators that follow the items of one assignment in chains and run with it, all together; 0: none do."""

    fold_s: float = 0.1
    """A step of the chains of an assignment is folded if it takes no longer than this for all its items: beside slower work the
    round trip is nothing, and other nodes could share it."""

    lease_s: float = 10.0
    """Lease of an assignment as told to the node, renewed by its heartbeat."""

    unnamed_s: float = 4.0
    """An assignment that its node leaves out of its heartbeats for so long was lost on the way, or there: it is given anew."""

    speculation_share: float = 0.05
    """Most that second attempts beside stragglers may cost: a share of what the nodes cost in the last hour. 0: none are made."""

    straggler_factor: float = 2.0
    """An assignment is late once it ran this many times as long as predicted, and ``straggler_spreads`` deviations more."""

    straggler_spreads: float = 3.0
    """In relative standard deviations of what was measured of its class of work and device."""

    straggler_min_s: float = 1.0
    """Nothing is late before it ran this much longer than predicted: less is not worth a second attempt."""

    straggler_unknown_s: float = 30.0
    """The same where nothing like it was ever measured, so that the prediction may be far off."""

    sick_ratio: float = 2.0
    """A node this many times slower than its peers may be sick; it is, if ``sick_z`` robust deviations say so too."""

    sick_z: float = 4.0
    """So many robust standard deviations of its peers (from the median absolute deviation of logarithms)."""

    sick_samples: int = 6
    """Assignments of one class that must have been measured before a node is called slow."""

    sick_peers: int = 2
    """Fewest other nodes of the same class of device that a slow one is compared with."""

    sick_failures: int = 3
    """Fewest failed batches (crashed, internal, timeout) of one class of work before a node is called unreliable."""

    sick_failure_rate: float = 0.5
    """A node is unreliable if it fails at least this share of its batches, and three times the share of its peers."""

    health_window_s: float = 900.0
    """What happened longer ago says nothing of a node."""

    cordon_share: float = 0.34
    """Most of the nodes that the scheduler withholds by itself; one it always may, if others can do its work."""

    cordon_pause_s: float = 60.0
    """Pause of a sick node until it is tried with small work; doubled with every relapse."""

    cordon_pause_max_s: float = 3600.0
    """Longest pause; a node that did well for as long begins anew with the shortest."""

    canaries: int = 3
    """Small assignments in a row that must go well before a sick node is trusted again."""

    canary_max_s: float = 10.0
    """Longest predicted time of an operator that is used to try a sick node."""

    trusts_new_nodes: bool = True
    """Whether a node that nobody knows gets work like any other, or has to prove itself first."""

    quarantine_s: float = 600.0
    """How long an operator that took ``nodes_lost_limit`` nodes with it is not run for anybody."""

    run_history: int = 200
    """Ended runs that stay in memory for questions; older ones are read from the ledger again."""

    tenants: dict[str, TenantSettings] = {}
    """Weights and quotas by tenant: in ``scheduler.json`` by its name, in the core by the key of its account."""
