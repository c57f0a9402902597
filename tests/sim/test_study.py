"""Workloads share what they say; figures become verdicts; the command line answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.sim.worlds import few
from typer.testing import CliRunner

from flowmesh_scheduler.sim import plots, study, verdict
from flowmesh_scheduler.sim.__main__ import app
from flowmesh_scheduler.sim.metrics import Figures, percentile
from flowmesh_scheduler.sim.policies import POLICIES
from flowmesh_scheduler.sim.simulation import Simulation
from flowmesh_scheduler.sim.study import Job, Outcome
from flowmesh_scheduler.sim.workloads import WORKLOADS, Shared, mix, shared, steady

FIGURES = Simulation(few("agents", 1, 2), POLICIES["fifo"], 1).run()


def _outcomes(policy: str, costs: list[float], p95_s: float, workload: str = "steady") -> list[Outcome]:
    def figures(cost: float) -> Figures:
        return replace(FIGURES, cost_usd=cost, response_p95_s=p95_s)

    return [Outcome(Job(workload, policy, seed), figures(cost), Shared(0, 0, 0), 0.1) for seed, cost in enumerate(costs)]


@pytest.mark.parametrize("overlap", [0.0, 0.4, 0.8])
def test_tenants_of_the_mix_share_what_is_asked_for_and_nothing_else(overlap: float) -> None:
    measured = shared(mix(1, overlap))
    assert measured.between_tenants == pytest.approx(overlap, abs=0.03)
    assert measured.within_tenant == 0.0


def test_nothing_is_shared_in_the_steady_workload() -> None:
    assert shared(steady(2)).needless == 0.0


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_workloads_differ_by_seed_and_come_in_order(workload: str) -> None:
    first, second = WORKLOADS[workload](1), WORKLOADS[workload](2)
    times = [arrival.at_s for arrival in first.arrivals]
    assert times == sorted(times)
    assert first.arrivals != second.arrivals
    assert first == WORKLOADS[workload](1)
    assert len({arrival.run for arrival in first.arrivals}) == len(times)


def test_seeds_of_results_are_none_of_those_for_tuning() -> None:
    assert study.EVALUATION_SEED > study.TUNING_SEED + 8
    jobs = study.whole_study(range(1001, 1021), range(1001, 1006))
    assert {job.seed for job in jobs} == set(range(1001, 1021))
    assert {job.ablate for job in jobs} == {"", *study.ABLATIONS}


def test_a_rival_counts_only_if_its_slowest_responses_are_no_worse() -> None:
    found = _outcomes("ours", [1.0, 1.2], 100) + _outcomes("fifo", [0.5, 0.5], 101) + _outcomes("random", [1.5, 1.6], 90)
    assert verdict.best_simple(verdict.Table(found), "steady") == "random"


def test_a_missed_bar_is_told() -> None:
    found = _outcomes("ours", [1.1, 1.3], 100) + _outcomes("fifo", [1.0, 1.0], 90)
    records = {record.name: record for record in verdict.records(verdict.Table(found), 1001)}
    worst = records["worst_cost_vs_best_simple"]
    assert worst.value == pytest.approx(1.2)
    assert worst.ok is False
    assert records["cost_vs_best_simple.steady.fifo"].low == pytest.approx(1.1)


def test_a_ratio_of_means_lies_in_its_interval() -> None:
    value, low, high = verdict.ratio_of([(4.0, 1.0), (6.0, 2.0), (5.0, 1.5)])
    assert value == pytest.approx(15 / 4.5)
    assert low <= value <= high


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.95) == 4.0


def test_plots_are_drawings(tmp_path: Path) -> None:
    found = _outcomes("ours", [1.0], 100) + _outcomes("isolated", [3.0], 100)
    for path in plots.draw(verdict.Table(found), tmp_path):
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")
    lines = plots.curves("title & more", {"a": [(0.0, 1.0), (0.8, 2.0)]})
    assert ElementTree.fromstring(lines).tag.endswith("svg")


def test_the_command_prints_what_came_of_each_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "scenario_of", lambda job: few(job.workload, job.seed, 3))
    command = [
        "--workload",
        "agents",
        "--policy",
        "ours,isolated",
        "--seeds",
        "2",
        "--jobs",
        "1",
        "--json",
        "--out",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert [(run["policy"], run["seed"]) for run in runs] == [("ours", 1), ("ours", 2), ("isolated", 1), ("isolated", 2)]
    assert (tmp_path / "sim_cost_usd.svg").exists()


def test_an_unknown_workload_is_refused_with_those_that_are_known() -> None:
    done = CliRunner().invoke(app, ["--workload", "mixed"])
    assert done.exit_code == 2
    assert "hot-model" in done.output
