"""Sick nodes: found by comparison with their peers, given no work for a while, tried with small work, trusted again.

A node is compared only with nodes of the same class of device on the same type and model (speed), or on the same type, model and
code (failures): what is slow or breaks everywhere is the work's fault, and what ran on one node alone says nothing of the node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import nlargest
from math import exp, log
from statistics import median

from flowmesh_mesh.messages import NodeHealth, NodeRecord, Reason
from flowmesh_scheduler.core.commands import RecordHealth
from flowmesh_scheduler.core.events import CordonRequested, QuarantineLifted
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.standing import (
    CANARY,
    CORDONED,
    OK,
    SCHEDULER,
    FailureClass,
    Group,
    Health,
    Marks,
    Quarantine,
    Samples,
    spread_of,
)
from flowmesh_scheduler.core.state import Node, Outstanding, State, Work

BLAMED = frozenset({Reason.CRASHED, Reason.INTERNAL, Reason.TIMEOUT})
"""Failures that may be the node's fault; a result that is not sound counts as internal."""

_LOOK_EVERY_US = 1_000_000
_NOISE_S = 0.02
"""Added to both sides of a ratio: what takes a few milliseconds says little."""

_SPREAD_MIN = 0.1
"""Peers that agree better than this (in logarithms) are not taken at their word: they are few."""

_WORST_CONSIDERED = 8
_ALIKE = 0.9


def may_take(state: State, node: Node, now_us: int) -> bool:
    """Tell whether the placement may give work to a node. A canary gets its work from ``canaries`` alone."""
    return node.health.state == OK


# --- what is noted


def note_batch(state: State, outstanding: Outstanding, exec_s: float, predicted_s: float, now_us: int) -> None:
    """Note how long a finished assignment ran, against what its class and device are predicted to take."""
    node = state.nodes.get(outstanding.node)
    if node is None:
        return
    value = log((exec_s + _NOISE_S) / (predicted_s + _NOISE_S))
    group = (*outstanding.kind, outstanding.device)
    if node.health.canary == outstanding.id:
        late = "" if _is_near(state, group, node, value) else f"its canary took {exp(value):.1f}x as long as predicted"
        _judge(state, node, late)
        return
    by_node = state.ward.speeds.setdefault(group, {})
    samples = by_node.get(node.name)
    if samples is None:
        samples = by_node[node.name] = Samples()
    samples.add(now_us, value)
    state.ward.new_speeds[group] = None


def _is_near(state: State, group: Group, node: Node, value: float) -> bool:
    peers = [s.middle() for name, s in state.ward.speeds.get(group, {}).items() if name != node.name and s.values]
    return not peers or value - median(peers) < log(state.settings.sick_ratio)


def note_report(state: State, name: str, work: Work, assignment: str, reasons: Iterable[str], now_us: int) -> None:
    """Note whether a node failed with what it reports: one mark, however many operators were in the batch."""
    node = state.nodes.get(name)
    if node is None:
        return
    is_bad = any(reason in BLAMED for reason in reasons)
    if node.health.canary == assignment:
        if is_bad:
            _judge(state, node, "its canary failed")
        return
    kind = failure_class(work)
    by_node = state.ward.failures.setdefault(kind, {})
    marks = by_node.get(name)
    if marks is None:
        marks = by_node[name] = Marks()
    marks.values.append((now_us, is_bad))
    if is_bad:
        state.ward.new_failures[kind] = None


def failure_class(work: Work) -> FailureClass:
    """Return what failures of this work are compared with."""
    code = work.operator.code
    return (work.operator.type, next(iter(work.model_digests.values()), ""), "" if code is None else code.digest.hex())


# --- finding the sick


