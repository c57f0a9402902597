"""Answers to tenants: status, runs, lineage, logs, and their blocks. Everything is read from the core's state and the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas.cid import cid_parse, cid_text
from flowmesh_cas.errors import FlowmeshError, NotFoundError, UsageError
from flowmesh_mesh import __version__, subjects
from flowmesh_mesh.bus import Delivery
from flowmesh_mesh.manifest import Acceptance, Manifest, RunEnd, decode_record
from flowmesh_mesh.messages import Answer, Ask, Blocks, Get, Put, decode, encode, is_json
from flowmesh_mesh.wire import check_peer
from flowmesh_scheduler import audit, cordons, explanations, lineage, printed, sharding, tenants
from flowmesh_scheduler.core.ending import outputs_of
from flowmesh_scheduler.core.recovery import evaluate
from flowmesh_scheduler.core.state import Node, Run, Vertex, VertexState
from flowmesh_scheduler.feeds import plain_outputs, plain_ref
from flowmesh_scheduler.hub import check_codecs

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

GET_MAX_BYTES = 960 * 1024
GET_MAX_BLOCKS = 4096
ROWS_DEFAULT = 1000


class JsonCancel(msgspec.Struct, frozen=True):
    """A cancellation as any client may write it."""

    run: str
    actor: str = ""


class JsonAsk(msgspec.Struct, frozen=True):
    """A question as any client may write it."""

    what: str
    args: dict[str, Any] = {}


def plain_answer(answer: Answer) -> dict[str, Any]:
    """Return an answer as plain data."""
    return {"body": answer.body, "error": answer.error, "hint": answer.hint, "kind": answer.kind}


async def answer(leader: Leader, tenant: str, data: bytes) -> Any:
    """Answer one question of a tenant; raise UsageError for one that cannot be read."""
    if is_json(data):
        try:
            plain = msgspec.json.decode(data, type=JsonAsk)
        except msgspec.DecodeError as error:
            raise UsageError(f"not a question: {error}", hint='Send {"what": "status", "args": {}}.') from error
        ask = Ask(plain.what, plain.args)
    else:
        ask = decode(data, Ask)
        check_peer("the mesh's leader", "this client", ask.wire, ask.wire_oldest)
    handler = _ANSWERS.get(ask.what)
    if handler is None:
        raise UsageError(f"unknown question {ask.what!r}", hint=f"Known: {', '.join(sorted(_ANSWERS))}.")
    result = handler(leader, tenant, ask.args)
    return await result if asyncio.iscoroutine(result) else result


# --- mesh


def _status(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    state = leader.state
    counts = {"waiting": 0, "ready": 0, "assigned": 0}
    for run in state.runs.values():
        if run.end is None:
            for name in counts:
                counts[name] += run.counts.get(name, 0)
    return {
        "mesh": leader.config.mesh,
        "version": __version__,
        "leader": {"id": leader.name, "epoch": state.epoch, "since_us": leader.since_us, "cut_off": leader.is_cut_off},
        "takeover": leader.report.plain(),
        "schedulers": leader.presence.rows(),
        "nodes": _nodes(leader, tenant, args),
        "queues": counts,
        "runs": {"active": sum(r.end is None for r in state.runs.values()), "ended": len(state.ended)},
        "keepers": leader.keepers.plain(),
        "warnings": leader.keepers.warnings(),
        "totals": {**state.totals, "speculation_usd": round(state.copies.total_usd, 6)},
        "tenants": _tenants(leader, tenant, args),
    }


def _tenants(leader: Leader, tenant: str, args: dict[str, Any]) -> list[dict[str, Any]]:
    return tenants.rows(leader.state, leader.tenant_names, tenant, all_tenants=leader.config.share == "mesh")


def _nodes(leader: Leader, tenant: str, args: dict[str, Any]) -> list[dict[str, Any]]:
    now = leader.now_us()
    models = {digest: name for run in leader.state.runs.values() for name, digest in run.acceptance.models.items()}
    rows = {name: _node(node, models, now) for name, node in leader.state.nodes.items()}
    for refusal in leader.reports.refusals.rows.values():
        row = _node(Node(refusal.record, refusal.at_us, "refused"), models, now)
        rows[refusal.record.node] = {**row, "refused": {"why": refusal.why, "hint": refusal.hint}}
    return [row for _, row in sorted(rows.items())]


def _node(node: Node, models: Mapping[str, str], now_us: int) -> dict[str, Any]:
    record = node.record
    return {
        "node": record.node,
        "state": node.state if not node.disconnected_at_us or node.state == "gone" else "suspected",
        "types": list(record.types),
        "devices": [{"kind": d.kind, "name": d.name, "memory_bytes": d.memory_bytes} for d in record.devices],
        "cpus": record.cpus,
        "memory_bytes": record.memory_bytes,
        "price_per_hour": record.price_per_hour,
        "load": node.load,
        "running": node.running,
        "queued": node.queued,
        "resident": sorted(models.get(digest, digest) for digest in node.resident),
        "seen_ago_s": round(max(0, now_us - node.last_beat_us) / 1e6, 3),
        "assignments": len(node.assignments),
        "site": record.site,
        "python": record.python,
        "health": node.health.plain(),
    }


def _costs(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return learned costs. Where tenants share nothing, what others run has no name."""
    state, is_shared = leader.state, leader.config.share == "mesh"
    accepted = [run.acceptance for run in state.runs.values()] + [each for _, each in state.ended.values() if each is not None]
    models = {digest: name for each in accepted if is_shared or each.tenant == tenant for name, digest in each.models.items()}
    rows = state.costs.rows()
    for row in rows:
        row["digest"] = row["model"] if is_shared or row["model"] in models else ""
        row["model"] = models.get(row["model"], row["digest"])
    return {"rows": rows, "nodes": state.costs.node_rows()}


