"""The comparison policies choose as they say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.sim.worlds import few, host
from tests.unit.scheduler.flows import operator, workflow

from flowmesh_scheduler.core.outbox import Outbox
from flowmesh_scheduler.core.outstanding import executor_of
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import Node, State, Work
from flowmesh_scheduler.sim import pool_view
from flowmesh_scheduler.sim.fleet import node_record
from flowmesh_scheduler.sim.policies import POLICIES, best_published, proxy
from flowmesh_scheduler.sim.simulation import Simulation, salted


def _node(name: str, kind: str, price: float) -> Node:
    return Node(node_record(host(name, kind, price), name, 1), 0)


def test_the_published_figure_of_a_node_counts_cards_memory_and_cores() -> None:
    assert proxy(_node("a", "3090", 0.2)) == 100 + 24 + 48 / 2 + 8 / 2
    assert proxy(_node("c", "CPU", 0.04)) == 32 / 2 + 8 / 2


def test_the_published_policy_takes_the_cheap_node_to_infer_and_the_large_one_to_train() -> None:
    small, large = _node("a", "3090", 0.2), _node("b", "A100-SXM4-80GB", 1.3)
    # Two nodes, so the figures are normalised to 0 and 1: small 0, large w - (1 - w).
    assert best_published([small, large], "engine", 1, {}) is small
    assert best_published([small, large], "train", 1, {}) is large


def test_the_published_policy_weighs_a_middling_node_by_both() -> None:
    nodes = [_node("a", "3090", 0.2), _node("m", "A6000", 0.45), _node("b", "HBM3", 2.2)]
    figures = [proxy(n) for n in nodes]
    middle = (figures[1] - figures[0]) / (figures[2] - figures[0])
    dear = (0.45 - 0.2) / (2.2 - 0.2)
    assert 0.4 * middle - 0.6 * dear == pytest.approx(0.025)
    assert best_published(nodes, "engine", 1, {}) is nodes[1]


def _batch_sizes(policy: str) -> list[int]:
    scenario = few("bursts", 1, 30)
    sizes: list[int] = []
    give = pool_view.assign

    def watch(state: State, node: Node, works: Sequence[Work], now_us: int, out: Outbox) -> None:
        sizes.append(len([work for work in works if executor_of(work) == "engine"]))
        give(state, node, works, now_us, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_view, "assign", watch)
        Simulation(scenario, POLICIES[policy], 1, salts=not POLICIES[policy].shares).run()
    return sizes


def test_the_published_policy_merges_no_more_than_four() -> None:
    assert max(_batch_sizes("published")) == 4


def test_other_policies_fill_a_batch_up_to_the_limit_of_the_core() -> None:
    assert 4 < max(_batch_sizes("fifo")) <= Settings().batch_limit["engine"]


def test_salted_workflows_have_nothing_in_common() -> None:
    document = workflow([operator("a", nonce=1)])
    first, second = salted(document, "r1"), salted(document, "r2")
    assert first.operators[0].params != second.operators[0].params
    assert first.operators[0].params["nonce"] == 1


def test_the_cheapest_policy_costs_less_an_hour_than_a_random_one() -> None:
    scenario = few("hot-model", 2, 40)
    prices = {}
    for name in ("cheapest", "random"):
        figures = Simulation(scenario, POLICIES[name], 2).run()
        prices[name] = figures.cost_usd / figures.paid_s
    assert prices["cheapest"] <= prices["random"]
