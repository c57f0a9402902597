"""Inputs that nobody holds any more: made again by who made them, or the end of those who need them."""

from __future__ import annotations

from typing import Any

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, Source, chain, content, operator, result_of, workflow

from flowmesh_mesh.messages import Outcome
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings


def desk(*nodes: str, **fields: Any) -> Desk:
    """Return a desk at which every operator has an assignment of its own."""
    made = Desk(settings=Settings(fold_hops=0), **fields)
    made.join(*(nodes or ("n1", "n2")))
    return made


def test_a_lost_input_is_made_again_by_its_producer() -> None:
    made = desk("n1")
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    made.lose_input("o1", "x")
    assert made.states() == {"o0": "assigned", "o1": "waiting"}
    assert made.only().items[0].generation == 1
    made.succeed(made.only(), "x")
    made.succeed(made.named("o1"))
    assert made.end().reason == "succeeded"
    assert len(made.ledger) == 2, "an equal result was published again"


def test_an_input_that_is_still_held_elsewhere_is_not_made_again() -> None:
    made = desk("n1", "n2")
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    made.held[content("x").cid] = {"n2"}
    made.fail(made.named("o1"), "input-missing", missing=(content("x").cid,))
    item = made.named("o1").items[0]
    assert [located.holders for refs in item.inputs.values() for located in refs] == [("n2",)]


def test_inputs_lost_over_several_levels_are_made_again_from_the_first() -> None:
    made = desk("n1")
    made.submit(chain(4))
    for name in ("o0", "o1", "o2"):
        made.succeed(made.named(name), f"x {name}")
    made.forget(content("x o0"), content("x o1"), content("x o2"))
    for name in ("o3", "o2", "o1"):
        made.run(made.named(name))
    assert made.states() == {"o0": "assigned", "o1": "waiting", "o2": "waiting", "o3": "waiting"}
    for name in ("o0", "o1", "o2"):
        made.succeed(made.named(name), f"x {name}")
    made.work_off()
    assert made.end().reason == "succeeded"
    assert len(made.ledger) == 4


def test_two_consumers_of_a_lost_input_wait_for_one_producer() -> None:
    made = desk("n1", locates=False)
    made.submit(workflow([operator("p", nonce=1), operator("c", nonce=2, after=[0]), operator("d", nonce=3, after=[0])], {}))
    made.succeed(made.only(), "x")
    made.lose_input("c", "x")
    made.lose_input("d", "x")
    root = content("x").cid
    made.apply(e.Located({root: []}))
    assert made.states() == {"p": "ready", "c": "waiting", "d": "waiting"}
    made.apply(e.Located({root: []}))
    made.succeed(made.only(), "x")
    made.work_off()
    assert made.end().reason == "succeeded"


def test_a_producer_waits_for_its_own_lost_inputs() -> None:
    """g feeds p and d, p feeds c; what g and p made is lost at once, and d notices first."""
    made = desk("n1")
    flow = [operator("g", nonce=1), operator("p", nonce=2, after=[0]), operator("d", nonce=3, after=[0])]
    made.submit(workflow([*flow, operator("c", after=[1])], {"d": 2, "c": 3}))
    made.answer("g", "g")
    made.answer("p", "p")
    made.lose_input("d", "g")
    made.lose_input("c", "p")
    assert made.states() == {"g": "assigned", "p": "waiting", "d": "waiting", "c": "waiting"}
    made.answer("g", "g")
    made.answer("p", "p")
    made.work_off()
    assert made.end().reason == "succeeded"
    assert len(made.ledger) == 4


def test_only_the_run_whose_content_is_gone_fails() -> None:
    """Two tenants wait for one operator; one has its input from an operator that can run again, the other had given it."""
    made = desk("n1")
    given = content("x")
    made.submit(workflow([operator("p", nonce=1), operator("c", nonce=2, after=[0])]), "r1", "ta")
    made.succeed(made.only(), "x")
    made.submit(workflow([operator("c", nonce=2, after=[given])]), "r2", "tb")
    assert made.vertex("c").work is made.vertex("c", "r2", "tb").work
    made.lose_input("c", "x")
    assert made.end("r2", "tb").reason == "input-missing"
    assert made.states() == {"p": "assigned", "c": "waiting"}
    made.succeed(made.only(), "x")
    made.work_off()
    assert made.end("r1", "ta").reason == "succeeded"