def watch(state: State, now_us: int, out: Outbox) -> None:
    """Once a second: compare nodes in what is new, let cordons end, and take back those that cannot be afforded."""
    ward = state.ward
    if now_us - ward.looked_at_us < _LOOK_EVERY_US or state.is_cut_off:
        return
    ward.looked_at_us = now_us
    since_us = now_us - int(state.settings.health_window_s * 1e6)
    new_speeds, ward.new_speeds = ward.new_speeds, {}
    for group in new_speeds:
        _compare_speeds(state, group, since_us, now_us, out)
    new_failures, ward.new_failures = ward.new_failures, {}
    for kind in new_failures:
        _compare_failures(state, kind, since_us, now_us, out)
    verdicts, ward.verdicts = ward.verdicts, {}
    for name, wrong in verdicts.items():
        _heed_verdict(state, state.nodes[name], wrong, now_us, out)
    lifted: list[NodeRecord] = []
    for name in list(ward.patients):
        _watch_patient(state, state.nodes[name], lifted, now_us, out)
    ward.forget_old(now_us)


def _recent(by_node: Mapping[str, Samples], state: State, since_us: int) -> dict[str, Samples]:
    found = {}
    for name, samples in by_node.items():
        samples.forget_before(since_us)
        if samples.values and name in state.nodes:
            found[name] = samples
    return found


def _compare_speeds(state: State, group: Group, since_us: int, now_us: int, out: Outbox) -> None:
    """Find the nodes of a group whose seconds are far beyond those of the others: by a robust z-score and by their ratio."""
    settings = state.settings
    known = _recent(state.ward.speeds.pop(group, {}), state, since_us)
    if not known:
        return
    state.ward.speeds[group] = known
    middles = {name: samples.middle() for name, samples in known.items()}
    common = median(middles.values())
    limit = log(settings.sick_ratio)
    late = [n for n, m in middles.items() if m - common > limit / 2 and len(known[n].values) >= settings.sick_samples]
    for name in nlargest(_WORST_CONSIDERED, late, key=lambda n: middles[n]):
        peers = [middle for other, middle in middles.items() if other != name]
        if len(peers) < settings.sick_peers:
            continue
        usual = median(peers)
        beyond = middles[name] - usual
        if beyond >= limit and beyond / max(spread_of(peers, usual), _SPREAD_MIN) >= settings.sick_z:
            text = f"{exp(beyond):.1f}x slower than its peers in {group[0]}"
            cordon(state, state.nodes[name], text, group[0], now_us, out)


def _compare_failures(state: State, kind: FailureClass, since_us: int, now_us: int, out: Outbox) -> None:
    """Find the nodes that fail with what others do well."""
    settings, by_node = state.settings, state.ward.failures.pop(kind, {})
    counts = {}
    for name, marks in list(by_node.items()):
        marks.forget_before(since_us)
        if marks.values and name in state.nodes:
            counts[name] = (marks.bad(), len(marks.values))
        else:
            del by_node[name]
    if by_node:
        state.ward.failures[kind] = by_node
    all_bad, all_total = sum(b for b, _ in counts.values()), sum(t for _, t in counts.values())
    for name, (bad, total) in counts.items():
        others = all_total - total
        if bad < settings.sick_failures or others < settings.sick_failures or bad < settings.sick_failure_rate * total:
            continue
        usual = (all_bad - bad) / others
        if bad / total >= 3 * usual + 0.1:
            text = f"{bad} of its last {total} batches of {kind[0]} failed, {all_bad - bad} of {others} on its peers"
            cordon(state, state.nodes[name], text, kind[0], now_us, out)


# --- cordons


def cordon(state: State, node: Node, reason: str, kind: str, now_us: int, out: Outbox) -> None:
    """Give a node no work for a while, if the fleet can do without it."""
    if node.health.state != OK or not node.is_usable or not _can_spare(state, node):
        return
    health, settings = node.health, state.settings
    if now_us - health.since_us > settings.cordon_pause_max_s * 1e6:
        health.strikes = 0
    health.kind = kind
    _pause(state, node, reason, now_us, out)


def _pause(state: State, node: Node, reason: str, now_us: int, out: Outbox) -> None:
    """Withhold work, twice as long as the last time."""
    health, settings = node.health, state.settings
    pause_s = min(settings.cordon_pause_s * 2**health.strikes, settings.cordon_pause_max_s)
    health.strikes = min(health.strikes + 1, 30)
    health.until_us = now_us + int(pause_s * 1e6)
    _enter(state, node, CORDONED, SCHEDULER, reason, now_us, out)


