"""Answers that explain: why an operator runs where it does (or waits), and what a workflow would take."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas.cid import DAG_CBOR, cid_of, cid_parse, cid_text
from flowmesh_cas.errors import FlowmeshError, NotFoundError, UsageError
from flowmesh_mesh import subjects
from flowmesh_mesh.manifest import Acceptance, Manifest, ResultRecord, decode_record
from flowmesh_scheduler import intake
from flowmesh_scheduler.core import forecast
from flowmesh_scheduler.core.state import Vertex, VertexState, WorkState
from flowmesh_scheduler.core.waiting import why_waiting
from flowmesh_scheduler.core.why import explain

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

KEY_PREFIX_MIN = 6
RESOLVE_WAIT_S = 5.0
"""How long a plan waits for nodes to tell which models they have."""


# --- why


async def why(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return why an operator of this tenant runs, ran or waits as it does: by run and name, or by the beginning of its key."""
    vertex = _by_key(leader, tenant, str(args["key"])) if args.get("key") else _by_name(leader, tenant, args)
    found: dict[str, Any] = {
        "run": vertex.run.id,
        "operator": vertex.operator.name,
        "type": vertex.operator.type,
        "key": vertex.key.hex(),
        "state": vertex.state.value,
        "shared": vertex.shared,
        "node": vertex.node,
        "attempt": vertex.attempt,
        "started_at_us": vertex.started_at_us,
        "ended_at_us": vertex.ended_at_us,
        "actor": vertex.actor,
        "attempts": [end.plain() for end in vertex.story],
        "decision": None,
        "waiting": None,
        "source": None,
    }
    if vertex.state is VertexState.DONE:
        await _of_result(leader, vertex, found)
    elif vertex.state.is_final:
        by = f", by {vertex.actor}" if vertex.actor else ""
        found["text"] = f"it ended as {vertex.state.value}: {vertex.reason}{by}" + (f", {vertex.error}" if vertex.error else "")
    elif vertex.state is VertexState.ASSIGNED and vertex.work is not None:
        _of_assignment(leader, vertex.work.assignment, found)
        if vertex.work.copy:
            found["text"] += f"; {vertex.work.copy} is a second attempt beside it, because the first is late"
        if vertex.work.state is WorkState.COMMITTING:
            found["text"] += "; it has run, its result is being written into the ledger"
    else:
        wait = why_waiting(leader.state, vertex, leader.now_us())
        found["waiting"], found["text"] = wait.plain(), wait.text
    return found


def _by_name(leader: Leader, tenant: str, args: Mapping[str, Any]) -> Vertex:
    from flowmesh_scheduler.asks import find_run

    run, wanted = find_run(leader, tenant, args.get("run")), args.get("operator")
    vertex = next((v for v in run.vertices if v.operator.name == wanted), None)
    if vertex is None:
        raise NotFoundError(f"run {run.id} has no operator {wanted!r}", hint=f"`flowmesh show {run.id}` lists them.")
    return vertex


def _by_key(leader: Leader, tenant: str, prefix: str) -> Vertex:
    """Return the newest vertex of the tenant whose key begins so; runs in memory before those that have left it."""
    from flowmesh_scheduler.asks import find_run

    prefix = prefix.lower()
    if len(prefix) < KEY_PREFIX_MIN or not set(prefix) <= set("0123456789abcdef"):
        raise UsageError(f"{prefix!r} is no beginning of a key", hint=f"Give at least {KEY_PREFIX_MIN} of its hex digits.")
    pairs = dict.fromkeys(pair for pair in reversed([*leader.state.ended, *leader.state.runs]) if pair[0] == tenant)
    for pair in pairs:
        try:
            run = find_run(leader, *pair)
        except FlowmeshError:
            continue
        found = [v for v in run.vertices if v.key and v.key.hex().startswith(prefix)]
        if len({v.key for v in found}) > 1:
            raise UsageError(f"{len(found)} operators of run {run.id} have a key that begins so", hint="Give more of it.")
        if found:
            return found[0]
    raise NotFoundError(f"no operator of yours has a key that begins with {prefix}", hint="`flowmesh show RUN --json` has keys.")


async def _of_result(leader: Leader, vertex: Vertex, found: dict[str, Any]) -> None:
    """Tell of a result: which assignment made it, by the receipt in the ledger."""
    subject = subjects.ledger_result(vertex.key.hex(), vertex.generation)
    message = await leader.bus.last_message(subjects.LEDGER, subject)
    record = None if message is None else decode_record(message.data, ResultRecord)
    if record is not None:
        found["source"] = {
            "record": cid_text(vertex.record) if vertex.record else "",
            "node": record.receipt.node,
            "assignment": record.receipt.assignment,
            "attempt": record.attempt,
            "generation": record.generation,
            "committed_at_us": record.committed_at_us,
            "exec_us": record.metered.exec_us,
        }
    _of_assignment(leader, record.receipt.assignment if record is not None else "", found)
    if vertex.shared:
        node = record.receipt.node if record is not None else vertex.node
        found["text"] = (
            f"it was not run for this run: the same operator had run on {node} or was running, and its result was used"
            f" ({vertex.saved_us / 1e6:.3g} s saved)" + ("" if found["decision"] else "; " + _FORGOTTEN)
        )


