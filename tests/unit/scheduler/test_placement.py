"""Which work goes to which node, how much of it at once, and who does not have to wait for whom."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.scheduler.desk import Desk, tally
from tests.unit.scheduler.flows import Resources, chain, content, fan, gpu, operator, workflow

from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.utility import score, terms


def sql(name: str, **fields: Any) -> Any:
    return operator(name, type="data.sql", params={"query": name}, **fields)


def generate(name: str, model: str, **fields: Any) -> Any:
    return operator(name, type="llm.generate", params={"prompt": name, "dtype": "float32"}, models={"model": model}, **fields)


def sizes(made: Desk) -> list[int]:
    return [len(x.assignment.items) for x in made.of(made.commands, c.Assign)]


def test_a_batch_never_mixes_batch_keys() -> None:
    made = Desk()
    flow = [generate(f"a{i}", "hf:one") for i in range(5)] + [generate(f"b{i}", "hf:two") for i in range(5)]
    made.submit(workflow(flow, {}), models={"hf:one": "sha256:1", "hf:two": "sha256:2"})
    made.join("n1")
    while made.assigned:
        assignment = made.only()
        assert len({item.name[0] for item in assignment.items}) == 1
        assert set(assignment.model_digests.values()) == {"sha256:1" if assignment.items[0].name[0] == "a" else "sha256:2"}
        made.succeed(assignment)
    assert made.end().reason == "succeeded"


def test_operators_of_types_that_do_not_batch_run_one_by_one() -> None:
    made = Desk()
    made.submit(workflow([operator(f"o{i}", type="python.call", params={"function": f"f{i}"}) for i in range(6)], {}))
    made.join("n1")
    made.work_off()
    assert sizes(made) == [1] * 6


def test_batches_shrink_so_that_all_nodes_finish_together() -> None:
    made = Desk(Settings(batch_floor={"inline": 1, "data": 1, "engine": 1, "train": 1, "user": 1}))
    made.submit(workflow([sql(f"q{i}") for i in range(64)], {}))
    made.join("n1", "n2")
    made.work_off()
    found = sizes(made)
    assert sum(found) == 64
    assert found == sorted(found, reverse=True)
    assert found[0] <= 32
    assert found[-1] == 1


def test_no_batch_is_larger_than_its_limit() -> None:
    made = Desk()
    made.join("n1")
    made.submit(fan(4000))
    made.work_off()
    assert max(sizes(made)) <= made.settings.batch_limit["inline"]


def test_depth_on_a_node_is_bounded_by_kind() -> None:
    made = Desk()
    made.join("n1")
    made.submit(workflow([sql(f"q{i}") for i in range(500)], {}))
    assert made.state.nodes["n1"].busy == {"data": made.settings.depth_limit["data"]}


def test_engine_and_training_share_the_slots_of_a_node() -> None:
    made = Desk()
    made.join("n1", slots=1)
    made.submit(
        workflow([operator("t", type="train.sft", params={"seed": 1}), generate("g", "hf:one")], {}),
        models={"hf:one": "sha256:1"},
    )
    assert len(made.assigned) == 1
    made.work_off()
    assert made.end().reason == "succeeded"


def test_an_operator_waits_for_a_node_with_its_type() -> None:
    made = Desk()
    made.join("n1", types=["data.sql"])
    made.submit(chain(1))
    assert not made.assigned
    made.join("n2", types=["flow.noop"])
    assert made.only().node == "n2"


def test_an_operator_waits_for_a_node_with_its_resources() -> None:
    made = Desk()
    made.join("n1", memory_bytes=1 << 30, cpus=2.0)
    made.join("n2", devices=(gpu(1 << 33),))
    wanted = [Resources(gpus=2), Resources(vram_bytes=1 << 34), Resources(memory_bytes=1 << 35), Resources(cpus=16.0)]
    made.submit(workflow([operator(f"o{i}", nonce=i, resources=needs) for i, needs in enumerate(wanted)], {}))
    assert not made.assigned
    made.join("n3", devices=(gpu(1 << 35), gpu(1 << 35)), memory_bytes=1 << 36, cpus=32.0)
    assert {a.node for a in made.assigned.values()} == {"n3"}
    made.work_off()
    assert made.end().reason == "succeeded"


def test_an_exact_numeric_class_runs_only_where_it_is_proven() -> None:
    made = Desk()
    made.join("n1")
    made.join("n2", numeric=("cpu-x",))
    made.submit(workflow([sql("q", numeric="exact:cpu-x"), sql("free")], {}))
    assert made.named("q").node == "n2"
    assert made.named("q").numeric == "exact:cpu-x"
    assert made.named("free").id != made.named("q").id


def test_every_item_of_a_batch_fits_the_node() -> None:
    """Both have the batch key of their type; only one of them fits a small node."""
    made = Desk()
    made.submit(workflow([sql("small"), sql("large", resources=Resources(memory_bytes=1 << 35))], {}))
    made.join("n1", memory_bytes=1 << 30)
    assert [item.name for item in made.only().items] == ["small"]
    made.join("n2", memory_bytes=1 << 36)
    made.work_off()
    assert made.vertex("large").node == "n2"


def test_work_that_no_node_can_run_does_not_hold_up_the_rest() -> None:
    made = Desk()
    made.join("n1")
    made.submit(workflow([sql("impossible", resources=Resources(gpus=8))]), "r1", "ta")
    made.submit(workflow([sql("possible")]), "r2", "tb")
    made.work_off()
    assert made.end("r2", "tb").reason == "succeeded"
    assert made.states() == {"impossible": "ready"}


def test_many_operators_that_no_node_can_run_do_not_hold_up_the_rest() -> None:
    made = Desk()
    made.join("n1")
    flow = [operator(f"t{i}", type="train.sft", params={"seed": i}, resources=Resources(gpus=8)) for i in range(100)]
    made.submit(workflow(flow, {}), "r1", "ta")
    made.submit(workflow([operator("o", type="train.sft", params={"seed": 1000})]), "r2", "tb")
    made.work_off()
    assert made.end("r2", "tb").reason == "succeeded"


def test_work_that_avoids_the_idle_node_does_not_hold_up_the_rest() -> None:
    """What crashed on the one node waits for the other, which is busy; the next in line need not wait with it."""
    made = Desk()
    made.join("n1", "n2")
    kind: dict[str, Any] = {"type": "train.sft"}
    made.submit(workflow([operator("a", params={"seed": 1}, **kind), operator("b", params={"seed": 2}, **kind)], {}))
    crashed = made.named("a").node
    made.fail(made.named("a"), "crashed")
    made.wait(2, beating=["n1", "n2"])
    assert not made.is_assigned("a")
    made.submit(workflow([operator("c", params={"seed": 3}, **kind)]), "r2")
    assert made.named("c").node == crashed


def test_avoided_nodes_are_used_when_there_is_no_other() -> None:
    made = Desk()
    made.join("n1", "n2")
    made.submit(chain(1))
    for _ in range(2):
        made.fail(made.only(), "crashed")
        made.wait(3, beating=["n1", "n2"])
    assert made.only().items[0].attempt == 3


def test_a_node_that_holds_the_input_is_preferred() -> None:
    made = Desk()
    made.join("n1", "n2", "n3")
    big = content("big", size=10_000_000_000)
    made.submit(workflow([sql("q", after=[big])]))
    first = made.only().node
    made.succeed(made.only())
    other = next(n for n in ("n1", "n2", "n3") if n != first)
    made.state.places[big.cid] = {"hub", other}
    made.submit(workflow([sql("q2", after=[big])]), "r2")
    assert made.only().node == other


def test_a_node_with_the_model_loaded_is_preferred() -> None:
    made = Desk()
    made.join("n1", "n2")
    from flowmesh_mesh.messages import Beat
    from flowmesh_scheduler.core import events as e

    made.apply(e.BeatReceived(Beat("n2", 1, 100, (), resident=("sha256:1",))))
    made.submit(workflow([generate("g", "hf:one")]), models={"hf:one": "sha256:1"})
    assert made.only().node == "n2"


def test_operators_of_higher_priority_go_first() -> None:
    made = Desk()
    kind: dict[str, Any] = {"type": "train.sft"}
    made.submit(workflow([operator(f"o{i}", params={"seed": i}, priority=i % 3, **kind) for i in range(6)], {}))
    made.join("n1")
    order = []
    while made.assigned:
        order.append(made.only().items[0].params["seed"])
        made.succeed(made.only())
    assert order == [2, 5, 1, 4, 0, 3]


def test_work_spreads_over_nodes() -> None:
    made = Desk()
    made.join("n1", "n2", "n3")
    made.submit(workflow([operator(f"o{i}", type="train.sft", params={"seed": i}) for i in range(3)], {}))
    assert tally(a.node for a in made.assigned.values()) == {"n1": 1, "n2": 1, "n3": 1}


def test_an_operator_with_no_time_limit_gets_none_from_its_company() -> None:
    made = Desk()
    made.submit(workflow([sql("endless"), sql("short", timeout_s=5.0)], {}))
    made.join("n1")
    assert (made.named("endless").timeout_s, made.named("short").timeout_s) == (0.0, 5.0)


def test_the_terms_of_each_choice_are_kept() -> None:
    made = Desk()
    made.join("n1", price_per_hour=2.0)
    made.submit(chain(1))
    (choice,) = made.of(made.commands, c.Assign)
    (decision,) = made.state.decisions.values()
    assert choice.why == terms(decision.factors)
    assert sum(choice.why.values()) == pytest.approx(score(decision.factors))
    assert choice.why["price"] < 0 < choice.why["value"]


def test_the_cheaper_of_two_equal_nodes_is_chosen() -> None:
    made = Desk()
    made.join("n1", price_per_hour=2.0)
    made.join("n2", price_per_hour=0.5)
    made.submit(workflow([sql("q")]))
    assert made.only().node == "n2"
