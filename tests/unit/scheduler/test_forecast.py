"""What a workflow would share and take, before it is submitted."""

from __future__ import annotations

from typing import Any

from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import content, manifest_cid, operator, workflow

from flowmesh_mesh.manifest import Acceptance, Manifest, Resources, Source
from flowmesh_scheduler.core.dealing import Job, deal
from flowmesh_scheduler.core.forecast import SLICE, forecast, told
from flowmesh_scheduler.core.sizes import Size
from flowmesh_scheduler.core.state import Node


def plan(desk: Desk, manifest: Manifest, tenant: str = "ta", share: str = "mesh") -> dict[str, Any]:
    """Return what the mesh of a desk says of a workflow; nothing about the desk may change."""
    acceptance = Acceptance(tenant, "", manifest_cid(manifest), desk.now_us, share=share)
    costs = desk.state.costs.beside({})
    steps = forecast(desk.state, costs, acceptance, manifest, desk.now_us)
    before = (len(desk.state.works), len(desk.state.runs), dict(desk.state.totals), len(desk.state.costs._lines))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found = told(desk.state, costs, manifest, *end.value)
            break
    assert before == (len(desk.state.works), len(desk.state.runs), dict(desk.state.totals), len(desk.state.costs._lines))
    return found


def shared(found: dict[str, Any]) -> tuple[int, int, int, int]:
    return found["hits"], found["in_flight"], found["merged"], found["to_run"]


def sleeps(name: str, seconds: float, nonce: int = 0, after: list[int | Source] | None = None, **fields: Any) -> Any:
    return operator(name, params={"nonce": nonce, "sleep_s": seconds}, after=after or [], **fields)


CHAIN = [operator("a", nonce=1), operator("b", nonce=2, after=[0]), operator("c", nonce=3, after=[1])]


def test_nothing_is_shared_with_a_mesh_that_has_done_nothing() -> None:
    desk = Desk()
    desk.join("n1")
    assert shared(plan(desk, workflow(CHAIN))) == (0, 0, 0, 3)


def test_results_are_hits_and_their_consumers_too() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(workflow(CHAIN[:2]))
    desk.work_off()
    assert shared(plan(desk, workflow(CHAIN))) == (2, 0, 0, 1)


def test_what_would_be_submitted_is_what_was_forecast() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(workflow(CHAIN[:2]))
    desk.work_off()
    flow = workflow([*CHAIN, operator("d", nonce=1), operator("e", nonce=9, after=[3])])
    found = plan(desk, flow)
    desk.submit(flow, "r2")
    desk.work_off()
    executed = sum(not v.shared for v in desk.state.runs["ta", "r2"].vertices)
    assert found["to_run"] == executed
    assert found["hits"] + found["merged"] == len(flow.operators) - executed


def test_what_runs_already_is_waited_for_not_run_again() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(workflow([sleeps("slow", 10.0)]))
    desk.now_us += 4_000_000
    found = plan(desk, workflow([sleeps("same", 10.0), sleeps("next", 1.0, 1, after=[0])]))
    assert shared(found) == (0, 1, 0, 1)
    assert 6.5 < found["makespan_s"] < 7.5
    assert found["makespan_s"] <= found["critical_path_s"] + 1e-3


def test_equal_operators_of_one_workflow_are_merged_down_to_their_ends() -> None:
    desk = Desk()
    desk.join("n1")
    flow = [operator("a", nonce=1), operator("b", nonce=1), operator("c", nonce=2, after=[0]), operator("d", nonce=2, after=[1])]
    assert shared(plan(desk, workflow(flow))) == (0, 0, 2, 2)


def test_different_parts_of_one_output_are_not_taken_for_equal() -> None:
    desk = Desk()
    desk.join("n1")
    split = operator("split", type="data.split", params={"parts": 2}, after=[content("rows")])
    parts = [operator(f"p{i}", nonce=1, after=[Source(op=0, port="parts", item=i)]) for i in range(2)]
    again = operator("again", nonce=1, after=[Source(op=0, port="parts", item=1)])
    assert shared(plan(desk, workflow([split, *parts, again]))) == (0, 0, 1, 3)


def test_a_hit_of_another_tenants_private_work_never_shows() -> None:
    desk = Desk()
    desk.join("n1")
    flow = workflow([operator("a", nonce=1, share="private"), operator("b", nonce=2, after=[0])])
    desk.submit(flow, tenant="ta")
    assert shared(plan(desk, flow, "ta")) == (0, 1, 0, 1)
    assert shared(plan(desk, flow, "tb")) == (0, 0, 0, 2)
    desk.work_off()
    assert shared(plan(desk, flow, "ta")) == (2, 0, 0, 0)
    assert shared(plan(desk, flow, "tb")) == (0, 0, 0, 2)
    assert shared(plan(desk, workflow([operator("a", nonce=1)]), "tb")) == (0, 0, 0, 1)


def test_a_mesh_that_shares_nothing_by_default_shares_nothing_in_a_plan() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(workflow(CHAIN), tenant="ta", share="private")
    desk.work_off()
    assert shared(plan(desk, workflow(CHAIN), "ta", "private")) == (3, 0, 0, 0)
    assert shared(plan(desk, workflow(CHAIN), "tb", "private")) == (0, 0, 0, 3)


def test_effects_are_never_hits() -> None:
    desk = Desk()
    desk.join("n1")
    flow = workflow([operator("call", type="python.call", params={"effect": True, "function": "f"})])
    desk.submit(flow)
    desk.work_off()
    assert shared(plan(desk, flow)) == (0, 0, 0, 1)


