"""Submissions: from bytes that a tenant sent to a run that the core may accept, or a rejection that says why."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from flowmesh_cas import dag
from flowmesh_cas.cid import DAG_CBOR, cid_of, decode_dag_cbor
from flowmesh_cas.errors import FlowmeshError, IntegrityError, NotFoundError, TransientError, UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.catalog import operator_type
from flowmesh_mesh.manifest import Manifest, Operator, Source
from flowmesh_mesh.messages import Resolve, Resolved, Submit, decode, encode, is_json
from flowmesh_mesh.names import check_name
from flowmesh_mesh.wire import check_peer
from flowmesh_scheduler.hub import Hub, name_blocks

OPERATORS_MAX = 1_000_000
RESOLVE_TIMEOUT_S = 60.0
MODEL_SCHEMES = ("wheel:", "hf:", "cid:")
"""A path would name whatever lies there on the node: compilers put local models into the store and name their CID."""


class InputsAbsentError(UsageError):
    """The mesh does not hold what a submission refers to, or no longer: whoever has it may put it again."""


class JsonSubmit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A submission as any client may write it: a workflow document instead of a compiled manifest."""

    workflow: dict[str, Any]
    v: int = 1
    run: str = ""
    params: dict[str, Any] = {}


class Submission(msgspec.Struct):
    """A submission on its way in."""

    tenant: str
    run: str
    encoding: str
    manifest_cid: bytes = b""
    blocks: list[tuple[bytes, bytes]] = []
    elsewhere: list[bytes] = []
    """What the manifest links to and the submission does not carry."""
    manifest: Manifest | None = None


def run_of(data: bytes) -> tuple[str, str]:
    """Return run id and encoding of a submission; a JSON one without a run id is named after its bytes."""
    if not is_json(data):
        return check_name(decode(data, Submit).run, "run"), "msgpack"
    try:
        run = msgspec.json.decode(data, type=JsonSubmit).run
    except msgspec.DecodeError as error:
        raise UsageError(f"not a submission: {error}", hint='Send {"workflow": {...}, "run": "...", "params": {...}}.') from error
    if not run:
        run = "r" + base64.b32encode(hashlib.sha256(data).digest()).decode().lower()[:20]
    return check_name(run, "run"), "json"


def fallback_run(data: bytes) -> str:
    """Return the name under which an unreadable submission is rejected."""
    return "r" + base64.b32encode(hashlib.sha256(data).digest()).decode().lower()[:20]


def open_submission(tenant: str, data: bytes, hub: Hub) -> Submission:
    """Return a compiled submission with its manifest read and checked; raise UsageError for what cannot run."""
    message = decode(data, Submit)
    check_peer("the mesh's leader", "this client", message.wire, message.wire_oldest)
    block = next((block for block in message.blocks if cid_of(DAG_CBOR, block) == message.manifest), None)
    try:
        value = decode_dag_cbor(hub.get(message.manifest) if block is None else block)
        manifest = msgspec.convert(value, Manifest)
    except NotFoundError as error:
        raise InputsAbsentError(
            "the manifest is neither in the submission nor in the mesh", hint="Put it before submitting."
        ) from error
    except (IntegrityError, msgspec.ValidationError) as error:
        raise UsageError(f"the manifest cannot be read: {error}") from error
    named, elsewhere = name_blocks(dag.cbor_links(value), message.blocks)
    if block is not None:
        named.append((message.manifest, block))
    check_manifest(manifest)
    return Submission(tenant, message.run, "msgpack", message.manifest, named, elsewhere, manifest)


def compile_submission(tenant: str, run: str, data: bytes) -> Submission:
    """Compile a JSON submission; raise DocumentError with every problem. Runs in a thread."""
    from flowmesh_mesh.compiler import compile_document

    message = msgspec.json.decode(data, type=JsonSubmit)
    store = MemoryStore()
    compiled = compile_document(message.workflow, base=None, params=message.params, store=store)
    block = compiled.manifest_block
    blocks = [(cid, store.get(cid)) for cid in store.cids()]
    named = {cid_of(DAG_CBOR, block): block, **dict(blocks)}
    return Submission(tenant, run, "json", compiled.cid, list(named.items()), [], compiled.manifest)


