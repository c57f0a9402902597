"""How many shards an operator is best cut into: so that a lost node costs little, and cutting costs next to nothing.

One shard takes ``shard_s + rows * row_s / count``. Three rules, the first of which goes before the others:

- overhead: what is spent on no row (each shard's fixed part, the split, the concat) is at most a share of the whole,
- loss: a shard takes at most so long, for that is what a lost node costs,
- company: there are at least as many shards as places that can run them at a time.

The number is a power of two wherever that does no harm, so that costs that have changed a little give the same number, and with
it the same operators, whose results are there already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flowmesh_mesh.catalog import CATALOG, operator_type
from flowmesh_mesh.manifest import Operator, Ref
from flowmesh_mesh.sharding import Choice, Wish
from flowmesh_mesh.vertices import SHARDS_MAX
from flowmesh_scheduler.core.classes import MARKETS, NodeClass
from flowmesh_scheduler.core.costs import Costs, cost_class, size_of
from flowmesh_scheduler.core.lacking import lacks
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.sizes import BYTES_PER_ROW
from flowmesh_scheduler.core.state import State

_MUCH_SLOWER = 4.0
"""A place that would take this many times as long as the fastest one is not counted on."""

_UNEVEN = 1.25
"""How many times as long as with shards for all places alike the places may take, because of one shard more on some."""


class Task(NamedTuple):
    """What is to be cut. ``shard_s`` is what a shard takes however few its rows, ``cut_s`` what the split and the concat take."""

    rows: int
    row_s: float
    shard_s: float
    cut_s: float
    places: int

    def seconds(self, count: int) -> float:
        """Return what one of so many shards takes."""
        return self.shard_s + self.rows * self.row_s / count

    def overhead(self, count: int) -> float:
        """Return which part of all the time is spent on no row."""
        idle_s = count * self.shard_s + (self.cut_s if count > 1 else 0.0)
        whole_s = idle_s + self.rows * self.row_s
        return idle_s / whole_s if whole_s > 0 else 0.0


def shard_count(task: Task, settings: Settings, most: int = SHARDS_MAX) -> int:
    """Return the number of shards."""
    bound = min(_by_overhead(task, settings.shard_overhead, most), task.rows, most)
    if bound < 2:
        return 1
    wanted = max(_by_loss(task, settings.shard_s, most), min(task.places, most))
    power = _power_from(wanted)
    while not _is_even(power, task.places):
        power *= 2
    if power <= bound:
        return power
    power = _power_from(bound + 1) // 2
    if task.places > bound or _is_even(power, task.places):
        return power
    return 2 * task.places if 2 * task.places <= bound else task.places


def _by_overhead(task: Task, share: float, most: int) -> int:
    """Return the largest number of shards whose overhead is no more than a share of the whole."""
    left_s = task.rows * task.row_s * share / (1 - share) - task.cut_s
    if left_s <= 0:
        return 0
    return most if left_s >= most * task.shard_s else int(left_s / task.shard_s)


def _by_loss(task: Task, target_s: float, most: int) -> int:
    """Return the smallest number of shards that take no longer than the target, as far as rows make the difference."""
    room_s, work_s = target_s - task.shard_s, task.rows * task.row_s
    if room_s * most <= work_s:
        return most
    return max(1, -int(-work_s // room_s))


def _power_from(number: int) -> int:
    """Return the smallest power of two that is no less."""
    return 1 << (number - 1).bit_length()


def _is_even(count: int, places: int) -> bool:
    """Tell whether so many shards keep so many places busy about alike."""
    return count >= 2 * places or (count >= places and -(-count // places) * places <= _UNEVEN * count)


# --- of the mesh as it is


def choose(state: State, costs: Costs, wish: Wish, digests: Mapping[str, str]) -> Choice:
    """Return into how many shards an operator is best cut on the present nodes, and why; ``digests`` are those of its models."""
    if wish.rows < 0:
        note = "because nobody knows how many rows it will get: write 'rows: N' beside 'shards: auto'"
        return Choice(shards=1, note=note)
    operator = _operator(wish)
    classes = [klass for klass in state.fleet.classes.values() if klass.nodes and not lacks(klass.sample, operator)]
    task, samples = _task(state, costs, operator, wish, digests, classes)
    count = shard_count(task, state.settings)
    return Choice(
        shards=count,
        rows=wish.rows,
        shard_s=task.seconds(count),
        overhead=task.overhead(count),
        places=task.places if classes else 0,
        samples=samples,
        note="; ".join(_notes(task, count, state.settings, has_nodes=bool(classes))),
    )


def _notes(task: Task, count: int, settings: Settings, *, has_nodes: bool) -> list[str]:
    notes = []
    most = f"{100 * settings.shard_overhead:g} %"
    if count == 1:
        short = f"predicted to take {task.seconds(1):.3g} s"
        is_bound = task.rows > 1 and (task.places > 1 or task.seconds(1) > settings.shard_s)
        notes.append(f"{short}: more shards would cost more than {most} overhead" if is_bound else short)
    elif task.seconds(count) > settings.shard_s:
        is_bound = count < task.rows
        notes.append(f"shorter ones would cost more than {most} overhead" if is_bound else "a row each")
    if not has_nodes:
        notes.append("no node can run it now")
    return notes


def _operator(wish: Wish) -> Operator:
    kind = operator_type(wish.type)
    params = {**wish.params, **{kind.models[role]: name for role, name in wish.models.items() if role in kind.models}}
    return Operator(
        "asked",
        kind.name,
        kind.version,
        params,
        models=dict(wish.models),
        numeric=wish.numeric,
        resources=wish.resources,
    )


def _task(
    state: State, costs: Costs, operator: Operator, wish: Wish, digests: Mapping[str, str], classes: list[NodeClass]
) -> tuple[Task, int]:
    """Return what is to be cut as the usual place sees it (faster ones do more of it), and on how many batches that rests."""
    size_bytes = wish.size_bytes if wish.size_bytes >= 0 else int(wish.rows * BYTES_PER_ROW)
    inputs = {"rows": [Ref("rows", b"", b"", size_bytes, wish.rows)]}
    kind, size = cost_class(operator, digests), size_of(operator, inputs)
    found: list[tuple[float, float, int]] = []
    for klass in classes:
        line = costs.line(kind, klass.device)
        each_s, work_s = line.fixed_s + line.step_s * size.steps, line.unit_s * size.units
        slots = max(1, klass.sample.slots) if MARKETS[CATALOG[operator.type].executor] in ("engine", "user") else 1
        for node in sorted(klass.nodes):
            ratio = costs.node_ratio(node)
            found.append((each_s * ratio, work_s * ratio, slots))
    if not found:
        line = costs.line(kind, "")
        found.append((line.fixed_s + line.step_s * size.steps, line.unit_s * size.units, 1))
    fastest_s = min(each_s + work_s for each_s, work_s, _ in found)
    found = [(each_s, work_s, slots) for each_s, work_s, slots in found if each_s + work_s <= _MUCH_SLOWER * fastest_s]
    weights = [slots / max(each_s + work_s, 1e-9) for each_s, work_s, slots in found]
    shard_s = sum(w * each_s for w, (each_s, _, _) in zip(weights, found, strict=True)) / sum(weights)
    whole_s = sum(w * work_s for w, (_, work_s, _) in zip(weights, found, strict=True)) / sum(weights)
    places = sum(slots for _, _, slots in found)
    samples = max((costs.samples(kind, klass.device) for klass in classes), default=0)
    shard_s += state.settings.shard_fixed_s
    return Task(wish.rows, whole_s / max(1, wish.rows), shard_s, _cut_s(costs, size_bytes, classes), places), samples


def _cut_s(costs: Costs, size_bytes: int, classes: list[NodeClass]) -> float:
    """Return what the split and the concat of a table take, on the fastest of the nodes."""
    table = {"rows": [Ref("rows", b"", b"", size_bytes)]}
    devices = [klass.device for klass in classes if "data.split" in klass.sample.types] or [""]
    total_s = 0.0
    for name in ("data.split", "data.concat"):
        operator = Operator("", name, 1)
        size = size_of(operator, table)
        total_s += min(costs.line((name, ""), device).seconds(size.steps, size.units) for device in devices)
    return total_s
