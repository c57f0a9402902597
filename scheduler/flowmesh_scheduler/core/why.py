"""Why a batch went to a node, in terms of the utility: what it came from, what else was weighed, what would have turned it.

A flip is the smallest change of one factor of an alternative with which it would have won, all others as they were. The utility
is monotonic in each factor, so the border is found by bisection over the floating-point numbers themselves: the change told
wins, the next number before it does not.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, NamedTuple, Protocol

from flowmesh_scheduler.core.utility import Factors, score, terms

_LARGEST = 1e30
_TIE = 1e-6
_HOUR_S = 3600.0


class Flip(NamedTuple):
    """One factor of an alternative: as it is, and the nearest value with which the alternative wins."""

    field: str
    now: float
    needed: float

    @property
    def far(self) -> float:
        """Return how large a change that is against the value itself."""
        return abs(self.needed - self.now) / self.now if self.now else float("inf")


class _Wording(NamedTuple):
    """How a factor is told: what falls or grows, its unit, and how many of them one of the factor's own is."""

    subject: str
    unit: str
    times: float = 1.0


_WORDS = {
    "price_usd_per_s": _Wording("its price", "$/h", _HOUR_S),
    "load_s": _Wording("loading the model there", "s"),
    "fetch_s": _Wording("fetching the inputs", "s"),
    "exec_s": _Wording("running it there", "s"),
    "wait_s": _Wording("the wait until it can begin", "s"),
    "value_usd": _Wording("the worth of its batch", "µ$", 1e6),
    "egress_usd": _Wording("the price of the traffic", "µ$", 1e6),
    "watts": _Wording("its power draw", "W"),
    "hazard_per_s": _Wording("its risk of being taken away", "per h", _HOUR_S),
    "redo_usd": _Wording("the cost of beginning again", "µ$", 1e6),
    "opportunity_usd_per_s": _Wording("what it would earn with other work", "$/h", _HOUR_S),
}
"""The factors that may change alone, and how that is said."""

OF_NODE = frozenset({"price_usd_per_s", "wait_s", "watts", "hazard_per_s", "opportunity_usd_per_s"})
"""Factors that two batches on one node share: none of them changes for one alone."""

OF_BATCH = frozenset({"value_usd"})
"""Factors that two nodes for one batch share."""


class _Weighed(Protocol):
    @property
    def node(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def queue(self) -> str: ...
    @property
    def factors(self) -> Factors: ...


class Alternative(_Weighed, Protocol):
    """What was weighed and not chosen."""

    @property
    def label(self) -> str: ...


class Decision(_Weighed, Protocol):
    """A choice as the placement recorded it."""

    @property
    def assignment(self) -> str: ...
    @property
    def alternatives(self) -> Sequence[Alternative]: ...


def flip(chosen: Factors, other: Factors, shared: Collection[str] = ()) -> list[Flip]:
    """Return, for each factor of ``other`` that could do it alone, the change that makes it win; the smallest change first.

    ``shared`` names factors that both have in common in truth. Empty when ``other`` scores higher already.
    """
    target = score(chosen)
    if score(other) > target:
        return []
    found = [_flip_one(target, other, name) for name in _WORDS if name not in shared]
    return sorted((each for each in found if each is not None), key=lambda each: each.far)


def _flip_one(target: float, other: Factors, name: str) -> Flip | None:
    now = float(getattr(other, name))
    for limit in (0.0, _LARGEST):
        if limit != now and _score_with(other, name, limit) > target:
            return Flip(name, now, _border(target, other, name, now, limit))
    return None


def _score_with(factors: Factors, name: str, value: float) -> float:
    return score(factors._replace(**{name: value}))


def _border(target: float, other: Factors, name: str, loses: float, wins: float) -> float:
    """Return the winning value next to a losing one, between a value that loses and one that wins."""
    low, high = _place(loses), _place(wins)
    while abs(high - low) > 1:
        middle = (low + high) // 2
        if _score_with(other, name, _at(middle)) > target:
            high = middle
        else:
            low = middle
    return _at(high)


def _place(value: float) -> int:
    """Return the number of a floating-point number among those from 0 on."""
    return int(struct.unpack(">q", struct.pack(">d", value))[0])


def _at(place: int) -> float:
    return float(struct.unpack(">d", struct.pack(">q", place))[0])


def told(each: Flip) -> float:
    """Return the value of a flip as it is said: three digits, rounded to where the alternative still wins; in its own unit."""
    times = _WORDS[each.field].times
    rounding = ROUND_FLOOR if each.needed < each.now else ROUND_CEILING
    return float(Context(prec=3, rounding=rounding).create_decimal(Decimal(each.needed) * Decimal(times)))


def in_words(label: str, each: Flip) -> str:
    """Return a flip as a sentence: ``node-2 would win if its price fell to 0.31 $/h (is 0.5)``."""
    word = _WORDS[each.field]
    if each.far < _TIE:
        return f"{label} was worth as much: it would win if {word.subject} were the least bit better"
    verb = "fell" if each.needed < each.now else "rose"
    return f"{label} would win if {word.subject} {verb} to {told(each):g} {word.unit} (is {each.now * word.times:.3g})"


def explain(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain data: terms and score in dollars, and for each alternative its gap and its flips."""
    own = score(decision.factors)
    return {
        "assignment": decision.assignment,
        **_weighed(decision, decision.count),
        "alternatives": [
            {
                "label": other.label,
                **_weighed(other, decision.count if _is_same_batch(decision, other) else other.count),
                "gap_usd": own - score(other.factors),
                "flips": _flips(decision, other),
            }
            for other in decision.alternatives
        ],
    }


def _is_same_batch(decision: Decision, other: Alternative) -> bool:
    return other.queue == decision.queue and other.factors.value_usd == decision.factors.value_usd


def _weighed(candidate: _Weighed, count: int) -> dict[str, Any]:
    found: Mapping[str, float] = terms(candidate.factors)
    return {
        "node": candidate.node,
        "count": count,
        "queue": candidate.queue,
        "score_usd": score(candidate.factors),
        "terms_usd": dict(found),
        "factors": candidate.factors._asdict(),
    }


def _flips(decision: Decision, other: Alternative) -> list[dict[str, Any]]:
    shared: frozenset[str] = frozenset()
    if other.node == decision.node:
        shared |= OF_NODE
    if _is_same_batch(decision, other):
        shared |= OF_BATCH
    label = other.node if _is_same_batch(decision, other) else other.label
    if other.queue == decision.queue and label == other.label:
        label = f"{other.count} of the same kind on {other.node}"
    return [
        {"field": each.field, "now": each.now, "needed": each.needed, "words": in_words(label, each)}
        for each in flip(decision.factors, other.factors, shared)
    ]
