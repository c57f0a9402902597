"""Fairness between tenants: weighted fair queueing by virtual time, and quotas.

Each tenant has a virtual finish F: where its demand so far ends if the mesh were a fluid that all tenants with demand share by
weight. The virtual time V is how far that fluid has come; it grows by R / (sum of the weights of tenants with F > V). Work of L
seconds that becomes ready starts at max(F, V) and moves F to L / weight behind that: who submits more moves only his own finish.
A tenant's tag is where the work of his that waits begins; the smallest tag is served first, whatever the priorities inside.

Exact shares hold up who asks for little now and then: a few operators of his at once wait for each other as if he had his share
of the mesh and no more. So a tenant may be ahead of the fluid by ``burst_s`` where little of his waits, and so much of what he
left to others while there was a queue is kept for him. Nobody else ends later by more than both for each such tenant.

The clock never lets the fluid have more than what has begun, nor less than what has ended: a mesh that is slower or faster than
it seems stays fair (two-level fair queueing as in UWFQ; the variable rate as in start-time fair queueing, Goyal et al. 1996).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from typing import TYPE_CHECKING

from flowmesh_scheduler.core.settings import TenantSettings

if TYPE_CHECKING:
    from flowmesh_scheduler.core.state import State, Vertex, Work

_UNLIMITED = TenantSettings()
_OUTSIDE = -1.0

_WRONG = 10.0
"""What was charged when work entered stands unless it is wrong by this factor when it begins: learning goes on in between."""


@dataclass(slots=True, eq=False)
class Account:
    """What is known of one tenant.

    ``finish`` and ``tag`` are virtual seconds; ``noted`` is the finish under which the tenant stands among those with demand, or
    negative. ``runs``, ``operators`` and ``slots`` count what is not over: runs, their operators, assignments that run.
    """

    tenant: str = ""
    limits: TenantSettings = _UNLIMITED
    finish: float = 0.0
    noted: float = _OUTSIDE
    last: float = 0.0
    waiting_us: int = 0
    running_us: int = 0
    used_us: int = 0
    runs: int = 0
    operators: int = 0
    slots: int = 0


@dataclass(slots=True)
class Shares:
    """The tenants' accounts and the fluid's clock.

    ``owed_s`` is what the fluid has still to give to tenants with demand; ``held_us`` what of theirs has not begun yet.
    """

    tenants: dict[str, TenantSettings] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)
    burst_s: float = 0.0
    floor: float = 0.0
    now_us: int = 0
    virtual: float = 0.0
    slots: int = 0
    weights: float = 0.0
    owed_s: float = 0.0
    held_us: int = 0
    waiting_us: int = 0
    running_us: int = 0
    _leaving: list[tuple[float, str]] = field(default_factory=list)
    _has_slot_quotas: bool | None = None

    def account(self, tenant: str) -> Account:
        """Return the account of a tenant; one that is seen for the first time gets one, and has saved nothing."""
        found = self.accounts.get(tenant)
        if found is None:
            found = self.accounts[tenant] = Account(tenant, self.tenants.get(tenant, _UNLIMITED), self.virtual)
        return found

    def weight(self, tenant: str) -> float:
        return self.account(tenant).limits.weight

    def limits(self, tenant: str) -> TenantSettings:
        return self.account(tenant).limits

    @property
    def has_slot_quotas(self) -> bool:
        """Tell whether any tenant may have only so many assignments running."""
        if self._has_slot_quotas is None:
            self._has_slot_quotas = any(limits.max_slots for limits in self.tenants.values())
        return self._has_slot_quotas

    @property
    def used_s(self) -> dict[str, float]:
        """Return the node-seconds that each tenant's operators took."""
        return {tenant: account.used_us / 1e6 for tenant, account in self.accounts.items()}

    # --- demand

    def enter(self, tenant: str, seconds: float, now_us: int = 0) -> float:
        """Take in work of so many node-seconds that became ready; return the virtual time at which it starts."""
        if now_us > self.now_us:
            self.advance(now_us, self.slots)
        account = self.account(tenant)
        start = account.last = max(account.finish, self.virtual, account.last)
        self.correct(tenant, seconds)
        self.count(tenant, "waiting", micros(seconds))
        return start

    def begin(self, tenant: str, seconds: float) -> None:
        """Note that work of a tenant which waited is running."""
        self.count(tenant, "waiting", -micros(seconds))
        self.count(tenant, "running", micros(seconds))

    def end(self, tenant: str, seconds: float, actual_s: float) -> None:
        """Note that work of a tenant which ran has ended, after ``actual_s`` instead of the ``seconds`` that it entered with."""
        self.count(tenant, "running", -micros(seconds))
        self.account(tenant).used_us += micros(actual_s)
        self.correct(tenant, actual_s - seconds)

    def correct(self, tenant: str, seconds: float) -> None:
        """Move a tenant's finish: further by what its work takes beyond what it was charged, back by a refund."""
        self.adjust(self.account(tenant), seconds)

    def adjust(self, account: Account, seconds: float) -> None:
        """Do the same where the account is at hand."""
        if seconds > 0:
            self.charge(account, seconds)
        elif seconds < 0:
            self._refund(account, -seconds)

    def charge(self, account: Account, seconds: float) -> None:
        """Move a finish further; a tenant who wanted nothing takes part again once it is ahead of the clock."""
        weight = account.limits.weight
        account.finish = max(account.finish, self.floor) + seconds / weight
        if account.noted >= 0.0:
            self.owed_s += seconds
        elif account.finish > self.virtual:
            self.owed_s += (account.finish - self.virtual) * weight
            self.weights += weight
            self.held_us += account.waiting_us
            self._note(account)

    def _refund(self, account: Account, seconds: float) -> None:
        weight = account.limits.weight
        if account.noted < 0.0:
            account.finish -= seconds / weight
            return
        before = account.finish
        account.finish -= seconds / weight
        self.owed_s -= (before - max(account.finish, self.virtual)) * weight
        if account.finish > self.virtual:
            if account.finish < account.noted:
                self._note(account)
        else:
            self._leave(account)

    def _note(self, account: Account) -> None:
        account.noted = account.finish
        heappush(self._leaving, (account.finish, account.tenant))

    def _leave(self, account: Account) -> None:
        """A tenant has nothing to ask for any more: the others share what it had."""
        account.noted = _OUTSIDE
        self.weights -= account.limits.weight
        self.held_us -= account.waiting_us

    def count(self, tenant: str, standing: str, amount_us: int) -> None:
        """Count microseconds of a tenant's work among what waits or what runs."""
        self.tally(self.account(tenant), standing, amount_us)

    def tally(self, account: Account, standing: str, amount_us: int) -> None:
        """Do the same where the account is at hand."""
        if standing == "waiting":
            account.waiting_us += amount_us
            self.waiting_us += amount_us
            if account.noted >= 0.0:
                self.held_us += amount_us
        elif standing == "running":
            account.running_us += amount_us
            self.running_us += amount_us

    # --- the clock

    def advance(self, now_us: int, capacity: float) -> None:
        """Let the fluid flow until now with ``capacity`` node-seconds per second; tenants whose demand is met drop out."""
        elapsed_us, self.now_us = now_us - self.now_us, max(now_us, self.now_us)
        if not self._leaving:
            self._calm_down()
            return
        left_s = max(self.owed_s - max(elapsed_us, 0) * capacity / 1e6, self.held_us / 1e6)
        left_s = min(left_s, (self.waiting_us + self.running_us) / 1e6)
        self._flow(max(0.0, self.owed_s - left_s))
        self._calm_down()

    def _calm_down(self) -> None:
        """Keep for tenants what they do not use, up to a limit, and only while somebody has to wait."""
        if not self.waiting_us:
            self.floor = self.virtual
        elif self.floor < self.virtual - self.burst_s:
            self.floor = self.virtual - self.burst_s

    def _flow(self, amount_s: float) -> None:
        leaving = self._leaving
        while leaving:
            finish, tenant = leaving[0]
            account = self.accounts[tenant]
            if finish != account.noted:
                heappop(leaving)
            elif account.finish > finish:
                account.noted = account.finish
                heapreplace(leaving, (account.finish, tenant))
            else:
                needed_s = (finish - self.virtual) * self.weights
                if needed_s > amount_s:
                    self.virtual += amount_s / self.weights
                    self.owed_s -= amount_s
                    return
                heappop(leaving)
                self.virtual = max(self.virtual, finish)
                self.owed_s -= needed_s
                amount_s -= needed_s
                self._leave(account)
        self.weights, self.owed_s, self.held_us = 0.0, 0.0, 0

    # --- what is asked

    def tag(self, tenant: str, taken_us: int = 0) -> float:
        """Return where a tenant stands in virtual time: who has the smallest tag is served first.

        That is where what waits of his begins; or, if less than ``burst_s`` waits, so much before all of it ends: a few
        operators go before a flood. ``taken_us`` of what waits are taken as served.
        """
        return self._tag(self.account(tenant), taken_us)

    def _tag(self, account: Account, taken_us: int) -> float:
        waiting_s = (account.waiting_us - taken_us) / (1e6 * account.limits.weight)
        return account.finish - (waiting_s if waiting_s > self.burst_s else self.burst_s)

    def due(self, tenant: str, head_us: int, taken_us: int = 0) -> float:
        """Return the virtual time by which the work that a tenant would be given next ends: the smallest goes first."""
        account = self.account(tenant)
        return self._tag(account, taken_us) + head_us / (1e6 * account.limits.weight)

    def lag_s(self, tenant: str) -> float:
        """Return by how many node-seconds a tenant is behind its fair share; negative: it had more than that."""
        account = self.account(tenant)
        if not account.waiting_us:
            return 0.0
        return account.waiting_us / 1e6 - max(0.0, account.finish - self.virtual) * account.limits.weight


