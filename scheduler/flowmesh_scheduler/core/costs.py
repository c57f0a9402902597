"""What running costs: seconds of batches, of loading models and of fetching, learned from what nodes metered.

Nothing here is authority. A leader that inherits nothing begins with the priors of ``sizes`` and learns again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import islice
from statistics import median
from typing import Any

from flowmesh_scheduler.core.devices import Figures
from flowmesh_scheduler.core.fit import Coefficients, Fit, Line, relative_error
from flowmesh_scheduler.core.peers import Factor, Peers, factor_of
from flowmesh_scheduler.core.sizes import (
    MODEL_BYTES,
    CostClass,
    Prior,
    Size,
    cost_class,
    memory_of,
    prior_of,
    size_of,
)

__all__ = ["CostClass", "Costs", "Line", "Size", "cost_class", "size_of"]

LINES_MAX = 1024
"""Lines kept; the one that has not been used for the longest goes."""

_CHANGE = 0.05
_PEERS = 32
_USUAL_SPREAD = 0.15
_SETTLED_SAMPLES = 5
_ROUND_TRIP_S = 0.002
_FETCH_MIN_BYTES = 4_000_000
_LOAD_FIXED_S = 1.0
_LOAD_BYTES_PER_S = 1e9
_RECENT_ERRORS = 20
_UNKNOWN_DEVICE = Figures("unknown", 120e9, 20e9, 0, 100.0, 60.0)

Place = tuple[CostClass, str]


class Costs:
    """All that has been learned. ``version`` grows whenever a line or the time of a load changed by more than a twentieth."""

    def __init__(self, bandwidth_bytes_per_s: float = 100e6) -> None:
        self.version = 0
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._figures: dict[str, Figures] = {}
        self._model_bytes: dict[str, int] = {}
        self._fits: dict[Place, Fit] = {}
        """In the order of their last use; ``_of_kind`` and ``_of_type`` are the same ones again."""
        self._of_kind: dict[CostClass, dict[str, Fit]] = {}
        self._of_type: dict[str, dict[Place, Fit]] = {}
        self._lines: dict[Place, Line] = {}
        self._published: dict[Place, Line] = {}
        self._guesses: dict[str, dict[Place, None]] = {}
        self._loads: dict[tuple[str, str], Factor] = {}
        self._load_ratios: dict[str, Factor] = {}
        self._downloads: dict[str, Factor] = {}
        self._links: dict[str, Factor] = {}
        self._link_priors: dict[str, float] = {}
        self._peers = Peers()
        self._factors = {"loads": self._load_ratios, "link": self._links, "download": self._downloads}
        self._changed: dict[tuple[str, ...], None] = {}

    # --- what is known beforehand

    def know_device(self, device: str, figures: Figures) -> None:
        """Learn what a class of device can do."""
        if self._figures.get(device) != figures:
            self._figures[device] = figures
            self._forget_guesses()

    def know_model(self, digest: str, size_bytes: int) -> None:
        """Learn how large a model is."""
        if size_bytes > 0 and self._model_bytes.get(digest) != size_bytes:
            self._model_bytes[digest] = size_bytes
            self._forget_guesses()

    def know_node(self, node: str, bandwidth_bytes_per_s: float) -> None:
        """Learn how fast a node says that its link is; 0 is unknown."""
        if bandwidth_bytes_per_s > 0:
            self._link_priors[node] = bandwidth_bytes_per_s

    def forget_node(self, node: str) -> None:
        """Forget how a node compares with its class: it is not what it was."""
        if self._peers.factors.pop(node, None) is not None:
            self.version += 1

    def figures(self, device: str) -> Figures:
        """Return what a class of device can do."""
        return self._figures.get(device, _UNKNOWN_DEVICE)

    # --- what things cost

    def line(self, kind: CostClass, device: str) -> Line:
        """Return what a batch of this kind takes on a class of device: learned, or guessed from others and from figures."""
        place = (kind, device)
        line = self._lines.get(place)
        if line is None:
            line = self._lines[place] = Line(*self._prior(place)[1], 1.0)
            self._guesses.setdefault(kind[0], {})[place] = None
        return line

    def beside(self, model_bytes: Mapping[str, int]) -> Costs:
        """Return costs that know these models too and share what was learned: questions must not change what choices rest on."""
        other = copy(self)
        other._lines, other._model_bytes = dict(self._lines), dict(self._model_bytes)
        other._guesses = {name: dict(places) for name, places in self._guesses.items()}
        for digest, size_bytes in model_bytes.items():
            other.know_model(digest, size_bytes)
        return other

    def samples(self, kind: CostClass, device: str) -> int:
        """Return how many batches a line was learned from; 0 while it is guessed."""
        fit = self._fits.get((kind, device))
        return 0 if fit is None else fit.samples

    def exec_s(self, kind: CostClass, device: str, node: str, max_steps: float, sum_units: float) -> float:
        """Return the seconds of a batch on one node: the line of its class, and how this node compares with its class."""
        return self.line(kind, device).seconds(max_steps, sum_units) * self.node_ratio(node)

    def load_s(self, model_digest: str, device: str) -> float:
        """Return the seconds that loading a model takes."""
        if not model_digest:
            return 0.0
        load = self._loads.get((model_digest, device))
        if load is not None:
            return load.value
        ratio = self._load_ratios.get(device)
        return self._load_prior_s(model_digest) * (ratio.value if ratio else 1.0)

    def _load_prior_s(self, model_digest: str) -> float:
        return _LOAD_FIXED_S + self._model_bytes.get(model_digest, MODEL_BYTES) / _LOAD_BYTES_PER_S

    def download_s(self, model_digest: str, node: str) -> float:
        """Return the seconds that bringing a model to a node takes which never had it, beside loading it."""
        size_bytes = self._model_bytes.get(model_digest, 0)
        if not size_bytes:
            return 0.0
        ratio = self._downloads.get(model_digest)
        return size_bytes / self._told_bandwidth(node) * (ratio.value if ratio else 1.0)

    def _told_bandwidth(self, node: str) -> float:
        """Return the rate of a node's link as it says: what small inputs show of it says nothing about a model."""
        return self._link_priors.get(node, self.bandwidth_bytes_per_s)

    def note_download(self, model_digest: str, node: str, seconds: float) -> None:
        """Learn from a load on a node that never had the model: what it took beyond a usual load."""
        expected_s = self._model_bytes.get(model_digest, 0) / self._told_bandwidth(node)
        if expected_s > 0:
            factor_of(self._downloads, model_digest).note(max(seconds, 0.001 * expected_s) / expected_s, far=3.0)
            self._changed["download", model_digest] = None
            self.version += 1

    def fetch_s(self, node: str, size_bytes: float) -> float:
        """Return the seconds that bringing so many bytes to a node takes."""
        if size_bytes <= 0:
            return 0.0
        return _ROUND_TRIP_S + size_bytes / self.bandwidth(node)

    def bandwidth(self, node: str) -> float:
        """Return the bytes a second that reach a node: measured, else as it says, else as the settings say."""
        link = self._links.get(node)
        return link.value if link else self._link_priors.get(node, self.bandwidth_bytes_per_s)

    def memory_bytes(self, kind: CostClass, size: Size) -> float:
        """Return the bytes that one operator needs on the device beside the weights."""
        return memory_of(kind, size, self._model_bytes.get(kind[1], MODEL_BYTES))

    def node_ratio(self, node: str) -> float:
        """Return how many times longer a node takes than the middle one of its class; 1 while that is unknown."""
        return self._peers.ratio(node)

    # --- learning

    def note_batch(
        self,
        kind: CostClass,
        device: str,
        node: str,
        max_steps: float,
        sum_units: float,
        exec_s: float,
        load_s: float,
        fetch_s: float,
        fetched_bytes: float,
        predicted_s: float = 0.0,
    ) -> None:
        """Learn from an assignment that ended well; ``predicted_s`` is what its execution was expected to take."""
        self._note_exec((kind, device), node, max_steps, sum_units, exec_s, predicted_s)
        if load_s > 0 and kind[1]:
            self._note_load(kind[1], device, load_s)
        if fetched_bytes >= _FETCH_MIN_BYTES and fetch_s >= 1e-6:
            link = factor_of(self._links, node)
            link.note(fetched_bytes / max(fetch_s - _ROUND_TRIP_S, fetch_s / 2))
            self._changed["link", node] = None

    def _note_exec(self, place: Place, node: str, max_steps: float, sum_units: float, exec_s: float, predicted_s: float) -> None:
        fit = self._fits.get(place) or Fit(*self._prior(place))
        self._keep(place, fit)
        expected_s = fit.line.seconds(max_steps, sum_units)
        if fit.samples >= _SETTLED_SAMPLES and expected_s > 1e-4:
            ratio = max(exec_s, 1e-6) / expected_s
            self._peers.note(node, place[1], ratio, weight=min(1.0, _USUAL_SPREAD / fit.spread))
            self._changed["node", node, place[1]] = None
        fit.note(max_steps, sum_units, exec_s, predicted_s or expected_s)
        self._lines[place] = fit.line
        self._changed["line", *place[0], place[1]] = None
        before = self._published.get(place)
        if before is None or fit.change(before) > _CHANGE:
            self._published[place] = fit.line
            self._forget_guesses(place[0][0])

    def _note_load(self, model: str, device: str, load_s: float) -> None:
        before_s = self.load_s(model, device)
        load = factor_of(self._loads, (model, device))
        load.note(load_s)
        factor_of(self._load_ratios, device).note(load_s / self._load_prior_s(model))
        self._changed["load", model, device] = None
        self._changed["loads", device] = None
        if abs(load.value - before_s) > _CHANGE * before_s:
            self.version += 1

    def _keep(self, place: Place, fit: Fit) -> None:
        """Hold the line of a place as the one used last; of too many the first goes."""
        kind, device = place
        self._fits.pop(place, None)
        self._fits[place] = fit
        self._of_kind.setdefault(kind, {})[device] = fit
        self._of_type.setdefault(kind[0], {})[place] = fit
        if len(self._fits) > LINES_MAX:
            self._drop(next(iter(self._fits)))

    def _drop(self, place: Place) -> None:
        kind, device = place
        del self._fits[place]
        self._lines.pop(place, None)
        self._published.pop(place, None)
        del self._of_type[kind[0]][place]
        of_kind = self._of_kind[kind]
        del of_kind[device]
        if not of_kind:
            del self._of_kind[kind]

    def _forget_guesses(self, name: str = "") -> None:
        """What was guessed of a type (of all, if empty) is to be guessed anew."""
        self.version += 1
        for each in [name] if name else list(self._guesses):
            for place in self._guesses.pop(each, ()):
                if place not in self._fits:
                    self._lines.pop(place, None)

    # --- guessing

    def _prior(self, place: Place) -> tuple[Coefficients, Coefficients, bool]:
        """Return what figures say, what they say together with what is known of others, and whether that is right in size."""
        kind, device = place
        base, is_firm = self._base(kind, device)
        if is_firm:
            return base, base, True
        same = list(islice(reversed(self._of_kind.get(kind, {}).values()), _PEERS))
        if same:
            return base, _times(base, _mean_ratios(same)), False
        alike = list(islice(reversed(self._of_type.get(kind[0], {}).items()), _PEERS))
        near = [fit for (_, other), fit in alike if other == device] or [fit for _, fit in alike]
        if not near:
            return base, base, False
        scale = math.exp(sum(fit.log_ratio() for fit in near) / len(near))
        return base, _times(base, (scale, scale, scale)), False

    def _base(self, kind: CostClass, device: str) -> Prior:
        return prior_of(kind, self.figures(device), self._model_bytes.get(kind[1], MODEL_BYTES))

    # --- showing

    def rows(self) -> list[dict[str, Any]]:
        """Return what is known of each kind of work on each class of device, most used first."""
        found = [_row(place, fit) | self._load_row(place) for place, fit in self._fits.items()]
        return sorted(found, key=lambda row: (-row["samples"], row["type"], row["model"], row["device"]))

    def _load_row(self, place: Place) -> dict[str, Any]:
        (_, model), device = place
        load = self._loads.get((model, device))
        return {"load_s": load.value if load else 0.0, "loads": load.samples if load else 0}

    def node_rows(self) -> list[dict[str, Any]]:
        """Return what is known of single nodes: how they compare with their class, how fast their links are."""
        return [
            {"node": node, "ratio": self.node_ratio(node), "bandwidth_bytes_per_s": self.bandwidth(node)}
            for node in sorted({*self._peers.factors, *self._links})
        ]

    # --- keeping

    def dump(self) -> list[list[Any]]:
        """Return everything learned as plain entries: a word, names, numbers."""
        return [entry for name in self._names() if (entry := self._entry(name)) is not None]

    def take_changes(self) -> list[tuple[str, list[Any]]]:
        """Return the entries that changed since the last call, each with a name that stays the same."""
        changed, self._changed = self._changed, {}
        return [("/".join(name), entry) for name in changed if (entry := self._entry(name)) is not None]

    def _names(self) -> list[tuple[str, ...]]:
        names: list[tuple[str, ...]] = [("line", *kind, device) for kind, device in self._fits]
        names += [("load", *pair) for pair in self._loads]
        names += [("node", *pair) for pair in self._peers.device_of.items()]
        for word, held in self._factors.items():
            names += [(word, name) for name in held]
        return names

    def _entry(self, name: tuple[str, ...]) -> list[Any] | None:
        """Return one entry, None when it is not held any more."""
        if name[0] == "line":
            fit = self._fits.get(((name[1], name[2]), name[3]))
            return None if fit is None else [*name, fit.dump()]
        if name[0] == "load":
            factor = self._loads.get((name[1], name[2]))
        else:
            factor = self._peers.factors.get(name[1]) if name[0] == "node" else self._factors[name[0]].get(name[1])
        return None if factor is None else [*name, factor.log, factor.samples]

    def restore(self, entries: Sequence[Sequence[Any]]) -> int:
        """Take over what another leader had learned; return how many entries could not be read."""
        refused = 0
        for entry in entries:
            try:
                self._take(list(entry))
            except (ValueError, TypeError, KeyError, IndexError):
                refused += 1
        self._forget_guesses()
        return refused

    def _take(self, entry: list[Any]) -> None:
        if entry[0] == "line":
            _, name, subject, device, plain = entry
            place = ((str(name), str(subject)), str(device))
            fit = Fit.restore(plain)
            self._keep(place, fit)
            self._lines[place] = self._published[place] = fit.line
            return
        log, samples = float(entry[-2]), int(entry[-1])
        if not math.isfinite(log):
            raise ValueError("not finite")
        factor = Factor(log, samples)
        if entry[0] == "load":
            self._loads[str(entry[1]), str(entry[2])] = factor
        elif entry[0] == "node":
            self._peers.place(str(entry[1]), str(entry[2]), factor)
        else:
            self._factors[entry[0]][str(entry[1])] = factor