def test_a_given_input_that_nobody_holds_ends_the_run_with_that_reason() -> None:
    made = desk("n1")
    made.submit(workflow([operator("o", nonce=1, after=[content("given")]), operator("after", after=[0])]))
    made.lose_input("o", "given")
    assert made.end().reason == "input-missing"
    assert made.states() == {"o": "failed", "after": "skipped"}


def test_code_that_nobody_holds_ends_the_run_with_that_reason() -> None:
    made = desk("n1")
    made.submit(workflow([operator("o", type="python.call", params={"function": "f"}, code=content("code"))]))
    made.lose_input("o", "code")
    assert made.end().reason == "input-missing"


def test_one_of_several_inputs_is_made_again_alone() -> None:
    made = desk("n1")
    made.submit(workflow([operator("p", nonce=1), operator("q", nonce=2), operator("c", after=[0, 1])]))
    assignment = made.only()
    made.report(assignment, [made.outcome(i, "flow.noop", f"x {i.name}") for i in assignment.items])
    made.lose_input("c", "x q")
    assert made.states() == {"p": "done", "q": "assigned", "c": "waiting"}
    made.succeed(made.only(), "x q")
    made.work_off()
    assert made.end().reason == "succeeded"


def test_a_lost_part_of_a_split_is_made_again_with_the_others() -> None:
    made = desk("n1")
    flow = [
        operator("s", type="data.split", params={"parts": 2}, after=[content("table")]),
        *(operator(f"c{i}", nonce=i, after=[Source(op=0, port="parts", item=i)]) for i in range(2)),
    ]
    made.submit(workflow(flow, {"a": 1, "b": 2}))
    outputs, result = result_of("data.split", "x", 2)
    made.report(made.only(), [Outcome(made.only().items[0].key, 0, 1, "succeeded", result, outputs)])
    made.answer("c0")
    made.lose_input("c1", "x#1")
    again = made.only()
    assert [(item.name, item.generation) for item in again.items] == [("s", 1)]
    made.report(again, [Outcome(again.items[0].key, 1, again.items[0].attempt, "succeeded", result, outputs)])
    made.work_off()
    assert made.end().reason == "succeeded"


def test_an_input_that_is_lost_while_its_record_is_being_written_is_made_again() -> None:
    made = desk("n1", commits=False)
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    made.lose_input("o1", "x")
    made.commit()
    made.succeed(made.named("o0"), "x")
    made.commit()
    made.succeed(made.named("o1"))
    made.commit()
    assert made.end().reason == "succeeded"


def test_a_consumer_whose_producer_has_failed_on_its_second_run_is_skipped() -> None:
    """c lost the input, its producer ran again and failed; d notices the loss only then."""
    made = desk("n1")
    made.submit(workflow([operator("p", nonce=1), operator("c", nonce=2, after=[0]), operator("d", nonce=3, after=[0])], {}))
    made.succeed(made.only(), "x")
    made.lose_input("c", "x")
    made.answer("p", reason="user-error")
    assert made.states() == {"p": "failed", "c": "skipped", "d": "assigned"}
    made.lose_input("d", "x")
    assert made.states() == {"p": "failed", "c": "skipped", "d": "skipped"}
    assert made.end().reason == "user-error"


def test_a_node_that_never_has_what_it_reports_does_not_keep_the_mesh_busy_for_ever() -> None:
    made = desk("n1")
    made.submit(chain(2))
    for _ in range(200):
        if not made.assigned:
            break
        if made.is_assigned("o0"):
            made.succeed(made.named("o0"), "x")
        else:
            made.lose_input("o1", "x")
    assert made.end().reason == "input-missing"


def test_a_result_that_was_lost_is_made_by_another_node() -> None:
    made = desk("n1", "n2")
    made.submit(chain(2))
    first = made.only()
    made.succeed(first, "x")
    made.lose_input("o1", "x")
    assert made.named("o0").node != first.node


