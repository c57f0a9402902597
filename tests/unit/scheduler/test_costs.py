"""Learned costs: whatever the truth of a kind of work is, predictions become good after few batches and stay sane before."""

from __future__ import annotations

import dis
import random
from collections.abc import Callable
from statistics import median
from types import CodeType

import msgspec
import pytest

from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.manifest import Operator, Ref
from flowmesh_mesh.messages import Device, NodeRecord
from flowmesh_scheduler.core import costs as costs_module
from flowmesh_scheduler.core import fit as fit_module
from flowmesh_scheduler.core.costs import LINES_MAX, CostClass, Costs, Size, cost_class, size_of
from flowmesh_scheduler.core.devices import Figures, device_class, figures_of
from flowmesh_scheduler.core.sizes import prior_of

DELAY: CostClass = ("flow.delay", "")
GENERATE: CostClass = ("llm.generate", "sha256:m")
FAST = Figures("fast", 300e12, 2000e9, 80 * 2**30, 400, 60)
SLOW = Figures("slow", 30e12, 200e9, 24 * 2**30, 200, 30)

Truth = Callable[[float, float], float]


def known() -> Costs:
    costs = Costs()
    costs.know_device("fast", FAST)
    costs.know_device("slow", SLOW)
    return costs


def record(cpus: float = 4.0, **fields: object) -> NodeRecord:
    base = NodeRecord("n", "U", 1, (), "3.11", cpus, 16 * 2**30)
    return msgspec.structs.replace(base, **fields)


def note(costs: Costs, kind: CostClass, size: tuple[float, float], seconds: float, device: str = "fast", node: str = "n") -> None:
    costs.note_batch(kind, device, node, size[0], size[1], seconds, 0.0, 0.0, 0.0)


def noisy(rng: random.Random, seconds: float) -> float:
    """Return a measurement: 10 % noise, and one in fifty takes five times as long."""
    return seconds * max(0.2, rng.gauss(1.0, 0.1)) * (5.0 if rng.random() < 0.02 else 1.0)


