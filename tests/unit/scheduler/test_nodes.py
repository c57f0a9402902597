"""Nodes that vanish, fall silent, crash, leave, come back: what they held goes on."""

from __future__ import annotations

from typing import Any

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, TRAIN, chain, content, node_record, operator, workflow

from flowmesh_mesh.messages import Beat, Commit
from flowmesh_scheduler.asks import _node
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings


def desk(*nodes: str, **fields: Any) -> Desk:
    made = Desk(**fields)
    made.join(*(nodes or ("n1", "n2")))
    return made


def test_work_of_a_killed_node_runs_elsewhere() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    commands = made.lose(first.node)
    assert [x.assignment for x in made.of(commands, c.Release)] == [first.id]
    assert made.only().node != first.node
    assert made.only().items[0].attempt == 2
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_a_lost_node_is_avoided_after_it_has_come_back() -> None:
    made = desk("n1")
    made.submit(chain(1))
    made.lose("n1")
    made.join("n2", "n1", started_at_us=2)
    assert made.only().node == "n2"


def test_the_only_node_is_used_again_although_it_was_lost_before() -> None:
    made = desk("n1")
    made.submit(chain(1))
    made.lose("n1")
    assert not made.assigned
    made.join("n1", started_at_us=2)
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_cheap_work_of_a_suspected_node_runs_elsewhere_soon_and_dear_work_after_its_lease() -> None:
    made = desk()
    made.submit(workflow([operator("cheap", nonce=1), operator("dear", **TRAIN)]))
    suspect = made.named("dear").node
    if made.named("cheap").node != suspect:
        made.succeed(made.named("cheap"))
        made.submit(chain(1, 5), "r2")
    other = next(n for n in ("n1", "n2") if n != suspect)
    made.apply(e.NodeDisconnected(suspect))
    made.wait(0.5, beating=[other])
    assert all(a.node == other for a in made.assigned.values() if a.type == "flow.noop")
    assert made.named("dear").node == suspect
    made.wait(5, beating=[other])
    assert made.named("dear").node == other


def test_a_beat_ends_the_suspicion() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    made.apply(e.NodeDisconnected(first.node))
    made.beat(first.node)
    made.wait(1, beating=["n1", "n2"])
    assert made.only() is first


def test_an_operator_that_takes_three_nodes_with_it_is_poison() -> None:
    made = desk("n1", "n2", "n3", "n4")
    made.submit(chain(1))
    for _ in range(3):
        made.lose(made.only().node)
    assert made.end().reason == "poison"
    assert not made.assigned


def test_an_operator_that_kills_its_node_and_its_inputs_with_it_is_poison() -> None:
    """The killed node held the input, which is computed again: the count of lost nodes must outlive that."""
    made = desk("n1", "n2", "n3", "n4", "n5")
    made.submit(chain(2))
    made.succeed(made.only(), "x")
    for _ in range(3):
        killer = made.named("o1")
        made.forget(content("x"))
        made.lose(killer.node)
        if not made.assigned:
            break
        made.succeed(made.named("o0"), "x")
    assert made.end().reason == "poison"


def test_an_agent_that_crashes_and_starts_again_counts_as_a_lost_node() -> None:
    made = desk("n1")
    made.submit(chain(1))
    for start in (2, 3, 4):
        made.join_as(node_record("n1", started_at_us=start))
    assert made.end().reason == "poison"


def test_a_node_that_leaves_in_good_order_is_not_held_against_the_operator() -> None:
    made = desk("n1")
    made.submit(chain(1))
    for start in (2, 3, 4, 5):
        made.join_as(node_record("n1", started_at_us=start - 1, state="left"))
        made.join_as(node_record("n1", started_at_us=start))
    made.succeed(made.only())
    assert made.end().reason == "succeeded"


