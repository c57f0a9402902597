"""Chains folded onto one node: what goes along, what of it is taken, and what becomes of it when something goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, Operator, Resources, chain, content, operator, result_of, workflow
from tests.unit.scheduler.tails import Tail

from flowmesh_mesh.identity import private_salt
from flowmesh_mesh.messages import Abort, Assignment, Commit, Item, Outcome
from flowmesh_mesh.subjects import HUB
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.devices import device_class
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.recording import decode_event, encode_event, unsalted


def desk(*nodes: str, **fields: Any) -> Desk:
    made = Desk(**fields)
    made.join(*(nodes or ("n1",)))
    return made


def names(assignment: Assignment, number: int = 0) -> list[str]:
    """Return the names of what follows an item."""
    return [hop.operator.name for hop in assignment.tails[number]] if assignment.tails else []


def answers(made: Desk, assignment: Assignment, label: str = "", number: int = 0) -> list[Outcome]:
    """Return what an honest node says of an item and everything that follows it."""
    item: Item = assignment.items[number]
    kind, tail = assignment.type, Tail(item, assignment.tails[number] if assignment.tails else ())
    found = []
    while True:
        found.append(made.outcome(item, kind, label + item.name if label else None))
        after = tail.next(found[-1], assignment.node)
        if after is None:
            return found
        item, kind = after


def keep(made: Desk, told: Sequence[Outcome]) -> None:
    """Let the hub hold what these outcomes gave, as it does what is small, and nobody else."""
    for ref in (ref for outcome in told for refs in outcome.outputs.values() for ref in refs):
        made.held[ref.cid] = {HUB}
        if ref.cid in made.state.places:
            made.state.places[ref.cid] = {HUB}


def test_what_follows_goes_along_and_is_taken_in_one_report() -> None:
    made = desk()
    made.submit(chain(4))
    first = made.only()
    assert names(first) == ["o1", "o2", "o3"]
    commands = made.report(first, answers(made, first))
    assert made.end().counts == {"done": 4}
    assert not made.of(commands, c.Assign)
    assert [len(commit.records) for commit in made.of(commands, c.CommitResults)] == [4]
    assert [m.closed for m in made.told(commands, "n1") if isinstance(m, Commit)] == [True]


def test_results_and_lineage_are_those_of_a_chain_that_is_not_folded() -> None:
    folded, plain = desk(), desk(settings=Settings(fold_hops=0))
    for made in (folded, plain):
        made.submit(chain(5))
    assert plain.only().tails == ()
    folded.report(folded.only(), answers(folded, folded.only()))
    plain.work_off()
    assert folded.end().outputs == plain.end().outputs

    def lineage(made: Desk) -> list[tuple[bytes, bytes, int, int, list[bytes]]]:
        """Return what each record says, its origins by the keys that made them: records differ in times and receipts."""
        keys = {made.vertex(f"o{i}").record: made.vertex(f"o{i}").key for i in range(5)}
        records = made.records()
        return [(r.operator, r.result, r.generation, r.attempt, [keys[o.record or b""] for o in r.origins]) for r in records]

    assert lineage(folded) == lineage(plain)


def test_reports_in_several_parts_are_taken_as_they_come() -> None:
    made = desk()
    made.submit(chain(5))
    first = made.only()
    told = answers(made, first)
    made.report(first, told[:2], last=False)
    assert made.states() == {"o0": "done", "o1": "done", "o2": "assigned", "o3": "waiting", "o4": "waiting"}
    assert made.state.nodes["n1"].busy == {"inline": 1}
    made.report(first, told[2:3], last=False)
    assert made.states()["o3"] == "assigned"
    made.report(first, told[3:])
    assert made.end().reason == "succeeded"
    assert not any(made.state.nodes["n1"].busy.values())


def test_a_report_that_overtakes_another_is_taken_when_it_is_offered_again() -> None:
    made = desk()
    made.submit(chain(4))
    first = made.only()
    told = answers(made, first)
    made.report(first, told[2:])
    assert made.states()["o2"] == "waiting"
    made.report(first, told[:2], last=False)
    assert made.states() == {"o0": "done", "o1": "done", "o2": "assigned", "o3": "waiting"}
    made.report(first, told[2:])
    assert made.end().reason == "succeeded"
    assert [record.attempt for record in made.records()] == [1, 1, 1, 1]


def test_outcomes_in_another_order_within_a_report_are_not_expected_and_run_again() -> None:
    made = desk()
    made.submit(chain(3))
    first = made.only()
    made.report(first, answers(made, first)[::-1])
    assert made.states() == {"o0": "done", "o1": "assigned", "o2": "waiting"}
    assert made.only().items[0].name == "o1"
    made.work_off()
    assert made.end().reason == "succeeded"


def test_a_node_that_stops_early_leaves_the_rest_to_others() -> None:
    made = desk()
    made.submit(chain(4))
    first = made.only()
    commands = made.report(first, answers(made, first)[:2])
    assert [a.assignment.items[0].name for a in made.of(commands, c.Assign)] == ["o2"]
    assert names(made.only()) == ["o3"]


def test_a_lost_node_costs_what_was_not_reported() -> None:
    made = desk("n1", "n2")
    made.submit(chain(6))
    first = made.only()
    made.report(first, told := answers(made, first)[:3], last=False)
    keep(made, told)
    made.lose(first.node)
    second = made.only()
    assert second.node != first.node
    assert [item.name for item in second.items] == ["o3"]
    assert names(second) == ["o4", "o5"]
    assert second.items[0].attempt == 2
    made.report(second, answers(made, second))
    assert made.end().counts == {"done": 6}
    assert len(made.ledger) == 6


def test_a_node_that_was_silent_goes_on_with_its_chain() -> None:
    made = desk("n1")
    made.submit(chain(4))
    first = made.only()
    told = answers(made, first)
    made.report(first, told[:1], last=False)
    keep(made, told[:1])
    made.apply(e.NodeDisconnected("n1"))
    made.wait(1)
    assert not made.state.assignments
    made.beat("n1", [first.id])
    assert list(made.state.assignments) == [first.id]
    made.report(first, told[1:3], last=False)
    assert made.states()["o3"] == "assigned"
    made.report(first, told[3:])
    assert made.end().reason == "succeeded"
    assert made.vertex("o1").attempt == 1


def test_what_a_lost_node_has_done_of_a_chain_is_taken_late() -> None:
    """Nobody else can run it meanwhile: the whole report counts, although only its first outcome was being waited for."""
    made = desk("n1")
    made.submit(chain(4))
    first = made.only()
    told = answers(made, first)
    made.lose("n1")
    keep(made, told)
    made.report(first, told)
    assert made.end().counts == {"done": 4}
    assert [record.attempt for record in made.records()] == [1, 1, 1, 1]


def test_a_late_report_does_not_promise_what_it_does_not_hold() -> None:
    made = desk("n1", "n2")
    made.submit(chain(4))
    first = made.only()
    made.lose(first.node)
    other = made.only()
    keep(made, told := answers(made, first)[:2])
    commands = made.report(first, told, last=False)
    assert made.states() == {"o0": "done", "o1": "done", "o2": "assigned", "o3": "waiting"}
    assert [a.assignment.node for a in made.of(commands, c.Assign)] == [other.node]
    made.work_off()
    assert len(made.ledger) == 4


def test_cancelling_the_run_stops_the_hop_that_runs() -> None:
    made = desk()
    made.submit(chain(4))
    first = made.only()
    told = answers(made, first)
    made.report(first, told[:2], last=False)
    commands = made.apply(e.CancelRequested("ta", "r1", "alice"))
    assert [m.keys for m in made.told(commands, "n1") if isinstance(m, Abort)] == [(told[2].key,)]
    assert made.end().reason == "cancelled"
    made.report(first, told[2:])
    assert len(made.ledger) == 2


def test_a_failed_hop_fails_like_any_operator() -> None:
    made = desk()
    made.submit(chain(4))
    first = made.only()
    told = answers(made, first)
    bad = Outcome(told[1].key, 0, 1, "user-error", error="no")
    made.report(first, [told[0], bad])
    assert made.states() == {"o0": "done", "o1": "failed", "o2": "skipped", "o3": "skipped"}
    assert made.end().reason == "user-error"


def test_a_hop_that_crashed_is_tried_again_elsewhere() -> None:
    made = desk("n1", "n2")
    made.submit(chain(3))
    first = made.only()
    told = answers(made, first)
    made.report(first, [told[0], Outcome(told[1].key, 0, 1, "crashed", error="boom")])
    made.wait(1, beating=["n1", "n2"])
    second = made.only()
    assert second.node != first.node
    assert (second.items[0].name, second.items[0].attempt) == ("o1", 2)
    assert names(second) == ["o2"]


def test_a_result_that_is_known_cuts_the_chain() -> None:
    """Another run has done the middle on the same content; the node's own is ignored, and it is told to stop."""
    made = desk("n1")
    middle = operator("m", nonce=7, after=[content("same")])
    made.submit(workflow([middle]), "r0")
    made.work_off()
    flow = [operator("a", nonce=1), operator("b", nonce=7, after=[0]), operator("d", nonce=9, after=[1])]
    made.submit(workflow(flow), "r1")
    first = made.only()
    told = [made.outcome(first.items[0], "flow.noop", "same"), *answers(made, first)[1:]]
    commands = made.report(first, told[:1], last=False)
    assert [m.keys for m in made.told(commands, "n1") if isinstance(m, Abort)] == [(told[0].key,)]
    assert made.vertex("b").shared
    assert made.states()["b"] == "done"
    assert made.only().items[0].name == "d"
    made.work_off()
    assert len(made.ledger) == 3


