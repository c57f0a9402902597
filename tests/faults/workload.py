"""What tenants ask for in a simulation, and what must come of it: workflows drawn from a seed, and an oracle of their results."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.faults.executors import FAILS, outputs_of

from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.client.submission import Prepared
from flowmesh_mesh.compiler import Draft
from flowmesh_mesh.manifest import Manifest, Operator, Ref

SOURCE = """\
def works(seconds=0.2, nonce=0, **ports):
    return nonce


def fails(seconds=0.2, nonce=0, **ports):
    raise ValueError("on purpose")
"""


@dataclass(slots=True)
class Order:
    """One submission: who sends it when, and what must come of it."""

    tenant: str
    run: str
    at_s: float
    document: dict[str, Any]
    cancel_after_s: float = 0.0
    must_fail: bool = False
    prepared: Prepared | None = None
    digests: dict[str, list[bytes]] = field(default_factory=dict)
    """Output name -> digests of its contents, of a run that succeeds."""

    @property
    def manifest(self) -> Manifest:
        assert self.prepared is not None
        return self.prepared.compiled.manifest


def write_source(folder: Path) -> None:
    """Put the source of users' functions where documents find it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.py").write_text(SOURCE)


def prepare(order: Order, folder: Path) -> None:
    """Compile an order, and evaluate it."""
    store = MemoryStore()
    draft = Draft(order.document, base=folder, params=None, store=store)
    order.prepared = Prepared(draft.compile({}), store, draft if draft.auto else None)
    order.digests = evaluate(order.manifest)


def evaluate(manifest: Manifest) -> dict[str, list[bytes]]:
    """Return the digests of a workflow's outputs; an output that cannot be, because an operator fails, is left out."""
    made: list[dict[str, list[bytes]] | None] = []
    for operator in manifest.operators:
        inputs = _inputs(operator, made)
        is_lost = inputs is None or operator.params.get("function") == FAILS or _runs_too_long(operator)
        made.append(None if is_lost else _outputs(operator, inputs or {}))
    found: dict[str, list[bytes]] = {}
    for name, output in manifest.outputs.items():
        outputs = made[output.op]
        if outputs is not None:
            found[name] = outputs[output.port]
    return found


def _runs_too_long(operator: Operator) -> bool:
    seconds = operator.params.get("args", {}).get("seconds", 0.0)
    return bool(operator.timeout_s and seconds > operator.timeout_s)


def _inputs(operator: Operator, made: Sequence[dict[str, list[bytes]] | None]) -> dict[str, list[str]] | None:
    found: dict[str, list[str]] = {}
    for port, sources in operator.inputs.items():
        digests: list[bytes] = []
        for source in sources:
            if source.ref is not None:
                digests.append(source.ref.digest)
                continue
            outputs = made[source.op]
            if outputs is None:
                return None
            every = outputs[source.port]
            digests += every if source.item < 0 else [every[source.item]]
        found[port] = [digest.hex() for digest in digests]
    return found


def _outputs(operator: Operator, inputs: dict[str, list[str]]) -> dict[str, list[bytes]]:
    outputs = outputs_of(operator.type, operator.params, inputs)
    return {port: [sha256(each.data or b"").digest() for each in contents] for port, contents in outputs.items()}


def digests_of(refs: Sequence[Ref]) -> list[bytes]:
    """Return the digests of contents."""
    return [ref.digest for ref in refs]


# --- documents