def micros(seconds: float) -> int:
    """Return seconds as integer microseconds: sums of them have no rounding that grows."""
    return int(seconds * 1e6 + 0.5)


# --- work, which may have several tenants


def enter(state: State, work: Work, seconds: float) -> None:
    """Charge work that becomes ready to its waiters, unless it was charged before, and note that it waits.

    ``work.tag`` and ``work.tenant`` tell when its turn is, and whose: of several tenants, the one that is most behind.
    """
    shares = state.shares
    if not work.charged_us and len(work.waiters) == 1:
        _enter_alone(shares, work, seconds)
        return
    if not work.charged_us:
        counts: dict[str, int] = {}
        for vertex in work.waiters:
            tenant = vertex.run.tenant
            counts[tenant] = counts.get(tenant, 0) + 1
        work.payers = counts if len(counts) > 1 else None
        work.charged_us = max(1, micros(seconds))
        _wait_under(shares, work, counts)
        for tenant, amount_us in _parts(work):
            shares.correct(tenant, amount_us / 1e6)
    _move(shares, work, "waiting")


def _enter_alone(shares: Shares, work: Work, seconds: float) -> None:
    """Do the same for work that one vertex waits for, as for nearly all: this is done for every operator."""
    (vertex,) = work.waiters
    account = vertex.run.account
    work.tenant, work.payers, work.standing = account.tenant, None, "waiting"
    work.tag = account.last = max(account.finish, account.last, shares.virtual)
    charged_us = work.charged_us = max(1, int(seconds * 1e6 + 0.5))
    shares.charge(account, charged_us / 1e6)
    shares.tally(account, "waiting", charged_us)


