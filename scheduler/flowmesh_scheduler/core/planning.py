"""From runs to work: which operators are ready, what their key is, whether somebody has done or is doing them.

The planner has no history of its own: a run is its manifest evaluated against results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowmesh_mesh.identity import batch_key, effect_salt, identity_record, operator_key, private_salt
from flowmesh_mesh.manifest import Acceptance, Manifest, Operator, Ref
from flowmesh_mesh.messages import Reason
from flowmesh_scheduler.core import fairness, health
from flowmesh_scheduler.core.commands import Accept
from flowmesh_scheduler.core.costs import cost_class, size_of
from flowmesh_scheduler.core.deadlines import path_seconds
from flowmesh_scheduler.core.events import Submitted
from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.state import Result, Run, State, Vertex, VertexState, Work, WorkState

SCHEDULER = "scheduler"
"""Who ends what nobody else ended."""

_NO_MODELS: Mapping[str, str] = {}
_NO_INPUTS: Mapping[str, list[Ref]] = {}
_NO_CONSUMERS: Sequence[int] = ()


def submit(state: State, event: Submitted, now_us: int, out: Outbox) -> None:
    """Accept a run, unless it is known already, and plan it."""
    if (event.tenant, event.run) in state.runs or (event.tenant, event.run) in state.ended:
        return
    acceptance = Acceptance(
        tenant=event.tenant,
        run=event.run,
        manifest=event.manifest_cid,
        accepted_at_us=now_us,
        models=dict(event.models),
        encoding=event.encoding,
        share=event.share,
        name=event.manifest.name,
        model_bytes=dict(event.model_bytes),
    )
    state.know_models(event.model_bytes)
    out.add(Accept(acceptance, event.manifest.name, len(event.manifest.operators)))
    start_run(state, acceptance, event.manifest, out)


def start_run(state: State, acceptance: Acceptance, manifest: Manifest, out: Outbox) -> Run:
    """Build the vertices of a run and enter those that wait for nothing."""
    run = Run(acceptance.tenant, acceptance.run, manifest, acceptance)
    run.order = state.take_order()
    state.runs[run.id_pair] = run
    run.account = state.shares.account(run.tenant)
    run.account.runs += 1
    run.account.operators += len(manifest.operators)
    vertices = run.vertices
    consumers: dict[int, list[int]] = {}
    default_private = acceptance.share == "private"
    deadlines = [o.deadline_s for o in manifest.operators if o.deadline_s]
    if deadlines:
        run.deadline_us = acceptance.accepted_at_us + int(max(deadlines) * 1e6)
    for index, operator in enumerate(manifest.operators):
        sources = sources_of(operator)
        vertex = Vertex(run, index, operator, len(sources))
        vertex.is_private = (
            operator.share == "private"
            or (default_private and operator.share != "mesh")
            or any(vertices[s].is_private for s in sources)
        )
        vertices.append(vertex)
        for source in sources:
            consumers.setdefault(source, []).append(index)
    run.consumers = [consumers.get(index, _NO_CONSUMERS) for index in range(len(vertices))]
    if run.deadline_us:
        run.paths_s = path_seconds(state, run)
    run.unfinished = len(vertices)
    run.counts = {VertexState.WAITING.value: len(vertices)}
    out.touched[run.id_pair] = run
    out.entering.extend(v for v in vertices if v.waits_for == 0)
    return run


def sources_of(operator: Operator) -> list[int]:
    """Return the indices of the operators that feed this one, each once."""
    if not operator.inputs:
        return []
    return list(dict.fromkeys(s.op for port in operator.inputs.values() for s in port if s.op >= 0))


def inputs_of(vertex: Vertex) -> Mapping[str, list[Ref]]:
    """Return the contents at each input port of a vertex whose sources are all delivered."""
    if not vertex.operator.inputs:
        return _NO_INPUTS
    found: dict[str, list[Ref]] = {}
    for port, sources in vertex.operator.inputs.items():
        refs: list[Ref] = []
        for source in sources:
            if source.ref is not None:
                refs.append(source.ref)
                continue
            outputs = vertex.run.vertices[source.op].outputs
            assert outputs is not None
            produced = outputs.get(source.port, [])
            refs.extend(produced if source.item < 0 else produced[source.item : source.item + 1])
        found[port] = refs
    return found


def salt_of(state: State, vertex: Vertex) -> bytes:
    """Return what separates this vertex from equal ones of others; empty where it may be shared."""
    run, operator = vertex.run, vertex.operator
    if operator.determinism == "effect" or (operator.determinism == "sampled" and not operator.reusable):
        return effect_salt(run.tenant, run.id, operator.name)
    if vertex.is_private:
        return private_salt(state.tenant_secrets.get(run.tenant, b""), run.tenant)
    return b""


def digests_of(vertex: Vertex) -> Mapping[str, str]:
    """Return the digests of the models of a vertex, by role."""
    models = vertex.operator.models
    if not models:
        return _NO_MODELS
    run, wanted = vertex.run, tuple(models.items())
    found = run.digests.get(wanted)
    if found is None:
        pinned = run.acceptance.models
        found = run.digests[wanted] = {role: pinned.get(reference, reference) for role, reference in wanted}
    return found


def identify(state: State, vertex: Vertex, inputs: Mapping[str, list[Ref]]) -> tuple[bytes, Mapping[str, str]]:
    """Return operator key and model digests (by role) of a vertex."""
    digests = digests_of(vertex)
    key = operator_key(identity_record(vertex.operator, inputs, digests, salt_of(state, vertex)))
    if vertex.is_private and state.name_private is not None:
        key = state.name_private(key)
    return key, digests


def enter(state: State, vertex: Vertex, out: Outbox) -> None:
    """Give a vertex its key: attach it to running work, to a known result, or make new work of it."""
    found = out.identified.pop(vertex, None)
    if found is None:
        inputs = inputs_of(vertex)
        key, digests = identify(state, vertex, inputs)
    else:
        inputs, key, digests = found
    vertex.key = key
    out.set_state(vertex, VertexState.READY)
    work = state.works.get(key)
    if work is not None:
        attach(state, vertex, work, out)
        return
    work = _new_work(state, vertex, inputs, digests)
    result = state.results.get(key)
    if result is None and key in state.ward.quarantine and (text := health.refuses(state, key)):
        fail_work(state, work, Reason.POISON, text, "", out)
    elif result is None:
        out.queueing.append(work)
    else:
        _ask_for_hit(state, work, result, out)


def _company_of(state: State, vertex: Vertex) -> str:
    """Return what keeps private work out of the batches of others: how a batch went would tell who asked for the same."""
    if not vertex.is_private:
        return ""
    salt = salt_of(state, vertex)
    return f"|private={salt.hex()[:16]}" if salt else ""


def _new_work(state: State, vertex: Vertex, inputs: Mapping[str, list[Ref]], digests: Mapping[str, str]) -> Work:
    operator = vertex.operator
    work = Work(
        vertex.key,
        operator,
        inputs,
        digests,
        operator.models,
        batch_key(operator, inputs, digests, vertex.key) + _company_of(state, vertex),
        state.take_order(),
        operator.priority,
        waiters=(vertex,),
        timeout_s=operator.timeout_s,
        cost_kind=cost_class(operator, digests),
        size=size_of(operator, inputs),
    )
    former, vertex.former = vertex.former, None
    if former is not None:
        work.lost_on, work.is_copied = former.lost_on, former.is_copied
        work.story = former.story
        work.nodes_lost, work.avoided, work.unfit = former.nodes_lost, former.avoided, former.unfit
        if former.key == work.key:
            work.attempts, work.failures, work.issued = former.attempts, former.failures, former.issued
    vertex.work = work
    state.works[vertex.key] = work
    return work


def attach(state: State, vertex: Vertex, work: Work, out: Outbox) -> None:
    """Let a vertex wait for work that exists already; what it may take is the widest of its waiters' limits."""
    vertex.work = work
    vertex.shared = True
    vertex.former = None
    vertex.story = work.story
    work.add_waiter(vertex)
    operator = vertex.operator
    if fairness.join(state, work, vertex):
        out.queueing.append(work)
    if work.state is WorkState.QUEUED or work.state is WorkState.LOCATING:
        is_wider = work.timeout_s and (not operator.timeout_s or operator.timeout_s > work.timeout_s)
        if is_wider or operator.priority > work.priority:
            work.timeout_s = operator.timeout_s if is_wider else work.timeout_s
            work.priority = max(work.priority, operator.priority)
            if work.state is WorkState.QUEUED and not work.not_before_us:
                out.queueing.append(work)
    if work.state is WorkState.ASSIGNED:
        out.set_state(vertex, VertexState.ASSIGNED)
    elif work.state is WorkState.COMMITTING and work.pending is not None:
        deliver(vertex, work.pending, out)


