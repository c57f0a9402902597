"""The history of one run of chaos: what clients did and were told, what the broker stored, what nodes began, what was broken.

Times are microseconds of this machine's clock. A history is written as JSON lines and read back, so that a failing seed can be
checked again without repeating it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec


class _Entry(msgspec.Struct, frozen=True, tag_field="entry", omit_defaults=True):
    """Base of all entries."""


class Submitted(_Entry, frozen=True, tag="submitted"):
    """A client submits. ``expected`` is the state in which the run ought to end, ``reason`` the one that must come with it.

    ``token`` names the effect that the run has outside, if it has one; ``operator`` is the operator that has it.
    """

    at_us: int
    tenant: str
    run: str
    kind: str
    expected: str = "succeeded"
    reason: str = ""
    token: str = ""
    operator: str = ""


class Told(_Entry, frozen=True, tag="told"):
    """What a client was told of a run: accepted, rejected, unknown (it may have been taken or not), or how it ended."""

    at_us: int
    run: str
    what: str
    reason: str = ""
    actor: str = ""
    detail: str = ""


class CancelAsked(_Entry, frozen=True, tag="cancel-asked"):
    """A client asks for the end of a run."""

    at_us: int
    run: str


class Verified(_Entry, frozen=True, tag="verified"):
    """A client fetched the results of a run, every block verified, and compared them with what they must be."""

    at_us: int
    run: str
    is_right: bool
    detail: str = ""


class Executed(_Entry, frozen=True, tag="executed"):
    """An effect took place outside the mesh: one line in a file."""

    at_us: int
    token: str
    pid: int = 0


class Stored(_Entry, frozen=True, tag="stored"):
    """A message of a guarded stream, as the broker keeps it.

    ``kind`` is epoch, result, accepted, ended, cancelled, assignment or other. ``fence`` is the sequence of the epoch record
    that the write named (0: none, -1: not seen), ``epoch`` the number that record or assignment carries, ``digest`` that of the
    data.
    """

    at_us: int
    stream: str
    seq: int
    subject: str
    kind: str
    fence: int = 0
    epoch: int = 0
    digest: str = ""
    leader: str = ""


class Issued(_Entry, frozen=True, tag="issued"):
    """An attempt that a leader gave to a node, as its assignment in the stream shows."""

    at_us: int
    assignment: str
    epoch: int
    node: str
    name: str
    key: str
    generation: int
    attempt: int


class LedgerEnd(_Entry, frozen=True, tag="ledger-end"):
    """How a run ended, by the ledger."""

    tenant: str
    run: str
    seq: int
    reason: str
    actor: str


class LedgerAcceptance(_Entry, frozen=True, tag="ledger-acceptance"):
    """A run that the ledger holds as accepted."""

    tenant: str
    run: str
    seq: int


class LedgerCancellation(_Entry, frozen=True, tag="ledger-cancellation"):
    """A run whose end somebody asked for, by the ledger."""

    tenant: str
    run: str
    seq: int


class Reported(_Entry, frozen=True, tag="reported"):
    """An operator of a run, as the mesh tells it in the end."""

    run: str
    name: str
    state: str
    reason: str = ""
    attempt: int = 0
    key: str = ""


class Begun(_Entry, frozen=True, tag="begun"):
    """A node took an assignment up, by its own log; ``highest`` is the highest epoch that it had seen then."""

    node: str
    assignment: str
    epoch: int
    highest: int


class Fault(_Entry, frozen=True, tag="fault"):
    """Something was broken at ``at_us`` and mended at ``until_us``."""

    at_us: int
    until_us: int
    kind: str
    target: str
    detail: str = ""


class Wiped(_Entry, frozen=True, tag="wiped"):
    """The broker's store was removed on purpose: what was stored before may be stored again."""

    at_us: int


class Died(_Entry, frozen=True, tag="died"):
    """A process ended although nobody had ended it."""

    at_us: int
    process: str
    status: int


class Complaint(_Entry, frozen=True, tag="complaint"):
    """The last line of a traceback in a process's log: nothing broken by itself, but nobody expected it."""

    process: str
    text: str


Entry = (
    Submitted
    | Told
    | CancelAsked
    | Verified
    | Executed
    | Stored
    | Issued
    | LedgerEnd
    | LedgerAcceptance
    | LedgerCancellation
    | Reported
    | Begun
    | Fault
    | Wiped
    | Died
    | Complaint
)

K = TypeVar("K", bound=_Entry)


class History:
    """Entries in the order in which they became known. ``is_read`` is false while the ledger has not been read in the end."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = list(entries)

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        self.entries.append(entry)

    def of(self, kind: type[K]) -> list[K]:
        """Return the entries of one kind, in order."""
        return [entry for entry in self.entries if isinstance(entry, kind)]

    def write(self, path: Path) -> None:
        """Write the history as JSON lines."""
        path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in self.entries))

    @classmethod
    def read(cls, path: Path) -> History:
        """Read a history that was written."""
        decoder: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)
        return cls(decoder.decode(line) for line in path.read_bytes().splitlines() if line)