class Author:
    """Writes documents. ``common`` numbers what several tenants may ask for alike."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._nonce = 0

    def _fresh(self) -> int:
        """Return a number that sometimes was there before: then two runs ask for the same."""
        if self._nonce and self._rng.random() < 0.3:
            return self._rng.randint(1, self._nonce)
        self._nonce += 1
        return self._nonce

    def orders(self, tenants: Sequence[str], count: int, until_s: float) -> list[Order]:
        """Return ``count`` submissions spread over the time."""
        rng = self._rng
        found = []
        for number in range(count):
            kind = rng.choices(("chain", "fan", "shards", "call", "delay", "fails", "late"), (4, 4, 3, 4, 3, 1, 1))[0]
            operators: dict[str, Any] = getattr(self, f"_{kind}")()
            document: dict[str, Any] = {"apiVersion": "flowmesh/v1", "name": kind, "operators": operators}
            if rng.random() < 0.2:
                document["share"] = "private"
            cancel_s = rng.uniform(0.05, 20.0) if rng.random() < 0.1 else 0.0
            run = f"run-{number}"
            found.append(
                Order(rng.choice(tenants), run, rng.uniform(3.0, until_s), document, cancel_s, kind in ("fails", "late"))
            )
        return sorted(found, key=lambda each: each.at_s)

    def _chain(self) -> dict[str, Any]:
        """No-ops one after the other: folded onto one node."""
        operators: dict[str, Any] = {}
        length = self._rng.randint(2, 12)
        for number in range(length):
            operators[f"s{number}"] = self._noop([f"s{number - 1}.out"] if number else [])
        return operators

    def _noop(self, after: list[str]) -> dict[str, Any]:
        sleep = {"sleep_s": round(self._rng.uniform(0.01, 1.0), 3)} if self._rng.random() < 0.4 else {}
        inputs = {"inputs": {"after": after[0]}} if after else {}
        return {"type": "flow.noop", "with": {"nonce": self._fresh(), **sleep}, **inputs}

    def _fan(self) -> dict[str, Any]:
        """One source, several branches, one end."""
        nonce, width = self._fresh(), self._rng.randint(2, 6)
        operators: dict[str, Any] = {"source": self._sql({"rows": {"rows": [{"n": nonce}]}}, "SELECT * FROM rows")}
        for number in range(width):
            operators[f"b{number}"] = self._sql({"rows": "source.rows"}, f"SELECT {number} + n AS n FROM rows")
        operators["end"] = {"type": "data.concat", "inputs": {"rows": [f"b{number}.rows" for number in range(width)]}}
        return operators

    def _sql(self, inputs: dict[str, Any], query: str) -> dict[str, Any]:
        return {"type": "data.sql", "inputs": inputs, "with": {"query": query}}

    def _shards(self) -> dict[str, Any]:
        nonce = self._fresh()
        rows = [{"n": nonce + number} for number in range(40)]
        columns = {"columns": {"m": "{{ n }}!"}}
        shards = self._rng.randint(2, 8)
        return {"all": {"type": "data.map", "inputs": {"rows": {"rows": rows}}, "with": columns, "shards": shards}}

    def _call(self) -> dict[str, Any]:
        """Users' functions, some with effects, one of them long."""
        count = self._rng.randint(1, 3)
        operators = {f"c{number}": self._function("works", self._seconds()) for number in range(count)}
        if self._rng.random() < 0.3:
            operators["c0"]["with"]["effect"] = True
        return operators

    def _seconds(self) -> float:
        return round(self._rng.uniform(0.2, 3.0) if self._rng.random() < 0.7 else self._rng.uniform(10.0, 40.0), 2)

    def _function(self, name: str, seconds: float) -> dict[str, Any]:
        args = {"seconds": seconds, "nonce": self._fresh()}
        return {"type": "python.call", "function": f"code.py:{name}", "with": {"args": args}}

    def _delay(self) -> dict[str, Any]:
        count, seconds = self._rng.randint(2, 12), round(self._rng.uniform(0.05, 1.5), 2)
        return {f"d{n}": {"type": "flow.delay", "with": {"nonce": self._fresh(), "item_s": seconds}} for n in range(count)}

    def _fails(self) -> dict[str, Any]:
        after = {"type": "flow.noop", "with": {"nonce": self._fresh()}, "inputs": {"after": "bad.out"}}
        return {"bad": self._function("fails", 0.3), "after": after, "beside": self._noop([])}

    def _late(self) -> dict[str, Any]:
        return {"slow": {**self._function("works", 30.0), "timeout": "2s"}, "beside": self._noop([])}
