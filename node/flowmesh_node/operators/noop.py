"""``flow.noop``: a value of a given size, after a given time. It runs inside the agent and touches nothing that blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any


def noop_value(params: Mapping[str, Any]) -> bytes:
    """Return the JSON value of a no-op: ``null``, or exactly ``bytes`` bytes that depend on the nonce.

    The content differs by nonce because equal contents would be one block, and a measurement of moving them a lie.
    """
    size_bytes = params.get("bytes", 0)
    if size_bytes == 0:
        return b"null"
    if size_bytes == 1:
        return b"0"
    inner = size_bytes - 2
    seed = str(params.get("nonce", 0)).encode()
    return b'"' + hashlib.shake_256(seed).hexdigest((inner + 1) // 2).encode()[:inner] + b'"'


class Noop:
    """Marks ``flow.noop`` as available; the agent itself runs it (:mod:`flowmesh_node.inline`)."""

    types = ("flow.noop",)
