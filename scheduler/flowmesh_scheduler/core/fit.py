"""One line of costs, learned as batches end: seconds = fixed + step * (most steps) + unit * (sum of units).

A linear regression kept as sums, so that a batch costs a few dozen multiplications whatever came before. Errors are relative:
a batch of a minute may be off by seconds, one of a millisecond may not. One that is far off counts less (Huber); old ones fade,
at once when several in a row tell of a change.
The prior gives the shape while batches do not tell the terms apart: its width is that of the data, so any one term may
turn out to be the whole. No coefficient is below zero: more work never takes less time.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

_FADING = 0.98
_HUBER = 1.5
_SPREAD_AT_FIRST = 0.5
_SPREAD_MIN = 0.02
_STRENGTH_MIN = 0.003
_RECENT = 50
_ERRORS = 200
_EARLY_SAMPLES = 6
_EARLY_SPREAD = 0.1
_WARM_SAMPLES = 20
_FAR_IN_A_ROW = 5
_KEPT = 0.01
_PIVOT_MIN = 1e-12
_NOTHING = 1e-60
_SECONDS_MIN = 1e-6
_SIZE_MIN_S = 1e-4
_ERROR_FLOOR_S = 1e-3

Coefficients = tuple[float, float, float]


class Line(NamedTuple):
    """Seconds of a batch: ``fixed_s + step_s * max(steps) + unit_s * sum(units)``; ``spread`` is its relative deviation."""

    fixed_s: float
    step_s: float
    unit_s: float
    spread: float

    def seconds(self, max_steps: float, sum_units: float) -> float:
        """Return the seconds of a batch."""
        return self.fixed_s + self.step_s * max_steps + self.unit_s * sum_units


class Fit:
    """The line of one kind of work on one class of device.

    ``base`` is the prior from the device's figures alone, ``prior`` that and what is known from elsewhere. A ``firm`` prior is
    right in its size too: it is not scaled to the first batches.
    """

    __slots__ = (
        "_log_scale", "_means", "_row", "_settling", "_sums", "base", "errors", "is_firm", "line", "prior", "recent", "samples",
        "spread",
    )  # fmt: skip

    def __init__(self, base: Coefficients, prior: Coefficients, is_firm: bool = False) -> None:
        self.base = base
        self.prior = prior
        self.is_firm = is_firm
        self.samples = 0
        self.spread = _SPREAD_AT_FIRST
        self.recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        """Predicted and measured seconds of the last batches."""
        self.errors: deque[float] = deque(maxlen=_ERRORS)
        """Relative errors of the predictions after the first twenty batches."""
        self.line = Line(*prior, 1.0)
        self._settling = 0
        """Batches since the line was last a guess."""
        self._row = 0
        """Batches in a row that were far above (below, if negative) what was expected."""
        self._log_scale = 0.0
        self._means = (0.0, 0.0, 0.0)
        self._sums: tuple[float, ...] = (0.0,) * 9

    def note(self, max_steps: float, sum_units: float, seconds: float, predicted_s: float) -> None:
        """Learn from a batch; ``predicted_s`` is what was expected of it when it was assigned."""
        seconds = max(seconds, _SECONDS_MIN)
        self.recent.append((predicted_s, seconds))
        if self.samples >= _WARM_SAMPLES:
            self.errors.append(relative_error(predicted_s, seconds))
        weight, size_s = 1.0, seconds
        if self.samples:
            expected_s = max(self.line.seconds(max_steps, sum_units), _SECONDS_MIN)
            weight, size_s = self._weight((seconds - expected_s) / expected_s), expected_s
            if self._settling < _EARLY_SAMPLES:  # the line is a guess still: what was measured is a better scale
                weight, size_s = 1.0, max(seconds, expected_s / 10)
        self._add(max_steps, sum_units, seconds, weight / max(size_s, _SIZE_MIN_S) ** 2)
        self.samples += 1
        self._settling += 1
        self._note_size(max_steps, sum_units, seconds)
        self.line = Line(*self._solve(), self.spread + (1.0 - min(self.spread, 1.0)) / (1 + self._settling))

    def _weight(self, deviation: float) -> float:
        """Return how much a batch counts that is so far off, relatively; learn how far off they usually are.

        Several in a row that are far off on the same side are no accidents, and do not count as usual.
        """
        far = abs(deviation) / self.spread
        self._row = 0 if far < _HUBER else max(self._row, 0) + 1 if deviation > 0 else min(self._row, 0) - 1
        if self._settling >= _EARLY_SAMPLES:
            if abs(self._row) >= _FAR_IN_A_ROW:
                self._begin_again()
                return 1.0
            if abs(self._row) > 1:
                return _HUBER / far
        usual = 1.25 * min(abs(deviation), 3.0 * self.spread if self._settling > 1 else 1.0)
        self.spread = max(_SPREAD_MIN, self.spread + max(0.1, 1 / (self._settling + 2)) * (usual - self.spread))
        return 1.0 if far <= _HUBER else _HUBER / far

    def _begin_again(self) -> None:
        """What was learned is the shape now, its size is learned anew: the machine or the work is not what it was."""
        self.prior = self.line[:3]
        self.spread = _SPREAD_AT_FIRST
        self._log_scale, self._settling, self._row = 0.0, 0, 0
        self._sums = tuple(value * _KEPT for value in self._sums)

    def _add(self, x1: float, x2: float, y: float, w: float) -> None:
        a00, a01, a02, a11, a12, a22, b0, b1, b2 = self._sums
        w1, w2, f = w * x1, w * x2, _FADING
        self._sums = (
            a00 * f + w,
            a01 * f + w1,
            a02 * f + w2,
            a11 * f + w1 * x1,
            a12 * f + w1 * x2,
            a22 * f + w2 * x2,
            b0 * f + w * y,
            b1 * f + w1 * y,
            b2 * f + w2 * y,
        )

    def _note_size(self, x1: float, x2: float, y: float) -> None:
        """Learn how large batches are, and how far the prior is off as a whole."""
        gain = max(1 / self._settling, 0.05)
        m1, m2, my = self._means
        self._means = (m1 + gain * (x1 - m1), m2 + gain * (x2 - m2), my + gain * (y - my))
        if not self.is_firm:
            p0, p1, p2 = self.prior
            ratio = math.log(y / max(p0 + p1 * x1 + p2 * x2, 1e-9))
            self._log_scale += gain * (max(-14.0, min(14.0, ratio)) - self._log_scale)

    def _solve(self) -> Coefficients:
        """Return the coefficients, none below zero: whichever would be is held at zero."""
        m1, m2, my = self._means
        p0, p1, p2 = self._anchor()
        spread = self.spread if self._settling > _EARLY_SAMPLES else min(self.spread, _EARLY_SPREAD)
        strength = max(_STRENGTH_MIN, spread * spread) / (my * my)
        l0, l1, l2 = strength, strength * m1 * m1, strength * m2 * m2
        # What never occurs stays at its prior.
        l1, l2 = l1 if l1 > _NOTHING else 1.0, l2 if l2 > _NOTHING else 1.0
        a00, a01, a02, a11, a12, a22, b0, b1, b2 = self._sums
        a00, a11, a22 = a00 + l0, a11 + l1, a22 + l2
        b0, b1, b2 = b0 + l0 * p0, b1 + l1 * p1, b2 + l2 * p2
        for _ in range(3):
            w0, w1, w2 = _solved(a00, a01, a02, a11, a12, a22, b0, b1, b2)
            worst = min(w0, w1 * m1, w2 * m2)
            if worst >= 0:
                break
            if worst == w0:
                a00, a01, a02, b0 = 1.0, 0.0, 0.0, 0.0
            elif worst == w1 * m1:
                a01, a11, a12, b1 = 0.0, 1.0, 0.0, 0.0
            else:
                a02, a12, a22, b2 = 0.0, 0.0, 1.0, 0.0
        return (max(w0, 0.0), max(w1, 0.0), max(w2, 0.0))

    def _anchor(self) -> Coefficients:
        """Return what holds where batches say nothing: the prior in the size of the data, later what was learned before.

        Otherwise batches of always the same size would slowly forget what others had told about the terms.
        """
        if self._settling > _WARM_SAMPLES:
            return self.line[:3]
        scale = math.exp(self._log_scale)
        return (self.prior[0] * scale, self.prior[1] * scale, self.prior[2] * scale)

    def ratios(self) -> Coefficients:
        """Return how many times dearer each term is than the figures of the device say."""
        b0, b1, b2 = self.base
        return (
            self.line.fixed_s / b0 if b0 else 1.0,
            self.line.step_s / b1 if b1 else 1.0,
            self.line.unit_s / b2 if b2 else 1.0,
        )

    def log_ratio(self) -> float:
        """Return the logarithm of how many times dearer a usual batch is than the figures of the device say."""
        b0, b1, b2 = self.base
        m1, m2, _ = self._means
        return math.log(max(self.line.seconds(m1, m2), 1e-9) / max(b0 + b1 * m1 + b2 * m2, 1e-9))

    def change(self, before: Line) -> float:
        """Return by which part of a usual batch the line differs from what it was."""
        m1, m2, _ = self._means
        now = self.line
        usual_s = max(before.seconds(m1, m2), now.seconds(m1, m2), _SECONDS_MIN)
        return (
            max(
                abs(now.fixed_s - before.fixed_s),
                abs(now.step_s - before.step_s) * m1,
                abs(now.unit_s - before.unit_s) * m2,
            )
            / usual_s
        )

    def dump(self) -> list[Any]:
        """Return all of it as plain data."""
        plain = [
            self.samples,
            self._settling,
            self._row,
            self.spread,
            self._log_scale,
            list(self._means),
            list(self._sums),
            list(self.line),
        ]
        recent = [value for pair in self.recent for value in pair]
        return [list(self.base), list(self.prior), self.is_firm, *plain, recent, list(self.errors)]

    @classmethod
    def restore(cls, plain: list[Any]) -> Fit:
        """Return what was dumped; raise ValueError or TypeError when it is something else."""
        base, prior, is_firm, samples, settling, row, spread, log_scale, means, sums, line, recent, errors = plain
        fit = cls(_three(base), _three(prior), bool(is_firm))
        fit.samples, fit._settling, fit._row = int(samples), int(settling), int(row)
        fit.spread, fit._log_scale = _finite((spread, log_scale), 2)
        fit._means = _three(means)
        fit._sums = _finite(sums, 9)
        fit.line = Line(*_finite(line, 4))
        fit.recent.extend(zip(recent[::2], recent[1::2], strict=True))
        fit.errors.extend(errors)
        return fit


def relative_error(predicted_s: float, measured_s: float) -> float:
    """Return by which part a prediction was off; what is below a millisecond counts as a millisecond."""
    return abs(predicted_s - measured_s) / max(measured_s, _ERROR_FLOOR_S)


def _finite(values: Any, count: int) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if len(found) != count or not all(math.isfinite(value) for value in found):
        raise ValueError(f"expected {count} finite numbers")
    return found


def _three(values: Any) -> Coefficients:
    a, b, c = _finite(values, 3)
    return (a, b, c)


def _solved(
    a00: float, a01: float, a02: float, a11: float, a12: float, a22: float, b0: float, b1: float, b2: float
) -> Coefficients:
    """Return the solution of a symmetric positive definite system of three, by elimination."""
    l10, l20 = a01 / a00, a02 / a00
    d1 = max(a11 - l10 * a01, a11 * _PIVOT_MIN)
    t = a12 - l20 * a01
    l21 = t / d1
    d2 = max(a22 - l20 * a02 - l21 * t, a22 * _PIVOT_MIN)
    z1 = b1 - l10 * b0
    z2 = b2 - l20 * b0 - l21 * z1
    w2 = z2 / d2
    w1 = z1 / d1 - l21 * w2
    return (b0 / a00 - l10 * w1 - l20 * w2, w1, w2)
