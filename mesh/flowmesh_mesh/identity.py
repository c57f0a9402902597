"""What makes two operators the same: the operator key, and the batch key.

The operator key is the SHA-256 of the identity record, a DAG-CBOR map; so ``cid_from_digest(DAG_CBOR, key)`` is the
CID of that record, and the lineage can link to it. No time, tenant or machine is part of it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from flowmesh_cas.cid import encode_dag_cbor
from flowmesh_mesh.catalog import operator_type
from flowmesh_mesh.manifest import Operator, Ref

IDENTITY_VERSION = 1


def identity_record(
    operator: Operator,
    inputs: Mapping[str, Sequence[Ref]],
    model_digests: Mapping[str, str],
    salt: bytes = b"",
) -> bytes:
    """Return the DAG-CBOR identity of an operator whose inputs are known.

    ``inputs`` maps ports to contents, in the order of the port; a content enters by digest and size only, so the chunker
    and the place do not change the key. ``model_digests`` maps roles to pinned digests, which stand for the references: the same
    weights by another name are the same model. ``salt`` separates what must
    not be shared (a tenant's private work, one run's effects).
    """
    params = operator.params
    if model_digests:
        named = operator_type(operator.type).models.values()
        params = {name: value for name, value in params.items() if name not in named}
    record: dict[str, Any] = {
        "v": IDENTITY_VERSION,
        "type": operator.type,
        "version": operator.version,
        "params": params,
        "inputs": {port: [[ref.digest, ref.size] for ref in refs] for port, refs in inputs.items()},
        "numeric": operator.numeric,
    }
    if operator.code is not None:
        record["code"] = operator.code.digest
    if model_digests:
        record["models"] = dict(model_digests)
    if salt:
        record["salt"] = salt
    return encode_dag_cbor(record)


def operator_key(identity: bytes) -> bytes:
    """Return the 32-byte operator key of an identity record."""
    return sha256(identity).digest()


def private_salt(tenant_secret: bytes, tenant: str) -> bytes:
    """Return the salt that keeps a tenant's private operators to itself."""
    return hmac.digest(tenant_secret, b"flowmesh/private/" + tenant.encode(), "sha256")


def effect_salt(tenant: str, run: str, operator: str) -> bytes:
    """Return the salt of an operator with effects: never shared, and the same for every retry."""
    return sha256(f"flowmesh/effect/{tenant}/{run}/{operator}".encode()).digest()


def batch_key(operator: Operator, inputs: Mapping[str, Sequence[Ref]], model_digests: Mapping[str, str], key: bytes) -> str:
    """Return what two operators must share to run in one batch: type, models, engine options, adapter, numeric class.

    An operator whose type does not batch gets a batch key of its own (its operator ``key``).
    """
    kind = operator_type(operator.type)
    head = f"{operator.type}@{operator.version}"
    if not kind.batches:
        return f"{head}|{key.hex()}"
    parts = [head, *(f"{role}={digest}" for role, digest in sorted(model_digests.items()))]
    parts += [f"{name}={operator.params.get(name)!r}" for name in kind.batch_params]
    parts += [f"{port}={','.join(ref.digest.hex() for ref in inputs.get(port, ()))}" for port in kind.batch_ports]
    if operator.code is not None:
        parts.append(f"code={operator.code.digest.hex()}")
    if operator.numeric != "any":
        parts.append(operator.numeric)
    return "|".join(parts)
