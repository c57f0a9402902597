"""What a batch is worth, how large it should be, what it costs on a node, and when it is better to wait.

Seconds come from what was learned (:mod:`costs`), dollars from the prices of nodes; a node that names none has the usual price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop
from math import ceil, log2

from flowmesh_scheduler.core.checkpoints import refs_of
from flowmesh_scheduler.core.classes import NodeClass
from flowmesh_scheduler.core.costs import Size
from flowmesh_scheduler.core.outstanding import executor_of
from flowmesh_scheduler.core.queues import Queue
from flowmesh_scheduler.core.splitting import Place
from flowmesh_scheduler.core.state import Node, State, Work
from flowmesh_scheduler.core.utility import Factors, score

_SECONDS_MIN = 1e-4
_INPUTS_SAMPLED = 16
_MEMORY_SHARE = 0.9
_ELSEWHERE_MARGIN = 0.05


@dataclass(slots=True, frozen=True)
class Base:
    """The first batch of a queue on a class of nodes, whatever a node holds: how many operators, what they take and bring."""

    count: int
    batches: int
    exec_s: float
    value_usd: float
    delay_usd_per_s: float
    fixed_s: float
    memory_bytes: float

    def fits(self, state: State) -> Callable[[Work], bool] | None:
        """Return what tells whether one more operator fits beside those taken; None where there is enough for all."""
        left = self.memory_bytes
        if not left:
            return None
        known: dict[Size, float] = {}  # one queue, so one kind

        def take(work: Work) -> bool:
            nonlocal left
            needed = known.get(work.size)
            if needed is None:
                needed = known[work.size] = state.costs.memory_bytes(work.cost_kind, work.size)
            left -= needed
            return left >= 0

        return take


def usual_usd_per_s(state: State) -> float:
    """Return the price of a node's second where nothing else is known: that of the class with the most nodes."""
    reference = state.fleet.reference
    return usd_per_s(state, reference) if reference is not None else state.settings.price_per_hour / 3600


def usd_per_s(state: State, klass: NodeClass) -> float:
    """Return the price of a second of a node."""
    return (klass.sample.price_per_hour or state.settings.price_per_hour) / 3600


def _own_wish(state: State, work: Work, now_us: int) -> float:
    """Return by how much work is wanted more than other work of its tenant: by priority, deadline, and the age of its run."""
    wish = 1.25**work.priority if work.priority else 1.0
    if state.settings.age_s:
        accepted_us = next(iter(work.waiters)).run.acceptance.accepted_at_us
        wish *= 1.0 + max(0, now_us - accepted_us) / 1e6 / state.settings.age_s
    if work.deadline_us:
        slack_s = max(0.0, (work.deadline_us - now_us) / 1e6)
        wish *= 1.0 + state.settings.deadline_weight * work.seconds / (work.seconds + slack_s)
    return wish


def wish_of(state: State, work: Work, least_tag: float, now_us: int) -> float:
    """Return by how much work is wanted more than other work: priority, deadline, weight and turn of its tenant."""
    settings, shares = state.settings, state.shares
    wish = shares.weight(work.tenant) * _own_wish(state, work, now_us)
    ahead = shares.tag(work.tenant) - least_tag
    if ahead > 0.0 and "fairness" not in settings.ablate:
        wish *= max(settings.fair_floor, 2.0 ** (-ahead / settings.fair_scale_s))
    return wish


def rank_of(state: State, queue: Queue, klass: NodeClass, now_us: int) -> float:
    """Return the logarithm of what a second of a class earns with a queue's batches: by it the queues of a tenant are ordered."""
    head, settings = queue.head, state.settings
    assert head is not None
    line = state.costs.line(head.cost_kind, klass.device)
    count = queue.count
    each_s, worth_s = line.unit_s * queue.units / count, max(0.0, queue.worth_s / count)
    batch = min(count, settings.batch_limit[executor_of(head)]) if queue.is_batching else 1
    exec_s = max(_SECONDS_MIN, line.fixed_s + line.step_s * queue.steps + each_s * batch)
    return log2((settings.value_margin * worth_s + settings.hold_s) * batch / exec_s * _own_wish(state, head, now_us))


