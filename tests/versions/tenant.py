"""What a tenant does, as a process of its own: run by path, so that it is the client of whichever build its PYTHONPATH names.

It prints one JSON object. Nothing here may use what only one of the two builds has.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from flowmesh_mesh.client import Mesh, connect

DEADLINE_S = 60.0

DOCUMENT = """\
apiVersion: flowmesh/v1
name: versions
operators:
  rows:
    type: data.map
    inputs: {{rows: {{rows: [{{n: 1}}, {{n: 2}}, {{n: 3}}]}}}}
    with: {{columns: {{text: "{mark} {{{{ n }}}}"}}}}
    shards: 2
  first: {{type: flow.noop, with: {{nonce: {nonce}}}}}
  second: {{type: flow.noop, with: {{nonce: {nonce}}}, inputs: {{after: first.out}}}}
  third: {{type: flow.noop, with: {{nonce: {nonce}, bytes: 300000}}, inputs: {{after: second.out}}}}
  call: {{type: python.call, function: "code.py:double", with: {{args: {{n: {nonce}}}}}}}
outputs: {{rows: rows.rows, chain: third.out, call: call.out}}
"""


def sleepers(count: int, seconds: float, nonce: int) -> dict[str, Any]:
    """Return a workflow of operators that take a while each."""
    operators = {f"n{i}": {"type": "flow.noop", "with": {"nonce": nonce + i, "sleep_s": seconds}} for i in range(count)}
    return {"apiVersion": "flowmesh/v1", "name": "sleepers", "operators": operators}


async def everything(mesh: Mesh, folder: Path, nonce: int) -> dict[str, Any]:
    """Submit a document with given rows, shards, a chain and a function; cancel another; return what came of both."""
    (folder / "code.py").write_text("def double(n):\n    print('doubling')\n    return 2 * n\n")
    (folder / "flow.yaml").write_text(DOCUMENT.format(nonce=nonce, mark=f"row-{nonce}"))
    run = await mesh.submit(folder / "flow.yaml")
    results = await run.result(timeout_s=DEADLINE_S)
    endless = await mesh.submit(sleepers(1, 300.0, nonce))
    cancelled = await endless.cancel()
    lineage = await run.lineage()
    return {
        "rows": [row["text"] for row in await results["rows"].rows()],
        "call": await results["call"].value(),
        "chain": (await results["chain"].export(folder))[0].stat().st_size,
        "cancelled": [cancelled.state, cancelled.reason, cancelled.actor],
        "records": len(lineage["records"]),
        "nodes": [[row["node"], row["state"]] for row in await mesh.nodes()],
    }


async def submit(mesh: Mesh, count: int, seconds: float, nonce: int) -> dict[str, Any]:
    """Submit operators that take a while; return the run once all are assigned that can be."""
    run = await mesh.submit(sleepers(count, seconds, nonce))
    async with asyncio.timeout(DEADLINE_S):
        while not any(row["state"] == "assigned" for row in await run.operators()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return {"run": run.id}


async def result(mesh: Mesh, name: str) -> dict[str, Any]:
    """Wait for a run; return how it ended and what became of each operator."""
    run = await mesh.run(name)
    results = await run.wait(timeout_s=DEADLINE_S)
    rows = [[row["name"], row["state"], row["node"], row["attempt"]] for row in await run.operators()]
    return {"state": results.state, "reason": results.reason, "rows": rows}


async def main() -> None:
    """Do what the command line says: context, folder, command, arguments as JSON."""
    context, folder, what = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    arguments = json.loads(sys.argv[4])
    async with connect(context) as mesh:
        if what == "everything":
            found = await everything(mesh, folder, *arguments)
        elif what == "submit":
            found = await submit(mesh, *arguments)
        elif what == "result":
            found = await result(mesh, *arguments)
        else:
            found = await mesh.status()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
