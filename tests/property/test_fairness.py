"""Virtual time against a fluid, for any weights, arrivals and wrong predictions; and nobody starves."""

from __future__ import annotations

from heapq import heappop, heappush

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_scheduler.core.fairness import Shares
from flowmesh_scheduler.core.settings import TenantSettings

SECOND = 1_000_000
LONGEST_S = 1.0

SECONDS = st.integers(1, 10).map(lambda tenths: tenths / 10)
ARRIVALS = st.lists(st.tuples(st.integers(0, 30 * SECOND), st.sampled_from("abc"), SECONDS), min_size=1, max_size=60)
WEIGHTS = st.fixed_dictionaries({tenant: st.sampled_from([0.5, 1.0, 2.0, 4.0]) for tenant in "abc"})


def scheduled(
    arrivals: list[tuple[int, str, float]], weights: dict[str, float], nodes: int, lie: float = 1.0, burst_s: float = 0.0
) -> list[float]:
    """Return when each request ends on so many nodes, by the order of virtual time; ``lie``: how wrong every prediction is."""
    shares = Shares({tenant: TenantSettings(weight=weight) for tenant, weight in weights.items()})
    shares.burst_s = burst_s
    lines: dict[str, list[int]] = {tenant: [] for tenant in weights}
    events = [(at_us, 0, index) for index, (at_us, _, _) in enumerate(arrivals)]
    events.sort()
    ends, free = [0.0] * len(arrivals), nodes
    while events:
        now_us = events[0][0]
        shares.advance(now_us, nodes - free)
        while events and events[0][0] == now_us:
            _, kind, index = heappop(events)
            _, tenant, seconds = arrivals[index]
            if kind:
                free += 1
                ends[index] = now_us / SECOND
                shares.end(tenant, seconds * lie, seconds)
            else:
                shares.enter(tenant, seconds * lie)
                lines[tenant].append(index)
        while free and any(lines.values()):
            waiting = [tenant for tenant in lines if lines[tenant]]
            chosen = min(waiting, key=lambda t: (shares.due(t, int(arrivals[lines[t][0]][2] * lie * SECOND)), t))
            index = lines[chosen].pop(0)
            free -= 1
            shares.begin(chosen, arrivals[index][2] * lie)
            heappush(events, (now_us + int(arrivals[index][2] * SECOND), 1, index))
    assert shares.waiting_us == shares.running_us == 0
    return ends


def fluid(arrivals: list[tuple[int, str, float]], weights: dict[str, float]) -> list[float]:
    """Return when each request ends on one node that all tenants with demand share by weight at every moment."""
    order = sorted(range(len(arrivals)), key=lambda index: (arrivals[index][0], index))
    lines: dict[str, list[list[float]]] = {tenant: [] for tenant in weights}
    ends, now_s = [0.0] * len(arrivals), 0.0
    while order or any(lines.values()):
        active = [tenant for tenant in lines if lines[tenant]]
        whole = sum(weights[tenant] for tenant in active)
        next_s = arrivals[order[0]][0] / SECOND if order else float("inf")
        elapsed_s = min([next_s - now_s, *(lines[tenant][0][1] * whole / weights[tenant] for tenant in active)])
        now_s += elapsed_s
        for tenant in active:
            lines[tenant][0][1] -= elapsed_s * weights[tenant] / whole
            if lines[tenant][0][1] <= 1e-9:
                ends[int(lines[tenant].pop(0)[0])] = now_s
        while order and arrivals[order[0]][0] / SECOND <= now_s + 1e-12:
            index = order.pop(0)
            lines[arrivals[index][1]].append([index, arrivals[index][2]])
    return ends


@given(ARRIVALS, WEIGHTS)
def test_on_one_node_nothing_ends_later_than_in_the_fluid_by_more_than_the_longest_operator(
    arrivals: list[tuple[int, str, float]], weights: dict[str, float]
) -> None:
    ends, exact = scheduled(arrivals, weights, 1), fluid(arrivals, weights)
    assert max(end - ideal for end, ideal in zip(ends, exact, strict=True)) <= LONGEST_S + 1e-3


@given(ARRIVALS, WEIGHTS, st.sampled_from([0.05, 0.5, 3.0, 50.0]), st.integers(1, 4))
def test_whatever_was_predicted_everything_ends_and_no_node_rests_while_something_waits(
    arrivals: list[tuple[int, str, float]], weights: dict[str, float], lie: float, nodes: int
) -> None:
    ends = scheduled(arrivals, weights, nodes, lie, burst_s=2.0)
    work_s = sum(seconds for _, _, seconds in arrivals)
    last_s = max(at_us for at_us, _, _ in arrivals) / SECOND
    assert all(end >= at_us / SECOND + seconds - 1e-3 for end, (at_us, _, seconds) in zip(ends, arrivals, strict=True))
    assert max(ends) <= last_s + work_s / nodes + LONGEST_S + 1e-3


@given(st.integers(1, 20), SECONDS, st.sampled_from([0.0, 2.0, 10.0]))
def test_nobody_waits_for_ever_beside_tenants_that_come_again_and_again(others: int, seconds: float, burst_s: float) -> None:
    """Others who always have one operator ready are each ahead by a bounded time; then it is the turn of who floods."""
    shares = Shares()
    shares.burst_s = burst_s
    for _ in range(10):
        shares.enter("flood", seconds)
    rounds = 0
    chosen = ""
    while chosen != "flood":
        tenant = f"other{rounds % others}"
        shares.enter(tenant, seconds)
        chosen = min((tenant, "flood"), key=lambda name: shares.due(name, int(seconds * SECOND)))
        shares.begin(chosen, seconds)
        rounds += 1
        shares.advance(int(rounds * seconds * SECOND), 1)
        shares.end(chosen, seconds, seconds)
        assert rounds <= (2 * burst_s / seconds + 2) * others + 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["enter", "begin", "end", "correct"]), SECONDS), max_size=80))
def test_the_clock_never_goes_back_and_its_sums_stay_whole(steps: list[tuple[str, str, float]]) -> None:
    shares, waiting, running = Shares(), {t: [] for t in "abc"}, {t: list[float]() for t in "abc"}  # type: ignore[var-annotated]
    before, tags = 0.0, dict.fromkeys("abc", 0.0)
    for number, (tenant, what, seconds) in enumerate(steps):
        if what == "enter":
            tag = shares.enter(tenant, seconds)
            assert tag >= tags[tenant], "tags of a tenant never fall"
            tags[tenant] = tag
            waiting[tenant].append(seconds)
        elif what == "begin" and waiting[tenant]:
            running[tenant].append(waiting[tenant].pop(0))
            shares.begin(tenant, running[tenant][-1])
        elif what == "end" and running[tenant]:
            shares.end(tenant, running[tenant].pop(0), seconds)
        elif what == "correct":
            shares.correct(tenant, -seconds)
        shares.advance(number * SECOND // 3, 2)
        assert shares.virtual >= before
        before = shares.virtual
        backlogged = [account for account in shares.accounts.values() if account.noted >= 0]
        assert shares.weights == pytest.approx(len(backlogged))
        owed = sum(account.finish - shares.virtual for account in backlogged)
        assert shares.owed_s == pytest.approx(owed, abs=1e-6)
        assert shares.held_us == sum(account.waiting_us for account in backlogged)