def test_a_result_that_nobody_holds_any_more_is_no_hit() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(workflow(CHAIN[:1]))
    desk.work_off()
    for root in list(desk.state.places):
        desk.state.places[root] = set()
    assert shared(plan(desk, workflow(CHAIN[:1]))) == (0, 0, 0, 1)


def test_a_recording_hears_nothing_of_a_plan() -> None:
    desk = Desk()
    desk.join("n1")
    heard: list[bytes] = []
    desk.state.name_private = lambda key: heard.append(key) or key  # type: ignore[func-returns-value]
    plan(desk, workflow([operator("a", nonce=1, share="private")]))
    assert not heard


def test_seconds_and_dollars_follow_from_the_work_and_the_nodes() -> None:
    desk = Desk()
    desk.join("n1", "n2", price_per_hour=3.6)
    found = plan(desk, workflow([sleeps(f"o{i}", 100.0, i, resources=Resources(cpus=1.0 + i)) for i in range(4)]))
    assert 199 < found["makespan_s"] < 202
    assert 399 < found["node_s"] < 404
    assert abs(found["usd"] - found["node_s"] * 0.001) < 1e-9
    assert 99 < found["critical_path_s"] < 101
    assert set(found["nodes"]) == {"n1", "n2"}
    (row,) = found["rows"]
    assert (row["type"], row["operators"], row["to_run"], row["batches"], row["samples"]) == ("flow.noop", 4, 4, 4, 0)


def test_a_chain_takes_the_sum_of_its_links_however_many_nodes_there_are() -> None:
    desk = Desk()
    desk.join("n1", "n2", "n3")
    chain = [sleeps(f"o{i}", 10.0, i, after=[i - 1] if i else []) for i in range(5)]
    found = plan(desk, workflow(chain))
    assert 49.9 < found["critical_path_s"] <= found["makespan_s"] + 1e-9 < 51
    assert found["unknown_sizes"] == 4


def test_learned_costs_are_told_apart_from_priors() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(workflow([operator(f"o{i}", nonce=i) for i in range(3)]))
    desk.work_off()
    (row,) = plan(desk, workflow([operator("x", nonce=77)]))["rows"]
    assert row["samples"] >= 1


def test_what_nobody_can_run_is_named_with_what_is_missing_and_left_out_of_the_sums() -> None:
    desk = Desk()
    desk.join("n1")
    flow = [operator("big", nonce=1, resources=Resources(gpus=8)), operator("after", nonce=2, after=[0]), operator("ok", nonce=3)]
    found = plan(desk, workflow(flow))
    (lack,) = found["lacking"]
    assert (lack["first"], lack["operators"], lack["nodes"]) == ("big", 1, {"n1": ["8 GPUs (has 0)"]})
    assert found["unplaced"] == 2
    found = plan(Desk(), workflow(flow))
    assert found["unplaced"] == 3
    assert found["makespan_s"] == 0
    assert all(lack["nodes"] == {} for lack in found["lacking"])


def test_a_large_workflow_is_looked_at_in_slices() -> None:
    desk = Desk()
    desk.join("n1")
    manifest = workflow([operator(f"o{i}", nonce=i) for i in range(4 * SLICE)])
    acceptance = Acceptance("ta", "", manifest_cid(manifest), desk.now_us)
    steps = forecast(desk.state, desk.state.costs.beside({}), acceptance, manifest, desk.now_us)
    assert sum(1 for _ in steps) >= 4


def test_more_nodes_never_make_independent_work_longer() -> None:
    spans = []
    for count in (1, 2, 4, 8):
        desk = Desk()
        desk.join(*(f"n{i}" for i in range(count)))
        flow = [sleeps(f"o{i}", 1.0, i, resources=Resources(cpus=1.0 + i / 10)) for i in range(16)]
        spans.append(plan(desk, workflow(flow))["makespan_s"])
    assert spans == sorted(spans, reverse=True)
    assert spans[0] > 3.5 * spans[2]


def test_nothing_is_dealt_to_a_node_that_is_gone() -> None:
    desk = Desk()
    desk.join("n1", "n2")
    desk.lose("n2")
    found = plan(desk, workflow([sleeps(f"o{i}", 1.0, i, resources=Resources(cpus=1.0 + i / 10)) for i in range(4)]))
    assert set(found["nodes"]) == {"n1"}


def test_dealing_no_jobs_takes_no_time() -> None:
    desk = Desk()
    jobs: dict[int, Job] = {}
    steps = deal(desk.state, desk.state.costs, jobs)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            dealt = end.value
            break
    assert (dealt.makespan_s, dealt.node_s, dealt.usd, dealt.critical_s) == (0, 0, 0, 0)


def test_a_loaded_model_is_not_loaded_again() -> None:
    desk = Desk()
    desk.join("n1")
    node: Node = desk.state.nodes["n1"]
    made = operator("g", type="llm.generate", models={"model": "m"})
    costs = desk.state.costs.beside({"sha256:m": 4_000_000_000})

    def span_s() -> float:
        steps = deal(desk.state, costs, {0: Job(made, ("llm.generate", "sha256:m"), Size(10, 100), "g")})
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return float(end.value.makespan_s)

    cold_s = span_s()
    node.resident = frozenset({"sha256:m"})
    assert cold_s - span_s() > 3.0
