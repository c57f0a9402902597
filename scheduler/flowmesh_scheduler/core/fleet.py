"""Which nodes are idle, which can run what, and how the classes of nodes follow what becomes of the nodes."""

from __future__ import annotations

from math import log

from flowmesh_mesh.messages import NodeRecord
from flowmesh_scheduler.core.classes import ORDER, Fleet, NodeClass
from flowmesh_scheduler.core.devices import device_class, figures_of
from flowmesh_scheduler.core.health import may_take
from flowmesh_scheduler.core.state import Node, State, Work


def free_slots(state: State, node: Node, kind: str) -> int:
    """Return how many more assignments of a kind a node may get."""
    depth, slots, busy = state.settings.depth_limit[kind], node.record.slots, node.busy
    if kind in ("engine", "train"):
        return min(depth * slots - busy.get(kind, 0), slots - busy.get("engine", 0) - busy.get("train", 0))
    return (depth * slots if kind == "user" else depth) - busy.get(kind, 0)


def can_run(record: NodeRecord, work: Work) -> bool:
    """Tell whether a node has the operator type, the numeric class and the hardware."""
    needs = work.operator.resources
    if work.operator.type not in record.types:
        return False
    numeric = work.operator.numeric
    if numeric != "any" and numeric.removeprefix("exact:") not in record.numeric:
        return False
    if needs.gpus > len(record.devices) or needs.memory_bytes > record.memory_bytes or needs.cpus > record.cpus:
        return False
    return not needs.vram_bytes or any(d.memory_bytes >= needs.vram_bytes for d in record.devices)


def memory_of(record: NodeRecord) -> int:
    """Return the bytes that models and what they work on can have on a node."""
    return sum(d.memory_bytes for d in record.devices) or record.memory_bytes


def refresh(state: State) -> None:
    """Bring the classes up to date with the nodes that have changed."""
    fleet = state.fleet
    if not fleet.stale:
        return
    stale, fleet.stale = fleet.stale, {}
    for node in stale:
        if node.is_usable and state.nodes.get(node.name) is node and may_take(state, node, state.now_us):
            _enter(state, fleet, node)
        elif node.klass is not None:
            _leave(node)
            fleet.changed.update(ORDER)  # what avoided another node may have no choice now
    _choose_reference(fleet)


def _leave(node: Node) -> None:
    known = node.klass
    if known is None:
        return
    known.nodes.pop(node.name, None)
    for idle in known.idle.values():
        idle.pop(node.name, None)
    for digest in node.warm:
        known.warm.get(digest, {}).pop(node.name, None)
    for digest in node.cached:
        known.cached.get(digest, {}).pop(node.name, None)
    node.klass, node.warm = None, frozenset()


def _enter(state: State, fleet: Fleet, node: Node) -> None:
    klass = node.klass
    if klass is None or (node.classed_as is not node.record and node.classed_as != node.record):
        _leave(node)
        klass = _class_of(state, fleet, node)
    for market, idle in klass.idle.items():
        is_idle = free_slots(state, node, market) > 0
        if is_idle and (node.name not in idle or market != "engine"):
            idle[node.name] = node
            fleet.changed.add(market)
        elif not is_idle:
            idle.pop(node.name, None)
    if node.warm != node.resident:
        for digest in node.warm - node.resident:
            klass.warm.get(digest, {}).pop(node.name, None)
        for digest in sorted(node.resident - node.warm):
            klass.warm.setdefault(digest, {})[node.name] = node
        node.warm = node.resident
    for digest in node.cached:
        klass.cached.setdefault(digest, {})[node.name] = node


def _class_of(state: State, fleet: Fleet, node: Node) -> NodeClass:
    r = node.record
    like = (
        r.types, r.python, r.cpus, r.memory_bytes, r.numeric, r.slots, r.site,
        _step(r.price_per_hour, 1.15), _step(r.hazard_per_hour, 2.0), _step(r.egress_usd_per_gb, 1.5),
        tuple((d.kind, d.name, d.memory_bytes, d.flops, d.bandwidth_bytes_per_s) for d in r.devices),
    )  # fmt: skip
    klass = fleet.classes.get(like)
    if klass is None:
        device = device_class(r)
        klass = fleet.classes[like] = NodeClass(len(fleet.classes), r, device, memory_bytes=memory_of(r))
        state.costs.know_device(device, figures_of(r))
        for queue in state.pool.values():
            klass.ranking[queue.market].pending[queue] = None
    klass.nodes[node.name] = node
    node.klass, node.classed_as = klass, r
    return klass


def _step(value: float, factor: float) -> int:
    """Return which of steps, each so many times the one before, a value is on: what differs by less is alike."""
    return round(log(value, factor)) if value > 0 else -(1 << 30)


def _choose_reference(fleet: Fleet) -> None:
    """Find the device that most nodes have, accelerated ones first, and the class of it with the most nodes."""
    counts: dict[str, int] = {}
    for klass in fleet.classes.values():
        counts[klass.device] = counts.get(klass.device, 0) + len(klass.nodes)

    def rank(klass: NodeClass) -> tuple[bool, bool, int, int, int]:
        return (bool(klass.nodes), bool(klass.sample.devices), counts[klass.device], len(klass.nodes), -klass.number)

    fleet.reference = max(fleet.classes.values(), key=rank, default=None)
