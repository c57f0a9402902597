"""Why operators wait or run where they do, as told of a core that is driven by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import EVERY_TYPE, content, node_record, operator, workflow

from flowmesh_mesh.manifest import Resources
from flowmesh_mesh.messages import Device
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.fleet import can_run
from flowmesh_scheduler.core.lacking import lacks
from flowmesh_scheduler.core.pricing import usual_usd_per_s
from flowmesh_scheduler.core.settings import Settings, TenantSettings
from flowmesh_scheduler.core.state import Work
from flowmesh_scheduler.core.utility import score
from flowmesh_scheduler.core.waiting import Wait, why_waiting
from flowmesh_scheduler.core.why import explain


def ask(desk: Desk, name: str, run: str = "r1") -> Wait:
    return why_waiting(desk.state, desk.vertex(name, run), desk.now_us)


def test_an_operator_waits_for_those_before_it() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(workflow([operator("load"), operator("tidy", after=[0])]))
    assert ask(desk, "tidy") == Wait("inputs", "it waits for load (assigned)")


def test_what_no_node_can_run_names_what_each_of_them_lacks() -> None:
    desk = Desk()
    desk.join("n1", types=("flow.noop",))
    desk.join("n2", memory_bytes=1 << 30)
    desk.submit(workflow([operator("train", type="train.sft", params={"seed": 1}, resources=Resources(memory_bytes=1 << 34))]))
    wait = ask(desk, "train")
    assert wait.kind == "no-node"
    assert "operator type train.sft" in wait.nodes["n1"]
    assert wait.nodes["n2"] == ["16.0 GiB of memory (has 1.0 GiB)"]
    assert "n2: 16.0 GiB of memory" in wait.text


def test_a_mesh_without_nodes_says_so() -> None:
    desk = Desk()
    desk.submit(workflow([operator("a")]))
    assert ask(desk, "a") == Wait("no-node", "the mesh has no nodes")


def test_a_node_whose_connection_ended_is_no_node_to_run_on() -> None:
    desk = Desk()
    desk.join("n1")
    desk.apply(e.NodeDisconnected("n1"))
    desk.submit(workflow([operator("a")]))
    assert ask(desk, "a").nodes == {"n1": ["its connection ended"]}


def test_an_operator_behind_others_knows_how_many_go_before_it() -> None:
    desk = Desk(settings=Settings(batch_limit={"inline": 1, "data": 1, "engine": 1, "train": 1, "user": 1}))
    desk.join("n1")
    desk.submit(workflow([operator(f"o{i}", type="train.sft", params={"seed": i}) for i in range(4)]))
    waiting = [name for name, state in desk.states().items() if state == "ready"]
    assert len(waiting) == 3
    told = [ask(desk, name) for name in waiting]
    assert {wait.kind for wait in told} == {"busy"}
    assert all("the node that can run it is busy" in wait.text for wait in told)
    assert [f"{ahead} of 3 operators" in wait.text for ahead, wait in enumerate(told)] == [True] * 3


def test_a_failed_attempt_pauses_before_the_next() -> None:
    desk = Desk()
    desk.join("n1")
    desk.submit(workflow([operator("a")]))
    desk.fail(desk.only(), "crashed")
    wait = ask(desk, "a")
    assert wait.kind == "paused"
    assert "attempt 1 failed; it is tried again in 0.5 s" in wait.text


def test_a_leader_that_is_cut_off_assigns_nothing() -> None:
    desk = Desk()
    desk.join("n1")
    desk.apply(e.CutOff())
    desk.submit(workflow([operator("a")]))
    assert ask(desk, "a").kind == "cut-off"


def test_a_used_up_quota_keeps_an_operator_waiting() -> None:
    desk = Desk(settings=Settings(tenants={"ta": TenantSettings(max_slots=1)}))
    desk.join("n1", "n2")
    desk.submit(workflow([operator(f"o{i}", type="train.sft", params={"seed": i}) for i in range(2)]))
    (waiting,) = [name for name, state in desk.states().items() if state == "ready"]
    assert ask(desk, waiting).kind == "quota"
    assert "your tenant" in ask(desk, waiting).text


def test_holders_of_inputs_and_hits_are_asked_first() -> None:
    desk = Desk(locates=False)
    desk.join("n1")
    manifest = workflow([operator("a", after=[content("given")])])
    desk.submit(manifest)
    desk.succeed(desk.only())
    desk.submit(manifest, "r2")
    assert ask(desk, "a", "r2").kind == "hit"
    desk.submit(workflow([operator("b", after=[content("other")])]), "r3")
    desk.lose_input("b", "other")
    assert ask(desk, "b", "r3") == Wait("locating", "it is being asked who holds 1 input of it")


def test_a_result_on_its_way_into_the_ledger_says_so() -> None:
    desk = Desk(commits=False)
    desk.join("n1")
    desk.submit(workflow([operator("a")]))
    desk.succeed(desk.only())
    assert ask(desk, "a").kind == "committing"


@given(
    st.sampled_from(EVERY_TYPE),
    st.lists(st.sampled_from(EVERY_TYPE), max_size=3),
    st.integers(0, 3),
    st.lists(st.integers(0, 4), max_size=2),
    st.sampled_from(["any", "exact:a", "exact:b"]),
    st.lists(st.sampled_from(["a", "b"]), max_size=1),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_a_node_lacks_something_exactly_when_it_cannot_run_the_work(
    kind: str,
    types: list[str],
    gpus: int,
    devices: list[int],
    numeric: str,
    classes: list[str],
    vram: int,
    memory: int,
    cpus: int,
    has: int,
) -> None:
    needs = Resources(gpus=gpus, vram_bytes=vram, memory_bytes=memory, cpus=float(cpus))
    made = operator("x", type=kind, numeric=numeric, resources=needs)
    record = node_record(
        "n", types=tuple(types), devices=tuple(Device("gpu", "g", memory_bytes=size) for size in devices), cpus=float(has),
        memory_bytes=has, numeric=tuple(classes),
    )  # fmt: skip
    work = Work(b"k", made, {}, {}, {}, "", 0, 0)
    assert can_run(record, work) == (not lacks(record, made))


def explained(desk: Desk) -> Sequence[dict[str, Any]]:
    return [explain(decision) for decision in desk.state.decisions.values()]


def test_a_decision_is_explained_by_terms_that_sum_to_its_score_and_by_the_other_node() -> None:
    desk = Desk()
    desk.join("cheap", price_per_hour=0.2)
    desk.join("dear", price_per_hour=2.0)
    desk.submit(workflow([operator("train", type="train.sft", params={"seed": 1})]))
    (plain,) = explained(desk)
    decision = desk.state.decisions[plain["assignment"]]
    assert plain["node"] == "cheap"
    assert sum(plain["terms_usd"].values()) == pytest.approx(score(decision.factors))
    (other,) = plain["alternatives"]
    assert other["node"] == "dear"
    assert other["gap_usd"] > 0
    words = {each["field"]: each["words"] for each in other["flips"]}
    assert words["price_usd_per_s"].startswith("dear would win if its price fell to ")
    assert words["price_usd_per_s"].endswith("$/h (is 2)")
    assert "value_usd" not in words, "one batch is worth the same on both"


def test_equal_nodes_are_told_to_be_equal() -> None:
    desk = Desk()
    desk.join("n1", "n2")
    desk.submit(workflow([operator("train", type="train.sft", params={"seed": 1})]))
    (plain,) = explained(desk)
    assert plain["alternatives"][0]["gap_usd"] == 0
    assert "was worth as much" in plain["alternatives"][0]["flips"][0]["words"]


def test_the_count_of_the_same_batch_elsewhere_is_that_of_the_batch() -> None:
    desk = Desk()
    desk.join("n1", "n2")
    desk.submit(workflow([operator(f"o{i}", nonce=i) for i in range(3)]))
    for plain in explained(desk):
        assert all(other["count"] == plain["count"] for other in plain["alternatives"] if other["queue"] == plain["queue"])


def test_a_place_among_tenants_is_the_one_in_which_work_is_taken() -> None:
    desk = Desk(settings=Settings(tenants={"ta": TenantSettings(weight=3.0)}))
    for number in range(6):
        operators = [operator(f"o{i}", type="train.sft", params={"seed": 10 * number + i}) for i in range(1 + number)]
        desk.submit(workflow(operators), f"r{number}", "ta" if number % 2 else "tb")
    (queue,) = desk.state.pool.values()
    works = list(desk.state.works.values())
    told = {work.key: queue.ahead_of(work) for work in works}
    taken = queue.take(len(works), desk.state.works)
    assert len({work.tenant for work in taken[:6]}) == 2, "the tenants take turns"
    assert [told[work.key] for work in taken] == list(range(len(works)))


def worth_usd(desk: Desk, count: int) -> float:
    """Return what so many operators of the only kind are worth."""
    settings, work = desk.state.settings, next(iter(desk.state.works.values()))
    return count * usual_usd_per_s(desk.state) * (settings.value_margin * work.seconds + settings.hold_s)


@pytest.mark.parametrize("kind", ["flow.noop", "data.sql", "llm.generate"])
def test_what_was_weighed_holds_no_more_operators_than_were_ready(kind: str) -> None:
    desk = Desk()
    desk.join("n1")
    desk.join("n2", cpus=8.0)
    params: list[dict[str, Any]] = [{"nonce": i, "query": f"q{i}", "prompt": f"p{i}", "dtype": "float32"} for i in range(5)]
    models = {"model": "hf:a"} if kind == "llm.generate" else {}
    flow = workflow([operator(f"o{i}", type=kind, params=params[i], models=models) for i in range(5)], {})
    desk.submit(flow, models={"hf:a": "sha256:a"})
    left = 5
    for decision in desk.state.decisions.values():
        told = explain(decision)
        assert decision.count <= left
        assert all(other["count"] <= left for other in told["alternatives"])
        assert decision.factors.value_usd < 2 * worth_usd(desk, decision.count), "of the operators that are there, no more"
        left -= decision.count
    assert desk.state.decisions