def test_work_that_somebody_else_is_at_cuts_the_chain() -> None:
    made = desk("n1", "n2")
    middle = operator("m", type="python.call", params={"function": "f"}, after=[content("same")])
    made.submit(workflow([middle]), "r0")
    other = made.only()
    flow = [operator("a", nonce=1), operator("b", type="python.call", params={"function": "f"}, of=[operator("a")], after=[0])]
    made.submit(workflow(flow), "r1")
    first = made.named("a")
    assert names(first) == ["b"]
    made.report(first, [made.outcome(first.items[0], "flow.noop", "same")], last=False)
    assert made.vertex("b").work is made.vertex("m", "r0").work
    made.succeed(other)
    assert made.end().reason == "succeeded"
    assert len(made.ledger) == 2


def test_a_key_that_the_leader_did_not_compute_is_not_taken() -> None:
    made = desk("n1")
    made.submit(chain(3))
    first = made.only()
    told = answers(made, first)
    outputs, result = result_of("flow.noop", "forged")
    forged = Outcome(b"k" * 32, 0, 1, "succeeded", result, outputs)
    made.report(first, [told[0], forged], last=False)
    assert len(made.ledger) == 1
    assert made.states()["o1"] == "assigned"
    made.report(first, [forged])
    made.wait(11, beating=["n1"])
    assert made.only().id != first.id
    made.work_off()
    assert made.end().counts == {"done": 3}


