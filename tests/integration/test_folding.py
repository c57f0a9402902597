"""Chains on a real mesh: folded onto one node they give what they give hop by hop, keys, results and lineage included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowmesh_deploy.embedded import embedded_mesh
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh

HOPS = 200
DEADLINE_S = 60.0


def noops() -> dict[str, Any]:
    """Return a chain of no-ops."""
    operators = {
        f"n{i}": {"type": "flow.noop", "with": {"nonce": i}, **({"inputs": {"after": f"n{i - 1}.out"}} if i else {})}
        for i in range(HOPS)
    }
    return {"apiVersion": "flowmesh/v1", "name": "chain", "operators": operators, "outputs": {"last": f"n{HOPS - 1}.out"}}


def tables() -> dict[str, Any]:
    """Return a chain of light operators of other kinds, one of them with given content beside what came before."""
    operators = {
        "load": {"type": "data.sql", "with": {"query": "select a from x"}, "inputs": {"x": {"rows": [{"a": 1}]}}},
        "more": {
            "type": "data.sql",
            "with": {"query": "select a + b as a from t, u"},
            "inputs": {"t": "load.rows", "u": {"rows": [{"b": 2}]}},
        },
        "text": {"type": "data.map", "with": {"columns": {"c": "x{{ a }}"}}, "inputs": {"rows": "more.rows"}},
        "last": {"type": "data.sql", "with": {"query": "select c, a from v"}, "inputs": {"v": "text.rows"}},
    }
    return {"apiVersion": "flowmesh/v1", "name": "tables", "operators": operators, "outputs": {"last": "last.rows"}}


async def told(client: Mesh, document: dict[str, Any]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], set[str]]:
    """Run a workflow; return its operators, its lineage as far as it depends on nothing but the work, and its receipts."""
    run = await client.submit(document)
    results = await run.result(timeout_s=DEADLINE_S)
    assert results.state == "succeeded", results.detail
    rows = await run.operators()
    operators = [(row["name"], row["key"], row["result"], row["attempt"], json.dumps(row["outputs"])) for row in rows]
    lineage = await run.lineage()
    keys = {record["record"]: record["key"] for record in lineage["records"]}
    links = sorted(
        (r["key"], r["result"], r["generation"], tuple((i["port"], i["cid"], keys.get(i["record"] or "")) for i in r["inputs"]))
        for r in lineage["records"]
    )
    return operators, links, {record["receipt"]["root"] for record in lineage["records"]}


def configure(folder: Path, **settings: Any) -> None:
    """Change settings of the scheduler of a mesh that is down."""
    path = next(folder.rglob("scheduler.json"))
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "settings": {**config.get("settings", {}), **settings}}))


async def run_both(folder: Path, **settings: Any) -> list[Any]:
    """Run the chains on a mesh of their own."""
    async with embedded_mesh(folder, nodes=1):
        pass
    configure(folder, **settings)
    async with embedded_mesh(folder, nodes=1) as mesh, connect(context=mesh) as client:
        return [await told(client, noops()), await told(client, tables())]


async def test_a_folded_chain_gives_the_results_and_the_lineage_of_one_that_is_not(tmp_path: Path) -> None:
    folded = await run_both(tmp_path / "folded", fold_s=10.0)
    plain = await run_both(tmp_path / "plain", fold_hops=0)
    for (operators, links, _), (plain_operators, plain_links, _) in zip(folded, plain, strict=True):
        assert operators == plain_operators
        assert links == plain_links
    assert [len(links) for _, links, _ in folded] == [HOPS, 4]
    assert len(plain[0][2]) == HOPS
    assert len(folded[0][2]) <= 5, "most hops were reported together with others"
