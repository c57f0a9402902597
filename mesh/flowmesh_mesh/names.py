"""Names that people choose, and the alphabets they are held to.

Names enter subjects, file paths and signed templates (``{{name()}}`` is pasted verbatim by the broker), so an
unchecked ``*`` or ``.`` would widen a right. Everything is checked at the edge, before it is signed or sent.
"""

from __future__ import annotations

import re

from flowmesh_cas.errors import UsageError

NAME_MAX_LENGTH = 63

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\Z")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}\Z")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it may name a node, tenant, run, workflow or operator; raise UsageError otherwise."""
    if not isinstance(name, str) or not _NAME.match(name):
        shown = name if len(name) <= 40 else name[:37] + "..."
        raise UsageError(
            f"{what} name {shown!r} is not allowed",
            hint=f"Use 1 to {NAME_MAX_LENGTH} letters, digits, '-' or '_', with a letter or digit at both ends.",
        )
    return name


def is_name(name: str) -> bool:
    """Tell whether :func:`check_name` would accept ``name``."""
    return isinstance(name, str) and _NAME.match(name) is not None


def is_identifier(name: str) -> bool:
    """Tell whether ``name`` may name a port, parameter or column variable."""
    return isinstance(name, str) and _IDENTIFIER.match(name) is not None