def begin(state: State, work: Work, factor: float = 1.0) -> None:
    """Note that work was given to a node, and is thought by now to take ``factor`` times what it was charged."""
    _move(state.shares, work, "running")
    if factor != 1.0 and work.charged_us:
        _recharge(state.shares, work, work.payers, int(work.charged_us * factor))


def factor_of(works: Sequence[Work], predicted_s: float) -> float:
    """Return by how much the charges of a batch are wrong, now that it begins; 1 where they have the right size."""
    charged_s = sum(work.charged_us for work in works) / 1e6
    if not charged_s or not predicted_s or 1 / _WRONG < predicted_s / charged_s < _WRONG:
        return 1.0
    return predicted_s / charged_s


def leave(state: State, work: Work) -> None:
    """Note that work neither waits nor runs."""
    _move(state.shares, work, "")


def end(state: State, work: Work, actual_us: int) -> None:
    """Work has ended after so many microseconds of a node's time: its payers are charged what it took, not what was thought."""
    if not work.charged_us:
        return
    shares = state.shares
    if work.payers is None:
        account, charged_us = shares.account(work.tenant), work.charged_us
        account.used_us += actual_us
        if work.standing:
            shares.tally(account, work.standing, -charged_us)
            work.standing = ""
        if actual_us != charged_us:
            shares.adjust(account, (actual_us - charged_us) / 1e6)
        work.charged_us = 0
        return
    leave(state, work)
    before = _parts(work)
    work.charged_us = actual_us
    for (tenant, predicted_us), (_, used_us) in zip(before, _parts(work), strict=True):
        shares.account(tenant).used_us += used_us
        shares.correct(tenant, (used_us - predicted_us) / 1e6)
    work.charged_us, work.payers = 0, None


def succeed(state: State, work: Work, metered_us: int) -> None:
    """Work has succeeded: it is charged what the node metered, but no more than the time for which the node had it."""
    if metered_us > work.charged_us:
        metered_us = min(metered_us, max(work.charged_us, _elapsed_us(state, work)))
    end(state, work, metered_us)


def abandon(state: State, work: Work) -> None:
    """An attempt has failed, or nobody wants it any more: what it has not used is given back."""
    end(state, work, min(work.charged_us, _elapsed_us(state, work)))


def _elapsed_us(state: State, work: Work) -> int:
    outstanding = state.assignments.get(work.assignment) if work.standing == "running" else None
    return 0 if outstanding is None else max(0, state.shares.now_us - outstanding.assigned_at_us)


def tenant_of(work: Work) -> str:
    """Return under whom work is counted where it can be under one tenant only."""
    return work.tenant or next(iter(work.waiters)).run.tenant


