"""Content by CID alone, written out as what it shows itself to be."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmesh_cas.cid import CID_LENGTH, DAG_CBOR, cid_text, codec_of, decode_dag_cbor
from flowmesh_cas.errors import UsageError

if TYPE_CHECKING:
    from flowmesh_cas.store import BlockStore


def plain_dag(value: Any) -> Any:
    """Return DAG-CBOR data as DAG-JSON: links as {"/": cid}, bytes as {"/": {"bytes": base64}}."""
    if isinstance(value, dict):
        return {key: plain_dag(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_dag(item) for item in value]
    if isinstance(value, bytes):
        if len(value) == CID_LENGTH:
            try:
                codec_of(value)
                return {"/": cid_text(value)}
            except UsageError:
                pass
        return {"/": {"bytes": base64.b64encode(value).decode().rstrip("=")}}
    return value


def export_cid(store: BlockStore, root: bytes, folder: Path) -> Path:
    """Write the DAG under ``root`` into ``folder``, named by its CID; return the path."""
    import json

    from flowmesh_cas.unixfs import export

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / cid_text(root)
    if codec_of(root) == DAG_CBOR:
        target = target.with_name(target.name + ".json")
        target.write_text(json.dumps(plain_dag(decode_dag_cbor(store.get(root))), ensure_ascii=False, indent=2) + "\n")
        return target
    export(store, root, target)
    return target
