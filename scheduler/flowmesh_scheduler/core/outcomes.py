"""What nodes report: results on their way into the ledger, failures and what is done about them."""

from __future__ import annotations

from collections.abc import Mapping

from flowmesh_cas.cid import DAG_CBOR, cid_from_digest, codec_of
from flowmesh_cas.errors import UsageError
from flowmesh_mesh import receipts
from flowmesh_mesh.manifest import Origin, Receipt, ResultManifest, ResultRecord, encode_record, record_cid
from flowmesh_mesh.messages import Commit, Done, Outcome, Reason
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import fairness, health, speculation
from flowmesh_scheduler.core.commands import Tell
from flowmesh_scheduler.core.events import Committed, DoneReceived
from flowmesh_scheduler.core.fleet import can_run
from flowmesh_scheduler.core.folding import chains_of, follow
from flowmesh_scheduler.core.learning import gather, note_hop
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import (
    close_if_empty,
    executor_of,
    free_slot,
    hand_over,
    note_answer,
    step_down,
    take_away,
)
from flowmesh_scheduler.core.planning import deliver, fail_work, plan_again, settle
from flowmesh_scheduler.core.state import AttemptEnd, Outstanding, Result, State, Vertex, VertexState, Work, WorkState

_RETRIED = frozenset({Reason.CRASHED, Reason.OOM, Reason.TIMEOUT, Reason.INTERNAL})
_UNFIT = frozenset({Reason.MODEL_MISSING, Reason.UNSATISFIABLE})
_FAILURES = {reason.value: reason for reason in (*_RETRIED, *_UNFIT, Reason.USER_ERROR, Reason.INPUT_MISSING, Reason.PREEMPTED)}
"""What a node may say of an attempt. Anything else is its own fault: also a cancellation that nobody asked for."""

_INPUT_MISSES_LIMIT = 5
_DETAIL_MAX_CHARS = 500
_MISS_PAUSE_S = 0.25

INLINE_MAX_BYTES = 4096
"""Results up to this size are kept by the ledger itself."""


def on_done(state: State, event: DoneReceived, now_us: int, out: Outbox) -> None:
    """Take the outcomes of one report; what is not open any more is ignored."""
    done = event.done
    outstanding = state.assignments.get(done.assignment)
    if outstanding is not None and outstanding.node != done.node:
        return
    tree: list[list[bytes]] = []
    late: dict[bytes, Work] = {}
    blamed: list[str] = []
    sample: Work | None = None
    sound: Outcome | None = None
    chains = chains_of(state, done, outstanding)
    ahead = {outcome.key: True for outcome in done.outcomes} if chains else {}
    for index, outcome in enumerate(done.outcomes):
        work = state.works.get(outcome.key)
        if chains:
            ahead[outcome.key] = False
        if work is not None and _is_expected(work, outcome, done):
            if outcome.reason == Reason.SUCCEEDED and (_is_same(outcome, sound) or _is_sound(outcome)):
                sound = outcome
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
                if work.state is WorkState.COMMITTING:
                    late[work.key] = work
                if outstanding is not None and work.key in outstanding.folded:
                    note_hop(state, outstanding, work, outcome.metered)
                if work.key in chains:
                    follow(state, done, work, ahead, now_us, out)
            elif done.assignment in (work.assignment, work.copy):
                blamed.append(_reason_of(outcome))
                work.note_end(_end_of(outcome, done.node, now_us))
                _forget(outstanding, work)
                if not _goes_on(state, work, outcome, done, out):
                    _fail(state, work, outcome, done.node, now_us, out)
            sample = work
        if outstanding is not None:
            gather(state, outstanding, outcome)
            note_answer(state, outstanding, outcome.key)
    if sample is not None:
        health.note_report(state, done.node, sample, done.assignment, blamed, now_us)
    if outstanding is not None:
        if done.last:
            free_slot(state, outstanding)
            outstanding.answered_at_us = outstanding.answered_at_us or now_us
        close_if_empty(state, outstanding, out)
    elif late:
        _adopt_late(state, done, late, now_us)
    elif not tree:
        _answer_late(state, done, out)


def _is_expected(work: Work, outcome: Outcome, done: Done) -> bool:
    """Tell whether this node was given this attempt at this work, and nobody has succeeded before."""
    return (
        work.state is not WorkState.COMMITTING
        and work.issued.get(done.assignment) == (outcome.attempt, done.node)
        and work.generation == outcome.generation
    )


def _is_same(outcome: Outcome, sound: Outcome | None) -> bool:
    """Tell whether an outcome has the very result of another that is sound: then it need not be encoded to be compared."""
    return sound is not None and outcome.result == sound.result and outcome.outputs == sound.outputs


def _is_sound(outcome: Outcome) -> bool:
    """Tell whether the result is that of the outputs, so that the node's signature covers them, and all can be asked for."""
    try:
        for refs in outcome.outputs.values():
            for ref in refs:
                codec_of(ref.cid)
        return outcome.result == record_cid(encode_record(ResultManifest(outcome.outputs)))
    except UsageError:
        return False


def _adopt_late(state: State, done: Done, works: dict[bytes, Work], now_us: int) -> None:
    """An assignment that was taken back has succeeded after all: its node keeps it until the ledger shows that."""
    node = state.nodes.get(done.node)
    if node is not None:
        executor = executor_of(next(iter(works.values())))
        hand_over(state, node, Outstanding(done.assignment, done.node, executor, works, set(), now_us, now_us))