def test_a_hop_of_another_attempt_or_generation_is_not_taken() -> None:
    made = desk("n1")
    made.submit(chain(2))
    first = made.only()
    told = answers(made, first)
    outputs, result = told[1].outputs, told[1].result
    wrong = [Outcome(told[1].key, *which, "succeeded", result, outputs) for which in ((0, 2), (1, 1))]
    made.report(first, [told[0], *wrong], last=False)
    assert len(made.ledger) == 1


def test_two_runs_of_the_same_chain_share_every_hop() -> None:
    made = desk("n1")
    made.submit(chain(4), "r1", "ta")
    first = made.only()
    made.submit(chain(4), "r2", "tb")
    made.report(first, answers(made, first))
    assert made.end("r1", "ta").counts == made.end("r2", "tb").counts == {"done": 4}
    assert len(made.ledger) == 4
    assert all(made.vertex(f"o{i}", "r2", "tb").shared for i in range(4))


def test_the_chain_of_a_cancelled_run_that_another_shares_goes_on_as_that_one_s() -> None:
    made = desk("n1")
    made.submit(chain(4), "r1", "ta")
    first = made.only()
    made.submit(chain(4), "r2", "tb")
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    told = answers(made, first)
    made.report(first, told[:1], last=False)
    made.work_off()
    assert made.end("r2", "tb").counts == {"done": 4}


def test_a_new_leader_lets_a_chain_go_on_from_where_it_is() -> None:
    made = desk("n1")
    made.submit(chain(6))
    first = made.only()
    told = answers(made, first)
    made.report(first, told[:2], last=False)
    after = made.successor("n1")
    assert list(after.state.assignments) == [first.id]
    assert after.states()["o2"] == "assigned"
    assert not after.of(after.commands, c.Assign)
    after.report(first, told[:2], last=False)  # the node offers everything again
    after.report(first, told[2:4], last=False)
    after.report(first, told[4:])
    assert after.end().counts == {"done": 6}
    assert len(after.ledger) == 6


def test_a_new_leader_lets_others_do_what_a_node_that_is_gone_had_of_a_chain() -> None:
    made = desk("n1", "n2")
    made.submit(chain(4))
    first = made.only()
    told = answers(made, first)
    made.report(first, told[:2], last=False)
    keep(made, told)
    other = "n2" if first.node == "n1" else "n1"
    after = made.successor(other)
    assert [r.assignment for r in after.of(after.commands, c.Release)] == [first.id]
    assert [i.name for i in after.only().items] == ["o2"]
    after.work_off()
    assert after.end().counts == {"done": 4}


