"""What a queue counts stays true while work is shared, left, cancelled and learned about."""

from __future__ import annotations

from typing import Any

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import operator, workflow

from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.queues import Queue


def train(name: str, seed: int) -> Any:
    return operator(name, type="train.sft", params={"seed": seed})


def only(made: Desk) -> Queue:
    (queue,) = made.state.pool.values()
    return queue


def test_a_run_that_was_cancelled_waits_no_more_in_a_queue() -> None:
    made = Desk()
    made.submit(workflow([train("a", 1)]), "r1")
    made.submit(workflow([train("b", 2)]), "r2")
    made.apply(e.CancelRequested("ta", "r1", "ta"))
    made.join("n1")
    assert made.is_assigned("b")
    made.submit(workflow([train("c", 3)]), "r3")
    assert only(made).runs == {("ta", "r3"): 1}, "the void entry has left nothing behind"


def test_what_a_queue_is_worth_does_not_drift_when_work_enters_anew_after_something_was_learned() -> None:
    made = Desk()
    made.submit(workflow([train("a", 1)]), "r1", "ta")
    made.submit(workflow([train("b", 2)]), "r2", "ta")
    queue = only(made)
    shared = next(work for work in made.state.works.values() if work.operator.name == "a")
    before = shared.seconds
    made.state.costs.note_batch(shared.cost_kind, "", "n0", *shared.size, 10 * before, 0.0, 0.0, 0)
    made.submit(workflow([train("a", 1)]), "r3", "tb")
    made.apply(e.CancelRequested("ta", "r1", "ta"))
    assert shared.seconds != before, "it stands under the other tenant now, charged as is known now"
    assert queue.first(made.state.works) is not None
    assert queue.take(1, made.state.works)
    live = [entry[3] for heap in queue.heaps.values() for entry in heap if entry[2] == entry[3].ticket]
    assert abs(queue.worth_s - sum(work.seconds for work in live)) < 1e-6


def test_a_queue_whose_work_was_cancelled_is_nothing_to_match_with_idle_nodes() -> None:
    made = Desk()
    pinned: dict[str, Any] = {"models": {"hf:a": "sha256:a", "hf:b": "sha256:b"}}
    for model in pinned["models"]:
        params = {"prompt": model, "dtype": "float32"}
        made.submit(workflow([operator("o", type="llm.generate", params=params, models={"model": model})]), model, **pinned)
    made.join("n1")
    left = next(iter(run for run in pinned["models"] if made.states(run) == {"o": "ready"}))
    made.apply(e.CancelRequested("ta", left, "ta"), e.CutOff())
    made.join("n2", "n3")
    made.apply(e.Restored())
    assert len(made.assigned) == 1