def base_of(state: State, queue: Queue, head: Work, klass: NodeClass, batches: int, wish: float) -> Base:
    """Return the first batch of a queue on a class, if the queue is cut into so many."""
    settings = state.settings
    line = state.costs.line(head.cost_kind, klass.device)
    usual = usual_usd_per_s(state)
    delay = delay_usd_per_s(state, queue, wish)
    fixed_s = line.fixed_s + line.step_s * queue.steps
    each_s = line.unit_s * queue.units / max(1, queue.count)
    memory_bytes = _room(state, klass, head)
    count = batch_count(state, queue, head, fixed_s, each_s, batches)
    if memory_bytes and count > 1:
        each_bytes = state.costs.memory_bytes(head.cost_kind, head.size)
        count = max(1, min(count, int(memory_bytes / each_bytes) + 1)) if each_bytes > 0 else count
    exec_s = max(_SECONDS_MIN, fixed_s + each_s * count)
    worth_s = queue.worth_s / max(1, queue.count) * count
    value = usual * wish * (settings.value_margin * worth_s + settings.hold_s * count)
    delay *= count / max(count, queue.count)
    return Base(count, batches, exec_s, value, delay, fixed_s, memory_bytes)


def load_s(state: State, head: Work, klass: NodeClass, node: Node) -> float:
    """Return the seconds until a node has the model of a batch: none if it is loaded, more if it has to be brought first.

    Training begins with a process and a load of its own.
    """
    model = head.model
    if not model or (model in node.resident and executor_of(head) == "engine"):
        return 0.0
    seconds = state.costs.load_s(model, klass.device)
    return seconds if model in node.cached else seconds + state.costs.download_s(model, node.name)


def is_paid_anyway(node: Node) -> bool:
    """Tell whether a node's engine is at work: what runs beside it costs nothing more."""
    return bool(node.busy.get("engine") or node.busy.get("train"))


def place_of(state: State, queue: Queue, head: Work, klass: NodeClass, nodes: Sequence[Node]) -> Place:
    """Return what idle nodes of a class, alike in what they hold, are to the batches of a queue."""
    line = state.costs.line(head.cost_kind, klass.device)
    once_s = load_s(state, head, klass, nodes[0]) + line.fixed_s + line.step_s * queue.steps
    return Place(len(nodes), once_s, line.unit_s * queue.units / max(1, queue.count), usd_per_s(state, klass))


def delay_usd_per_s(state: State, queue: Queue, wish: float) -> float:
    """Return what a second of waiting for all of a queue costs the runs behind it."""
    return usual_usd_per_s(state) * wish * max(1, len(queue.runs)) * state.settings.delay_weight


def _room(state: State, klass: NodeClass, head: Work) -> float:
    """Return the bytes beside the model on a device; 0 where that is not told."""
    weights = state.model_bytes.get(head.model, 0)
    if not weights:
        return 0.0
    return max(1.0, klass.memory_bytes * _MEMORY_SHARE - weights) * state.settings.memory_waves


