"""Which versions of the wire work together, and what people are told where two do not.

A build speaks one version (WIRE_VERSION) and understands everything down to WIRE_OLDEST; two builds fit when each still
understands what the other speaks. What may change within a version, and what needs a new one, stands in docs/versions.md.
"""

from __future__ import annotations

from flowmesh_cas.errors import UsageError
from flowmesh_mesh import messages

RECORDS_NEED = 1
"""Version that a scheduler must speak to read all that this build writes into LEDGER and ASSIGN. It grows with the first kept
record that an older build could not read: an older scheduler would lose what it cannot read, so it must not lead any more."""

_UPGRADE = "Install a newer FlowMesh on {who}: `flowmesh version` shows which one runs."


class OutdatedError(UsageError):
    """This process is too old for the mesh that it has found, or too new; only another installation mends that."""


def fits(ours: int, ours_oldest: int, theirs: int, theirs_oldest: int) -> bool:
    """Tell whether two builds can work together: each understands the version that the other speaks."""
    return theirs >= ours_oldest and ours >= theirs_oldest


def misfit(us: str, ours: int, ours_oldest: int, them: str, theirs: int, theirs_oldest: int) -> tuple[str, str]:
    """Return why two builds do not fit and how to mend it, both empty where they do. ``us`` and ``them`` name them for people."""
    if fits(ours, ours_oldest, theirs, theirs_oldest):
        return "", ""
    older, floor, newer = (them, ours_oldest, us) if theirs < ours_oldest else (us, theirs_oldest, them)
    why = f"{us} speaks version {ours} of the wire, {them} version {theirs}: {newer} understands none below {floor}"
    return why, _UPGRADE.format(who=older)


def misfit_of(us: str, them: str, theirs: int, theirs_oldest: int) -> tuple[str, str]:
    """Return why this build does not fit another, and how to mend it; both empty where it does."""
    return misfit(us, messages.WIRE_VERSION, messages.WIRE_OLDEST, them, theirs, theirs_oldest)


def check_peer(us: str, them: str, theirs: int, theirs_oldest: int) -> None:
    """Raise OutdatedError where this build and another do not fit."""
    why, hint = misfit_of(us, them, theirs, theirs_oldest)
    if why:
        raise OutdatedError(why, hint=hint)


def check_records(stream: str, needed: int) -> int:
    """Return what whoever reads a guarded stream must speak from now on; raise OutdatedError when this build does not.

    ``needed`` is what the last epoch record says. It never falls: what was written stays there.
    """
    if needed > messages.WIRE_VERSION:
        raise OutdatedError(
            f"stream {stream} holds records of version {needed} of the wire, this scheduler reads up to {messages.WIRE_VERSION}",
            hint=_UPGRADE.format(who="this scheduler's machine"),
        )
    return max(needed, RECORDS_NEED)
