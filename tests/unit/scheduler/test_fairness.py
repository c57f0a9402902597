"""Virtual time between tenants: tags, the clock, who pays for shared work, quotas."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import operator, workflow

from flowmesh_mesh.manifest import Manifest, Metered
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.fairness import Shares, refusal
from flowmesh_scheduler.core.settings import Settings, TenantSettings
from flowmesh_scheduler.core.state import Work

SECOND = 1_000_000


def shares(burst_s: float = 0.0, **weights: float) -> Shares:
    made = Shares({tenant: TenantSettings(weight=weight) for tenant, weight in weights.items()})
    made.burst_s = burst_s
    return made


def serve(made: Shares, tenant: str, seconds: float, began_s: float) -> None:
    """Let a tenant have a node for some seconds."""
    made.begin(tenant, seconds)
    made.advance(int((began_s + seconds) * SECOND), 1)
    made.end(tenant, seconds, seconds)


# --- tags and clock


def test_who_asks_for_more_moves_only_his_own_turn() -> None:
    made = shares()
    tags = [made.enter("many", 1.0) for _ in range(5)]
    assert tags == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert made.enter("few", 1.0) == 0.0


def test_a_tenant_of_three_times_the_weight_has_three_turns_to_one() -> None:
    made = shares(heavy=3.0, light=1.0)
    for _ in range(12):
        made.enter("heavy", 1.0)
        made.enter("light", 1.0)
    served = {"heavy": 0, "light": 0}
    for second in range(12):
        tenant = min(served, key=lambda name: made.due(name, SECOND))
        served[tenant] += 1
        serve(made, tenant, 1.0, float(second))
    assert served == {"heavy": 9, "light": 3}


def test_tags_of_a_tenant_never_fall_even_after_a_refund() -> None:
    made = shares()
    first = made.enter("a", 5.0)
    second = made.enter("a", 5.0)
    made.correct("a", -9.0)
    assert first <= second <= made.enter("a", 1.0)


def test_time_that_nobody_asked_for_is_not_saved() -> None:
    made = shares(burst_s=10.0)
    made.enter("a", 1.0)
    serve(made, "a", 1.0, 0.0)
    made.advance(1000 * SECOND, 1)
    made.enter("b", 1.0)
    assert made.tag("b") == pytest.approx(made.virtual + 1.0 - 10.0)
    assert made.account("b").finish == pytest.approx(made.virtual + 1.0)


def test_what_is_left_to_others_in_a_queue_is_kept_up_to_the_limit() -> None:
    made = shares(burst_s=10.0)
    made.account("late")
    for _ in range(100):
        made.enter("flood", 1.0)
    for second in range(50):
        serve(made, "flood", 1.0, float(second))
    made.enter("late", 1.0)
    assert made.account("late").finish == pytest.approx(made.virtual - 10.0 + 1.0)


def test_the_clock_does_not_run_ahead_of_a_mesh_that_is_slower_than_it_seems() -> None:
    made = shares()
    for _ in range(10):
        made.enter("a", 1.0)
    made.begin("a", 1.0)
    made.advance(1000 * SECOND, 8)
    assert made.virtual == pytest.approx(1.0)


def test_the_clock_follows_a_mesh_that_is_faster_than_it_seems() -> None:
    made = shares()
    for _ in range(10):
        made.enter("a", 1.0)
        made.begin("a", 1.0)
        made.end("a", 1.0, 1.0)
    made.advance(1, 1)
    assert made.virtual == pytest.approx(10.0)


def test_the_clock_runs_faster_once_a_tenant_wants_nothing_more() -> None:
    made = shares()
    made.enter("a", 1.0)
    for _ in range(10):
        made.enter("b", 1.0)
    for tenant in ("a", "b", "b", "b"):
        made.begin(tenant, 1.0)
    made.advance(2 * SECOND, 1)
    assert made.virtual == pytest.approx(1.0), "a and b have had half a node each"
    made.advance(3 * SECOND, 1)
    assert made.virtual == pytest.approx(2.0), "b has had all of it"


def test_what_it_took_counts_and_not_what_was_thought() -> None:
    made = shares()
    made.enter("wrong", 10.0)
    made.begin("wrong", 10.0)
    made.end("wrong", 10.0, 2.0)
    assert made.account("wrong").finish == pytest.approx(2.0)
    assert made.used_s == {"wrong": 2.0}


def test_a_tenant_behind_its_share_is_told_by_how_much() -> None:
    made = shares()
    for _ in range(10):
        made.enter("served", 1.0)
        made.enter("late", 1.0)
    for second in range(4):
        serve(made, "served", 1.0, float(second))
    assert made.lag_s("late") == pytest.approx(2.0)
    assert made.lag_s("served") == pytest.approx(-2.0)
    assert made.lag_s("nobody") == 0.0


def test_the_clock_costs_nothing_for_tenants_that_stay() -> None:
    made = shares()
    for number in range(1000):
        made.enter(f"t{number}", 100.0)
    made.begin("t0", 100.0)
    before = list(made._leaving)
    for step in range(100):
        made.advance(step, 1)
    assert made._leaving == before


# --- shared work


def one(seed: int = 1, **fields: object) -> Manifest:
    return workflow([operator("o", type="train.sft", params={"seed": seed}, **fields)])  # type: ignore[arg-type]


def work_of(desk: Desk, run: str, tenant: str) -> Work:
    work = desk.vertex("o", run, tenant).work
    assert work is not None
    return work


def test_work_that_two_wait_for_is_paid_by_both() -> None:
    desk = Desk()
    desk.submit(one(), "r1", "ta")
    alone = desk.state.shares.account("ta").finish
    desk.submit(one(), "r1", "tb")
    accounts = desk.state.shares.accounts
    assert accounts["ta"].finish == pytest.approx(alone / 2, rel=1e-3)
    assert accounts["tb"].finish == pytest.approx(alone / 2, rel=1e-3)
    assert accounts["ta"].waiting_us == accounts["tb"].waiting_us == work_of(desk, "r1", "ta").charged_us // 2


def test_who_leaves_work_that_waits_leaves_its_cost_to_the_others() -> None:
    desk = Desk()
    desk.submit(one(), "r1", "ta")
    desk.submit(one(), "r1", "tb")
    work = work_of(desk, "r1", "tb")
    desk.apply(e.CancelRequested("ta", "r1", "alice"))
    accounts = desk.state.shares.accounts
    assert accounts["ta"].waiting_us == 0
    assert accounts["ta"].finish == pytest.approx(0.0)
    assert accounts["tb"].waiting_us == work.charged_us
    assert work.tenant == "tb"
    desk.join("n1")
    assert desk.is_assigned("o"), "it has found its place under the other tenant"


def test_work_of_a_flood_that_a_light_tenant_wants_too_is_done_when_it_is_his_turn() -> None:
    desk = Desk(Settings(fair_burst_s=0.0))
    for seed in range(10):
        desk.submit(one(seed), f"r{seed}", "tb")
    desk.submit(one(9), "r", "ta")
    assert work_of(desk, "r", "ta").tenant == "ta"
    desk.join("n1")
    assert [item.key for item in desk.only().items] == [desk.vertex("o", "r", "ta").key]


def test_what_everybody_has_left_costs_nobody_more_than_it_took() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(one(), "r1", "ta")
    desk.now_us += 250_000
    desk.apply(e.CancelRequested("ta", "r1", "alice"))
    account = desk.state.shares.account("ta")
    assert (account.waiting_us, account.running_us) == (0, 0)
    assert account.used_us == 250_000


def test_a_node_cannot_bill_more_than_the_time_for_which_it_had_the_work() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(one(), "r1", "ta")
    charged_us = work_of(desk, "r1", "ta").charged_us
    desk.now_us += charged_us * 2
    desk.succeed(desk.only(), metered=Metered(exec_us=10**15))
    assert desk.state.shares.account("ta").used_us == charged_us * 2


def test_an_attempt_that_failed_is_charged_for_the_time_it_took() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(one(), "r1", "ta")
    desk.now_us += 2 * SECOND
    desk.fail(desk.only(), "user-error")
    assert desk.state.shares.account("ta").used_us == 2 * SECOND


def test_work_of_a_node_that_was_lost_costs_its_tenant_nothing() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(one(), "r1", "ta")
    desk.lose("n1")
    account = desk.state.shares.account("ta")
    assert account.used_us == 0
    assert account.running_us == 0
    assert account.waiting_us == work_of(desk, "r1", "ta").charged_us


# --- priorities


def test_a_priority_orders_only_the_work_of_its_own_tenant() -> None:
    desk = Desk(Settings(fair_burst_s=0.0))
    desk.submit(one(1), "r1", "ta")
    desk.submit(one(2), "r2", "ta")
    desk.submit(one(3), "r3", "tb")
    desk.submit(one(4, priority=9), "r4", "tb")
    desk.submit(one(5, priority=9), "r5", "tb")
    desk.join("n1")
    order = []
    while desk.assigned:
        assignment = desk.only()
        key = assignment.items[0].key
        order += [run.id for run in desk.state.runs.values() if run.vertices[0].key == key]
        desk.now_us += SECOND
        desk.succeed(assignment, metered=Metered(exec_us=SECOND))
    assert [run for run in order if run in ("r3", "r4", "r5")] == ["r4", "r5", "r3"]
    assert {order[0], order[1]} == {"r1", "r4"}, "one each, whatever the priorities"


# --- quotas


def limited(**limits: int) -> Desk:
    return Desk(Settings(tenants={"ta": TenantSettings(**limits)}))


def test_a_run_beyond_the_quota_of_runs_is_refused_until_one_has_ended() -> None:
    desk = limited(max_runs=1)
    assert refusal(desk.state, "ta", 1) == ""
    desk.submit(one(), "r1", "ta")
    assert refusal(desk.state, "ta", 1) == "the quota of 1 runs at a time is used up: 1 have not ended"
    assert refusal(desk.state, "tb", 1) == ""
    desk.join("n1")
    desk.work_off()
    assert refusal(desk.state, "ta", 1) == ""


def test_a_run_with_more_operators_than_the_quota_has_left_is_refused() -> None:
    desk = limited(max_operators=3)
    desk.submit(workflow([operator(f"o{n}", type="train.sft", params={"seed": n}) for n in range(2)]), "r1", "ta")
    assert refusal(desk.state, "ta", 1) == ""
    assert refusal(desk.state, "ta", 2) == ("the quota of 3 operators at a time does not hold 2 more: 2 have not ended")
    desk.apply(e.CancelRequested("ta", "r1", "alice"))
    assert refusal(desk.state, "ta", 3) == ""


def test_a_tenant_takes_no_more_slots_than_its_quota_and_others_go_on() -> None:
    desk = limited(max_slots=1)
    desk.join("n1", "n2", "n3")
    for seed in range(3):
        desk.submit(one(seed), f"r{seed}", "ta")
    assert len(desk.assigned) == 1
    desk.submit(one(7), "r1", "tb")
    assert len(desk.assigned) == 2
    desk.run(desk.named("o") if len(desk.assigned) == 1 else next(iter(desk.assigned.values())))
    assert len(desk.assigned) == 2, "the next one of the tenant follows"
    desk.work_off()
    assert desk.state.shares.account("ta").slots == 0
    assert desk.state.shares.slots == 0


def test_weights_and_limits_that_make_no_sense_are_refused() -> None:
    for text in ('{"weight": 0}', '{"weight": -1}', '{"max_runs": -1}', '{"waight": 2}'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(text, type=TenantSettings)
