"""Nothing on the way of an operator is linear in the number of operators: counted in bytecode, not in seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.instructions import count_bytecode
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import Resources, Retry, chain, fan, operator, workflow

from flowmesh_scheduler.core import events as e

SIZE = 600
GROWTH_MAX = 2.3
NEVER = 1 << 60


def desk(*nodes: str) -> Desk:
    made = Desk(checks_every=NEVER)
    made.join(*(nodes or ("n1", "n2")))
    return made


def run_independent(count: int) -> None:
    made = desk()
    made.submit(fan(count))
    made.work_off()
    assert made.end().counts == {"done": count}


def run_one_by_one(count: int) -> None:
    made = desk()
    made.submit(workflow([operator(f"o{i}", type="python.call", params={"function": f"f{i}"}) for i in range(count)], {}))
    made.work_off()
    assert made.end().counts == {"done": count}


def run_a_chain(count: int) -> None:
    made = desk()
    made.submit(chain(count))
    made.work_off()
    assert made.end().counts == {"done": count}


def run_a_join(count: int) -> None:
    made = desk()
    operators = [operator(f"o{i}", nonce=i) for i in range(count)]
    made.submit(workflow([*operators, operator("join", after=list(range(count)))]))
    made.work_off()
    assert made.end().counts == {"done": count + 1}


def run_many_runs(count: int) -> None:
    made = desk()
    for number in range(count):
        made.submit(chain(1, number), f"r{number}")
    made.work_off()
    assert len(made.ended) == count


def run_many_runs_one_after_another(count: int) -> None:
    made = desk()
    for number in range(count):
        made.submit(chain(1, number), f"r{number}")
        made.work_off()
    assert len(made.ended) == count


def run_equal_operators(count: int) -> None:
    made = desk()
    made.submit(workflow([operator(f"o{i}", nonce=1) for i in range(count)], {}))
    made.work_off()
    assert made.end().counts == {"done": count}


def cancel_equal_operators(count: int) -> None:
    made = desk()
    made.submit(workflow([operator(f"o{i}", nonce=1) for i in range(count)], {}))
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    assert made.end().counts == {"cancelled": count}


def cancel_independent(count: int) -> None:
    made = desk()
    made.submit(fan(count))
    made.apply(e.CancelRequested("ta", "r1", "alice"))
    assert made.end().counts == {"cancelled": count}


def serve_hits(count: int) -> None:
    made = desk()
    made.submit(fan(count))
    made.work_off()
    made.submit(fan(count), "r2", "tb")
    assert made.end("r2", "tb").counts == {"done": count}


def wait_for_nodes(count: int) -> None:
    """A backlog that no node can run, and work beside it."""
    made = desk()
    big = [operator(f"o{i}", type="train.sft", params={"seed": i}, resources=Resources(gpus=8)) for i in range(count)]
    made.submit(workflow(big, {}), "r1")
    for number in range(count):
        made.submit(chain(1, number), f"s{number}")
        made.work_off()


def crash_and_retry(count: int) -> None:
    made = desk()
    made.submit(workflow([operator(f"o{i}", nonce=i, retry=Retry(3, 0.1)) for i in range(count)], {}))
    while made.assigned:
        made.fail(next(iter(made.assigned.values())), "crashed")
    made.wait(1, beating=["n1", "n2"])
    made.work_off()
    assert made.end().counts == {"done": count}


def lose_a_node(count: int) -> None:
    made = desk("n1", "n2")
    made.submit(fan(count))
    made.lose("n1")
    made.work_off()
    assert made.end().counts == {"done": count}


def take_over(count: int) -> None:
    made = desk()
    made.submit(fan(count))
    made.run(next(iter(made.assigned.values())))
    made.successor("n1", "n2", checks_every=NEVER).work_off()


@pytest.mark.parametrize(
    "scenario",
    [
        run_independent,
        run_one_by_one,
        run_a_chain,
        run_a_join,
        run_many_runs,
        run_many_runs_one_after_another,
        run_equal_operators,
        cancel_equal_operators,
        cancel_independent,
        serve_hits,
        wait_for_nodes,
        crash_and_retry,
        lose_a_node,
        take_over,
    ],
)
def test_twice_the_operators_take_about_twice_the_instructions(scenario: Callable[[int], None]) -> None:
    once, twice = (count_bytecode(lambda n=n: scenario(n), "flowmesh_scheduler") for n in (SIZE, 2 * SIZE))  # type: ignore[misc]
    assert twice / once <= GROWTH_MAX, (
        f"{once / SIZE:.0f} instructions per operator of {SIZE}, {twice / SIZE / 2:.0f} of {2 * SIZE}"
    )
