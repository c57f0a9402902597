"""Sealed acceptances: what others than the leader keep of the ledger, and cannot forge.

The seal is a MAC over the very bytes of the acceptance record, under a key that only schedulers can derive. Nodes and standbys
keep acceptances for the day on which the ledger is lost; a scheduler that gets one back takes it only with its seal. A seal says
that the mesh once accepted the run, not that the run has not ended since: that is for the ledger and the journals to say.
"""

from __future__ import annotations

import hmac

_KEY_DOMAIN = b"flowmesh acceptance seal key/1"
_SEAL_DOMAIN = b"flowmesh acceptance/1\0"


def seal_key(secret: bytes) -> bytes:
    """Return the key of seals, derived from the mesh's secret, so that no seal tells anything of its other uses."""
    return hmac.digest(secret, _KEY_DOMAIN, "sha256")


def seal(secret: bytes, acceptance: bytes) -> bytes:
    """Return the seal of an encoded acceptance record."""
    return hmac.digest(seal_key(secret), _SEAL_DOMAIN + acceptance, "sha256")


def is_sealed(secret: bytes, acceptance: bytes, claimed: bytes) -> bool:
    """Tell whether a seal belongs to this record and this mesh."""
    return hmac.compare_digest(seal(secret, acceptance), claimed)