def _ask_for_hit(state: State, work: Work, result: Result, out: Outbox) -> None:
    """A result is known: it counts only once holders of all its outputs have confirmed."""
    work.is_hit = True
    work.previous = result
    roots = [ref.cid for refs in result.outputs.values() for ref in refs]
    if roots:
        await_roots(state, work, roots, out)
    else:
        serve_hit(state, work, out)


def await_roots(state: State, work: Work, roots: Sequence[bytes], out: Outbox) -> None:
    """Park work until it is known who holds these roots."""
    fairness.leave(state, work)
    work.state = WorkState.LOCATING
    work.awaited = set(roots)
    for root in dict.fromkeys(roots):
        waiting = state.locating.setdefault(root, [])
        if not waiting:
            out.locate[root] = state.holders(root)
        waiting.append(work)


def serve_hit(state: State, work: Work, out: Outbox) -> None:
    """Give a verified result to everyone who waits for it."""
    result = work.previous
    assert result is not None
    del state.works[work.key]
    for vertex in work.waiters:
        vertex.shared = True
        vertex.saved_us = result.exec_us
        deliver(vertex, result, out)
        settle(state, vertex, result, out)


def deliver(vertex: Vertex, result: Result, out: Outbox) -> None:
    """Let the consumers of a vertex go on from its result."""
    vertex.outputs = result.outputs
    vertex.result = result.result
    vertex.record = result.record
    vertex.generation = result.generation
    vertex.exec_us, vertex.load_us = result.exec_us, result.load_us
    vertex.attempt, vertex.node, vertex.log = result.attempt, result.node, result.log
    for index in vertex.run.consumers[vertex.index]:
        consumer = vertex.run.vertices[index]
        if consumer.state is VertexState.WAITING:
            consumer.waits_for -= 1
            if consumer.waits_for == 0:
                out.entering.append(consumer)


