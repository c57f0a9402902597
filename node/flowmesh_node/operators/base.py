"""What an operator implementation sees: a batch of items in, outputs or failures out, one by one.

Implementations run inside an executor process (never in the agent). They know no broker, no store and no lease: the
agent has fetched and verified the inputs before, and keeps what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Input:
    """Content of an input port: small ones as ``data``, larger ones and folders as a read-only ``path``."""

    kind: str
    digest: str
    size: int
    rows: int = -1
    data: bytes | None = None
    path: str = ""

    def read_bytes(self) -> bytes:
        """Return the bytes of a file, table or value."""
        return self.data if self.data is not None else Path(self.path).read_bytes()

    def read_rows(self) -> list[Row]:
        """Return the records of a table."""
        return decode_rows(self.read_bytes())

    def read_value(self) -> Any:
        """Return a JSON value."""
        return msgspec.json.decode(self.read_bytes())


@dataclass(frozen=True, slots=True)
class Item:
    """One operator of the batch. ``key`` is the operator key in hex; ``name`` is for people and logs only.

    ``checkpoint`` is a read-only folder from which an attempt may go on; empty if there is none.
    """

    key: str
    name: str
    params: dict[str, Any]
    inputs: dict[str, list[Input]] = field(default_factory=dict)
    generation: int = 0
    attempt: int = 0
    checkpoint: str = ""

    def rows(self, port: str = "rows") -> list[Row]:
        """Return the records of all the tables at ``port``, in order."""
        return [row for table in self.inputs.get(port, []) for row in table.read_rows()]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is present on this machine: the reference, its digest (``sha256:...``) and the folder of its files."""

    reference: str
    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Items that share type, models, code and engine options. ``scratch`` is an empty folder for this batch's files.

    ``cadence_s`` above 0 is how often a training writes a checkpoint; else that follows from what one costs and from
    ``hazard_per_hour``, how often such a node is taken away.
    """

    type: str
    version: int
    items: list[Item]
    models: dict[str, Model] = field(default_factory=dict)
    code: Input | None = None
    scratch: str = ""
    timeout_s: float = 0.0
    memory_bytes: int = 0
    numeric: str = "any"
    cadence_s: float = 0.0
    hazard_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Content:
    """What goes to an output port: bytes, or a file or folder under the batch's scratch folder."""

    kind: str
    data: bytes | None = None
    path: str = ""
    rows: int = -1


@dataclass(frozen=True, slots=True)
class Produced:
    """Success of one item. ``rows_shared`` of its rows were computed by this batch once, for it and for others that asked."""

    outputs: dict[str, list[Content]]
    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    exec_us: int = 0
    rows_shared: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """Failure of one item: a reason code of ``flowmesh_mesh.messages.Reason`` and a text for its author."""

    reason: str
    error: str


Emit = Callable[[int, Produced | Failed], None]
"""Called once per item (its index in the batch) as soon as it is settled."""


class Saving(Protocol):
    """The way to the agent for what an operator keeps of its progress. An implementation with ``attach`` is handed one."""

    def keep(self, index: int, path: str, step: int, steps: int, stall_us: int) -> None:
        """Hand over the complete folder of a checkpoint; from then on it is the agent's. Any thread may call it."""

    def pace(self) -> tuple[bool, float]:
        """Tell whether a checkpoint is wanted at once, and how long the last one took until the mesh held it (0: nothing new)."""


class Implementation(Protocol):
    """Runs batches of the operator types that it names. One instance lives as long as its executor process."""

    types: tuple[str, ...]

    def load(self, batch: Batch) -> None:
        """Make ready what the batch needs and may stay (a model); called before ``run``, timed as load."""

    def run(self, batch: Batch, emit: Emit, log: Callable[[str], None]) -> None:
        """Settle every item through ``emit``. An exception that escapes fails the items not yet settled."""


_encode = msgspec.json.Encoder().encode


def encode_rows(rows: Iterable[Row]) -> bytes:
    """Return the canonical table: one compact JSON object per line, columns in the order given."""
    return b"".join(_encode(row) + b"\n" for row in rows)


def decode_rows(data: bytes) -> list[Row]:
    """Return the records of a canonical table; raise msgspec.DecodeError for what is not one."""
    return [msgspec.json.decode(line, type=dict[str, Any]) for line in data.splitlines() if line.strip()]


def table(rows: Iterable[Row]) -> Content:
    """Return a rows output."""
    kept = list(rows)
    return Content("rows", encode_rows(kept), rows=len(kept))


def value(data: Any) -> Content:
    """Return a value output."""
    return Content("value", _encode(data))
