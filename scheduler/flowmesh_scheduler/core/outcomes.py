"""What nodes report: results on their way into the ledger, failures and what is done about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowmesh_cas.cid import DAG_CBOR, cid_from_digest
from flowmesh_mesh import receipts
from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.manifest import Origin, Receipt, ResultRecord, encode_record, record_cid
from flowmesh_mesh.messages import Abort, Commit, Done, Outcome, Reason
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core.commands import Release, Tell
from flowmesh_scheduler.core.events import Committed, DoneReceived
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.planning import deliver, fail_work, settle
from flowmesh_scheduler.core.state import Outstanding, Result, Speed, State, Vertex, Work, WorkState

_RETRIED = frozenset({Reason.CRASHED, Reason.OOM, Reason.TIMEOUT, Reason.INTERNAL})
_INPUT_MISSES_LIMIT = 5

INLINE_MAX_BYTES = 4096
"""Results up to this size are kept by the ledger itself."""


def on_done(state: State, event: DoneReceived, now_us: int, out: Outbox) -> None:
    """Take the outcomes of one report; what is not open any more is ignored."""
    done = event.done
    outstanding = state.assignments.get(done.assignment)
    tree: list[list[bytes]] = []
    for index, outcome in enumerate(done.outcomes):
        work = state.works.get(outcome.key)
        is_open = (
            work is not None
            and work.state is not WorkState.COMMITTING
            and work.issued.get(done.assignment) == outcome.attempt
            and work.generation == outcome.generation
        )
        if is_open and work is not None:
            if outcome.reason == Reason.SUCCEEDED:
                if not tree:
                    tree = receipts.levels([receipts.leaf(o) for o in done.outcomes])
                receipt = Receipt(
                    done.node,
                    done.public_key,
                    done.epoch,
                    done.assignment,
                    tree[-1][0],
                    done.signature,
                    index,
                    len(done.outcomes),
                    list(receipts.path(tree, index)),
                )
                _succeed(state, work, outcome, done, receipt, event.blocks, now_us, out)
            elif work.assignment == done.assignment:
                _forget(outstanding, work)
                _fail(state, work, outcome, done.node, now_us, out)
        if outstanding is not None:
            outstanding.running -= 1
    if outstanding is None:
        if not tree:
            _answer_late(state, done, out)
    else:
        if done.last or outstanding.running <= 0:
            free_slot(state, outstanding)
        close_if_empty(state, outstanding, out)


def free_slot(state: State, outstanding: Outstanding) -> None:
    """The node has nothing left to run of this assignment: it can take another."""
    node = state.nodes.get(outstanding.node)
    if node is not None and outstanding.id in node.assignments:
        node.assignments.discard(outstanding.id)
        node.busy[outstanding.executor] -= 1
    outstanding.running = 0


def close_if_empty(state: State, outstanding: Outstanding, out: Outbox) -> None:
    """Once every item is committed, failed or taken away, the node may drop the assignment."""
    if outstanding.open or outstanding.running > 0 or state.assignments.get(outstanding.id) is not outstanding:
        return
    del state.assignments[outstanding.id]
    out.add(Tell(outstanding.node, Commit(state.epoch, outstanding.id, tuple(outstanding.confirmed), closed=True)))


def _answer_late(state: State, done: Done, out: Outbox) -> None:
    """Nobody waits for this report: show the node what the ledger holds, so that it can drop its spool.

    A late success that is only now on its way into the ledger gets no answer: the node offers it again.
    """
    shown = []
    for outcome in done.outcomes:
        result = state.results.get(outcome.key)
        if result is not None:
            shown.append((outcome.key, result.generation, result.result))
    out.add(Tell(done.node, Commit(state.epoch, done.assignment, tuple(shown), closed=True)))


def _forget(outstanding: Outstanding | None, work: Work) -> None:
    if outstanding is not None:
        outstanding.open.pop(work.key, None)


def _succeed(
    state: State,
    work: Work,
    outcome: Outcome,
    done: Done,
    receipt: Receipt,
    blocks: Mapping[bytes, bytes],
    now_us: int,
    out: Outbox,
) -> None:
    _note_places(state, outcome, done.node, blocks)
    _learn(state, work, outcome)
    if work.assignment and work.assignment != done.assignment:
        take_away(state, work, out)
    previous = work.previous
    if previous is not None and previous.result == outcome.result:
        _keep_previous(state, work, previous, done, outcome, out)
        return
    record = ResultRecord(
        operator=cid_from_digest(DAG_CBOR, work.key),
        generation=work.generation,
        attempt=outcome.attempt,
        result=outcome.result,
        outputs=outcome.outputs,
        receipt=receipt,
        origins=origins_of(work.waiters[0]) if work.waiters else [],
        models=dict(work.model_digests),
        numeric=done.numeric,
        metered=outcome.metered,
        log=outcome.log,
        committed_at_us=now_us,
        inline=_small(outcome, blocks),
    )
    block = encode_record(record)
    work.state = WorkState.COMMITTING
    work.assignment = done.assignment
    work.pending = Result(
        work.generation,
        outcome.result,
        outcome.outputs,
        record_cid(block),
        outcome.metered.exec_us,
        outcome.metered.load_us,
        outcome.attempt,
        done.node,
        outcome.log,
    )
    out.commits.append((work.key, work.generation, block))
    for vertex in work.waiters:
        deliver(vertex, work.pending, out)


def _keep_previous(state: State, work: Work, previous: Result, done: Done, outcome: Outcome, out: Outbox) -> None:
    """The lost result was made again, bit for bit: the ledger's record stands."""
    del state.works[work.key]
    state.results[work.key] = previous
    outstanding = state.assignments.get(done.assignment)
    if outstanding is not None:
        outstanding.open.pop(work.key, None)
        outstanding.confirmed.append((work.key, previous.generation, outcome.result))
    for vertex in work.waiters:
        deliver(vertex, previous, out)
        vertex.node, vertex.attempt, vertex.exec_us = done.node, outcome.attempt, outcome.metered.exec_us
        settle(state, vertex, previous, out)