def settle(state: State, vertex: Vertex, result: Result, out: Outbox) -> None:
    """The ledger shows the result of a vertex: now it is done."""
    vertex.work = None
    if vertex.state.is_final:
        return
    vertex.actor = result.node
    out.set_state(vertex, VertexState.DONE)
    vertex.ended_at_us = result.at_us or vertex.ended_at_us
    if vertex.shared:
        vertex.saved_us = result.exec_us
        vertex.run.saved_us += vertex.saved_us
        state.totals["shared"] += 1
        state.totals["saved_us"] += result.exec_us
    else:
        state.totals["executed"] += 1


def fail_work(state: State, work: Work, reason: str, error: str, node: str, out: Outbox, actor: str = SCHEDULER) -> None:
    """No further attempt: every waiter fails with the reason, and what depends on it is skipped. ``actor`` ended it."""
    fairness.abandon(state, work)
    state.works.pop(work.key, None)
    for vertex in work.waiters:
        vertex.work = None
        if not vertex.state.is_final:
            fail_vertex(vertex, reason, error, node, out, actor)


def fail_vertex(vertex: Vertex, reason: str, error: str, node: str, out: Outbox, actor: str = SCHEDULER) -> None:
    """End a vertex with a reason and skip everything downstream."""
    vertex.reason, vertex.error, vertex.node, vertex.actor = reason, error, node, actor
    run = vertex.run
    if not run.reason:
        run.failed_by = actor
        run.reason, run.detail = (
            reason,
            f"operator {vertex.operator.name}: {error}" if error else f"operator {vertex.operator.name}",
        )
    out.set_state(vertex, VertexState.FAILED)
    _skip(run, run.consumers[vertex.index], vertex, out)


