"""``flow.delay``: what a batch costs, and that nothing else is paid for it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from flowmesh_mesh.identity import batch_key
from flowmesh_mesh.manifest import Operator
from flowmesh_node.operators.base import Batch, Failed, Item, Produced
from flowmesh_node.operators.delay import Delay


def _run(count: int, slept_s: list[float], monkeypatch: pytest.MonkeyPatch) -> list[Produced | Failed]:
    monkeypatch.setattr("flowmesh_node.operators.delay.time.sleep", slept_s.append)
    params: dict[str, Any] = {"batch_s": 0.05, "item_s": 0.002}
    batch = Batch("flow.delay", 1, [Item(f"{nonce:02x}", "d", {"nonce": nonce, **params}) for nonce in range(count)])
    settled: dict[int, Produced | Failed] = {}
    operator = Delay()
    operator.load(batch)
    operator.run(batch, settled.__setitem__, lambda line: None)
    return [settled[index] for index in range(count)]


def test_a_batch_sleeps_once_for_all_that_are_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    slept_s: list[float] = []
    results = _run(5, slept_s, monkeypatch)
    assert slept_s == [pytest.approx(0.06)]
    told = [result.outputs["out"][0].data for result in results if isinstance(result, Produced)]
    assert told == [b"0", b"1", b"2", b"3", b"4"]


def test_delays_of_one_cost_share_a_batch_whatever_their_nonce() -> None:
    def key(**params: Any) -> str:
        return batch_key(Operator("d", "flow.delay", 1, {"nonce": 0, "batch_s": 0.05, "item_s": 0.002} | params), {}, {}, b"k")

    assert key(nonce=1) == key(nonce=2)
    assert len({key(), key(batch_s=0.1), key(item_s=0.1)}) == 3


def test_a_process_that_only_delays_loads_no_engine() -> None:
    source = (
        "import sys, flowmesh_node.process\n"
        "from flowmesh_node.operators.registry import implementation\n"
        "implementation('flow.delay')\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'numpy', 'duckdb', 'jinja2'}))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
