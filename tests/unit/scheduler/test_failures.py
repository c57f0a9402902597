"""What a failed attempt leads to: again, elsewhere, or the end of the operator with a reason."""

from __future__ import annotations

import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import Resources, Retry, chain, gpu, operator, workflow

from flowmesh_mesh.messages import Outcome
from flowmesh_scheduler.core import commands as c


def desk(*nodes: str) -> Desk:
    made = Desk()
    made.join(*(nodes or ("n1", "n2", "n3")))
    return made


def alive(made: Desk) -> list[str]:
    return [n.name for n in made.state.nodes.values() if n.state == "active"]


def test_a_user_error_is_not_tried_again() -> None:
    made = desk()
    made.submit(chain(1))
    made.fail(made.only(), "user-error")
    assert made.end().reason == "user-error"
    assert "it was user-error" in made.end().detail
    assert not made.assigned


@pytest.mark.parametrize("reason", ["crashed", "oom", "timeout", "internal"])
def test_a_crash_is_tried_again_elsewhere_after_a_pause_that_doubles(reason: str) -> None:
    made = desk()
    made.submit(workflow([operator("o", nonce=1, retry=Retry(3, 2.0))]))
    seen = []
    for pause_s in (2.0, 4.0):
        seen.append(made.only().node)
        made.fail(made.only(), reason)
        made.wait(pause_s - 0.5, beating=alive(made))
        assert not made.assigned, "it was tried before the pause was over"
        made.wait(0.5, beating=alive(made))
    seen.append(made.only().node)
    assert sorted(seen) == ["n1", "n2", "n3"]
    assert [item.attempt for item in made.only().items] == [3]
    made.fail(made.only(), reason)
    assert made.end().reason == reason


def test_an_operator_that_may_run_once_is_not_tried_again() -> None:
    made = desk()
    made.submit(workflow([operator("o", nonce=1, retry=Retry(1, 0.1))]))
    made.fail(made.only(), "crashed")
    assert made.end().reason == "crashed"


def test_what_goes_wrong_on_a_node_itself_is_tried_elsewhere_although_the_operator_may_run_once() -> None:
    made = desk()
    made.submit(workflow([operator("o", nonce=1, retry=Retry(1, 0.1))]))
    seen = []
    for _ in range(3):
        seen.append(made.only().node)
        made.fail(made.only(), "internal")
        made.wait(1.0, beating=alive(made))
    assert sorted(seen) == ["n1", "n2", "n3"]
    assert made.end().reason == "internal"


def test_what_has_effects_and_may_run_once_is_not_tried_again_whatever_went_wrong() -> None:
    made = desk()
    made.submit(workflow([operator("o", nonce=1, retry=Retry(1, 0.1), determinism="effect")]))
    made.fail(made.only(), "internal")
    assert made.end().reason == "internal"


def test_an_attempt_that_succeeds_after_crashes_is_a_success() -> None:
    made = desk("n1")
    made.submit(chain(1))
    made.fail(made.only(), "crashed")
    made.wait(1, beating=["n1"])
    made.succeed(made.only())
    assert made.end().reason == "succeeded"
    assert [r.attempt for r in made.records()] == [2]


def test_a_model_that_a_node_lacks_is_sought_on_another() -> None:
    made = desk("n1", "n2")
    made.submit(chain(1))
    first = made.only().node
    made.fail(made.only(), "model-missing")
    assert made.only().node != first
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_a_model_that_no_node_has_ends_the_operator() -> None:
    made = desk("n1", "n2")
    made.submit(chain(1))
    made.fail(made.only(), "model-missing")
    made.fail(made.only(), "model-missing")
    assert made.end().reason == "model-missing"


def test_a_model_is_not_sought_for_ever_on_a_node_that_cannot_run_the_operator() -> None:
    made = Desk()
    made.join("n1", devices=(gpu(),))
    made.join("n2")
    made.submit(workflow([operator("o", nonce=1, resources=Resources(gpus=1))]))
    for _ in range(5):
        if not made.assigned:
            break
        made.fail(made.only(), "model-missing")
    assert made.end().reason == "model-missing"


def test_a_node_that_crashed_once_still_counts_when_another_lacks_the_model() -> None:
    made = desk("n1", "n2")
    made.submit(chain(1))
    first = made.only().node
    made.fail(made.only(), "crashed")
    made.wait(1, beating=["n1", "n2"])
    assert made.only().node != first
    made.fail(made.only(), "model-missing")
    assert made.only().node == first
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_what_one_node_cannot_run_is_run_by_another() -> None:
    made = desk("n1", "n2")
    made.submit(chain(1))
    made.fail(made.only(), "unsatisfiable")
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_a_node_that_stops_work_unasked_is_not_given_it_for_ever() -> None:
    made = desk("n1")
    made.submit(chain(1))
    for _ in range(20):
        if made.assigned:
            made.fail(made.only(), "cancelled")
        made.wait(2, beating=["n1"])
    assert made.end().reason == "internal", "a cancellation that nobody asked for is the node's fault"


