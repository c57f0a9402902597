"""From outcomes to costs: what the items of an assignment metered, added up, and learned from once all have succeeded."""

from __future__ import annotations

from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.manifest import Metered
from flowmesh_mesh.messages import Outcome, Reason
from flowmesh_scheduler.core import health
from flowmesh_scheduler.core.state import Outstanding, State, Work


def expect(state: State, outstanding: Outstanding) -> None:
    """Note what an assignment that is given out is expected to take, to be compared with what it took."""
    if outstanding.device:
        outstanding.items = len(outstanding.running)
        outstanding.expected_s = state.costs.exec_s(
            outstanding.kind, outstanding.device, outstanding.node, outstanding.max_steps, outstanding.sum_units
        )


def gather(state: State, outstanding: Outstanding, outcome: Outcome) -> None:
    """Add the outcome of one item; learn from the batch with the last, unless one failed or was taken away.

    An outcome that comes twice counts once: the key is not among those ``running`` the second time.
    """
    if not outstanding.items or outcome.key not in outstanding.running or outcome.key in outstanding.folded:
        return
    if outcome.reason != Reason.SUCCEEDED:
        outstanding.items = 0
        return
    metered = outcome.metered
    outstanding.exec_us += metered.exec_us
    if metered.load_us or metered.fetch_us:
        outstanding.load_us += metered.load_us
        outstanding.fetch_us += metered.fetch_us
        outstanding.bytes_fetched += metered.bytes_fetched
    outstanding.succeeded += 1
    if outstanding.succeeded == outstanding.items:
        _learn(state, outstanding)


def note_hop(state: State, outstanding: Outstanding, work: Work, metered: Metered) -> None:
    """Learn from a hop of a chain that has succeeded: a batch of its own."""
    if CATALOG[work.operator.type].executor != "inline" and outstanding.device:
        steps, units = work.size
        kind, device, node = work.cost_kind, outstanding.device, outstanding.node
        expected_s = state.costs.exec_s(kind, device, node, steps, units)
        exec_s, fetch_s = max(metered.exec_us, 0) / 1e6, max(metered.fetch_us, 0) / 1e6
        state.costs.note_batch(kind, device, node, steps, units, exec_s, 0.0, fetch_s, max(metered.bytes_fetched, 0), expected_s)


def _learn(state: State, outstanding: Outstanding) -> None:
    if "learning" in state.settings.ablate:
        return
    line = state.costs.line(outstanding.kind, outstanding.device)
    usual_s = line.seconds(outstanding.max_steps, outstanding.sum_units)
    health.note_batch(state, outstanding, max(outstanding.exec_us, 0) / 1e6, usual_s, state.now_us)
    load_s = max(outstanding.load_us, 0) / 1e6
    if outstanding.is_cold and load_s > 0:
        model = outstanding.kind[1]
        state.costs.note_download(model, outstanding.node, load_s - state.costs.load_s(model, outstanding.device))
        load_s = 0.0  # how long a load takes is learned where nothing had to be brought
    state.costs.note_batch(
        outstanding.kind,
        outstanding.device,
        outstanding.node,
        outstanding.max_steps,
        outstanding.sum_units,
        max(outstanding.exec_us, 0) / 1e6,
        load_s,
        max(outstanding.fetch_us, 0) / 1e6,
        max(outstanding.bytes_fetched, 0),
        outstanding.expected_s,
    )