def origins_of(vertex: Vertex) -> list[Origin]:
    """Return where each input of a vertex came from, for the lineage."""
    found: list[Origin] = []
    for port, sources in vertex.operator.inputs.items():
        for source in sources:
            if source.ref is not None:
                found.append(Origin(port, source.ref.cid))
                continue
            producer = vertex.run.vertices[source.op]
            refs = (producer.outputs or {}).get(source.port, [])
            for ref in refs if source.item < 0 else refs[source.item : source.item + 1]:
                found.append(Origin(port, ref.cid, producer.record or None))
    return found


def _small(outcome: Outcome, blocks: Mapping[bytes, bytes]) -> list[bytes]:
    """Return the outputs themselves if all are small and came along: the ledger keeps them then."""
    if not blocks:
        return []
    found = {ref.cid: blocks.get(ref.cid) for refs in outcome.outputs.values() for ref in refs}
    small = [block for block in found.values() if block is not None]
    return small if len(small) == len(found) and sum(map(len, small)) <= INLINE_MAX_BYTES else []


def _note_places(state: State, outcome: Outcome, node: str, blocks: Mapping[bytes, bytes]) -> None:
    for refs in outcome.outputs.values():
        for ref in refs:
            places = state.places.get(ref.cid)
            if places is None:
                places = state.places[ref.cid] = set()
            places.add(node)
            if ref.cid in blocks:
                places.add(HUB)


def _learn(state: State, work: Work, outcome: Outcome) -> None:
    """Smooth what running this kind of work costs (weight 0.2 for the newest)."""
    seconds = outcome.metered.exec_us / 1e6
    key = speed_key(work)
    speed = state.speeds.get(key)
    if speed is None:
        state.speeds[key] = Speed(seconds, outcome.metered.load_us / 1e6, 1)
        return
    speed.operator_s += 0.2 * (seconds - speed.operator_s)
    if outcome.metered.load_us:
        speed.load_s += 0.2 * (outcome.metered.load_us / 1e6 - speed.load_s)
    speed.samples += 1


def speed_key(work: Work) -> tuple[str, str]:
    """Return under what the cost of this work is learned."""
    return (work.operator.type, next(iter(work.model_digests.values()), ""))


def _fail(state: State, work: Work, outcome: Outcome, node: str, now_us: int, out: Outbox) -> None:
    """Decide what a failed attempt means: look for inputs, try elsewhere, or give up."""
    reason = outcome.reason
    work.assignment = ""
    if reason == Reason.CANCELLED:
        out.queueing.append(work)
        return
    work.failures += 1
    if reason == Reason.INPUT_MISSING and work.failures < _INPUT_MISSES_LIMIT:
        for root in outcome.missing:
            state.places.pop(root, None)
        out.queueing.append(work)
        return
    if reason == Reason.MODEL_MISSING and any(
        n.is_usable and n.name != node and n.name not in work.avoided and work.operator.type in n.record.types
        for n in state.nodes.values()
    ):
        work.avoided.add(node)
        out.queueing.append(work)
        return
    if reason in _RETRIED and work.failures < work.operator.retry.attempts:
        work.avoided.add(node)
        work.not_before_us = now_us + int(work.operator.retry.backoff_s * 2 ** (work.failures - 1) * 1e6)
        out.queueing.append(work)
        return
    for vertex in work.waiters:
        vertex.attempt, vertex.log = outcome.attempt, outcome.log
    fail_work(state, work, reason, outcome.error, node, out)


def on_committed(state: State, event: Committed, out: Outbox) -> None:
    """The ledger shows results: vertices are done, nodes may drop what they kept."""
    touched: dict[str, Outstanding] = {}
    for key, record in event.records:
        work = state.works.pop(key, None)
        if work is None or work.pending is None:
            continue
        result = work.pending
        result.record = record
        state.results[key] = result
        for vertex in work.waiters:
            vertex.record = record
            settle(state, vertex, result, out)
        outstanding = state.assignments.get(work.assignment)
        if outstanding is not None:
            outstanding.open.pop(key, None)
            outstanding.confirmed.append((key, result.generation, result.result))
            touched[outstanding.id] = outstanding
    for outstanding in touched.values():
        close_if_empty(state, outstanding, out)


def take_away(state: State, work: Work, out: Outbox) -> None:
    """Stop the attempt that runs for this work: its result is not wanted any more."""
    outstanding = state.assignments.get(work.assignment)
    work.assignment = ""
    if outstanding is None or outstanding.open.pop(work.key, None) is None:
        return
    out.add(Tell(outstanding.node, Abort(state.epoch, outstanding.id, (work.key,), "no longer needed")))
    outstanding.running -= 1
    if outstanding.running <= 0:
        free_slot(state, outstanding)
    close_if_empty(state, outstanding, out)


def release(state: State, outstanding: Outstanding, out: Outbox) -> Sequence[Work]:
    """Take a whole assignment back; return the work that was still open."""
    free_slot(state, outstanding)
    del state.assignments[outstanding.id]
    out.add(Release(outstanding.id, outstanding.node))
    return [w for w in outstanding.open.values() if w.assignment == outstanding.id and w.state is WorkState.ASSIGNED]


def executor_of(work: Work) -> str:
    """Return the kind of executor that runs this work."""
    return CATALOG[work.operator.type].executor
