"""The streams and consumers of a mesh, as data. The leader creates them through the bus.

LEDGER and ASSIGN are guarded by an epoch record and live on disk always; they begin at the current time in
milliseconds, so that no sequence of an earlier life of the store can match again. READY and DONE can be derived
from manifests and the ledger, RUNS is a projection: they live in memory.
"""

from __future__ import annotations

import msgspec

from flowmesh_mesh import subjects

SECOND_NS = 1_000_000_000


class StreamConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the broker is told about a stream; durations in nanoseconds, sizes in bytes, -1 is unlimited."""

    name: str
    subjects: list[str]
    retention: str = "limits"
    storage: str = "file"
    max_consumers: int = 0
    max_msgs: int = 0
    max_bytes: int = 0
    max_age: int = 0
    max_msgs_per_subject: int = 0
    max_msg_size: int = 0
    discard: str = "old"
    discard_new_per_subject: bool = False
    num_replicas: int = 0
    duplicate_window: int = 0
    first_seq: int = 0
    allow_direct: bool = False
    allow_rollup_hdrs: bool = False
    deny_delete: bool = False
    allow_atomic: bool = False
    allow_msg_ttl: bool = False
    subject_delete_marker_ttl: int = 0


class ConsumerConfig(msgspec.Struct, frozen=True):
    """What the broker is told about a consumer; durations in nanoseconds, 0 is the broker's default."""

    name: str
    durable_name: str = ""
    filter_subject: str = ""
    deliver_policy: str = "all"
    opt_start_seq: int = 0
    ack_policy: str = "explicit"
    ack_wait: int = 0
    max_deliver: int = 0
    max_ack_pending: int = 0
    max_waiting: int = 0
    inactive_threshold: int = 0
    mem_storage: bool = False
    num_replicas: int = 0


def submit(first_seq_ms: int = 0, replicas: int = 1) -> StreamConfig:
    """Submissions and cancellations of all tenants; the subject ends with the tenant's key.

    The leader removes what it has settled in bulk: a work queue would sync each removal on its own. ``first_seq_ms`` is the
    current time, so that a leader of an earlier life of the store removes nothing of this one.
    """
    return StreamConfig(
        subjects.SUBMIT,
        ["fm.submit.*", "fm.cancel.*"],
        first_seq=first_seq_ms,
        num_replicas=replicas,
        duplicate_window=120 * SECOND_NS,
    )


def ready(replicas: int = 1) -> StreamConfig:
    """Ready operators from planners beside the leader."""
    return StreamConfig(subjects.READY, ["fm.ready.>"], retention="workqueue", storage="memory", num_replicas=replicas)


def assign(first_seq_ms: int, replicas: int = 1) -> StreamConfig:
    """Assignments and the epoch records that guard them; ``first_seq_ms`` is the current time.

    The leader removes what is settled in bulk: a work queue would sync each removal on its own.
    """
    return StreamConfig(
        subjects.ASSIGN,
        ["asg.>"],
        allow_atomic=True,
        max_consumers=20_000,
        first_seq=first_seq_ms,
        num_replicas=replicas,
        duplicate_window=2 * SECOND_NS,
    )


def done(replicas: int = 1) -> StreamConfig:
    """Batch results, for a leader that was away when they came; an hour of them at most, and nodes offer them again."""
    return StreamConfig(
        subjects.DONE,
        ["fm.node.*.done"],
        storage="memory",
        max_age=3600 * SECOND_NS,
        max_bytes=256 * 1024 * 1024,
        num_replicas=replicas,
        duplicate_window=120 * SECOND_NS,
    )


def ledger(first_seq_ms: int, replicas: int = 1) -> StreamConfig:
    """The system of record: each subject is written once; ``first_seq_ms`` is the current time."""
    return StreamConfig(
        subjects.LEDGER,
        ["led.>"],
        max_msgs_per_subject=1,
        discard="new",
        discard_new_per_subject=True,
        allow_atomic=True,
        first_seq=first_seq_ms,
        num_replicas=replicas,
        duplicate_window=2 * SECOND_NS,
    )


def runs(replicas: int = 1, max_bytes: int = 256 * 1024 * 1024, max_age_s: int = 24 * 3600) -> StreamConfig:
    """Events of runs, kept for late watchers as long as there is room."""
    return StreamConfig(
        subjects.RUNS,
        ["fm.runs.*.*"],
        storage="memory",
        max_bytes=max_bytes,
        max_age=max_age_s * SECOND_NS,
        num_replicas=replicas,
        duplicate_window=2 * SECOND_NS,
    )


def nodes(replicas: int = 1) -> StreamConfig:
    """The last record of every node."""
    return StreamConfig(
        subjects.NODES, ["fm.nodes.*"], max_msgs_per_subject=1, num_replicas=replicas, duplicate_window=2 * SECOND_NS
    )


def health(replicas: int = 1) -> StreamConfig:
    """How far each node is trusted: what a new leader must not forget."""
    return StreamConfig(
        subjects.HEALTH, ["fm.health.*"], max_msgs_per_subject=1, num_replicas=replicas, duplicate_window=2 * SECOND_NS
    )


def costs(replicas: int = 1) -> StreamConfig:
    """What was learned about costs, for the next leader; without authority, so that losing some of it loses time only."""
    return StreamConfig(
        subjects.COSTS,
        ["fm.costs.*"],
        max_msgs=8192,
        max_msgs_per_subject=1,
        num_replicas=replicas,
        duplicate_window=2 * SECOND_NS,
    )


def lease(first_seq_ms: int = 0, replicas: int = 1) -> StreamConfig:
    """The bucket of the leader's lease: keys expire, and an expiry leaves a marker that watchers see.

    Epoch records name a revision of it: it must not begin anew below one of them.
    """
    return StreamConfig(
        subjects.LEASE_STREAM,
        [f"$KV.{subjects.LEASE_BUCKET}.>"],
        max_msgs_per_subject=1,
        discard="new",
        allow_rollup_hdrs=True,
        allow_msg_ttl=True,
        subject_delete_marker_ttl=SECOND_NS,
        first_seq=first_seq_ms,
        num_replicas=replicas,
        duplicate_window=2 * SECOND_NS,
    )


def mesh_streams(now_ms: int, replicas: int = 1) -> list[StreamConfig]:
    """Return every stream of a mesh, those that guard first."""
    return [
        lease(now_ms, replicas),
        ledger(now_ms, replicas),
        assign(now_ms, replicas),
        submit(now_ms, replicas),
        ready(replicas),
        done(replicas),
        runs(replicas),
        nodes(replicas),
        health(replicas),
        costs(replicas),
    ]


def assign_consumer(node: str, ack_wait_s: float = 30.0) -> ConsumerConfig:
    """Return the durable from which one node pulls its assignments."""
    name = subjects.assign_consumer(node)
    return ConsumerConfig(
        name,
        durable_name=name,
        filter_subject=subjects.assign(node, "*"),
        ack_wait=int(ack_wait_s * SECOND_NS),
        max_ack_pending=20_000,
    )


def leader_consumer(name: str, filter_subject: str = "", ack_wait_s: float = 30.0) -> ConsumerConfig:
    """Return the durable from which the leader pulls a work queue."""
    return ConsumerConfig(
        name,
        durable_name=name,
        filter_subject=filter_subject,
        ack_wait=int(ack_wait_s * SECOND_NS),
        max_ack_pending=100_000,
    )
