"""Many runs of the simulator: which, in how many processes, and what is kept of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.sim.isolated import Isolated
from flowmesh_scheduler.sim.metrics import Figures
from flowmesh_scheduler.sim.policies import ISOLATED, POLICIES
from flowmesh_scheduler.sim.rental import Terms
from flowmesh_scheduler.sim.simulation import Simulation
from flowmesh_scheduler.sim.workloads import OVERLAP, SPARSE, WORKLOADS, Scenario, Shared, mix, mix_sparse, shared

TUNING_SEED = 1
"""First of the seeds on which anything may be tuned (to 9)."""

EVALUATION_SEED = 1001
"""First of the seeds for results: never used in tuning."""

OVERLAPS = (0.0, 0.2, 0.4, 0.6, 0.8)
ABLATIONS = ("dedup", "batching", "locality", "learning", "fairness")
_LOST_LIMIT = 20


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a workload (``overlap`` counts for ``mix`` only) under a policy; ``ablate`` names a part of ours to switch off."""

    workload: str
    policy: str
    seed: int
    overlap: float = OVERLAP
    ablate: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job."""

    job: Job
    figures: Figures
    shared: Shared
    cpu_s: float


def scenario_of(job: Job) -> Scenario:
    """Return what happens in a job."""
    if job.workload == "mix":
        return mix(job.seed, job.overlap)
    return mix_sparse(job.seed) if job.workload == SPARSE else WORKLOADS[job.workload](job.seed)


def settings_of(job: Job) -> Settings:
    """Return the core's settings: as they come, but on hosts that vanish often, three losses do not make an operator poison."""
    ablate = (job.ablate,) if job.ablate and job.ablate != "dedup" else ()
    return Settings(nodes_lost_limit=_LOST_LIMIT, ablate=ablate, fold_hops=0)  # simulated nodes run items, not tails


def run(job: Job) -> Outcome:
    """Run a job."""
    began_s = time.process_time()
    scenario = scenario_of(job)
    if job.policy == ISOLATED:
        figures = Isolated(scenario, Terms(), settings_of(job)).run()
    else:
        policy = POLICIES[job.policy]
        salts = not policy.shares or job.ablate == "dedup"
        figures = Simulation(scenario, policy, job.seed, Terms(), settings_of(job), salts=salts).run()
    return Outcome(job, figures, shared(scenario), time.process_time() - began_s)


def run_all(jobs: Sequence[Job], processes: int, note: Callable[[int, int], None]) -> list[Outcome]:
    """Run jobs in several processes; return the outcomes in the order of the jobs. ``note`` is told how many are done."""
    found = []
    for outcome in _outcomes(jobs, processes):
        found.append(outcome)
        note(len(found), len(jobs))
    return found


def _outcomes(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    if processes <= 1 or len(jobs) == 1:
        yield from map(run, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, jobs, chunksize=4)


def every_job(workloads: Sequence[str], policies: Sequence[str], seeds: Sequence[int], overlap: float = OVERLAP) -> list[Job]:
    """Return a job for each workload, policy and seed."""
    return [Job(workload, policy, seed, overlap) for workload in workloads for policy in policies for seed in seeds]


def whole_study(seeds: Sequence[int], ablation_seeds: Sequence[int]) -> list[Job]:
    """Return everything that `make sim` reports: workloads by policies, the sweep of overlaps, ablations."""
    jobs = every_job(tuple(WORKLOADS), (*POLICIES, ISOLATED), seeds)
    for overlap in OVERLAPS:
        if overlap != OVERLAP:
            jobs += every_job(("mix",), ("ours", ISOLATED), seeds, overlap)
    jobs += every_job((SPARSE,), ("ours", ISOLATED), seeds)
    jobs += [Job(workload, "ours", seed, ablate=part) for part in ABLATIONS for workload in WORKLOADS for seed in ablation_seeds]
    return jobs
