"""Golden traces: whole scenarios as text, read in review. FLOWMESH_WRITE_TRACES=1 writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

from tests.unit.scheduler.flows import content, operator, workflow
from tests.unit.scheduler.story import Story

from flowmesh_scheduler.core import events as e

TRACES = Path(__file__).parents[2] / "traces"


def hold(story: Story, name: str) -> None:
    """Compare a story with the one that is kept, or keep it."""
    path = TRACES / f"{name}.txt"
    text = "\n".join(story.lines) + "\n"
    if os.environ.get("FLOWMESH_WRITE_TRACES"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; if that is meant, repeat with FLOWMESH_WRITE_TRACES=1 and read it"


def test_the_trace_of_a_run_shared_by_two_tenants() -> None:
    story = Story(commits=False)
    story.join("n1")
    prompts = story.given("prompts")
    flow = [
        operator("load", type="data.sql", params={"query": "select"}, after=[prompts]),
        operator("score", type="python.call", params={"function": "score"}, after=[0], of=[operator("x", type="data.sql")]),
    ]
    story.note("Two tenants submit the same workflow; while its first operator runs, the second attaches to it.")
    story.submit(workflow(flow), "r1", "ta")
    story.submit(workflow(flow), "r2", "tb")
    story.answer("load")
    story.note("The result goes on to its consumers while its record is being written.")
    story.commit()
    story.answer("score")
    story.commit()
    story.note("A third run, later, is served from the ledger once holders have confirmed.")
    story.submit(workflow(flow), "r3", "tb")
    hold(story, "shared_run")


def test_the_trace_of_a_killed_node() -> None:
    story = Story()
    story.join("n1")
    flow = [operator("train", type="train.sft", params={"seed": 1}), operator("tidy", nonce=1)]
    story.submit(workflow(flow, {"adapter": 0, "tidied": 1}))
    story.join("n2")
    silent = story.named("train")
    story.note("The broker sees the connection end: cheap work is taken back soon, dear work after the lease.")
    story.apply(e.NodeDisconnected("n1"))
    story.wait(1, beating=["n2"])
    story.answer("tidy")
    story.wait(5, beating=["n2"])
    story.note("The node was only silent. What runs elsewhere by now is decided by the first result.")
    story.beat("n1", [silent.id])
    story.succeed(silent)
    hold(story, "killed_node")


def test_the_trace_of_a_lost_input() -> None:
    story = Story()
    story.join("n1", "n2")
    flow = [operator("first", nonce=1), operator("second", nonce=2, after=[0]), operator("third", nonce=3, after=[1])]
    story.submit(workflow(flow))
    story.answer("first")
    story.answer("second")
    story.note("What the first two made is gone; the third notices, its producer runs again and notices too.")
    story.forget(content("first's result"), content("second's result"))
    for name in ("third", "second", "first"):
        story.run(story.named(name))
    story.note("The same results come out: the ledger's records stand.")
    story.answer("second")
    story.answer("third")
    hold(story, "lost_input")