@pytest.mark.parametrize(
    ("kind", "truth", "steps"),
    [
        (DELAY, lambda s, u: 0.05 + 0.002 * u, (0,)),
        (DELAY, lambda s, u: 3.0 + 0.001 * u, (0,)),
        (DELAY, lambda s, u: 40.0 * u, (0,)),
        (("data.sql", ""), lambda s, u: 2e-3 + 1e-5 * u, (0,)),
        (GENERATE, lambda s, u: 1.0 + 0.02 * s + 1e-4 * u, (16, 64, 256)),
        (GENERATE, lambda s, u: 0.3 + 0.1 * s, (128,)),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_after_twenty_batches_predictions_are_within_a_tenth(
    kind: CostClass, truth: Truth, steps: tuple[int, ...], seed: int
) -> None:
    rng, costs, errors = random.Random(seed), known(), list[float]()
    for count in range(140):
        size = (float(rng.choice(steps)), float(rng.randint(1, 64)))
        actual = truth(*size)
        if count >= 20:
            errors.append(abs(costs.line(kind, "fast").seconds(*size) - actual) / actual)
        note(costs, kind, size, noisy(rng, actual))
    assert median(errors) < 0.10
    (row,) = costs.rows()
    assert row["error_settled"] < 0.15, "what a user is shown includes the noise of the measurements"
    assert row["samples"] == 140


def test_two_sizes_are_enough_to_tell_what_a_batch_costs_from_what_an_item_costs() -> None:
    costs = known()
    for count in (4, 64):
        note(costs, DELAY, (0, count), 0.05 + 0.002 * count)
    line = costs.line(DELAY, "fast")
    assert line.seconds(0, 128) == pytest.approx(0.306, rel=0.25)
    for count in (16, 128):
        note(costs, DELAY, (0, count), 0.05 + 0.002 * count)
    line = costs.line(DELAY, "fast")
    assert line.fixed_s == pytest.approx(0.05, rel=0.25)
    assert line.unit_s == pytest.approx(0.002, rel=0.15)


def test_batches_of_one_size_do_not_wash_away_what_others_have_told() -> None:
    costs = known()
    for count in (1, 8, 64, 2, 16, 128) * 5:
        note(costs, DELAY, (0, count), 0.05 + 0.002 * count)
    for _ in range(5000):
        note(costs, DELAY, (0, 4), 0.058)
    assert costs.line(DELAY, "fast").seconds(0, 128) == pytest.approx(0.306, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_no_term_is_below_zero_and_more_work_never_takes_less_time(seed: int) -> None:
    rng, costs = random.Random(seed), known()
    for _ in range(60):
        size = (float(rng.choice((0, 1, 500))), 10 ** rng.uniform(0, 6))
        note(costs, GENERATE, size, rng.choice((0.0, 10 ** rng.uniform(-6, 4))))
        line = costs.line(GENERATE, "fast")
        assert min(line) >= 0
        assert line.seconds(100, 1000) >= line.seconds(100, 999) >= line.seconds(99, 999) >= 0


@pytest.mark.parametrize("factor", [0.2, 8.0])
def test_a_lasting_change_is_followed_although_single_outliers_are_not(factor: float) -> None:
    rng, costs = random.Random(1), known()
    for _ in range(50):
        count = rng.randint(1, 64)
        note(costs, DELAY, (0, count), noisy(rng, 1 + 0.1 * count))
    before = costs.line(DELAY, "fast").seconds(0, 32)
    note(costs, DELAY, (0, 32), before * 50)
    assert costs.line(DELAY, "fast").seconds(0, 32) == pytest.approx(before, rel=0.1)
    for _ in range(60):
        count = rng.randint(1, 64)
        note(costs, DELAY, (0, count), factor * noisy(rng, 1 + 0.1 * count))
    assert costs.line(DELAY, "fast").seconds(0, 32) == pytest.approx(before * factor, rel=0.25)


# --- before anything was measured


def test_a_better_device_is_expected_to_be_faster_before_anything_was_measured() -> None:
    costs = known()
    costs.know_model("sha256:m", 14_000_000_000)
    for name in ("llm.generate", "llm.score", "reward.score", "train.sft"):
        fast, slow = (costs.line((name, "sha256:m"), device).seconds(64, 10_000) for device in ("fast", "slow"))
        assert 1.5 * fast < slow, name
    # 14 GB read once per token at 2 TB/s
    assert costs.line(GENERATE, "fast").step_s == pytest.approx(0.011, rel=0.01)


def test_every_type_has_a_prior_above_zero_and_a_size() -> None:
    for name in CATALOG:
        for subject in ("", "sha256:m"):
            prior = prior_of((name, subject), SLOW, 10**9)
            assert prior.coefficients[0] > 0
            assert prior.coefficients[2] > 0
        assert size_of(Operator("a", name, 1), {}).units >= 1


def test_a_device_without_samples_inherits_how_far_the_prior_was_off_elsewhere() -> None:
    costs = known()
    prior = costs.line(GENERATE, "slow")
    truth = [3.0 * value for value in costs.line(GENERATE, "fast")[:3]]
    for steps, units in ((16, 100), (64, 4000), (256, 900)) * 10:
        note(costs, GENERATE, (steps, units), truth[0] + truth[1] * steps + truth[2] * units)
    assert costs.line(GENERATE, "slow").seconds(64, 1000) == pytest.approx(3 * prior.seconds(64, 1000), rel=0.1)


def test_a_model_without_samples_inherits_how_far_its_type_was_off() -> None:
    costs = known()
    other: CostClass = ("llm.generate", "sha256:other")
    prior = costs.line(other, "fast").seconds(64, 1000)
    usual = costs.line(GENERATE, "fast").seconds(64, 1000)
    for _ in range(10):
        note(costs, GENERATE, (64, 1000), 5 * usual)
    assert costs.line(other, "fast").seconds(64, 1000) == pytest.approx(5 * prior, rel=0.1)
    assert costs.line(("llm.score", "sha256:m"), "fast") == known().line(("llm.score", "sha256:m"), "fast")


def test_a_no_op_takes_the_time_that_it_is_told_to_sleep() -> None:
    costs = known()
    for _ in range(30):
        note(costs, ("flow.noop", ""), (0, 500), 0.0)
    line = costs.line(("flow.noop", ""), "fast")
    assert line.seconds(0, 500) < 0.001
    assert line.seconds(2.0, 1) == pytest.approx(2.0, rel=0.01)


# --- lines are cheap, and say when they change


def test_the_version_grows_only_when_a_line_changes_by_more_than_a_twentieth() -> None:
    costs = known()
    note(costs, DELAY, (0, 10), 1.0)
    grown = costs.version
    assert grown > known().version
    for _ in range(50):
        note(costs, DELAY, (0, 10), 1.0)
    settled = costs.version
    for _ in range(50):
        note(costs, DELAY, (0, 10), 1.01)
    assert costs.version == settled
    for _ in range(50):
        note(costs, DELAY, (0, 10), 1.5)
    assert costs.version > settled


def test_a_guess_is_made_anew_when_what_it_was_made_from_has_changed() -> None:
    costs = known()
    costs.know_model("sha256:m", 10**9)
    small, version = costs.line(GENERATE, "slow").step_s, costs.version
    assert costs.line(GENERATE, "slow") is costs.line(GENERATE, "slow")
    costs.know_model("sha256:m", 10**10)
    assert costs.line(GENERATE, "slow").step_s > 2 * small
    assert costs.version > version
    costs.know_model("sha256:m", 10**10)
    assert costs.version == version + 1, "nothing new, nothing changed"


def instructions(code: CodeType) -> int:
    """Return how many instructions a function has, its generators and comprehensions included."""
    return sum(1 for _ in dis.get_instructions(code)) + sum(instructions(c) for c in code.co_consts if isinstance(c, CodeType))


def test_learning_and_looking_up_are_a_bounded_number_of_instructions_without_loops_over_what_is_known() -> None:
    assert instructions(Costs.line.__code__) < 100
    fit = fit_module.Fit
    learning = [each.__code__ for each in (Costs.note_batch, Costs._note_exec, Costs._keep, fit.note, fit._add, fit._weight)]
    learning += [each.__code__ for each in (fit._note_size, fit._solve, fit._anchor, fit_module._solved, fit.change)]
    assert sum(map(instructions, learning)) < 1400


def test_the_least_recently_used_of_too_many_lines_goes() -> None:
    costs = known()
    kinds = [("python.call", f"f@{number}") for number in range(LINES_MAX + 10)]
    for kind in kinds:
        note(costs, kind, (0, 1), 1.0)
        note(costs, kinds[0], (0, 1), 1.0)
    rows = {row["model"] for row in costs.rows()}
    assert len(rows) == LINES_MAX
    assert {"f@0", kinds[-1][1]} <= rows
    assert "f@1" not in rows


# --- loads, links, nodes


def test_loads_are_learned_per_model_and_device_and_tell_of_other_models() -> None:
    costs = known()
    costs.know_model("sha256:m", 4_000_000_000)
    costs.know_model("sha256:o", 9_000_000_000)
    assert costs.load_s("sha256:m", "fast") == pytest.approx(5.0)
    for _ in range(10):
        costs.note_batch(GENERATE, "fast", "n", 64, 1000, 1.0, 20.0, 0.0, 0)
    assert costs.load_s("sha256:m", "fast") == pytest.approx(20.0, rel=0.01)
    assert costs.load_s("sha256:o", "fast") == pytest.approx(40.0, rel=0.01)
    assert costs.load_s("sha256:o", "slow") == pytest.approx(10.0)
    assert costs.load_s("", "fast") == 0
    costs.note_batch(GENERATE, "fast", "n", 64, 1000, 1.0, 0.0, 0.0, 0)
    assert costs.load_s("sha256:m", "fast") == pytest.approx(20.0, rel=0.01), "a resident model is no load of no time"


def test_a_link_is_as_fast_as_was_measured_else_as_the_node_says_else_as_the_settings_say() -> None:
    costs = Costs(bandwidth_bytes_per_s=100e6)
    costs.know_node("said", 10e6)
    for _ in range(10):
        costs.note_batch(DELAY, "fast", "measured", 0, 1, 1.0, 0.0, 5.0, 5e6)
    costs.note_batch(DELAY, "fast", "measured", 0, 1, 1.0, 0.0, 50.0, 5e6)
    assert costs.fetch_s("measured", 10e6) == pytest.approx(10, rel=0.15)
    assert costs.fetch_s("said", 10e6) == pytest.approx(1, rel=0.01)
    assert costs.fetch_s("unknown", 10e6) == pytest.approx(0.1, rel=0.05)
    assert costs.fetch_s("unknown", 0) == 0


def test_a_node_that_is_slower_than_its_class_is_known_by_its_ratio() -> None:
    rng, costs = random.Random(2), known()
    for number in range(200):
        node = f"n{number % 5}"
        count = rng.randint(1, 32)
        note(costs, DELAY, (0, count), noisy(rng, (1 + 0.1 * count) * (2.0 if node == "n4" else 1.0)), node=node)
    assert costs.node_ratio("n4") == pytest.approx(2.0, rel=0.25)
    assert costs.node_ratio("n1") == pytest.approx(1.0, rel=0.15)
    assert costs.node_ratio("unknown") == 1.0
    assert costs.exec_s(DELAY, "fast", "n4", 0, 10) == pytest.approx(4.0, rel=0.25)


def test_the_only_node_of_a_class_is_like_its_class() -> None:
    costs = known()
    for number in range(100):
        note(costs, DELAY, (0, 1 + number % 7), 1.0 + number / 20)
    assert costs.node_ratio("n") == 1.0


def test_a_node_that_has_changed_its_device_is_compared_with_its_new_class() -> None:
    costs = known()
    for node, seconds in (("a", 1.0), ("b", 3.0), ("c", 3.0)) * 40:
        note(costs, DELAY, (0, 1), seconds, node=node)
    assert costs.node_ratio("a") < 0.6
    for _ in range(40):
        note(costs, DELAY, (0, 1), 7.0, device="slow", node="a")
    assert costs.node_ratio("a") == 1.0
    other = Costs()
    assert other.restore(costs.dump()) == 0
    assert [other.node_ratio(n) for n in "abc"] == [costs.node_ratio(n) for n in "abc"]


# --- kept for the next leader


def learned() -> Costs:
    rng, costs = random.Random(3), known()
    for _ in range(100):
        count = rng.randint(1, 64)
        kind = rng.choice((DELAY, GENERATE, ("python.call", "f@00")))
        device, node = rng.choice((("fast", "a"), ("slow", "b")))
        costs.note_batch(kind, device, node, 32, count, noisy(rng, 1 + 0.1 * count), rng.choice((0, 7.0)), 1.0, 1e6)
    return costs


def test_what_is_restored_is_what_was_kept() -> None:
    costs, other = learned(), known()
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(costs.dump()))
    assert other.restore(plain) == 0
    assert other.dump() == costs.dump()
    assert other.rows() == costs.rows()
    for each in (costs, other):
        note(each, DELAY, (0, 5), 1.7)
    assert other.dump() == costs.dump()
    assert other.line(DELAY, "fast") == costs.line(DELAY, "fast")


def test_changes_are_told_once_and_make_up_the_whole() -> None:
    costs, other = learned(), Costs()
    changes = costs.take_changes()
    assert costs.take_changes() == []
    assert other.restore([entry for _, entry in changes]) == 0
    assert sorted(map(str, other.dump())) == sorted(map(str, costs.dump()))
    note(costs, DELAY, (0, 5), 1.7, node="b")
    assert [name for name, _ in costs.take_changes()] == ["node/b/fast", "line/flow.delay//fast"]


def test_entries_that_cannot_be_read_are_left_out_and_counted() -> None:
    costs = learned()
    good = costs.dump()
    bad: list[list[object]] = [
        [],
        ["line"],
        ["line", "a", "b", "c", [1, 2]],
        ["new", "x", 1.0, 2],
        ["link", "n", float("nan"), 3],
        ["node", "n", "x", 1],
    ]
    other = Costs()
    assert other.restore([*bad, *good]) == len(bad)
    assert other.dump() == good


# --- sizes and devices


def ref(size: int, rows: int = -1) -> Ref:
    return Ref("rows", b"c", b"digest", size, rows)


def test_sizes_follow_parameters_and_inputs() -> None:
    generate = Operator("a", "llm.generate", 1, {"max_new_tokens": 50, "samples": 2})
    assert size_of(generate, {"rows": [ref(4000, 10)]}) == Size(50, 1000 + 10 * 2 * 50)
    train = Operator("a", "train.sft", 1, {"steps": 20, "batch_size": 4, "max_length": 64})
    assert size_of(train, {"rows": [ref(40_000, 10)]}) == Size(20, 20 * 4 * 64)
    assert size_of(Operator("a", "flow.noop", 1, {"sleep_s": 2.0}), {}) == Size(2.0, 1.0)
    assert size_of(Operator("a", "data.sql", 1), {"t": [ref(10**6)], "u": [ref(10**6)]}).units == pytest.approx(21)
    assert size_of(Operator("a", "not.known", 1), {"t": [ref(10**6)]}) == Size(0.0, 1.0)


def test_users_functions_are_told_apart_by_name_and_source() -> None:
    def call(function: str, digest: bytes) -> Operator:
        return Operator("a", "python.call", 1, {"function": function}, code=Ref("file", b"c", digest, 10))

    classes = {cost_class(call(f, d), {}) for f in ("f", "g") for d in (b"1" * 32, b"2" * 32)}
    assert len(classes) == 4
    assert cost_class(Operator("a", "llm.score", 1), {"model": "sha256:m"}) == ("llm.score", "sha256:m")


def test_memory_grows_with_tokens_and_is_none_where_nothing_is_known() -> None:
    costs = known()
    costs.know_model("sha256:m", 14_000_000_000)
    small, large = (costs.memory_bytes(GENERATE, Size(64, units)) for units in (100, 1000))
    assert 0 < small < large
    # Keys and values of a token of a model of seven billion parameters: some hundred kilobytes.
    assert 50_000 < small / 100 < 600_000
    assert costs.memory_bytes(("python.call", "f@00"), Size(0, 1)) == 0


@pytest.mark.parametrize(
    ("name", "memory_gib", "teraflops", "gigabytes_per_s"),
    [
        ("NVIDIA GeForce RTX 4090", 24, 330, 1008),
        ("NVIDIA GeForce RTX 3090 Ti", 24, 142, 936),
        ("NVIDIA A100-SXM4-80GB", 80, 312, 2039),
        ("NVIDIA A100-PCIE-40GB", 40, 312, 1555),
        ("NVIDIA H100 80GB HBM3", 80, 989, 3350),
        ("NVIDIA H100 PCIe", 80, 756, 2000),
        ("NVIDIA H200", 141, 989, 4800),
        ("NVIDIA L4", 24, 121, 300),
        ("NVIDIA L40S", 48, 362, 864),
        ("Tesla V100-SXM2-16GB", 16, 125, 900),
        ("Tesla T4", 16, 65, 320),
        ("NVIDIA RTX A6000", 48, 155, 768),
        ("NVIDIA RTX 6000 Ada Generation", 48, 364, 960),
    ],
)
def test_devices_are_known_by_their_names(name: str, memory_gib: int, teraflops: float, gigabytes_per_s: float) -> None:
    found = figures_of(record(devices=(Device("cuda", name, memory_bytes=memory_gib * 2**30),)))
    assert (found.flops, found.bandwidth_bytes_per_s) == (teraflops * 1e12, gigabytes_per_s * 1e9)
    assert found.watts > found.idle_watts > 0


def test_what_a_node_says_of_its_device_goes_before_the_table() -> None:
    device = Device("cuda", "Tesla T4", memory_bytes=2**30, flops=1e12, bandwidth_bytes_per_s=5e9)
    found = figures_of(record(devices=(device, device), watts=500.0, idle_watts=100.0))
    assert found == Figures("Tesla T4", 1e12, 5e9, 2**30, 500.0, 100.0)
    assert device_class(record(devices=(device, device))) == "Tesla T4 x2"
    assert device_class(record(cpus=3.6)) == "cpu x4"
    assert figures_of(record(cpus=8)).flops > figures_of(record(cpus=2)).flops


def test_an_unknown_device_is_no_error() -> None:
    assert figures_of(record(devices=(Device("cuda", "Something 9000"),))).flops > 0
    assert costs_module.Costs().line(DELAY, "never heard of").seconds(0, 1) > 0