def _enter(state: State, node: Node, word: str, by: str, reason: str, now_us: int, out: Outbox) -> None:
    health = node.health
    health.state, health.by, health.reason, health.since_us = word, by, reason, now_us
    health.good, health.canary = 0, ""
    if word == OK:
        health.until_us, health.kind = 0, ""
        state.ward.patients.pop(node.name, None)
    else:
        state.ward.patients[node.name] = None
    state.touch(node)
    out.add(RecordHealth(record_of(node)))


def forget(state: State, node: Node) -> None:
    """Drop what was measured of a node: it is not what it was."""
    state.ward.forget_node(node.name)
    state.costs.forget_node(node.name)


def record_of(node: Node) -> NodeHealth:
    """Return what outlives a leader."""
    h = node.health
    return NodeHealth(node.name, h.state, h.reason, h.by, h.since_us, h.until_us, h.strikes, h.kind)


def _can_spare(state: State, node: Node) -> bool:
    """Tell whether the fleet can do without a node: few enough are withheld, and others can do all that it can."""
    there = [n for n in state.nodes.values() if n.is_usable]
    withheld = sum(n.health.state != OK and n.health.by == SCHEDULER for n in there if n is not node)
    if withheld + 1 > max(1, int(state.settings.cordon_share * len(there))):
        return False
    return _is_covered(state, node)


def _is_covered(state: State, node: Node, lifted: Sequence[NodeRecord] = ()) -> bool:
    """Tell whether everything that a node can run, a trusted node of some class can run too, or one of those lifted."""
    able = [
        klass.sample
        for klass in state.fleet.classes.values()
        if _is_as_able(klass.sample, node.record)
        and any(n is not node and n.is_usable and n.health.state == OK for n in klass.nodes.values())
    ]
    able += [record for record in lifted if _is_as_able(record, node.record)]
    return bool(able) and all(any(kind in record.types for record in able) for kind in node.record.types)


def _is_as_able(other: NodeRecord, record: NodeRecord) -> bool:
    """Tell whether a node has at least the hardware of another; a tenth less of what varies between equal machines will do."""
    return (
        len(other.devices) >= len(record.devices)
        and max((d.memory_bytes for d in other.devices), default=0)
        >= _ALIKE * max((d.memory_bytes for d in record.devices), default=0)
        and other.memory_bytes >= _ALIKE * record.memory_bytes
        and other.cpus >= _ALIKE * record.cpus
        and set(record.numeric) <= set(other.numeric)
    )


def _watch_patient(state: State, node: Node, lifted: list[NodeRecord], now_us: int, out: Outbox) -> None:
    """Let a pause end in canaries; give back a node that nobody else can stand in for, those ``lifted`` just now included."""
    health = node.health
    if health.by != SCHEDULER or not node.is_usable:
        return
    if not _is_covered(state, node, lifted):
        lifted.append(node.record)
        _enter(state, node, OK, SCHEDULER, f"no other node can do its work; before: {health.reason}", now_us, out)
    elif health.state == CORDONED and now_us >= health.until_us:
        _enter(state, node, CANARY, SCHEDULER, health.reason, now_us, out)
    elif health.canary and health.canary not in state.assignments:
        health.canary = ""


def _judge(state: State, node: Node, wrong: str) -> None:
    """Take the verdict of a canary; it counts from the next look on."""
    if node.health.state == CANARY:
        state.ward.verdicts[node.name] = wrong
    node.health.canary = ""


def note_late_canary(state: State, node: Node) -> None:
    """A canary runs far longer than predicted: nobody waits for its end to know what that means."""
    _judge(state, node, "its canary is late")


def _heed_verdict(state: State, node: Node, wrong: str, now_us: int, out: Outbox) -> None:
    """Enough good canaries in a row and the node is trusted again; a bad one and it pauses longer."""
    health = node.health
    if health.state != CANARY:
        return
    if wrong:
        _pause(state, node, f"{wrong}; before: {health.reason.rpartition('; before: ')[2]}", now_us, out)
        return
    health.good += 1
    if health.good >= state.settings.canaries:
        forget(state, node)
        _enter(state, node, OK, SCHEDULER, f"{health.good} canaries went well", now_us, out)


# --- what people ask for