def _times(base: Coefficients, ratios: Coefficients) -> Coefficients:
    return (base[0] * ratios[0], base[1] * ratios[1], base[2] * ratios[2])


def _mean_ratios(fits: Sequence[Fit]) -> Coefficients:
    """Return how much dearer each term was elsewhere than figures say; those with more batches count more."""
    weights = [min(fit.samples, 20) for fit in fits]
    ratios = [fit.ratios() for fit in fits]
    mean = [sum(w * r[i] for w, r in zip(weights, ratios, strict=True)) / sum(weights) for i in range(3)]
    return (mean[0], mean[1], mean[2])


def _row(place: Place, fit: Fit) -> dict[str, Any]:
    (name, subject), device = place
    last = list(fit.recent)[-_RECENT_ERRORS:]
    return {
        "type": name,
        "model": subject,
        "device": device,
        "samples": fit.samples,
        "predicted_s": median(predicted for predicted, _ in fit.recent),
        "measured_s": median(measured for _, measured in fit.recent),
        "error_last": median(relative_error(predicted, measured) for predicted, measured in last),
        "error_settled": median(fit.errors) if fit.errors else None,
        "fixed_s": fit.line.fixed_s,
        "step_s": fit.line.step_s,
        "unit_s": fit.line.unit_s,
        "spread": fit.line.spread,
    }