def join(state: State, work: Work, vertex: Vertex) -> bool:
    """Let one more waiter pay its share of work; earlier ones get back what they paid for it.

    Return whether the work now waits under another tenant, who is served sooner: then it needs another place in the pool.
    """
    tenant = vertex.run.tenant
    if not work.charged_us or (work.payers is None and tenant == work.tenant):
        return False
    shares = state.shares
    counts = {work.tenant: len(work.waiters) - 1} if work.payers is None else dict(work.payers)
    counts[tenant] = counts.get(tenant, 0) + 1
    is_sooner = work.standing == "waiting" and tenant != work.tenant and shares.tag(tenant) < work.tag
    _recharge(shares, work, counts, work.charged_us)
    if is_sooner:
        _wait_under(shares, work, [tenant])
    return is_sooner


def part(state: State, work: Work, vertex: Vertex) -> bool:
    """Let a waiter go: what waits is paid by the others, what runs is paid by all who wanted it when it began.

    Return whether the work now waits under another tenant: then it needs another place in the pool.
    """
    if work.payers is None or not work.charged_us or not work.waiters or work.standing == "running":
        return False
    counts = dict(work.payers)
    counts[vertex.run.tenant] -= 1
    if not counts[vertex.run.tenant]:
        del counts[vertex.run.tenant]
    is_left = work.tenant not in counts
    if is_left:
        _wait_under(state.shares, work, counts)
    _recharge(state.shares, work, counts, work.charged_us)
    return is_left and work.standing == "waiting"


def _wait_under(shares: Shares, work: Work, tenants: Iterable[str]) -> None:
    """Let work wait under that of its tenants who is most behind."""
    work.tenant = min(tenants, key=lambda tenant: (shares.tag(tenant), tenant))
    account = shares.account(work.tenant)
    work.tag = account.last = max(account.finish, account.last, shares.virtual)


def _parts(work: Work) -> list[tuple[str, int]]:
    """Return what each tenant pays of the work, in microseconds; nothing before the work has been charged."""
    if work.payers is None:
        return [(work.tenant, work.charged_us)]
    total = sum(work.payers.values())
    return [(tenant, work.charged_us * count // total) for tenant, count in work.payers.items()]


def _recharge(shares: Shares, work: Work, payers: dict[str, int] | None, charged_us: int) -> None:
    """Divide what work costs anew."""
    before = dict(_parts(work))
    work.payers, work.charged_us = payers, max(1, charged_us)
    after = dict(_parts(work))
    for tenant in {**before, **after}:
        change_us = after.get(tenant, 0) - before.get(tenant, 0)
        shares.correct(tenant, change_us / 1e6)
        shares.count(tenant, work.standing, change_us)
    if payers is not None and len(payers) == 1:
        work.tenant, work.payers = next(iter(payers)), None


def _move(shares: Shares, work: Work, standing: str) -> None:
    """Count work among what waits, what runs, or neither, for each tenant that pays for it."""
    if work.standing == standing or not work.charged_us:
        return
    if work.payers is None:
        account, charged_us = shares.account(work.tenant), work.charged_us
        if work.standing:
            shares.tally(account, work.standing, -charged_us)
        if standing:
            shares.tally(account, standing, charged_us)
        work.standing = standing
        return
    for tenant, amount_us in _parts(work):
        shares.count(tenant, work.standing, -amount_us)
        shares.count(tenant, standing, amount_us)
    work.standing = standing


# --- quotas


def refusal(state: State, tenant: str, operators: int) -> str:
    """Return why a run with so many operators cannot be accepted from a tenant; empty if it can."""
    account = state.shares.account(tenant)
    limits = account.limits
    if limits.max_runs and account.runs >= limits.max_runs:
        return f"the quota of {limits.max_runs} runs at a time is used up: {account.runs} have not ended"
    if limits.max_operators and account.operators + operators > limits.max_operators:
        return (
            f"the quota of {limits.max_operators} operators at a time does not hold {operators} more: "
            f"{account.operators} have not ended"
        )
    return ""


def may_start(state: State, tenant: str) -> bool:
    """Tell whether a tenant may have one more assignment running."""
    account = state.shares.accounts.get(tenant)
    return account is None or not account.limits.max_slots or account.slots < account.limits.max_slots


def occupy(state: State, tenants: tuple[str, ...], slots: int = 1) -> None:
    """Count an assignment that runs, or (``slots`` = -1) does so no more, for each tenant that has work in it."""
    state.shares.slots += slots
    for tenant in tenants:
        account = state.shares.account(tenant)
        account.slots += slots
        if slots < 0 and account.slots == account.limits.max_slots - 1:
            _look_again(state, tenant)


def _look_again(state: State, tenant: str) -> None:
    """A tenant that had all slots of its quota may start something again."""
    for queue in state.pool.values():
        if tenant in queue.heaps:
            state.fleet.note_change(queue)
            state.unsettled.add(queue.market)