def test_a_new_leader_takes_the_report_that_the_old_one_never_saw() -> None:
    made = desk("n1")
    made.submit(chain(3))
    first = made.only()
    after = made.successor("n1")
    after.report(first, answers(after, first))
    assert after.end().counts == {"done": 3}


def test_a_salt_goes_along_for_private_work_and_the_secret_does_not() -> None:
    made = desk("n1")
    made.submit(chain(3), share="private")
    first = made.only()
    assert {hop.salt for hop in first.tails[0]} == {private_salt(b"secret a", "ta")}
    assert b"secret a" not in repr(first).encode()
    made.report(first, answers(made, first))
    assert made.end().reason == "succeeded"


def test_a_new_leader_follows_a_private_chain_without_its_salts_which_no_log_keeps() -> None:
    made = desk("n1")
    made.submit(chain(4), share="private")
    first = made.only()
    told = answers(made, first)
    made.report(first, told[:2], last=False)
    name, data = encode_event(unsalted(made.recovered()))
    assert private_salt(b"secret a", "ta") not in data
    after = Desk(epoch=200, now_us=made.now_us, ledger=dict(made.ledger), manifests=dict(made.manifests))
    after.join("n1")
    after.held, after.assigned = made.held, {first.id: first}
    after.apply(decode_event(name, data))
    assert list(after.state.assignments) == [first.id]
    after.report(first, told[2:])
    assert after.end().counts == {"done": 4}


A = operator("a")
CALL = operator("b", type="python.call", of=[A], after=[0])
EFFECT = operator("b", type="python.call", params={"effect": True}, of=[A], after=[0])


@pytest.mark.parametrize(
    ("why", "others"),
    [
        ("two consume it", [operator("b", nonce=1, after=[0]), operator("c", nonce=2, after=[0])]),
        ("it waits for another too", [operator("x", nonce=1), operator("b", nonce=2, after=[0, 1])]),
        ("it has effects", [EFFECT]),
        ("an engine runs it", [operator("b", type="llm.generate", of=[A], after=[0])]),
        ("it is dearer to somebody", [operator("b", nonce=1, after=[0], priority=1)]),
        ("it wants numbers of its own", [operator("b", nonce=1, after=[0], numeric="exact:x")]),
        ("it wants more memory", [operator("b", nonce=1, after=[0], resources=Resources(memory_bytes=1 << 30))]),
        ("it sleeps", [operator("b", nonce=1, after=[0], params={"sleep_s": 1.0})]),
    ],
)
def test_what_does_not_belong_in_a_chain_stays_out(why: str, others: list[Operator]) -> None:
    made = desk("n1")
    made.submit(workflow([A, *others], {}))
    assert all(assignment.tails == () for assignment in made.assigned.values()), why


@pytest.mark.parametrize("head", [operator("e", type="python.call", params={"effect": True}), operator("e", type="llm.generate")])
def test_nothing_follows_an_effect_or_an_engine_by_itself(head: Operator) -> None:
    made = desk("n1")
    made.submit(workflow([head, operator("z", of=[head], after=[0])], {}))
    assert made.only().tails == ()


def test_a_type_that_the_node_does_not_run_stays_out() -> None:
    made = Desk()
    made.join("n1", types=["flow.noop"])
    made.submit(workflow([A, CALL], {}))
    assert made.only().tails == ()


def test_slow_hops_stay_out() -> None:
    quick = desk("n1")
    quick.submit(workflow([A, CALL], {}))
    assert names(quick.only()) == ["b"]
    slow = desk("n1")
    teach(slow, 0.5)
    slow.submit(workflow([A, CALL], {}))
    assert slow.only().tails == ()


def teach(made: Desk, seconds: float) -> None:
    """Let calls be known to take so long on n1."""
    device = device_class(made.state.nodes["n1"].record)
    for _ in range(20):
        made.state.costs.note_batch(("python.call", ""), device, "n1", 0.0, 1.0, seconds, 0.0, 0.0, 0, seconds)


def test_a_chain_as_a_whole_is_no_longer_than_a_lease() -> None:
    made = desk("n1", settings=Settings(lease_s=0.15))
    teach(made, 0.06)
    calls = [operator(f"b{i}", type="python.call", params={"n": i}, of=[A, CALL, CALL, CALL], after=[i]) for i in range(4)]
    made.submit(workflow([A, *calls], {}))
    assert names(made.only()) == ["b0", "b1"]