def check_manifest(manifest: Manifest) -> None:
    """Refuse what no compiler of ours would write: clients are not trusted."""
    if not 0 < len(manifest.operators) <= OPERATORS_MAX:
        raise UsageError(f"a workflow has 1 to {OPERATORS_MAX} operators, not {len(manifest.operators)}")
    check_name(manifest.name, "workflow")
    seen: set[str] = set()
    for index, operator in enumerate(manifest.operators):
        _check_operator(manifest, index, operator)
        if operator.name in seen:
            raise UsageError(f"two operators are named {operator.name!r}")
        seen.add(operator.name)
    for name, output in manifest.outputs.items():
        if not 0 <= output.op < len(manifest.operators):
            raise UsageError(f"output {name!r} names no operator")


def _check_operator(manifest: Manifest, index: int, operator: Operator) -> None:
    kind = operator_type(operator.type)
    check_name(operator.name, "operator")
    where = f"operator {operator.name}"
    if operator.version != kind.version:
        raise UsageError(f"{where}: {operator.type} version {operator.version} is unknown here (this mesh has {kind.version})")
    try:
        msgspec.convert(operator.params, kind.params)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {error}") from error
    if operator.determinism != kind.determinism_of(operator.params):
        raise UsageError(f"{where}: determinism must be {kind.determinism_of(operator.params)}")
    for role, reference in operator.models.items():
        if operator.params.get(kind.models.get(role, "")) != reference or not reference.startswith(MODEL_SCHEMES):
            raise UsageError(f"{where}: {reference!r} is no model reference of the parameter it stands for")
    for port, sources in operator.inputs.items():
        if port not in kind.inputs and not kind.open_inputs:
            raise UsageError(f"{where}: {operator.type} has no input {port!r}")
        for source in sources:
            _check_source(manifest, index, source, f"{where}, input {port}")


def _check_source(manifest: Manifest, index: int, source: Source, where: str) -> None:
    if (source.op >= 0) == (source.ref is not None):
        raise UsageError(f"{where}: needs either an operator or a content")
    if source.op >= index:
        raise UsageError(f"{where}: sources must come before their users")
    if source.op >= 0 and source.port not in operator_type(manifest.operators[source.op].type).outputs:
        raise UsageError(f"{where}: {manifest.operators[source.op].type} has no output {source.port!r}")


def references(manifest: Manifest) -> set[str]:
    """Return the model references of a workflow."""
    return {reference for operator in manifest.operators for reference in operator.models.values()}


class Resolver:
    """Pins model references to digests by asking nodes; remembers the answers."""

    def __init__(self, bus: Bus, nodes: Callable[[], Iterable[str]]) -> None:
        self._bus = bus
        self._nodes = nodes
        self._known: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        """Size in bytes behind each digest that a node named."""

    def known(self, wanted: Iterable[str]) -> dict[str, str] | None:
        """Return the digests if all are known already."""
        found = {reference: self._known.get(reference, "") for reference in wanted}
        return found if all(found.values()) else None

    async def resolve(self, wanted: Iterable[str]) -> dict[str, str]:
        """Return the digest of each reference; raise UsageError with what the nodes said when none can tell."""
        return {reference: await self._one(reference) for reference in sorted(wanted)}

    async def _one(self, reference: str) -> str:
        if reference in self._known:
            return self._known[reference]
        deadline = asyncio.get_running_loop().time() + RESOLVE_TIMEOUT_S
        said: dict[str, str] = {}
        while asyncio.get_running_loop().time() < deadline:
            names = [name for name in self._nodes() if name not in said]
            for name in names:
                answer = await self._ask(name, reference)
                if answer is not None and answer.digest:
                    self._known[reference] = answer.digest
                    self.sizes[answer.digest] = answer.size
                    return answer.digest
                if answer is not None:
                    said[name] = answer.error
            if said and not names:
                break
            await asyncio.sleep(random.uniform(0.2, 0.4))
        told = "; ".join(f"{name}: {error}" for name, error in sorted(said.items())) or "no node is there to tell"
        raise UsageError(f"model {reference!r} is not available: {told}", hint="Install it on a node, or correct the reference.")

    async def _ask(self, node: str, reference: str) -> Resolved | None:
        try:
            data = await self._bus.request(subjects.node_control(node), encode(Resolve(reference)), timeout_s=30.0)
            return decode(data, Resolved)
        except TransientError:
            return None


def rejection(error: FlowmeshError) -> dict[str, Any]:
    """Return the body of the event that tells a client why its submission was refused."""
    problems = getattr(error, "problems", None) or []
    told = [msgspec.to_builtins(p) if isinstance(p, msgspec.Struct) else str(p) for p in problems]
    body: dict[str, Any] = {"error": error.message, "hint": error.hint, "problems": told}
    return body | {"absent": True} if isinstance(error, InputsAbsentError) else body
