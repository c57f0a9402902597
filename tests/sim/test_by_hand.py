"""Bills and times that can be worked out by hand."""

from __future__ import annotations

import pytest
from tests.sim.worlds import CLASS, alone, host, short_document

from flowmesh_scheduler.sim import truth
from flowmesh_scheduler.sim.isolated import Isolated, plan
from flowmesh_scheduler.sim.language_models import MODELS
from flowmesh_scheduler.sim.machine import Machine
from flowmesh_scheduler.sim.policies import POLICIES
from flowmesh_scheduler.sim.rental import Market, Terms
from flowmesh_scheduler.sim.simulation import Simulation

FILE_BYTES = 1000 * 180 * 4
ROWS_BYTES = FILE_BYTES * 32 // 1000
MODEL = MODELS["3b"]


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be left to chance: no noise, and every boot as long as the host says."""
    monkeypatch.setattr(truth, "noise", lambda *names: 1.0)
    monkeypatch.setattr("flowmesh_scheduler.sim.rental.lognormal", lambda sigma, *names: 1.0)


def _load_s() -> float:
    """The file over the link, then the table."""
    return 0.02 + FILE_BYTES / 100e6 + 0.2 + FILE_BYTES / 50e6 + 1000 * 20e-6


def _generate_s(steps: float) -> float:
    """The model over the link and from the disk; prompts; steps that are bound by reading weights and contexts."""
    fetch_s = MODEL.weights_bytes / 100e6 + 5.0 + MODEL.weights_bytes / 2e9
    prompt_tokens = ROWS_BYTES / 4
    prefill_s = 2 * 3.2e9 * prompt_tokens / (71e12 * 0.5)
    context_bytes = (prompt_tokens + 32 * steps) * MODEL.kv_bytes / 32
    rows = 0.75 * 32
    reading_s = (MODEL.weights_bytes + rows * 0.75 * context_bytes) / (936e9 * 0.65)
    computing_s = 2 * 3.2e9 * rows / (71e12 * 0.45)
    return fetch_s + 0.4 + prefill_s + steps * (max(reading_s, computing_s) + 0.004)


def _steps() -> float:
    return plan(short_document())[1].demand.steps


def test_a_workflow_on_its_own_machine_takes_and_costs_what_it_should() -> None:
    world = Isolated(alone(short_document(), host()), Terms(idle_release_s=120.0))
    figures = world.run()
    end_s = 100.0 + _load_s() + _generate_s(_steps())
    kept_s = 0.02 + world.market.machines[0].released_at_s * 0
    assert 75 <= _steps() <= 100
    assert figures.response_p50_s == pytest.approx(end_s + kept_s, abs=0.01)
    assert figures.paid_s == pytest.approx(end_s + kept_s + 120.0, abs=0.01)
    assert figures.cost_usd == pytest.approx(0.36 / 3600 * figures.paid_s)


def test_a_rented_machine_is_paid_from_renting_to_release() -> None:
    gpu, cpu = host("g"), host("c", "CPU", price=0.04, boot_s=20.0)
    world = Simulation(alone(short_document(), gpu, cpu), POLICIES["fifo"], 1, Terms(10.0, 200.0, 120.0, 5.0))
    figures = world.run()
    first, second = world.market.machines
    # Submitted at 50 s, seen ready at the review of 50 s or 55 s, patience of 10 s, machines for tables first.
    assert first.offer.name == "c"
    assert 60.0 <= first.rented_at_s <= 65.0
    assert first.released_at_s == pytest.approx(first.rented_at_s + 20.0 + _load_s() + 120.0, abs=0.1)
    assert second.offer.name == "g"
    assert second.released_at_s == pytest.approx(second.rented_at_s + 100.0 + _generate_s(_steps()) + 0.02 + 120.0, abs=0.2)
    dollars = (first.paid_s() * 0.04 + second.paid_s() * 0.36) / 3600
    assert figures.cost_usd == pytest.approx(dollars)
    assert figures.operators == 2


def test_the_next_workflow_takes_over_a_warm_machine_and_its_model() -> None:
    documents = [short_document(), short_document("other")]
    scenario = alone(documents[0], host())
    later = alone(documents[1], host(), at_s=400.0).arrivals[0]
    both = type(scenario)("two", 1, (*scenario.arrivals, type(later)(later.at_s, "ada", "r1", later.manifest)), 0.0, 0, (host(),))
    world = Isolated(both, Terms(idle_release_s=300.0))
    world.run()
    assert len(world.market.machines) == 1
    cold, warm = (world.times.ended_us[r] - world.times.submitted_us[r] for r in ("r0", "r1"))
    saved_s = 100.0 + MODEL.weights_bytes / 100e6 + 5.0 + MODEL.weights_bytes / 2e9
    assert (cold - warm) / 1e6 == pytest.approx(saved_s, abs=1.5)  # the number of steps differs a little


def test_a_baseline_takes_the_machine_with_the_fewest_dollars_for_the_workflow() -> None:
    slow_and_cheap, quick = host("a", slowness=30.0, price=0.30), host("b", "4090", price=0.36)
    world = Isolated(alone(short_document(), slow_and_cheap, quick))
    world.run()
    assert [machine.offer.name for machine in world.market.machines] == ["b"]


def test_energy_is_idle_watts_for_every_paid_second_and_more_while_busy() -> None:
    machine = Machine("m", host(), 0.0, 100.0)
    machine.released_at_s = 1000.0
    assert machine.total_joules() == pytest.approx(1000 * (25 + 60))
    spent = truth.Spent(fetch_s=10.0, load_s=20.0, exec_s=30.0, power_share=0.6)
    assert machine.joules(spent, is_gpu=True) == pytest.approx((350 - 25) * (0.05 * 10 + 0.15 * 20 + 0.6 * 30))


def test_rows_that_do_not_fit_beside_the_weights_wait() -> None:
    device, model = CLASS["3090"], MODELS["8b"]
    demand = truth.Demand("llm.generate", model, 64, 64 * 200.0, 400.0, 0.75 * 400 * 64, 0.0, 0.0)
    roomy, _ = truth.execution(device, [demand], 64e9)
    narrow, _ = truth.execution(device, [demand], 1e9)
    assert narrow > 2 * roomy


def test_a_batch_takes_less_than_its_operators_one_by_one() -> None:
    device, model = CLASS["3090"], MODELS["3b"]
    demand = truth.Demand("llm.generate", model, 8, 8 * 100.0, 200.0, 0.75 * 200 * 8, 0.0, 0.0)
    one, _ = truth.execution(device, [demand], 12e9)
    eight, _ = truth.execution(device, [demand] * 8, 12e9)
    assert eight < 3 * one


def test_training_is_bound_by_arithmetic() -> None:
    demand = truth.Demand("train.sft", MODELS["8b"], 0, 0.0, 20.0, 0.0, 60_000.0, 0.0)
    seconds, _ = truth.execution(CLASS["4090"], [demand], 0.0)
    assert seconds == pytest.approx(10 + 20 * 0.05 + 6 * 8e9 * 60_000 / (165e12 * 0.35))


def test_a_host_that_was_taken_away_cannot_be_rented_for_a_while() -> None:
    market = Market([host()], 1)
    machine, _ = market.rent(market.offers[0], 0.0)
    assert not list(market.available(10.0))
    market.give_back(machine, 20.0, is_taken=True)
    assert not list(market.available(30.0))
    assert list(market.available(20.0 + 1800.0))