def on_cordon(state: State, event: CordonRequested, now_us: int, out: Outbox) -> None:
    """Withhold a node, or trust it again, because somebody says so."""
    node = state.nodes.get(event.node)
    if node is None:
        return
    node.health.strikes = 0
    if event.is_on:
        node.health.until_us, node.health.kind = 0, ""
        _enter(state, node, CORDONED, event.actor, event.reason, now_us, out)
    else:
        forget(state, node)
        _enter(state, node, OK, event.actor, event.reason, now_us, out)


_KEY = "key-"
QUARANTINED = "quarantined"


def quarantine(state: State, work: Work, out: Outbox) -> str:
    """Run an operator key for nobody for a while, because it took nodes with it; return what to tell about that.

    The next leader is told in the shape in which it is told of nodes.
    """
    lost = tuple(dict.fromkeys(work.lost_on))
    seconds = state.settings.quarantine_s
    if seconds <= 0:
        return f"{work.nodes_lost} nodes were lost while they ran it ({', '.join(lost)})"
    until_us = state.now_us + int(seconds * 1e6)
    held = state.ward.quarantine[work.key] = Quarantine(work.key, until_us, lost, work.operator.name)
    out.add(RecordHealth(_record_of_key(held, state.now_us)))
    return poison_text(held, state.now_us)


def _record_of_key(held: Quarantine, now_us: int) -> NodeHealth:
    name, nodes = _KEY + held.key.hex(), ",".join(held.nodes)
    return NodeHealth(name, QUARANTINED, held.operator, nodes, now_us, held.until_us)


def _inherit_key(state: State, record: NodeHealth) -> None:
    key = bytes.fromhex(record.node.removeprefix(_KEY))
    if record.until_us > state.now_us:
        state.ward.quarantine[key] = Quarantine(key, record.until_us, tuple(record.by.split(",")), record.reason)


def poison_text(held: Quarantine, now_us: int) -> str:
    """Return why an operator is not run, what to look at, and how to have it tried again."""
    left_s = max(0, held.until_us - now_us) / 1e6
    return (
        f"nodes were lost while they ran it: {', '.join(held.nodes)}. Look at its last log lines and at the memory it asks for "
        f"(resources.memory_bytes). Its operator key {held.key.hex()} is quarantined for {left_s:.0f} s; "
        f"`flowmesh unquarantine {held.key.hex()[:16]}` ends that, and so does a change of its parameters"
    )


def refuses(state: State, key: bytes) -> str:
    """Return why an operator key may not run now; empty if it may."""
    held = state.ward.quarantine.get(key)
    return "" if held is None or held.until_us <= state.now_us else poison_text(held, state.now_us)


def on_lifted(state: State, event: QuarantineLifted, out: Outbox) -> None:
    """Let an operator key be tried again."""
    held = state.ward.quarantine.pop(event.key, None)
    if held is not None:
        held.until_us = 0
        out.add(RecordHealth(_record_of_key(held, state.now_us)))


# --- lives of nodes and leaders


def admit(state: State, node: Node, known: Node | None, now_us: int) -> None:
    """Decide how far a node is trusted that joins.

    One that started again may have been mended: the scheduler's own cordon goes on with canaries. What somebody ordered stays.
    """
    found = known.health if known is not None else state.ward.inherited.pop(node.name, None)
    if found is None:
        if not state.settings.trusts_new_nodes:
            node.health = Health(CANARY, "it has not proved itself yet", SCHEDULER, now_us)
            state.ward.patients[node.name] = None
        return
    node.health = found
    if known is not None:
        forget(state, node)
        found.canary = ""
        if found.state == CORDONED and found.by == SCHEDULER:
            found.until_us = min(found.until_us, now_us)
    if found.state != OK:
        state.ward.patients[node.name] = None


def inherit(state: State, records: Iterable[NodeHealth]) -> None:
    """Take over what an earlier leader decided."""
    for r in records:
        if r.state == QUARANTINED:
            _inherit_key(state, r)
            continue
        health = Health(r.state, r.reason, r.by, r.since_us, r.until_us, r.strikes, kind=r.kind)
        node = state.nodes.get(r.node)
        if node is None:
            state.ward.inherited[r.node] = health
            continue
        node.health = health
        if health.state != OK:
            state.ward.patients[r.node] = None
        state.touch(node)
