"""The compiled workflow and what its operators produce: the records that are hashed and kept (DAG-CBOR).

YAML, JSON and Python are all compiled to one :class:`Manifest`; its CID names the workflow, whatever road it
came by. Records are maps with default fields left out, so equal meaning gives equal bytes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from flowmesh_cas.cid import DAG_CBOR, cid_of, decode_dag_cbor, encode_dag_cbor
from flowmesh_cas.errors import IntegrityError

MANIFEST_VERSION = 1

T = TypeVar("T", bound=msgspec.Struct)


class _Kept(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of the records that are hashed."""


class Ref(_Kept, frozen=True):
    """Content of one port: what it is (digest, size) and where its DAG begins (cid, a locator only).

    ``kind`` is a port kind of the catalog: rows, value, file, folder. ``digest`` is the SHA-256 of the bytes, or for a
    folder of the canonical listing of its files (:func:`flowmesh_cas.unixfs.folder_digest`). ``size`` in bytes,
    ``rows`` the number of records of a table, -1 where it has none.
    """

    kind: str
    cid: bytes
    digest: bytes
    size: int
    rows: int = -1


class Source(_Kept, frozen=True):
    """One thing that feeds an input port: an output of another operator (by index), or given content.

    ``item`` picks one element of an output with several (the parts of ``data.split``); -1 takes them all.
    """

    op: int = -1
    port: str = ""
    item: int = -1
    ref: Ref | None = None


class Resources(_Kept, frozen=True):
    """What an operator needs to be placed; zero means no demand."""

    gpus: int = 0
    vram_bytes: int = 0
    memory_bytes: int = 0
    cpus: float = 0.0


class Retry(_Kept, frozen=True):
    """How often an operator may run (``attempts`` in all) and the first pause between, which doubles."""

    attempts: int = 3
    backoff_s: float = 0.5


class Operator(_Kept, frozen=True):
    """One vertex of a compiled workflow.

    ``params`` are complete and canonical (defaults filled in by the catalog). ``models`` maps a role to a model
    reference (``wheel:``, ``hf:``, ``cid:``); references are pinned to digests on acceptance. ``code`` is the source of a
    ``python.call``. ``determinism`` is pure, seeded, sampled or effect; ``numeric`` is ``any`` or ``exact:<class>``.
    ``share`` is mesh, private, or empty for the mesh's default.
    """

    name: str
    type: str
    version: int
    params: dict[str, Any] = {}
    inputs: dict[str, list[Source]] = {}
    models: dict[str, str] = {}
    code: Ref | None = None
    determinism: str = "pure"
    numeric: str = "any"
    reusable: bool = False
    resources: Resources = Resources()
    retry: Retry = Retry()
    timeout_s: float = 0.0
    priority: int = 0
    deadline_s: float = 0.0
    share: str = ""


class Output(_Kept, frozen=True):
    """A named result of the workflow: a port of one operator."""

    op: int
    port: str


class Manifest(_Kept, frozen=True):
    """A whole compiled workflow; operators stand in an order in which sources come before their users.

    ``models`` are the CIDs of models given by content (``cid:``): links, so that whoever holds the workflow holds them.
    """

    name: str
    operators: list[Operator]
    outputs: dict[str, Output] = {}
    v: int = MANIFEST_VERSION
    models: list[bytes] = []


class ResultManifest(_Kept, frozen=True):
    """What an operator produced; its CID is the result CID. Holds no time and no machine, so equal results are equal."""

    outputs: dict[str, list[Ref]]
    v: int = MANIFEST_VERSION


class Receipt(_Kept, frozen=True):
    """Proof that a node vouches for one result: a signature over a Merkle root, and the result's path to it.

    ``public_key`` is the node's nkey (U...). ``index`` is the leaf's position among ``count``; ``path`` the sibling digests
    from leaf to root. See :mod:`flowmesh_mesh.receipts`.
    """

    node: str
    public_key: str
    epoch: int
    assignment: str
    root: bytes
    signature: bytes
    index: int
    count: int
    path: list[bytes] = []


class Metered(_Kept, frozen=True):
    """What running cost, measured on the node: times in microseconds, sizes in bytes.

    ``rows_shared`` of the ``rows`` were computed for another row of the batch too, and once for all that asked.
    """

    load_us: int = 0
    fetch_us: int = 0
    exec_us: int = 0
    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    bytes_fetched: int = 0
    rows_shared: int = 0


class Origin(_Kept, frozen=True):
    """Where an input of a result came from: the ledger record that produced it, or only its content if it was given."""

    port: str
    cid: bytes
    record: bytes | None = None


class ResultRecord(_Kept, frozen=True):
    """A ledger entry: operator key and generation -> result. Links make the lineage of a run one Merkle DAG.

    ``operator`` is the CID of the identity record (its digest is the operator key); ``result`` the CID of the
    :class:`ResultManifest`, whose outputs are repeated here so that readers need no second look-up. ``inline`` holds the
    outputs themselves when they are small: then the ledger keeps them, whatever becomes of the node.
    """

    operator: bytes
    generation: int
    attempt: int
    result: bytes
    outputs: dict[str, list[Ref]]
    receipt: Receipt
    origins: list[Origin] = []
    models: dict[str, str] = {}
    numeric: str = ""
    metered: Metered = Metered()
    log: Ref | None = None
    committed_at_us: int = 0
    inline: list[bytes] = []
    v: int = MANIFEST_VERSION


class Acceptance(_Kept, frozen=True):
    """Ledger entry: the run is accepted; its manifest and given inputs are held by the mesh.

    ``models`` maps each reference of the manifest to the digest it was pinned to (``sha256:...``). ``blocks`` carries the
    manifest and its inputs when they are small: then the ledger itself holds them. ``model_bytes`` is the size of each digest.
    """

    tenant: str
    run: str
    manifest: bytes
    accepted_at_us: int
    models: dict[str, str] = {}
    encoding: str = "msgpack"
    share: str = "mesh"
    blocks: list[bytes] = []
    name: str = ""
    v: int = MANIFEST_VERSION
    model_bytes: dict[str, int] = {}


class RunEnd(_Kept, frozen=True):
    """Ledger entry: how a run ended. ``records`` names the ledger record (CID) behind each declared output.

    A run with very many outputs names none of them here (``outputs_total`` tells how many): they follow from its results.
    """

    tenant: str
    run: str
    reason: str
    actor: str
    ended_at_us: int
    detail: str = ""
    outputs: dict[str, list[Ref]] = {}
    records: dict[str, bytes] = {}
    counts: dict[str, int] = {}
    saved_us: int = 0
    outputs_total: int = 0
    v: int = MANIFEST_VERSION


class Cancellation(_Kept, frozen=True):
    """Ledger entry: a tenant asked for a run to stop."""

    tenant: str
    run: str
    actor: str
    at_us: int
    v: int = MANIFEST_VERSION


def encode_record(record: msgspec.Struct) -> bytes:
    """Return the DAG-CBOR bytes of a kept record."""
    return encode_dag_cbor(msgspec.to_builtins(record, builtin_types=(bytes,)))


def decode_record(block: bytes, kind: type[T]) -> T:
    """Return the record in ``block``; raise IntegrityError when it is not a canonical ``kind``."""
    try:
        return msgspec.convert(decode_dag_cbor(block), kind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise IntegrityError(f"not a {kind.__name__} record: {error}") from error


def record_cid(block: bytes) -> bytes:
    """Return the CID of an encoded record."""
    return cid_of(DAG_CBOR, block)