# --- runs


def _runs(leader: Leader, tenant: str, args: dict[str, Any]) -> list[dict[str, Any]]:
    limit = int(args.get("limit", 100))
    rows = [_run_row(leader, run) for run in leader.state.runs.values() if run.tenant == tenant]
    known = {row["run"] for row in rows}
    for (owner, run), (end, acceptance) in leader.state.ended.items():
        if owner == tenant and run not in known:
            rows.append(_ended_row(end, acceptance))
    rows.sort(key=lambda row: row["accepted_at_us"], reverse=True)
    return rows[:limit]


def told_end(leader: Leader, run: Run) -> RunEnd | None:
    """Return how a run ended once that follows from the ledger, None before: another leader would say otherwise."""
    is_sure = run.id_pair not in leader.hands.failing and not leader.requests.is_accepting(run.id_pair)
    return run.end if is_sure else None


def state_of(leader: Leader, run: Run) -> str:
    """Return the state of a run in one word, as far as the ledger shows it."""
    end = told_end(leader, run)
    if end is not None:
        return _end_state(end)
    return "received" if leader.requests.is_accepting(run.id_pair) else "accepted"


def _end_state(end: RunEnd) -> str:
    return {"succeeded": "succeeded", "cancelled": "cancelled"}.get(end.reason, "failed")


def _run_row(leader: Leader, run: Run) -> dict[str, Any]:
    end = told_end(leader, run)
    return {
        "run": run.id,
        "name": run.manifest.name,
        "state": state_of(leader, run),
        "reason": end.reason if end else run.reason,
        "accepted_at_us": run.acceptance.accepted_at_us,
        "ended_at_us": end.ended_at_us if end else 0,
        "counts": {name: n for name, n in run.counts.items() if n},
    }


def _ended_row(end: RunEnd, acceptance: Acceptance | None) -> dict[str, Any]:
    return {
        "run": end.run,
        "name": acceptance.name if acceptance else "",
        "state": _end_state(end),
        "reason": end.reason,
        "accepted_at_us": acceptance.accepted_at_us if acceptance else 0,
        "ended_at_us": end.ended_at_us,
        "counts": dict(end.counts),
    }


def plain_end(end: RunEnd) -> dict[str, Any]:
    """Return the body of the event that tells how a run ended."""
    return {
        "state": _end_state(end),
        "reason": end.reason,
        "actor": end.actor,
        "detail": end.detail,
        "counts": dict(end.counts),
        "outputs": plain_outputs(end.outputs),
        "outputs_total": end.outputs_total or len(end.outputs),
        "saved_us": end.saved_us,
    }