def test_a_reason_that_is_none_becomes_an_internal_error() -> None:
    made = desk("n1")
    made.submit(workflow([operator("o", nonce=1, retry=Retry(1), determinism="effect")]))
    made.fail(made.only(), "because")
    assert made.end().reason == "internal"


def test_misses_of_inputs_do_not_use_up_the_attempts() -> None:
    made = desk("n1")
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    for _ in range(2):
        made.fail(made.only(), "input-missing")
        made.wait(2, beating=["n1"])
    made.fail(made.only(), "crashed")
    made.wait(1, beating=["n1"])
    assert made.is_assigned("o1"), "the first crash ended it"


def test_an_input_that_is_said_to_be_there_but_never_is_ends_the_operator() -> None:
    made = desk("n1")
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    for _ in range(100):
        if made.assigned:
            item = made.only().items[0]
            made.fail(made.only(), "input-missing", missing=tuple(x.ref.cid for refs in item.inputs.values() for x in refs))
        made.wait(1, beating=["n1"])
    assert made.end().reason == "input-missing"


def test_results_are_per_operator() -> None:
    made = desk("n1")
    made.submit(workflow([operator(f"o{i}", nonce=i) for i in range(3)]))
    assignment = made.only()
    outcomes: list[Outcome] = [made.outcome(item, "flow.noop") for item in assignment.items]
    bad = assignment.items[1]
    outcomes[1] = made.outcome(bad, "flow.noop", reason="user-error")
    made.report(assignment, outcomes)
    assert made.states() == {"o0": "done", "o1": "failed", "o2": "done"}


def test_a_failure_skips_everything_downstream_and_nothing_else() -> None:
    made = desk("n1")
    flow = [
        operator("bad", nonce=1),
        operator("good", nonce=2),
        operator("child", after=[0]),
        operator("grandchild", after=[2, 1]),
        operator("beside", after=[1]),
    ]
    made.submit(workflow(flow, {"beside": 4, "grandchild": 3}))
    assignment = made.only()
    bad, good = sorted(assignment.items, key=lambda item: item.name)
    made.report(assignment, [made.outcome(bad, "flow.noop", reason="user-error")], last=False)
    assert made.states()["grandchild"] == "skipped"
    assert ("ta", "r1") not in made.ended, "the run ended while a branch of it was running"
    made.report(assignment, [made.outcome(good, "flow.noop")])
    made.work_off()
    assert made.states() == {"bad": "failed", "good": "done", "child": "skipped", "grandchild": "skipped", "beside": "done"}
    end = made.end()
    assert (end.reason, sorted(end.outputs)) == ("user-error", ["beside"])
    assert made.vertex("grandchild").reason == "upstream-failed"


def test_everyone_who_waits_hears_of_the_failure() -> None:
    made = desk("n1")
    made.submit(chain(1), "r1", "ta")
    made.submit(chain(1), "r2", "tb")
    made.fail(made.only(), "user-error")
    assert made.end("r1", "ta").reason == made.end("r2", "tb").reason == "user-error"


def test_only_success_is_kept_under_a_key() -> None:
    made = desk("n1")
    made.submit(chain(1), "r1", "ta")
    made.fail(made.only(), "user-error")
    made.submit(chain(1), "r2", "tb")
    made.succeed(made.only())
    assert made.end("r2", "tb").reason == "succeeded"
    assert len(made.ledger) == 1


def test_the_attempts_are_those_of_the_most_patient_waiter() -> None:
    made = desk("n1")
    made.submit(workflow([operator("o", nonce=1, retry=Retry(1, 0.1))]), "r1", "ta")
    made.submit(workflow([operator("o", nonce=1, retry=Retry(3, 0.1))]), "r2", "tb")
    made.fail(made.only(), "crashed")
    made.wait(1, beating=["n1"])
    made.succeed(made.only())
    assert made.end("r2", "tb").reason == "succeeded"


def test_a_node_that_forgets_an_item_does_not_hold_it_for_ever() -> None:
    """The last part of the answer came, one item is in none: after a lease it runs elsewhere."""
    made = desk("n1", "n2")
    made.submit(workflow([operator("a", nonce=1), operator("b", nonce=2)]))
    assignment = made.only()
    made.report(assignment, [made.outcome(assignment.items[0], "flow.noop")], last=True)
    made.wait(made.settings.lease_s + 2, beating=["n1", "n2"])
    again = made.only()
    assert (again.node != assignment.node, [i.name for i in again.items]) == (True, ["b"])
    made.work_off()
    assert made.end().reason == "succeeded"


def test_every_failure_names_operator_and_node() -> None:
    made = desk("n1")
    made.submit(chain(1))
    made.fail(made.only(), "user-error")
    vertex = made.vertex("o0")
    assert (vertex.node, vertex.reason, vertex.error, vertex.attempt) == ("n1", "user-error", "it was user-error", 1)
    assert made.end().actor == "n1"
    assert made.of(made.commands, c.EndRun)[0].state == "failed"