def _answer_late(state: State, done: Done, out: Outbox) -> None:
    """Nobody waits for this report: show the node what the ledger holds, so that it can drop its spool."""
    shown = []
    for outcome in done.outcomes:
        result = state.results.get(outcome.key)
        if result is not None:
            shown.append((outcome.key, result.generation, result.result))
    out.add(Tell(done.node, Commit(state.epoch, done.assignment, tuple(shown), closed=True)))


def _forget(outstanding: Outstanding | None, work: Work) -> None:
    if outstanding is not None:
        outstanding.open.pop(work.key, None)
        outstanding.chains.pop(work.key, None)


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
    metered = outcome.metered
    fairness.succeed(state, work, metered.load_us + metered.fetch_us + metered.exec_us)
    if work.copy or (work.assignment and work.assignment != done.assignment):
        speculation.note_win(state, work, done.assignment, now_us)
        take_away(state, work, out, keep=done.assignment)
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
        origins=origins_of(next(iter(work.waiters))),
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
        now_us,
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
    found: dict[bytes, bytes] = {}
    size_bytes = 0
    for refs in outcome.outputs.values():
        for ref in refs:
            block = blocks.get(ref.cid)
            if block is None:
                return []
            if ref.cid not in found:
                found[ref.cid] = block
                size_bytes += len(block)
    return list(found.values()) if size_bytes <= INLINE_MAX_BYTES else []


def _note_places(state: State, outcome: Outcome, node: str, blocks: Mapping[bytes, bytes]) -> None:
    for refs in outcome.outputs.values():
        for ref in refs:
            cid = ref.cid
            places = state.places.get(cid)
            if places is None:
                places = state.places[cid] = set()
            places.add(node)
            if cid in blocks:
                places.add(HUB)


def _reason_of(outcome: Outcome) -> Reason:
    return _FAILURES.get(outcome.reason, Reason.INTERNAL)


def _end_of(outcome: Outcome, node: str, now_us: int) -> AttemptEnd:
    return AttemptEnd(outcome.attempt, node, _reason_of(outcome), node, now_us, outcome.error[:_DETAIL_MAX_CHARS])


def _goes_on(state: State, work: Work, outcome: Outcome, done: Done, out: Outbox) -> bool:
    """One of two attempts has failed: the other goes on, unless it would fail the same way."""
    if not step_down(work, done.assignment):
        return False
    reason = _reason_of(outcome)
    if reason == Reason.USER_ERROR:
        take_away(state, work, out)
        return False
    if reason in _UNFIT:
        work.unfit |= {done.node}
    elif reason in _RETRIED or reason == Reason.PREEMPTED:
        work.avoided |= {done.node}
    return True


def _fail(state: State, work: Work, outcome: Outcome, node: str, now_us: int, out: Outbox) -> None:
    """Decide what a failed attempt means: look for inputs, try elsewhere, or give up."""
    reason = _reason_of(outcome)
    fairness.abandon(state, work)
    work.assignment = ""
    if reason == Reason.PREEMPTED:  # the node gives back what it has not begun, or will not end: no failure of anybody
        work.avoided |= {node}
        out.queueing.append(work)
        return
    if reason == Reason.INPUT_MISSING and work.misses < _INPUT_MISSES_LIMIT:
        work.misses += 1
        if work.misses > 1:
            work.not_before_us = now_us + int(_MISS_PAUSE_S * 2**work.misses * 1e6)
        for root in outcome.missing:
            state.places.pop(root, None)
        out.queueing.append(work)
        return
    if reason in _UNFIT:
        work.unfit |= {node}
        if any(n.is_usable and n.name not in work.unfit and can_run(n.record, work) for n in state.nodes.values()):
            out.queueing.append(work)
            return
    if reason in _RETRIED:
        work.failures += 1
        if work.failures < _tries(state, work, reason):
            work.avoided |= {node}
            work.not_before_us = now_us + int(work.operator.retry.backoff_s * 2 ** (work.failures - 1) * 1e6)
            out.queueing.append(work)
            return
    for vertex in work.waiters:
        vertex.attempt, vertex.log = outcome.attempt, outcome.log
    fail_work(state, work, reason, outcome.error, node, out, actor=node)


def _tries(state: State, work: Work, reason: Reason) -> int:
    """Return how often an operator may fail; what goes wrong on a node itself (a full disk) is not the author's to count."""
    tries = max(vertex.operator.retry.attempts for vertex in work.waiters)
    is_of_node = reason == Reason.INTERNAL and work.operator.determinism != "effect"
    return max(tries, state.settings.nodes_lost_limit) if is_of_node else tries


def on_committed(state: State, event: Committed, out: Outbox) -> None:
    """The ledger shows results: vertices are done, nodes may drop what they kept."""
    touched: dict[str, Outstanding] = {}
    for key, record in event.records:
        work = state.works.get(key)
        if work is None or work.pending is None or work.pending.record != record:
            continue
        del state.works[key]
        result = state.results[key] = work.pending
        for vertex in work.waiters:
            if vertex.outputs is not None:
                settle(state, vertex, result, out)
            else:
                _settle_lost(state, vertex, out)
        outstanding = state.assignments.get(work.assignment)
        if outstanding is not None:
            outstanding.open.pop(key, None)
            outstanding.confirmed.append((key, result.generation, result.result))
            touched[outstanding.id] = outstanding
    for outstanding in touched.values():
        close_if_empty(state, outstanding, out)


def _settle_lost(state: State, vertex: Vertex, out: Outbox) -> None:
    """The outputs of a vertex were lost while the record was being written."""
    vertex.work = None
    if vertex.run.is_stopped:
        vertex.reason, vertex.actor = vertex.run.reason, vertex.run.actor
        out.set_state(vertex, VertexState.CANCELLED)
    else:
        plan_again(state, vertex, out)