def find_run(leader: Leader, tenant: str, run_id: Any) -> Run:
    """Return a run of this tenant; one that has left memory is evaluated again from manifest and ledger."""
    if not isinstance(run_id, str) or not run_id:
        raise UsageError("which run?", hint='Give {"run": "..."}; `flowmesh ls` lists them.')
    run = leader.state.runs.get((tenant, run_id))
    if run is not None:
        return run
    ended = leader.state.ended.get((tenant, run_id))
    end, acceptance = ended if ended is not None else (None, None)
    if acceptance is None:
        raise NotFoundError(f"no run {run_id!r}", hint="`flowmesh ls` lists the runs of this tenant.")
    try:
        manifest = decode_record(leader.hub.get(acceptance.manifest), Manifest)
    except NotFoundError:  # a run that was given up for want of its manifest has an end, and nothing else
        manifest = Manifest(acceptance.name or run_id, [])
    return evaluate(leader.state, acceptance, manifest, end)


def _run(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    run = find_run(leader, tenant, args.get("run"))
    offset, limit = max(0, int(args.get("offset", 0))), max(1, int(args.get("limit", ROWS_DEFAULT)))
    end = told_end(leader, run)
    return {
        **_run_row(leader, run),
        "actor": end.actor if end else run.actor,
        "detail": end.detail if end else run.detail,
        "manifest": cid_text(run.acceptance.manifest),
        "models": dict(run.acceptance.models),
        "seq": leader.feeds.seq(tenant, run.id),
        "operators": [_operator_row(v) for v in run.vertices[offset : offset + limit]],
        "outputs": plain_outputs(end.outputs) if end else {},
        "outputs_total": (end.outputs_total or len(end.outputs)) if end else 0,
        "total": len(run.vertices),
        "saved_us": end.saved_us if end else run.saved_us,
    }


def _outputs(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return declared outputs by name: one, or a page of them."""
    run = find_run(leader, tenant, args.get("run"))
    offset, limit = max(0, int(args.get("offset", 0))), max(1, int(args.get("limit", ROWS_DEFAULT)))
    found = outputs_of(run)
    if args.get("name"):
        found = {name: refs for name, refs in found.items() if name == args["name"]}
    page = list(found.items())[offset : offset + limit]
    return {"outputs": plain_outputs(dict(page)), "total": len(found)}


def _operator_row(vertex: Vertex) -> dict[str, Any]:
    return {
        "index": vertex.index,
        "name": vertex.operator.name,
        "type": vertex.operator.type,
        "state": vertex.state.value,
        "node": vertex.node,
        "attempt": vertex.attempt,
        "reason": vertex.reason,
        "error": vertex.error,
        "actor": vertex.actor,
        "attempts": [end.plain() for end in vertex.story],
        "shared": vertex.shared,
        "key": vertex.key.hex(),
        "result": cid_text(vertex.result) if vertex.result else "",
        "saved_us": vertex.saved_us,
        "exec_us": vertex.exec_us,
        "load_us": vertex.load_us,
        "started_at_us": vertex.started_at_us,
        "ended_at_us": vertex.ended_at_us,
        "outputs": plain_outputs(vertex.outputs) if vertex.outputs and vertex.state is VertexState.DONE else {},
        "log": plain_ref(vertex.log) if vertex.log is not None else None,
    }


async def _log(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    run = find_run(leader, tenant, args.get("run"))
    wanted = args.get("operator")
    vertex = next((v for v in run.vertices if v.operator.name == wanted), None)
    if vertex is None:
        raise NotFoundError(f"run {run.id} has no operator {wanted!r}", hint="`flowmesh show RUN` lists them.")
    lines = leader.feeds.lines_of(tenant, run.id, vertex.index, vertex.attempt)
    earlier = await printed.earlier_attempts(leader, vertex)
    return {"lines": lines, "log": plain_ref(vertex.log) if vertex.log is not None else None, "earlier": earlier}


async def _lineage(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    if args.get("cid"):
        return await lineage.of_content(leader, tenant, cid_parse(str(args["cid"])))
    return await lineage.of_run(leader, find_run(leader, tenant, args.get("run")))


_ANSWERS: dict[str, Any] = {
    "status": _status,
    "nodes": _nodes,
    "costs": _costs,
    "runs": _runs,
    "run": _run,
    "outputs": _outputs,
    "log": _log,
    "lineage": _lineage,
    "why": explanations.why,
    "plan": explanations.plan,
    "shards": sharding.shards,
    "audit": audit.answer,
    "cordon": cordons.cordon,
    "uncordon": cordons.uncordon,
    "unquarantine": cordons.unquarantine,
}


# --- blocks


async def put(leader: Leader, tenant: str, data: bytes) -> dict[str, Any]:
    """Take blocks of a tenant; tell what the DAG under the root still lacks."""
    message = decode(data, Put)
    if len(message.codecs) != len(message.blocks):
        raise UsageError("each block needs its codec")
    blocks = check_codecs(message.codecs, message.blocks)
    if blocks:
        await leader.hub.put(blocks)
    if not message.root:
        return {"missing": []}
    missing = await asyncio.to_thread(leader.hub.missing, message.root)
    if not missing and message.last:
        leader.tenant_roots.setdefault(tenant, set()).add(message.root)
        await asyncio.to_thread(leader.hub.store.pin, message.root, f"tenant-{tenant}")
    return {"missing": [cid_text(cid) for cid in missing[:GET_MAX_BLOCKS]]}


async def get(leader: Leader, tenant: str, delivery: Delivery) -> None:
    """Send the DAG under a root that this tenant may read, piece by piece."""
    try:
        message = decode(delivery.data, Get)
        if not may_read(leader, tenant, message.root):
            raise NotFoundError("no such content among your inputs, results and logs", hint="`flowmesh show RUN` lists results.")
        await bring(leader, message.root)
        found = await asyncio.to_thread(_piece, leader, message)
    except FlowmeshError as error:
        found = Blocks((), error=error.message)
    delivery.post_respond(encode(found))


def _piece(leader: Leader, message: Get) -> Blocks:
    order = leader.hub.order(message.root)
    size = 0
    blocks: list[bytes] = []
    codecs: list[int] = []
    cursor = message.cursor
    while cursor < len(order) and len(blocks) < GET_MAX_BLOCKS:
        block = leader.hub.get(order[cursor])
        if blocks and size + len(block) > GET_MAX_BYTES:
            break
        blocks.append(block)
        codecs.append(order[cursor][1])
        size += len(block)
        cursor += 1
    return Blocks(tuple(blocks), tuple(codecs), cursor if cursor < len(order) else -1)


async def bring(leader: Leader, root: bytes) -> None:
    """Make sure that the hub holds a DAG: fetch what it lacks from whoever holds it, part by part."""
    from flowmesh_mesh.transfer import fetch_many

    while missing := await asyncio.to_thread(leader.hub.missing, root):
        nodes = [n.name for n in leader.state.nodes.values() if n.state != "gone"]
        known = {cid: [name for name in leader.state.holders(cid) if name != subjects.HUB] for cid in missing}
        located = await leader.hub.locate(known, nodes)
        if not all(located.values()):
            lost = [cid_text(cid) for cid, holders in located.items() if not holders]
            raise NotFoundError(
                f"nobody holds {', '.join(lost[:3])}{' and others' if len(lost) > 3 else ''} any more",
                hint="Submit the workflow again: what is needed is computed anew.",
            )
        await fetch_many(leader.bus, leader.hub.store, located, deadline_s=60.0)
    leader.hub_holds([root])


def may_read(leader: Leader, tenant: str, root: bytes) -> bool:
    """Tell whether a root is an input, result, log, manifest or lineage record of one of the tenant's runs."""
    if root in leader.tenant_roots.get(tenant, ()):
        return True
    state = leader.state
    for run in state.runs.values():
        if run.tenant == tenant and _mentions(run, root):
            return True
    for (owner, _), (end, acceptance) in state.ended.items():
        if owner != tenant or acceptance is None:
            continue
        if root == acceptance.manifest or any(ref.cid == root for refs in end.outputs.values() for ref in refs):
            return True
        try:
            if _mentions(find_run(leader, tenant, end.run), root):
                return True
        except FlowmeshError:
            continue
    return False


def _mentions(run: Run, root: bytes) -> bool:
    return root == run.acceptance.manifest or any(root in _roots(vertex) for vertex in run.vertices)


def _roots(vertex: Vertex) -> Iterable[bytes]:
    yield vertex.result
    yield vertex.record
    if vertex.log is not None:
        yield vertex.log.cid
    for refs in (vertex.outputs or {}).values():
        for ref in refs:
            yield ref.cid
    for sources in vertex.operator.inputs.values():
        for source in sources:
            if source.ref is not None:
                yield source.ref.cid
    if vertex.operator.code is not None:
        yield vertex.operator.code.cid