def _skip(run: Run, indices: Sequence[int], failed: Vertex, out: Outbox) -> None:
    """Skip what waits for a vertex that delivers nothing, and everything after it."""
    stack = list(indices)
    while stack:
        consumer = run.vertices[stack.pop()]
        if consumer.state is VertexState.WAITING:
            consumer.reason = Reason.UPSTREAM_FAILED
            consumer.error = f"needs {failed.operator.name}"
            consumer.actor = SCHEDULER
            out.set_state(consumer, VertexState.SKIPPED)
            stack.extend(run.consumers[consumer.index])


def reopen(state: State, vertex: Vertex, out: Outbox) -> None:
    """The outputs of a vertex are lost: whoever holds them still is asked, otherwise it is computed again."""
    vertex.outputs = None
    for index in vertex.run.consumers[vertex.index]:
        consumer = vertex.run.vertices[index]
        if consumer.state is VertexState.WAITING:
            consumer.waits_for += 1
    state.totals["repeated"] += 1
    vertex.repeats += 1
    if vertex.work is None:
        plan_again(state, vertex, out)


def plan_again(state: State, vertex: Vertex, out: Outbox) -> None:
    """Let a vertex without outputs find its way once more, as if its run had just begun; unless it was lost too often."""
    if vertex.shared and vertex.state is VertexState.DONE:
        vertex.run.saved_us -= vertex.saved_us
        state.totals["saved_us"] -= vertex.saved_us
        state.totals["shared"] -= 1
    vertex.record, vertex.shared, vertex.saved_us = b"", False, 0
    if vertex.repeats > state.settings.results_lost_limit:
        fail_vertex(vertex, Reason.INPUT_MISSING, f"its result was lost {vertex.repeats} times", vertex.node, out)
    else:
        wait_for_sources(vertex, out)


def wait_for_sources(vertex: Vertex, out: Outbox) -> None:
    """Let a vertex wait for those of its sources that have no outputs; if one of them never will, it is skipped."""
    run = vertex.run
    lacking = [source for source in sources_of(vertex.operator) if run.vertices[source].outputs is None]
    vertex.waits_for = len(lacking)
    out.set_state(vertex, VertexState.WAITING)
    for source in lacking:
        if run.vertices[source].state.is_final:
            _skip(run, [vertex.index], run.vertices[source], out)
            return
    if not lacking:
        out.entering.append(vertex)


def replace_result(work: Work) -> None:
    """Nobody holds the result that the ledger names: make work produce another, not on the node that lost it."""
    assert work.previous is not None
    work.is_hit = False
    work.generation = work.previous.generation + 1
    work.avoided |= {work.previous.node}


def detach(state: State, vertex: Vertex, out: Outbox) -> Work | None:
    """Take a vertex off its work; return the work if nobody waits for it any more."""
    work, vertex.work = vertex.work, None
    if work is None:
        return None
    work.drop_waiter(vertex)
    if fairness.part(state, work, vertex):
        out.queueing.append(work)
    return None if work.waiters else work