def test_work_that_waits_in_the_pool_already_is_not_taken_out_of_it() -> None:
    made = desk("n1", settings=Settings(depth_limit={**Settings().depth_limit, "user": 0}))
    made.submit(workflow([operator("m", type="python.call", params={"function": "f"}, after=[content("same")])]), "r0")
    follows = operator("b", type="python.call", params={"function": "f"}, of=[A], after=[0])
    made.submit(workflow([A, follows]), "r1")
    first = made.only()
    commands = made.report(first, [made.outcome(first.items[0], "flow.noop", "same")], last=False)
    assert [m.keys for m in made.told(commands, "n1") if isinstance(m, Abort)] == [(first.items[0].key,)]
    assert made.states()["b"] == "ready"


def test_a_tenant_pays_for_hops_as_for_anything_else() -> None:
    made = desk("n1")
    made.submit(workflow([A, CALL], {}))
    first = made.only()
    told = answers(made, first)
    made.report(first, told[:1], last=False)
    work = made.vertex("b").work
    assert work is not None
    assert work.charged_us > 0
    assert work.standing == "running"
    before_us = made.state.shares.account("ta").used_us
    made.now_us += SECOND
    made.report(first, told[1:])
    assert made.state.shares.account("ta").used_us - before_us == 1000


def test_what_a_batch_costs_is_learned_from_its_items_and_a_hop_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made = desk("n1")
    teach(made, 0.01)
    learned: list[tuple[str, float]] = []
    monkeypatch.setattr(made.state.costs, "note_batch", lambda kind, *rest: learned.append((kind[0], rest[3])))
    flow = [A, operator("x", nonce=5), CALL, operator("y", nonce=6, after=[1])]
    made.submit(workflow(flow, {}))
    first = made.only()
    made.report(first, answers(made, first, number=0), last=False)
    assert learned == [("python.call", 1.0)]
    made.report(first, answers(made, first, number=1))
    assert learned == [("python.call", 1.0), ("flow.noop", 2.0)]


def test_the_hops_of_an_assignment_are_bounded_in_number_and_size() -> None:
    rows = [(row, i) for row in range(3) for i in range(3)]
    several = workflow([operator(f"o{r}{i}", nonce=10 * r + i, after=[3 * r + i - 1] if i else []) for r, i in rows], {})
    for hops, expected in ((6, [2, 2, 2]), (3, [1, 1, 1]), (2, [])):
        made = desk("n1", settings=Settings(fold_hops=hops))
        made.submit(several)
        assert [len(tail) for tail in made.only().tails] == expected
    bulky = desk("n1")
    pad = "x" * 5000
    bulky.submit(workflow([operator(f"o{i}", params={"nonce": i, "pad": pad}, after=[i - 1] if i else []) for i in range(9)]))
    assert len(bulky.only().tails[0]) == 2


def test_each_item_of_a_batch_has_its_own_tail() -> None:
    made = desk("n1")
    heads = [operator("a0", nonce=1), operator("b0", nonce=2)]
    made.submit(workflow([*heads, operator("b1", nonce=3, after=[1]), operator("a1", nonce=4, after=[0])], {}))
    first = made.only()
    assert [names(first, i) for i in range(2)] == [["a1"], ["b1"]]
    made.report(first, answers(made, first, number=1), last=False)
    assert made.states() == {"a0": "assigned", "b0": "done", "b1": "done", "a1": "waiting"}
    made.report(first, answers(made, first, number=0))
    assert made.end().counts == {"done": 4}


def test_given_content_may_feed_a_hop_beside_what_came_before() -> None:
    made = desk("n1")
    given = content("given")
    made.submit(workflow([operator("a", nonce=1), operator("b", nonce=2, after=[given, 0])]))
    first = made.only()
    assert names(first) == ["b"]
    made.report(first, answers(made, first))
    assert [(o.cid == given.cid, o.record is None) for o in made.records()[1].origins] == [(True, True), (False, False)]


def test_a_deadline_ends_a_chain() -> None:
    made = desk("n1")
    made.submit(workflow([operator(f"o{i}", nonce=i, after=[i - 1] if i else [], deadline_s=5) for i in range(3)]))
    first = made.only()
    made.report(first, answers(made, first)[:1], last=False)
    made.now_us += 6 * SECOND
    made.beat("n1")
    made.apply(e.Tick())
    assert made.end().reason == "timeout"
    assert not made.state.assignments
