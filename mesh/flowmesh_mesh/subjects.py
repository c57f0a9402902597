"""Every subject of the mesh, in its final form. Who may use which stands in docs/protocol.md.

``tenant`` is the public key of the tenant's account (A...): the broker puts it into the subject by the account
import, so it cannot be forged. ``node`` is a checked name. Inside a tenant's own account the subjects of the
first group carry no key: a bare client publishes to ``fm.submit``.
"""

from __future__ import annotations

# streams
SUBMIT = "SUBMIT"
READY = "READY"
ASSIGN = "ASSIGN"
DONE = "DONE"
LEDGER = "LEDGER"
RUNS = "RUNS"
NODES = "NODES"
HEALTH = "HEALTH"
COSTS = "COSTS"
LEASE_BUCKET = "lead"
LEASE_STREAM = "KV_lead"
LEASE_SUBJECT = "$KV.lead.scheduler"

# what a tenant's client uses inside its own account (imported from the mesh account)
TENANT_SUBMIT = "fm.submit"
TENANT_CANCEL = "fm.cancel"
TENANT_ASK = "fm.ask"
TENANT_PUT = "fm.put"
TENANT_GET = "fm.get"
TENANT_RUNS = "fm.runs"

# control
LEADER_ALIVE = "fm.leader.alive"
LEDGER_EPOCHS = "led.epoch.*"
ASSIGN_EPOCHS = "asg.epoch.*"
LEDGER_RESTORED = "led.restored.*"


def submit(tenant: str) -> str:
    return f"fm.submit.{tenant}"


def cancel(tenant: str) -> str:
    return f"fm.cancel.{tenant}"


def ask(tenant: str) -> str:
    return f"fm.ask.{tenant}"


def put(tenant: str) -> str:
    return f"fm.put.{tenant}"


def get(tenant: str) -> str:
    return f"fm.get.{tenant}"


def run_event(tenant: str, run: str) -> str:
    """Events of one run, published by the leader; in the tenant's account ``fm.runs.<run>``."""
    return f"fm.runs.{tenant}.{run}"


def tenant_run_event(run: str) -> str:
    return f"{TENANT_RUNS}.{run}"


def ready(operator_key: str) -> str:
    return f"fm.ready.{operator_key}"


def assign(node: str, assignment: str) -> str:
    return f"asg.node.{node}.{assignment}"


def assign_consumer(node: str) -> str:
    """Name of the durable consumer from which a node pulls its assignments."""
    return f"node_{node}"


def assign_epoch(epoch: int) -> str:
    return f"asg.epoch.{epoch}"


def node_done(node: str) -> str:
    """Batch results of a node (stream DONE)."""
    return f"fm.node.{node}.done"


def node_beat(node: str) -> str:
    return f"fm.node.{node}.beat"


def node_log(node: str) -> str:
    """Log lines of running operators; the leader routes them to the runs that wait."""
    return f"fm.node.{node}.log"


def node_checkpoint(node: str) -> str:
    """Checkpoints that a node has made; the leader answers each once the mesh holds it."""
    return f"fm.node.{node}.checkpoint"


def node_record(node: str) -> str:
    """The node's own description (stream NODES, last value per node)."""
    return f"fm.nodes.{node}"


def node_health(node: str) -> str:
    """How far a node is trusted, written by the leader (stream HEALTH, last value per node)."""
    return f"fm.health.{node}"


def cost(entry: str) -> str:
    """One entry of what was learned about costs, written by the leader (stream COSTS, last value per entry)."""
    return f"fm.costs.{entry}"


def node_control(node: str) -> str:
    """Leader to node: commits, cancellations, questions."""
    return f"fm.ctl.{node}"


def blocks(holder: str) -> str:
    """Requests for blocks and leases on roots, answered by one holder (a node, or ``hub``)."""
    return f"fm.blocks.{holder}"


def assign_checkpoint(operator_key: str) -> str:
    """Pointer to the last complete checkpoint of a running operator, under the same fence as the assignments."""
    return f"asg.checkpoint.{operator_key}"


def scheduler_beat(scheduler: str) -> str:
    """Presence of one scheduler, leader or standby, once a second."""
    return f"fm.scheduler.{scheduler}.beat"


def hub_of(scheduler: str) -> str:
    """Name under which a scheduler that stands by gives its hub's blocks; the leader's hub is ``hub``."""
    return f"{HUB}-{scheduler}"


def scheduler_control(scheduler: str) -> str:
    """Leader to one standby: acceptances to keep."""
    return f"fm.ctl.{scheduler}"


HUB = "hub"
ALL_SCHEDULERS_CONTROL = "fm.ctl.schedulers"
ALL_NODES_CONTROL = "fm.ctl.all"


def ledger_epoch(epoch: int) -> str:
    return f"led.epoch.{epoch}"


def ledger_result(operator_key: str, generation: int) -> str:
    """Write-once subject of a result; ``operator_key`` in hex."""
    return f"led.result.{operator_key}.{generation}"


def ledger_accepted(tenant: str, run: str) -> str:
    return f"led.accepted.{tenant}.{run}"


def ledger_ended(tenant: str, run: str) -> str:
    return f"led.ended.{tenant}.{run}"


def ledger_cancelled(tenant: str, run: str) -> str:
    return f"led.cancelled.{tenant}.{run}"


def ledger_restored(epoch: int) -> str:
    """Mark that the ledger holds what the journals of the schedulers hold; one without it was made anew."""
    return f"led.restored.{epoch}"


def ledger_reserved(tenant: str, period: int) -> str:
    """Spend reserved by a tenant for one lease period."""
    return f"led.reserved.{tenant}.{period}"


def inbox_prefix(role: str) -> str:
    """Every credential may listen only on an inbox of its own."""
    return f"_INBOX_{role}"