def test_the_last_beat_of_a_node_that_has_left_does_not_bring_it_back() -> None:
    made = desk(keeps=False)
    made.submit(chain(1))
    made.succeed(made.only(), "x")
    holder = made.vertex("o0").node
    made.join_as(node_record(holder, state="left"))
    made.beat(holder, [], state="left")
    assert made.state.holders(content("x").cid) == []


def test_the_record_of_an_earlier_life_does_not_displace_a_node() -> None:
    made = Desk()
    made.join_as(node_record("n1", started_at_us=7))
    made.submit(chain(1))
    made.join_as(node_record("n1", started_at_us=3, state="left"))
    made.join_as(node_record("n1", started_at_us=3))
    assert made.state.nodes["n1"].record.started_at_us == 7
    assert made.only().items[0].attempt == 1


def test_a_draining_node_keeps_what_it_has_and_gets_nothing_new() -> None:
    made = desk("n1")
    made.submit(chain(2))
    made.beat("n1", state="draining")
    made.succeed(made.only())
    assert not made.assigned
    made.join("n2")
    assert made.only().node == "n2"


def test_an_assignment_that_its_node_has_forgotten_runs_again_after_a_lease() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    for _ in range(30):
        made.now_us += SECOND // 2
        made.beat(first.node, [])
        made.beat(next(n for n in ("n1", "n2") if n != first.node))
    assert made.only().node != first.node


def test_a_node_is_told_to_drop_an_assignment_that_is_not_known() -> None:
    made = desk("n1")
    commands = made.beat("n1", ["64-77", "64-78"])
    assert [(m.assignment, m.closed) for m in made.told(commands, "n1") if isinstance(m, Commit)] == [
        ("64-77", True),
        ("64-78", True),
    ]


def test_nothing_is_lost_or_begun_while_the_leader_is_cut_off() -> None:
    made = desk()
    made.submit(chain(2))
    made.apply(e.NodeDisconnected(made.only().node), e.CutOff())
    made.wait(20)
    first = made.only()
    assert first.items[0].attempt == 1
    made.succeed(first)
    assert not made.assigned
    made.apply(e.Restored())
    made.wait(0.2)
    assert made.is_assigned("o1")


def test_suspicion_starts_anew_when_the_leader_is_back() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    made.apply(e.NodeDisconnected(first.node), e.CutOff())
    made.wait(3)
    made.apply(e.Restored())
    made.now_us += SECOND // 10
    made.apply(e.Tick())
    assert made.only() is first


def test_the_limit_on_lost_nodes_is_a_setting() -> None:
    made = Desk(Settings(nodes_lost_limit=1))
    made.join("n1", "n2")
    made.submit(chain(1))
    made.lose(made.only().node)
    assert made.end().reason == "poison"


def test_a_node_that_says_again_what_it_is_keeps_its_place() -> None:
    """Whatever object it comes in: a replay, and a leader that was told over the wire, would else choose otherwise."""
    made = desk("n1", "n2")
    made.join("n1")
    made.beat("n1")
    ((klass,), order) = made.state.fleet.classes.values(), ["n1", "n2"]
    assert [list(idle) for idle in klass.idle.values()] == [order] * len(klass.idle)


def test_what_waits_on_a_node_is_told_of_it() -> None:
    made = desk("n1")
    made.apply(e.BeatReceived(Beat("n1", made.now_us, made.state.epoch, running=2, queued=3)))
    assert (made.state.nodes["n1"].running, made.state.nodes["n1"].queued) == (2, 3)
    told = _node(made.state.nodes["n1"], {}, made.now_us)
    assert (told["running"], told["queued"]) == (2, 3)


def test_what_a_dead_agent_held_runs_elsewhere_at_once_however_dear() -> None:
    made = desk()
    made.submit(workflow([operator("dear", **TRAIN)]))
    first = made.named("dear")
    life = made.state.nodes[first.node].record.started_at_us
    made.apply(e.BeatReceived(Beat(first.node, made.now_us, 0, state="died", life=life)))
    again = made.named("dear")
    assert again.node != first.node
    assert again.items[0].attempt == 2
    assert made.state.works[again.items[0].key].nodes_lost == 1