def batch_count(state: State, queue: Queue, head: Work, fixed_s: float, each_s: float, batches: int) -> int:
    """Return how many of the ready operators the first of so many batches takes.

    What a lost node may cost bounds the seconds of a batch.
    """
    settings, kind, ready = state.settings, executor_of(head), queue.count
    if not queue.is_batching or "batching" in settings.ablate:
        return 1
    count, limit = -(-ready // max(1, batches)), settings.batch_limit[kind]
    if queue.market != "engine":
        is_quick = fixed_s + each_s * settings.batch_floor[kind] < settings.quick_batch_s
        return max(1, min(ready, limit, max(settings.batch_floor[kind] if is_quick else 1, count)))
    if each_s > 0:
        count = min(count, max(1, int((settings.batch_max_s - fixed_s) / each_s)), _enough(state, ready, fixed_s, each_s))
    return max(1, min(limit, count))


def _enough(state: State, ready: int, fixed_s: float, each_s: float) -> int:
    """Return above how many operators a larger batch gains next to nothing: the rest is for whichever node is free first.

    While much is left a batch takes half of a node's part of all that is left: so nodes end together, and one that is lost, or
    comes back, changes little.
    """
    settings = state.settings
    least_s = max(fixed_s / settings.batch_overhead, settings.feed_ahead_s)
    nodes = sum(len(each.nodes) for each in state.fleet.classes.values())
    return max(ceil(least_s / each_s), ceil(ready / (2 * max(1, nodes))))


def factors_of(state: State, queue: Queue, head: Work, base: Base, klass: NodeClass, node: Node) -> Factors:
    """Return everything that the utility of this batch on this very node depends on."""
    settings, costs = state.settings, state.costs
    ratio = costs.node_ratio(node.name)
    exec_s = base.exec_s * ratio
    price = (node.record.price_per_hour or settings.price_per_hour) / 3600
    if queue.market != "engine" and is_paid_anyway(node):
        price = 0.0
    wait_s, load_share, fetch_s, egress = 0.0, 1.0, 0.0, 0.0
    if "locality" not in settings.ablate:
        wait_s = load_s(state, head, klass, node)
        if wait_s and executor_of(head) == "engine":
            taken = base.count * base.batches  # by equal batches, each with a load of its own
            load_share = taken / (max(taken, queue.count) + queue.rate_per_s * settings.residency_s)
        fetch_s, egress = _missing(state, head, base.count, node)
    record = node.record
    hazard = record.hazard_per_hour / 3600
    return Factors(
        base.value_usd,
        base.delay_usd_per_s,
        price,
        0.0,
        wait_s,
        load_share,
        fetch_s,
        exec_s,
        egress,
        max(0.0, record.watts - record.idle_watts),
        settings.energy_usd_per_kwh / 3.6e6,
        hazard,
        (price + base.delay_usd_per_s) * (wait_s + exec_s / 2) if hazard else 0.0,
    )


def _missing(state: State, head: Work, count: int, node: Node) -> tuple[float, float]:
    """Return seconds and dollars of bringing the inputs of a batch to a node; the first operator stands for all."""
    missing, egress = 0, 0.0
    for refs in (*head.inputs.values(), *refs_of(state, head)):
        for ref in refs[:_INPUTS_SAMPLED]:
            places = state.places.get(ref.cid)
            if places and node.name not in places:
                size = max(ref.size, 0) + 1
                missing += size
                holder = state.nodes.get(min(places))
                if holder is not None:
                    egress += size / 1e9 * holder.record.egress_usd_per_gb
    if not missing:
        return 0.0, 0.0
    return state.costs.fetch_s(node.name, missing * count), egress * count


def held_back(
    state: State, queue: Queue, head: Work, factors: Factors, count: int, others: Sequence[NodeClass], now_us: int
) -> bool:
    """Tell whether waiting for one of ``others``, whose nodes are busy, is better than this idle node by more than a margin."""
    if now_us - head.queued_at_us > state.settings.hold_back_max_s * 1e6:
        return False
    own = score(factors._replace(opportunity_usd_per_s=0.0)) / count
    needed = own + _ELSEWHERE_MARGIN * abs(own)
    each = factors.value_usd / count
    delay = factors.delay_usd_per_s / count
    for other in others:
        line = state.costs.line(head.cost_kind, other.device)
        exec_s = line.seconds(queue.steps, queue.units / max(1, queue.count) * count)
        price = usd_per_s(state, other)
        if each - (delay + price / count) * exec_s <= needed:
            continue
        more = -(-queue.count // count) - 1
        wait_s = free_in_s(state, other, now_us) + more * exec_s / len(other.nodes)
        ready_s = load_s(state, head, other, _best_prepared(queue, other))
        if each - delay * (wait_s + ready_s + exec_s) - price * (exec_s + ready_s) / count > needed:
            return True
    return False


def _best_prepared(queue: Queue, klass: NodeClass) -> Node:
    """Return a node of a class that has the model of a queue loaded, or at least at hand, if there is one."""
    for held in (klass.warm, klass.cached):
        for node in held.get(queue.model, {}).values():
            return node
    return next(iter(klass.nodes.values()))


def free_in_s(state: State, klass: NodeClass, now_us: int) -> float:
    """Return when the first busy node of a class is predicted to be idle."""
    ends = klass.ends
    while ends and (ends[0][1] not in state.assignments or not state.assignments[ends[0][1]].running):
        heappop(ends)
    return max(0.0, (ends[0][0] - now_us) / 1e6) if ends else 0.0


def lingers(state: State, queue: Queue, head: Work, base: Base, price: float, now_us: int) -> bool:
    """Tell whether the batch should wait a moment: what arrives would save more than the wait of what is here costs."""
    settings, kind = state.settings, executor_of(head)
    linger_s = settings.linger_s.get(kind, 0.0)
    waited_s = (now_us - head.queued_at_us) / 1e6
    if not linger_s or waited_s >= linger_s or base.count < queue.count or base.count >= settings.batch_limit[kind]:
        return False
    if not queue.is_batching:
        return False
    since_s = (now_us - queue.last_arrival_us) / 1e6
    rate = min(queue.rate_per_s, 1.0 / since_s) if since_s > 0 else queue.rate_per_s
    return rate * price * base.fixed_s > base.delay_usd_per_s
