"""Sick nodes: found among their peers, withheld, tried, trusted again. Operators that take nodes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import SECOND, chain, fan, gpu, operator, workflow

from flowmesh_mesh.manifest import Metered
from flowmesh_mesh.messages import Assignment
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.standing import Quarantine, Samples

QUIET = Settings(speculation_share=0.0, cordon_pause_s=60.0)
FOUR = ("n1", "n2", "n3", "n4")


def desk(*nodes: str, settings: Settings = QUIET, **fields: Any) -> Desk:
    made = Desk(settings=settings)
    made.join(*(nodes or FOUR), **fields)
    return made


def alive(made: Desk) -> list[str]:
    return [n.name for n in made.state.nodes.values() if n.state != "gone"]


def pass_time(made: Desk, seconds: float = 1.0) -> list[c.Command]:
    return made.wait(seconds, beating=alive(made))


class Source:
    """Gives every node one operator after the other; ``slow`` nodes take that many times as long, ``broken`` ones fail."""

    def __init__(self, made: Desk, *, usual_s: float = 1.0, reason: str = "crashed", type: str = "python.call") -> None:
        self.made, self.usual_s, self.reason, self.type = made, usual_s, reason, type
        self.slow: dict[str, float] = {}
        self.broken: Sequence[str] = ()
        self.rounds = 0

    def round(self, per_node: int = 2) -> None:
        """Submit so much that every node gets something; let all of it be carried out, then let a second pass."""
        made, self.rounds = self.made, self.rounds + 1
        count = per_node * len(made.state.nodes)
        names = [f"r{self.rounds}o{i}" for i in range(count)]
        made.submit(workflow([operator(n, type=self.type, params={"function": n}) for n in names], {}), f"round{self.rounds}")
        while made.assigned:
            self.carry_out(next(iter(made.assigned.values())))
        pass_time(made)
        while made.assigned:
            self.carry_out(next(iter(made.assigned.values())))

    def carry_out(self, assignment: Assignment) -> None:
        if assignment.node in self.broken:
            self.made.fail(assignment, self.reason)
        else:
            seconds = self.usual_s * self.slow.get(assignment.node, 1.0)
            self.made.succeed(assignment, metered=Metered(exec_us=int(seconds * SECOND)))


def states(made: Desk) -> dict[str, str]:
    return {n.name: n.health.state for n in made.state.nodes.values() if n.health.state != "ok"}


def sicken(made: Desk, name: str = "n2", times: float = 4.0, rounds: int = 8) -> Source:
    """Let a node become slow and be found."""
    source = Source(made)
    source.slow = {name: times}
    for _ in range(rounds):
        source.round()
    return source


# --- speed


def test_a_node_far_slower_than_its_peers_is_cordoned_with_a_reason() -> None:
    made = desk()
    sicken(made)
    assert states(made) == {"n2": "cordoned"}
    found = made.state.nodes["n2"].health
    assert found.by == "scheduler"
    assert found.reason == "4.0x slower than its peers in python.call", found.reason
    assert found.since_us > 0


def test_a_cordoned_node_gets_no_work_and_what_runs_on_it_goes_on() -> None:
    made = desk()
    made.submit(
        workflow([operator(f"long{i}", type="python.call", params={"function": f"long{i}"}) for i in range(4)], {}), "long"
    )
    held = next(a for a in made.assigned.values() if a.node == "n2")
    made.apply(e.CordonRequested("n2", True, "alice"))
    for assignment in [a for a in made.assigned.values() if a is not held]:
        made.succeed(assignment)
    made.submit(fan(300), "later")
    assert {a.node for a in made.assigned.values() if a is not held} == {"n1", "n3", "n4"}
    assert held.id in made.state.assignments
    made.succeed(held)
    assert made.end("long").reason == "succeeded"


@pytest.mark.parametrize(("times", "is_sick"), [(1.6, False), (2.6, True)])
def test_a_node_less_than_twice_as_slow_is_left_alone(times: float, is_sick: bool) -> None:
    made = desk()
    sicken(made, times=times)
    assert bool(states(made)) == is_sick


def test_few_samples_condemn_nobody() -> None:
    made = desk(settings=Settings(speculation_share=0.0, sick_samples=100))
    sicken(made)
    assert not states(made)


def test_nodes_that_differ_widely_among_themselves_make_no_one_sick() -> None:
    made = desk("n1", "n2", "n3", "n4", "n5")
    source = Source(made)
    source.slow = {"n1": 0.3, "n2": 0.7, "n3": 1.5, "n4": 3.0, "n5": 4.0}
    for _ in range(8):
        source.round()
    assert not states(made), "4x is within the spread of the others"


def test_a_node_of_another_class_of_device_is_no_peer() -> None:
    made = desk("n1", "n2", "n3")
    made.join("n4", devices=(gpu(),))
    source = sicken(made, "n4")
    assert source.rounds == 8
    assert not states(made)


def test_a_lone_peer_is_not_enough_to_call_a_node_slow() -> None:
    made = desk("n1", "n2")
    sicken(made)
    assert not states(made)


def test_work_that_has_become_slow_everywhere_makes_no_node_sick() -> None:
    made = desk()
    source = sicken(made, times=1.0)
    source.usual_s = 10.0
    for _ in range(6):
        source.round()
    assert not states(made)


# --- failures


@pytest.mark.parametrize("reason", ["crashed", "timeout", "internal", "for no reason"])
def test_a_node_that_fails_what_others_do_well_is_cordoned(reason: str) -> None:
    made = desk()
    source = Source(made, reason=reason)
    source.broken = ["n3"]
    for _ in range(4):
        source.round()
    assert states(made) == {"n3": "cordoned"}
    assert "of its last" in made.state.nodes["n3"].health.reason
    assert "failed" in made.state.nodes["n3"].health.reason


@pytest.mark.parametrize("reason", ["user-error", "input-missing", "oom", "model-missing"])
def test_failures_that_are_not_the_nodes_fault_do_not_count(reason: str) -> None:
    made = desk()
    source = Source(made, reason=reason)
    source.broken = ["n3"]
    for _ in range(3):
        source.round()
    assert not states(made)


def test_work_that_fails_everywhere_makes_no_node_sick() -> None:
    made = desk()
    source = Source(made)
    source.broken = FOUR
    for _ in range(4):
        source.round()
    assert not states(made)


def test_a_result_that_is_not_that_of_its_outputs_counts_as_a_failure() -> None:
    made = desk()
    for number in range(20):
        made.submit(workflow([operator(f"o{i}", nonce=100 * number + i) for i in range(256)], {}), f"r{number}")
        for assignment in list(made.assigned.values()):
            outcomes = [made.outcome(item, assignment.type) for item in assignment.items]
            if assignment.node == "n1":
                outcomes = [replace(outcome, result=outcomes[0].result[:-1] + b"!") for outcome in outcomes]
            made.report(assignment, outcomes)
        pass_time(made)
        made.work_off()
    assert states(made) == {"n1": "cordoned"}


# --- who must stay


def test_the_last_node_that_can_run_a_type_is_never_cordoned() -> None:
    impatient = replace(QUIET, hold_back_max_s=-1.0)  # else a node that is known to be slow gets nothing
    made = desk("n1", "n3", "n4", types=("flow.noop", "python.call"), settings=impatient)
    made.join("n2", types=("flow.noop", "python.call", "data.sql"))
    source = sicken(made)
    assert not states(made)
    made.join("n5", types=("data.sql", "python.call", "flow.noop"))
    source.round()
    assert states(made) == {"n2": "cordoned"}


def test_a_node_with_more_memory_than_all_others_is_never_cordoned() -> None:
    made = desk("n1", "n3", "n4")
    made.join("n2", memory_bytes=1 << 36)
    sicken(made)
    assert not states(made)


def test_no_more_than_a_share_of_the_fleet_is_withheld() -> None:
    names = [f"n{i}" for i in range(9)]
    made = desk(*names, settings=Settings(speculation_share=0.0, cordon_share=0.25, cordon_pause_s=1e6, cordon_pause_max_s=1e6))
    source = Source(made)
    source.slow = {"n1": 5.0, "n2": 6.0, "n3": 7.0}
    for _ in range(8):
        source.round()
    assert states(made) == {"n2": "cordoned", "n3": "cordoned"}, "the worst two of nine"


def test_a_cordon_of_the_schedulers_own_ends_when_nobody_else_is_left() -> None:
    made = desk("n1", "n2", "n3")
    sicken(made)
    assert states(made) == {"n2": "cordoned"}
    made.apply(e.NodeDisconnected("n1"), e.NodeDisconnected("n3"))
    made.wait(8, beating=["n2"])
    assert not states(made)
    assert made.state.nodes["n2"].health.reason.startswith("no other node can do its work")
    made.submit(chain(1), "after")
    made.work_off()
    assert made.end("after").reason == "succeeded"


# --- canaries


def cordoned(**fields: Any) -> tuple[Desk, Source]:
    made = desk(settings=Settings(speculation_share=0.0, cordon_pause_s=60.0, **fields))
    source = sicken(made)
    assert states(made) == {"n2": "cordoned"}
    return made, source


def test_after_a_pause_a_sick_node_gets_one_small_operator_at_a_time() -> None:
    made, _ = cordoned()
    pass_time(made, 40)
    assert states(made) == {"n2": "cordoned"}
    pass_time(made, 25)
    assert states(made) == {"n2": "canary"}
    made.submit(workflow([operator(f"o{i}", type="python.call", params={"function": f"o{i}"}) for i in range(40)], {}), "work")
    here = [a for a in made.assigned.values() if a.node == "n2"]
    assert [len(a.items) for a in here] == [1]


def test_enough_good_canaries_in_a_row_and_the_node_is_trusted_again() -> None:
    made, source = cordoned()
    pass_time(made, 70)
    source.slow = {}
    for _ in range(3):
        assert states(made) == {"n2": "canary"}
        source.round()
    pass_time(made)
    assert not states(made)
    assert made.state.nodes["n2"].health.reason == "3 canaries went well"
    source.round(per_node=6)
    assert not states(made)


def test_a_bad_canary_doubles_the_pause() -> None:
    made, source = cordoned()
    until = [made.state.nodes["n2"].health.until_us - made.state.nodes["n2"].health.since_us]
    for _ in range(3):
        pass_time(made, until[-1] / SECOND + 2)
        assert states(made) == {"n2": "canary"}
        source.round()
        pass_time(made)
        found = made.state.nodes["n2"].health
        assert found.state == "cordoned"
        assert found.reason.endswith("before: 4.0x slower than its peers in python.call")
        until.append(found.until_us - found.since_us)
    assert until == [60 * SECOND, 120 * SECOND, 240 * SECOND, 480 * SECOND]


def test_the_pause_has_a_bound() -> None:
    made, _ = cordoned(cordon_pause_max_s=100.0)
    node = made.state.nodes["n2"]
    for _ in range(40):
        pass_time(made, 105)
        assert node.health.state == "canary"
        made.state.ward.verdicts["n2"] = "wrong"
        pass_time(made, 2)
        assert node.health.until_us - node.health.since_us == 100 * SECOND


def test_a_canary_is_neither_training_nor_long_nor_has_it_effects() -> None:
    made, _ = cordoned(canary_max_s=0.5)
    pass_time(made, 70)
    flow = [
        operator("effect", nonce=1, determinism="effect"),
        operator("train", type="train.sft", params={"seed": 1}),
        operator("long", type="python.call", params={"function": "long"}),
    ]
    made.submit(workflow(flow, {}), "work")
    assert "n2" not in {a.node for a in made.assigned.values()}


def test_a_canary_that_is_late_is_a_bad_one_although_it_has_not_ended() -> None:
    made = desk(settings=Settings(speculation_share=0.5))
    source = sicken(made)
    pass_time(made, 70)
    assert states(made) == {"n2": "canary"}
    made.submit(workflow([operator("o", type="python.call", params={"function": "o"})], {}), "work")
    assert made.only().node == "n2"
    pass_time(made, 15)
    assert states(made) == {"n2": "cordoned"}
    assert "late" in made.state.nodes["n2"].health.reason
    for assignment in list(made.assigned.values()):
        source.carry_out(assignment)
    assert made.end("work").reason == "succeeded"


def test_a_canary_that_is_lost_with_its_node_is_no_verdict() -> None:
    made, _ = cordoned()
    pass_time(made, 70)
    made.submit(workflow([operator("o", type="python.call", params={"function": "o"})], {}), "work")
    assert made.only().node == "n2"
    made.lose("n2")
    made.work_off()
    assert made.end("work").reason == "succeeded"
    made.join("n2", started_at_us=2)
    pass_time(made, 2)
    assert states(made) == {"n2": "canary"}


# --- what people order


def test_an_ordered_cordon_stays_until_somebody_ends_it() -> None:
    made = desk("n1", "n2")
    made.apply(e.CordonRequested("n1", True, "alice", "the fan is loud"))
    pass_time(made, 4000)
    found = made.state.nodes["n1"].health
    assert (found.state, found.by, found.reason) == ("cordoned", "alice", "the fan is loud")
    made.apply(e.CordonRequested("n1", False, "bob"))
    assert not states(made)
    made.submit(fan(200))
    assert {a.node for a in made.assigned.values()} == {"n1", "n2"}


def test_all_nodes_may_be_cordoned_by_order_and_work_waits() -> None:
    made = desk("n1")
    made.apply(e.CordonRequested("n1", True, "alice"))
    made.submit(chain(1))
    pass_time(made, 100)
    assert not made.assigned
    made.apply(e.CordonRequested("n1", False, "alice"))
    made.work_off()
    assert made.end().reason == "succeeded"


def test_work_that_crashed_on_the_last_trusted_node_is_tried_there_again() -> None:
    made = desk("n1", "n2")
    made.submit(chain(1))
    first = made.only().node
    other = "n2" if first == "n1" else "n1"
    made.apply(e.CordonRequested(other, True, "alice"))
    made.fail(made.only(), "crashed")
    pass_time(made)
    assert made.only().node == first


def test_an_ordered_cordon_survives_a_restart_of_the_node() -> None:
    made = desk("n1", "n2")
    made.apply(e.CordonRequested("n1", True, "alice"))
    made.join("n1", started_at_us=2)
    assert states(made) == {"n1": "cordoned"}


def test_a_sick_node_that_starts_again_is_tried_at_once() -> None:
    made, _ = cordoned()
    made.join("n2", started_at_us=2)
    pass_time(made, 2)
    assert states(made) == {"n2": "canary"}


def test_an_order_about_a_node_that_nobody_knows_is_ignored() -> None:
    made = desk("n1")
    assert not made.apply(e.CordonRequested("n9", True, "alice"))


# --- leaders


def test_every_change_of_trust_is_written_for_the_next_leader() -> None:
    made = desk()
    sicken(made)
    pass_time(made, 70)
    told = [(r.health.node, r.health.state, r.health.by) for r in made.of(made.commands, c.RecordHealth)]
    assert told == [("n2", "cordoned", "scheduler"), ("n2", "canary", "scheduler")]


@pytest.mark.parametrize("is_early", [True, False], ids=["node known", "node joins later"])
def test_a_new_leader_goes_on_with_what_was_written(is_early: bool) -> None:
    made, _ = cordoned()
    made.apply(e.CordonRequested("n4", True, "alice", "mine"))
    records = {r.health.node: r.health for r in made.of(made.commands, c.RecordHealth)}
    after = Desk(settings=made.settings, epoch=200, now_us=made.now_us)
    if is_early:
        after.join(*FOUR)
    after.apply(e.Recovered([], [], [], [], list(records.values())))
    if not is_early:
        after.join(*FOUR)
    assert states(after) == {"n2": "cordoned", "n4": "cordoned"}
    assert after.state.nodes["n2"].health.until_us == made.state.nodes["n2"].health.until_us
    pass_time(after, 70)
    assert states(after) == {"n2": "canary", "n4": "cordoned"}


# --- new nodes


def test_a_new_node_is_trusted_unless_the_settings_say_otherwise() -> None:
    made = desk("n1", "n2")
    assert not states(made)
    made = desk("n1", "n2", settings=Settings(trusts_new_nodes=False, speculation_share=0.0))
    pass_time(made, 2)
    assert list(states(made).values()) == ["canary"], "the first that joins has nobody to prove itself beside"
    for number in range(3):
        made.submit(fan(4, 10 * number), f"r{number}")
        made.work_off()
        pass_time(made, 2)
    assert not states(made)


# --- poison


def poison(made: Desk, run: str = "r1", tenant: str = "ta") -> bytes:
    """Let an operator take three nodes with it."""
    made.submit(chain(1, 7), run, tenant)
    key = made.only().items[0].key
    for _ in range(3):
        made.lose(made.only().node)
    return key


def test_an_operator_that_took_nodes_with_it_is_not_run_for_anybody_for_a_while() -> None:
    made = desk("n1", "n2", "n3", "n4")
    key = poison(made)
    assert made.end().reason == "poison"
    made.submit(chain(1, 7), "r2", "tb")
    assert made.end("r2", "tb").reason == "poison"
    assert not made.assigned
    detail = made.end("r2", "tb").detail
    assert key.hex() in detail
    assert all(name in detail for name in ("n1", "n2", "n3")) or "n4" in detail
    assert f"flowmesh unquarantine {key.hex()[:16]}" in detail
    assert "memory" in detail


def test_what_depends_on_a_quarantined_operator_is_skipped() -> None:
    made = desk("n1", "n2", "n3", "n4")
    poison(made)
    made.submit(chain(3, 7), "r2")
    assert made.states("r2") == {"o0": "failed", "o1": "skipped", "o2": "skipped"}


def test_other_operators_run_as_ever() -> None:
    made = desk("n1", "n2", "n3", "n4")
    poison(made)
    made.submit(chain(1, 8), "r2")
    made.work_off()
    assert made.end("r2").reason == "succeeded"


def test_a_quarantine_ends_by_itself() -> None:
    made = desk("n1", "n2", "n3", "n4", settings=Settings(quarantine_s=30.0))
    poison(made)
    pass_time(made, 31)
    assert not made.state.ward.quarantine
    made.submit(chain(1, 7), "r2")
    made.work_off()
    assert made.end("r2").reason == "succeeded"


def test_a_quarantine_ends_when_somebody_lifts_it() -> None:
    made = desk("n1", "n2", "n3", "n4")
    key = poison(made)
    made.apply(e.QuarantineLifted(key, "alice"))
    made.submit(chain(1, 7), "r2")
    made.work_off()
    assert made.end("r2").reason == "succeeded"


def test_without_a_quarantine_the_next_run_tries_again() -> None:
    made = desk("n1", "n2", "n3", "n4", settings=Settings(quarantine_s=0.0))
    poison(made)
    assert "3 nodes were lost" in made.end().detail
    made.submit(chain(1, 7), "r2")
    assert made.assigned


def test_a_result_that_exists_is_served_whatever_is_quarantined() -> None:
    made = desk("n1", "n2", "n3", "n4")
    made.submit(chain(1, 7), "r0")
    key = made.only().items[0].key
    made.work_off()
    work = made.vertex("o0", "r0")
    assert work.key == key
    made.state.ward.quarantine[key] = Quarantine(key, made.now_us + 10**9, ("n1",), "o0")
    made.submit(chain(1, 7), "r2", "tb")
    assert made.end("r2", "tb").reason == "succeeded"


# --- bounds


def test_what_is_remembered_is_bounded() -> None:
    made = desk("n1", "n2")
    for number in range(1100):
        for name in ("n1", "n2"):
            group = (f"python.call{number}", "", "cpu")
            made.state.ward.speeds.setdefault(group, {})[name] = Samples()
    pass_time(made, 2)
    assert len(made.state.ward.speeds) <= 1024


def test_what_is_left_of_a_queue_from_which_a_canary_took_is_not_forgotten() -> None:
    made = Desk(Settings(trusts_new_nodes=False, canary_max_s=1e6))
    pinned: dict[str, Any] = {"models": {"hf:a": "sha256:a", "hf:b": "sha256:b"}}
    made.join("n1")
    made.apply(e.CordonRequested("n1", False, "alice"), e.CutOff())

    def ask(name: str, model: str) -> Any:
        return operator(name, type="llm.generate", params={"prompt": name, "dtype": "float32"}, models={"model": model})

    for model in pinned["models"]:
        made.submit(workflow([ask(f"{model}{i}", model) for i in range(3)], {}), model, **pinned)
    made.apply(e.Restored())
    first = made.only()
    made.join("n2")
    made.wait(2.0, beating=["n1", "n2"])
    assert {a.node: len(a.items) for a in made.assigned.values() if a is not first}["n2"] == 1, "a canary"
    made.succeed(first)
    assert sorted(len(a.items) for a in made.assigned.values()) == [1, 2]