def test_the_death_of_an_earlier_life_says_nothing_of_this_one() -> None:
    made = desk("n1")
    life = made.state.nodes["n1"].record.started_at_us
    made.join("n1", started_at_us=life + 5)
    made.submit(chain(1))
    first = made.only()
    made.apply(e.BeatReceived(Beat("n1", made.now_us, 0, state="died", life=life)))
    assert made.only() is first
    assert made.state.nodes["n1"].is_usable


def test_an_operator_remembers_how_its_attempts_ended() -> None:
    made = desk("n1", "n2", "n3", "n4")
    run = made.submit(chain(1))
    vertex = run.vertices[0]
    first = made.only()
    made.fail(first, "crashed")
    made.wait(5, beating=["n1", "n2", "n3", "n4"])
    second = made.only()
    life = made.state.nodes[second.node].record.started_at_us
    made.apply(e.BeatReceived(Beat(second.node, made.now_us, 0, state="died", life=life)))
    third = made.only()
    made.fail(third, "preempted")
    fourth = made.only()
    assert fourth.node not in (second.node, third.node)
    made.lose(fourth.node)
    told = [(end.attempt, end.node, end.reason, end.actor) for end in vertex.story]
    assert told == [
        (1, first.node, "crashed", first.node),
        (2, second.node, "node-lost", second.node),
        (3, third.node, "preempted", third.node),
        (4, fourth.node, "lease-expired", "scheduler"),
    ]
    made.join("n9")
    made.succeed(made.only())
    assert vertex.actor == vertex.node
    assert vertex.ended_at_us
    assert len(vertex.story) == 4


def test_what_a_node_gives_back_runs_elsewhere_at_once_and_is_held_against_nobody() -> None:
    made = desk()
    made.submit(chain(1))
    first = made.only()
    made.fail(first, "preempted")
    again = made.only()
    assert again.node != first.node
    assert made.state.works[again.items[0].key].failures == 0


def test_an_assignment_that_heartbeats_leave_out_is_given_anew_within_seconds_but_not_for_a_gap_in_them() -> None:
    made = desk("n1")
    made.submit(chain(1))
    first = made.only()
    made.now_us += 4 * SECOND
    made.beat("n1", held=())  # after a gap: what was on its way may not have arrived yet
    assert made.only() is first
    for _ in range(6):
        made.now_us += SECOND
        made.beat("n1", held=())
    assert made.only().items[0].attempt == 2


def test_a_quarantine_outlives_its_leader_and_can_be_lifted_after_that() -> None:
    made = desk("n1", "n2", "n3", "n4")
    run = made.submit(chain(1))
    for _ in range(3):
        made.lose(made.only().node)
    vertex = run.vertices[0]
    assert (vertex.reason, vertex.actor, made.end().actor) == ("poison", "scheduler", "scheduler")
    assert [end.reason for end in vertex.story] == ["lease-expired"] * 3
    assert f"flowmesh unquarantine {vertex.key.hex()[:16]}" in vertex.error
    records = [each.health for each in made.of(made.commands, c.RecordHealth)]
    after = desk("n5", now_us=made.now_us + SECOND)
    after.apply(e.Recovered([], [], [], [], records))
    after.submit(chain(1), "r2")
    assert after.end("r2").reason == "poison"
    commands = after.apply(e.QuarantineLifted(vertex.key, "somebody"))
    after.submit(chain(1), "r3")
    assert after.only().items[0].key == vertex.key
    later = desk("n6", now_us=after.now_us + SECOND)
    later.apply(e.Recovered([], [], [], [], [each.health for each in later.of(commands, c.RecordHealth)]))
    later.submit(chain(1), "r4")
    assert later.only().items[0].key == vertex.key