def test_an_output_that_the_hub_cannot_fetch_is_made_again() -> None:
    made = desk("n1", keeps=False)
    made.submit(chain(1))
    commands = made.succeed(made.only(), "x")
    assert [dict(k.roots) for k in made.of(commands, c.Keep)] == [{content("x").cid: ["n1"]}]
    made.forget(content("x"))
    made.apply(e.Kept("ta", "r1", [content("x").cid]))
    assert made.states() == {"o0": "assigned"}
    made.succeed(made.only(), "x")
    made.apply(e.Kept("ta", "r1"))
    assert made.end().reason == "succeeded"


def test_an_output_that_can_never_be_fetched_ends_the_run() -> None:
    made = desk("n1", keeps=False)
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    for _ in range(100):
        if ("ta", "r1") in made.ended:
            break
        made.apply(e.Kept("ta", "r1", [content("x").cid]))
        if made.assigned:
            made.succeed(made.only(), "x")
    assert made.end().reason == "input-missing"


def test_what_the_hub_has_fetched_is_held_by_the_hub() -> None:
    made = desk("n1")
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    assert "hub" in made.state.holders(content("x").cid)


def test_what_is_being_asked_about_is_not_taken_for_lost() -> None:
    """c waits to hear of x while d's node misses the given content: nobody has said yet that nobody holds that."""
    made = desk("n1", locates=False)
    given = content("given")
    flow = [operator("p", nonce=1), operator("c", nonce=2, after=[0, given]), operator("d", nonce=3, after=[given])]
    made.submit(workflow(flow, {}))
    made.answer("p", "x")
    made.answer("c", reason="input-missing", missing=(content("x").cid,))
    made.answer("d", reason="input-missing", missing=(given.cid,))
    made.apply(e.Located({content("x").cid: ["n1"]}))
    assert made.states() == {"p": "done", "c": "ready", "d": "ready"}
    made.apply(e.Located({given.cid: ["hub"]}))
    made.work_off()
    assert made.end().reason == "succeeded"


def test_a_vertex_whose_last_source_comes_while_another_is_lost_goes_on_waiting() -> None:
    """One answer tells both: what q made is held, what p made is not; c needs both, d only p's."""
    made = desk("n1")
    made.submit(workflow([operator("q", nonce=5)]), "r0")
    made.work_off()
    q = made.vertex("q", "r0").outputs
    assert q is not None
    made.locates = False
    flow = [operator("p", nonce=1), operator("q", nonce=5), operator("d", nonce=2, after=[0]), operator("c", after=[0, 1])]
    made.submit(workflow(flow, {}))
    made.answer("p", "x")
    made.answer("d", reason="input-missing", missing=(content("x").cid,))
    made.apply(e.Located({q["out"][0].cid: ["hub"], content("x").cid: []}))
    assert made.states() == {"p": "ready", "q": "done", "d": "waiting", "c": "waiting"}
    made.apply(e.Located({content("x").cid: []}))
    made.work_off()
    assert made.end().reason == "succeeded"


def test_an_input_that_cannot_be_fetched_is_sought_again_after_pauses_that_grow() -> None:
    made = desk("n1")
    made.submit(chain(2))
    made.answer("o0", "x")
    pauses = []
    for _ in range(5):
        made.answer("o1", reason="input-missing", missing=(content("x").cid,))
        begun_us = made.now_us
        while not made.assigned:
            made.wait(0.1, beating=["n1"])
        pauses.append((made.now_us - begun_us) / SECOND)
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert 3 < sum(pauses) < 30
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_a_poisonous_operator_is_found_out_although_its_input_never_comes_out_the_same() -> None:
    made = desk("n1", "n2", "n3", "n4", "n5")
    made.submit(chain(2))
    for number in range(3):
        if not made.is_assigned("o0"):
            break
        made.answer("o0", f"x{number}")
        killer = made.named("o1")
        made.forget(content(f"x{number}"))
        made.lose(killer.node)
    assert made.end().reason == "poison"