_FORGOTTEN = "nothing is recorded of the choice any more (only the last choices of the present leader are kept)"


def _of_assignment(leader: Leader, assignment: str, found: dict[str, Any]) -> None:
    decision = leader.state.decisions.get(assignment)
    if decision is None and _is_canary(leader, assignment, found["node"]):
        found["text"] = f"it went to {found['node']} as a canary: that node was withheld and is tried with single operators"
        return
    if decision is None:
        where = f"it went to {found['node']}; " if found["node"] else ""
        found["text"] = where + _FORGOTTEN
        return
    plain = explain(decision)
    _hide_others(plain, is_shared=leader.config.share == "mesh")
    found["decision"] = {**plain, "at_us": decision.at_us}
    company = "alone" if decision.count == 1 else f"in a batch of {decision.count}"
    found["text"] = f"it went to {decision.node} {company}: of all that was weighed then, that was worth most"


def _is_canary(leader: Leader, assignment: str, name: str) -> bool:
    node = leader.state.nodes.get(name)
    return node is not None and bool(assignment) and node.health.canary == assignment


def _hide_others(plain: dict[str, Any], *, is_shared: bool) -> None:
    """Leave of batches that this operator is not in only their type, and where tenants share nothing not even that."""
    for other in plain["alternatives"]:
        if other["queue"] == plain["queue"]:
            continue
        other["queue"] = other["queue"].partition("|")[0] if is_shared else "other work"
        label = f"{other['queue']} x{other['count']} on {other['node']}"
        for each in other["flips"]:
            each["words"] = each["words"].replace(other["label"], label, 1)
        other["label"] = label


# --- plan


async def plan(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return what a workflow would take: a compiled manifest (inline, or put before), or a document as JSON clients write it."""
    manifest_cid, manifest = await _manifest(leader, tenant, args)
    models, unknown = await known_models(leader, intake.references(manifest))
    share, at_us = leader.config.share, leader.now_us()
    acceptance = Acceptance(tenant, "", manifest_cid, at_us, models=models, share=share)
    sizes = leader.resolver.sizes
    costs = leader.state.costs.beside({digest: sizes[digest] for digest in models.values() if digest in sizes})
    steps = forecast.forecast(leader.state, costs, acceptance, manifest, at_us)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            fates, dealt = end.value
            break
        await asyncio.sleep(0)
    found = forecast.told(leader.state, costs, manifest, fates, dealt)
    return {**found, "manifest": cid_text(manifest_cid), "unknown_models": unknown}


async def _manifest(leader: Leader, tenant: str, args: Mapping[str, Any]) -> tuple[bytes, Manifest]:
    if isinstance(args.get("workflow"), dict):
        data = msgspec.json.encode({"workflow": args["workflow"], "params": args.get("params") or {}})
        submission = await asyncio.to_thread(intake.compile_submission, tenant, "", data)
        assert submission.manifest is not None
        return submission.manifest_cid, submission.manifest
    named = args.get("manifest")
    cid = named if isinstance(named, bytes) else cid_parse(str(named or ""))
    blocks = [block for block in args.get("blocks") or () if isinstance(block, bytes) and cid_of(DAG_CBOR, block) == cid]
    try:
        manifest = decode_record(blocks[0] if blocks else leader.hub.get(cid), Manifest)
    except NotFoundError as error:
        raise UsageError("the manifest is neither in the question nor in the mesh", hint="Put it before asking.") from error
    await asyncio.to_thread(intake.check_manifest, manifest)
    return cid, manifest


async def known_models(
    leader: Leader, references: Iterable[str], *, asks_for_content: bool = True
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digests of the models that are known or can be told soon, and why the others are not.

    Without ``asks_for_content`` nobody is asked for models given by content, which may not have reached the mesh yet.
    """
    found: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for reference in sorted(references):
        if not asks_for_content and reference.startswith("cid:"):
            found |= leader.resolver.known([reference]) or {}
            continue
        try:
            async with asyncio.timeout(RESOLVE_WAIT_S):
                found |= await leader.resolver.resolve([reference])
        except TimeoutError:
            unknown[reference] = f"no node has told within {RESOLVE_WAIT_S:g} s"
        except FlowmeshError as error:
            unknown[reference] = error.message
    return found, unknown
