"""What an audit finds, in words: one record per finding."""

from __future__ import annotations

from typing import Any

import msgspec


class Finding(msgspec.Struct):
    """``repair`` says what repairing does, ``repaired`` whether it was done; ``tenant`` is empty for what concerns everybody."""

    kind: str
    what: str
    why: str
    repair: str
    run: str = ""
    tenant: str = ""
    repaired: bool = False

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, without the key of a tenant's account."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        del found["tenant"]
        return found


KINDS = {
    "acceptance-lost": "a keeper had an accepted run that the ledger had not",
    "run-unknown": "the ledger has an accepted run that the leader does not know",
    "manifest-gone": "nobody has the manifest of an accepted run",
    "inputs-gone": "nobody has a given input of a run that goes on",
    "operator-adrift": "an operator neither runs nor waits for anything",
    "assignment-astray": "the stream of assignments holds one that nobody knows",
    "end-unfounded": "the ledger has the end of a run that was never accepted",
    "result-dangling": "the ledger has a result whose contents nobody holds",
    "request-left": "a submission or report lies in its stream and is not settled",
    "keepers-missing": "fewer keep a run than should",
    "pin-orphan": "a pin of a run that has ended",
    "blocks-orphaned": "blocks in the hub that nothing refers to",
    "submission-lost": "a client remembers an accepted run that the mesh does not know",
}
"""Every kind of finding, in words (docs/recovery.md)."""
