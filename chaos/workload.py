"""What tenants submit under chaos: small workflows of many kinds, each with what must come of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.functions import appended, failing, slept
from flowmesh_mesh.workflow import Workflow
from flowmesh_node.operators.noop import noop_value

API = "flowmesh/v1"
TIMEOUT_S = 1.0
ROWS = 60
BIG_ROWS = 9_000
"""Rows of about 80 bytes: more than travels inside a submission."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One workflow, and what must come of it.

    ``values`` are outputs by name: a value, or rows. ``cancel_s`` is when its end is asked for, in seconds after its acceptance;
    ``is_shared`` submissions go out from both tenants at about the same time.
    """

    kind: str
    document: dict[str, Any]
    values: dict[str, Any]
    expected: str = "succeeded"
    reason: str = ""
    token: str = ""
    operator: str = ""
    cancel_s: float | None = None
    is_shared: bool = False


def _document(name: str, operators: dict[str, Any], outputs: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": API, "name": name, "operators": operators, "outputs": outputs}


def _noop(nonce: int, after: list[str] | None = None, **params: Any) -> dict[str, Any]:
    operator: dict[str, Any] = {"type": "flow.noop", "with": {"nonce": nonce, **params}}
    return operator | ({"inputs": {"after": after}} if after else {})


def _value_of(nonce: int, size: int) -> str:
    return noop_value({"nonce": nonce, "bytes": size}).decode()[1:-1]


class Workload:
    """A seeded stream of wishes. ``base`` keeps the operators of one run of chaos apart from those of any other."""

    def __init__(self, seed: int, effects: Path, base: int = 0) -> None:
        self._random = random.Random(f"{seed}/workload")
        self._effects = effects
        self._nonce = base + seed * 10_000_000
        self._kinds: list[tuple[float, Callable[[], Wish]]] = [
            (5, self._single),
            (3, self._chain),
            (3, self._fan),
            (3, self._delays),
            (2, self._sleeping),
            (3, self._effect),
            (1.5, self._table),
            (1.5, self._failing),
            (2, self._cancelled),
            (1, self._timed_out),
            (2, self._shared),
            (0.7, self._big),
        ]

    def next(self) -> Wish:
        """Return the next workflow."""
        weights = [weight for weight, _ in self._kinds]
        return self._random.choices([make for _, make in self._kinds], weights)[0]()

    def _fresh(self) -> int:
        self._nonce += 1
        return self._nonce

    def _single(self) -> Wish:
        nonce = self._fresh()
        return Wish(
            "single", _document("single", {"one": _noop(nonce, bytes=64)}, {"last": "one.out"}), {"last": _value_of(nonce, 64)}
        )

    def _chain(self) -> Wish:
        length = self._random.randint(3, 12)
        nonces = [self._fresh() for _ in range(length)]
        operators = {
            f"n{place}": _noop(nonce, [f"n{place - 1}.out"] if place else None, bytes=48) for place, nonce in enumerate(nonces)
        }
        return Wish("chain", _document("chain", operators, {"last": f"n{length - 1}.out"}), {"last": _value_of(nonces[-1], 48)})

    def _fan(self) -> Wish:
        width = self._random.randint(4, 24)
        nonces = [self._fresh() for _ in range(width + 2)]
        operators = {"first": _noop(nonces[0], bytes=32)}
        operators |= {f"n{place}": _noop(nonces[place + 1], ["first.out"], bytes=32) for place in range(width)}
        operators["last"] = _noop(nonces[-1], [f"n{place}.out" for place in range(width)], bytes=32)
        return Wish("fan", _document("fan", operators, {"last": "last.out"}), {"last": _value_of(nonces[-1], 32)})

    def _delays(self) -> Wish:
        operators: dict[str, Any] = {}
        for place in range(self._random.randint(1, 4)):
            seconds = round(self._random.choice([0.1, 0.3, 1.0, 2.0, 5.0]) * self._random.uniform(0.8, 1.2), 3)
            operators[f"d{place}"] = _noop(self._fresh(), sleep_s=seconds)
        nonce = self._fresh()
        operators["last"] = _noop(nonce, [f"{name}.out" for name in operators], bytes=40)
        return Wish("delays", _document("delays", operators, {"last": "last.out"}), {"last": _value_of(nonce, 40)})

    def _sleeping(self) -> Wish:
        text = f"sleeping {self._fresh()}"
        workflow = Workflow("sleeping")
        call = workflow.call(slept, name="sleeping", args={"seconds": round(self._random.uniform(0.1, 1.5), 2), "text": text})
        workflow.output("text", call.out)
        return Wish("sleeping", workflow.to_document(), {"text": text[::-1]})

    def _effect(self) -> Wish:
        token = f"token-{self._fresh()}"
        workflow = Workflow("effect")
        name = f"effect-{token}"
        call = workflow.call(appended, name=name, args={"path": str(self._effects), "token": token}, effect=True)
        workflow.output("token", call.out)
        return Wish("effect", workflow.to_document(), {"token": token}, token=token, operator=name)

    def _table(self) -> Wish:
        salt = self._fresh()
        rows = [{"number": place, "salt": salt} for place in range(ROWS)]
        operators: dict[str, Any] = {
            "doubled": {
                "type": "data.map",
                "inputs": {"rows": {"rows": rows}},
                "with": {"columns": {"double": "{{ number * 2 }}"}},
                "shards": self._random.randint(2, 4),
            },
            "total": {
                "type": "data.sql",
                "inputs": {"t": "doubled.rows"},
                "with": {"query": "SELECT sum(CAST(double AS BIGINT))::BIGINT AS total, count(*) AS rows FROM t"},
            },
        }
        values = {"total": [{"total": ROWS * (ROWS - 1), "rows": ROWS}]}
        return Wish("table", _document("table", operators, {"total": "total.rows"}), values)

    def _failing(self) -> Wish:
        workflow = Workflow("failing")
        call = workflow.call(failing, name="failing", args={"text": f"fails {self._fresh()}"}, options={"retry": {"attempts": 1}})
        workflow.add("after", "flow.noop", nonce=self._fresh(), after=call.out)
        return Wish("failing", workflow.to_document(), {}, "failed", "user-error")

    def _cancelled(self) -> Wish:
        nonce = self._fresh()
        sleep_s = self._random.choice([0.5, 2.0, 6.0])
        operators = {"slow": _noop(self._fresh(), sleep_s=sleep_s), "last": _noop(nonce, ["slow.out"], bytes=24)}
        document = _document("cancelled", operators, {"last": "last.out"})
        return Wish("cancelled", document, {"last": _value_of(nonce, 24)}, cancel_s=self._random.uniform(0.0, 3.0))

    def _timed_out(self) -> Wish:
        workflow = Workflow("timed-out")
        options = {"timeout": TIMEOUT_S, "retry": {"attempts": 1}}
        args = {"seconds": 60.0, "text": f"late {self._fresh()}"}
        call = workflow.call(slept, name="late", args=args, options=options)
        workflow.output("text", call.out)
        return Wish("timed-out", workflow.to_document(), {}, "failed", "timeout")

    def _shared(self) -> Wish:
        wish = self._random.choice([self._chain, self._fan, self._sleeping])()
        return Wish("shared", wish.document, wish.values, is_shared=True)

    def _big(self) -> Wish:
        salt = self._fresh()
        rows = [{"number": place, "text": f"{salt}-{place:06d}-{'x' * 40}"} for place in range(BIG_ROWS)]
        query = "SELECT count(*) AS rows, max(number) AS last FROM t"
        operators = {"count": {"type": "data.sql", "inputs": {"t": {"rows": rows}}, "with": {"query": query}}}
        values = {"count": [{"rows": BIG_ROWS, "last": BIG_ROWS - 1}]}
        return Wish("big", _document("big", operators, {"count": "count.rows"}), values)
