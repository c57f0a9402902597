"""What must hold of every run, whatever the policy: nothing is lost, nothing is free, nothing depends on chance."""

from __future__ import annotations

import pytest
from tests.hash_seeds import told_under
from tests.sim.worlds import PATIENT, few

from flowmesh_scheduler.sim.isolated import Isolated
from flowmesh_scheduler.sim.machine import Machine
from flowmesh_scheduler.sim.policies import POLICIES
from flowmesh_scheduler.sim.simulation import Simulation
from flowmesh_scheduler.sim.workloads import identities


def _check_bills(machines: list[Machine]) -> None:
    assert machines
    for machine in machines:
        device = machine.offer.device
        idle_watts, most_watts = device.idle_watts + device.host_watts, device.watts + device.host_watts + 15 * 6
        assert machine.is_gone
        assert machine.paid_s() >= 0
        assert machine.busy_s <= machine.paid_s() + 1e-6
        assert idle_watts * machine.paid_s() <= machine.total_joules() <= most_watts * machine.paid_s() + 1e-6


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("workload", ["mix", "agents"])
def test_every_operator_runs_or_is_a_hit_and_every_second_is_paid(workload: str, policy: str) -> None:
    scenario = few(workload, 3, 8, hazard_per_hour=0.0)
    world = Simulation(scenario, POLICIES[policy], 3, settings=PATIENT, salts=not POLICIES[policy].shares)
    figures = world.run()
    distinct = {key for arrival in scenario.arrivals for key in identities(arrival.manifest)}
    assert figures.failed == 0
    assert figures.operators + figures.hits >= scenario.operators
    assert figures.operators >= len(distinct)
    assert figures.cost_usd == pytest.approx(sum(m.paid_s() * m.offer.price_per_hour / 3600 for m in world.market.machines))
    _check_bills(world.market.machines)


def test_what_is_the_same_in_two_documents_runs_once() -> None:
    scenario = few("mix", 4, 16, hazard_per_hour=0.0)
    distinct = {key for arrival in scenario.arrivals for key in identities(arrival.manifest)}
    figures = Simulation(scenario, POLICIES["fifo"], 4).run()
    assert len(distinct) < scenario.operators
    assert figures.operators == len(distinct)
    assert figures.hits == scenario.operators - len(distinct)


def test_policies_that_share_nothing_run_everything() -> None:
    scenario = few("mix", 4, 16, hazard_per_hour=0.0)
    figures = Simulation(scenario, POLICIES["published"], 4, salts=True).run()
    assert figures.hits == 0
    assert figures.operators == scenario.operators


@pytest.mark.parametrize("policy", ["ours", "fifo", "published"])
def test_invariants_of_the_core_hold_after_every_step_while_machines_vanish(policy: str) -> None:
    scenario = few("preempt", 2, 6, hazard_per_hour=15.0)
    world = Simulation(scenario, POLICIES[policy], 2, settings=PATIENT, checks=True, salts=not POLICIES[policy].shares)
    figures = world.run()
    assert figures.preemptions > 0
    assert figures.failed == 0
    _check_bills(world.market.machines)


def test_pipelines_on_machines_of_their_own_end_although_machines_vanish() -> None:
    world = Isolated(few("preempt", 2, 12, hazard_per_hour=15.0))
    figures = world.run()
    assert figures.preemptions > 0
    assert figures.operators == sum(len(set(identities(a.manifest))) for a in world.scenario.arrivals)
    _check_bills(world.market.machines)


_SCRIPT = """
from tests.sim.worlds import few
from flowmesh_scheduler.sim.isolated import Isolated
from flowmesh_scheduler.sim.policies import POLICIES
from flowmesh_scheduler.sim.simulation import Simulation
scenario = few("preempt", 5, 6)
print(Isolated(scenario).run().digest, *(Simulation(scenario, p, 5).run().digest for p in POLICIES.values()))
"""


def test_a_seed_gives_the_same_assignments_whatever_the_hash_seed() -> None:
    told = [lines[0].split() for lines in told_under(("0", "4711"), _SCRIPT, timeout_s=100)]
    assert len(told[0]) == 1 + len(POLICIES)
    assert told[0] == told[1]


def test_another_seed_gives_other_assignments() -> None:
    digests = {Simulation(few("agents", seed, 4), POLICIES["ours"], seed).run().digest for seed in (1, 2)}
    assert len(digests) == 2
