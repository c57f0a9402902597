"""What a new leader reads before it acts: ledger, nodes, assignments, manifests of live runs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from flowmesh_cas.cid import RAW, cid_of
from flowmesh_cas.errors import FlowmeshError, IntegrityError, UsageError
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.clock import monotonic_s, now_us
from flowmesh_mesh.manifest import (
    Acceptance,
    Cancellation,
    Manifest,
    ResultRecord,
    RunEnd,
    decode_record,
    record_cid,
)
from flowmesh_mesh.messages import Assignment, NodeHealth, NodeRecord, decode
from flowmesh_mesh.streams import StreamConfig
from flowmesh_scheduler.assignments import AssignmentQueue
from flowmesh_scheduler.core.events import Recovered, RecoveredRun
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.hub import Hub, name_blocks

log = logging.getLogger("flowmesh.scheduler")

T = TypeVar("T")


@dataclass(slots=True)
class Report:
    """How a take-over went. ``silent_s``: from the earlier leader's last sign of life to the first write, if one led."""

    at_us: int = 0
    why: str = ""
    previous: str = ""
    silent_s: float | None = None
    took_s: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    results: int = 0
    assignments: int = 0
    operators: int = 0

    def count(self, state: State, found: Found) -> None:
        """Note what was taken over."""
        self.runs = len(found.recovered.runs)
        self.results = len(found.recovered.results)
        self.assignments = len(found.recovered.assignments)
        self.operators = sum(run.unfinished for run in state.runs.values())

    def text(self) -> str:
        """Return it in one line, for the log."""
        silent = "" if self.silent_s is None else f", {self.silent_s:.3f} s after the last sign of {self.previous}"
        told = f"{self.runs} runs, {self.operators} operators, {self.assignments} assignments, {self.results} results"
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phases_s.items())
        return f"{told}; took {self.took_s:.3f} s ({phases}){silent} ({self.why or 'nobody led'})"

    def plain(self) -> dict[str, Any]:
        """Return it for people."""
        return {
            "at_us": self.at_us,
            "why": self.why,
            "from": self.previous,
            "silent_s": None if self.silent_s is None else round(self.silent_s, 3),
            "took_s": round(self.took_s, 3),
            "phases_s": {name: round(seconds, 4) for name, seconds in self.phases_s.items()},
            "runs": self.runs,
            "operators": self.operators,
            "results": self.results,
            "assignments": self.assignments,
        }


class Stopwatch:
    """Measures the phases of a take-over."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._began_s = self._last_s = monotonic_s()
        report.at_us = now_us()

    def lap(self, phase: str) -> None:
        """End a phase."""
        at_s = monotonic_s()
        self._report.phases_s[phase] = at_s - self._last_s
        self._report.took_s = at_s - self._began_s
        self._last_s = at_s


@contextlib.contextmanager
def collection_put_off() -> Iterator[None]:
    """Collect no garbage while a state is rebuilt: there is none, only millions of objects that stay; nor look at those later."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


async def make_streams(bus: Bus, now_ms: int, replicas: int) -> None:
    """Make every stream that lacks, and give those that have fewer as many replicas; none ever gets fewer."""
    await asyncio.gather(*(_make_stream(bus, config) for config in streams.mesh_streams(now_ms, replicas)))


async def _make_stream(bus: Bus, config: StreamConfig) -> None:
    found = await bus.stream_info(config.name)
    if found is not None:
        kept = max(config.num_replicas, int(found.config.get("num_replicas", 1)))
        config = msgspec.structs.replace(config, num_replicas=kept)
    await bus.ensure_stream(config)


async def lacking_streams(bus: Bus) -> list[str]:
    """Return which of the guarded streams do not exist."""
    found = await asyncio.gather(*(bus.stream_info(name) for name in (subjects.LEDGER, subjects.ASSIGN)))
    return [name for name, info in zip((subjects.LEDGER, subjects.ASSIGN), found, strict=True) if info is None]


@dataclass(slots=True)
class Ledger:
    """The ledger's entries by kind."""

    results: list[tuple[bytes, ResultRecord]] = field(default_factory=list)
    acceptances: dict[tuple[str, str], Acceptance] = field(default_factory=dict)
    ends: dict[tuple[str, str], RunEnd] = field(default_factory=dict)
    cancellations: dict[tuple[str, str], Cancellation] = field(default_factory=dict)


@dataclass(slots=True)
class Found:
    """Everything that a take-over starts from."""

    recovered: Recovered
    nodes: list[NodeRecord]
    lost: list[tuple[Acceptance, str]] = field(default_factory=list)
    """Runs without a manifest here, and who cancelled them: keepers are asked for it."""


async def read_state(bus: Bus, hub: Hub, state: State, queue: AssignmentQueue) -> Found:
    """Read streams and manifests; the queue learns where each outstanding assignment stands."""
    ledger, assignments, nodes, health = await asyncio.gather(
        _read_ledger(bus),
        _read_assignments(bus, queue),
        _read_all(bus, subjects.NODES, NodeRecord),
        _read_all(bus, subjects.HEALTH, NodeHealth),
    )
    _restore_results(hub, state, ledger)
    live: list[RecoveredRun] = []
    lost: list[tuple[Acceptance, str]] = []
    for pair, acceptance in ledger.acceptances.items():
        await _restore_blocks(hub, acceptance)
        if pair not in ledger.ends:
            run = _recover(hub, acceptance, ledger.cancellations.get(pair))
            if run is None:
                cancellation = ledger.cancellations.get(pair)
                lost.append((acceptance, cancellation.actor if cancellation else ""))
            else:
                live.append(run)
                _note_inputs(state, run.manifest)
    ended = [(end, ledger.acceptances.get(pair)) for pair, end in ledger.ends.items()]
    recovered = Recovered(ledger.results, live, ended, assignments, health)
    return Found(recovered, [n for n in nodes if n.state != "left"], lost)


async def _read_assignments(bus: Bus, queue: AssignmentQueue) -> list[Assignment]:
    """Return the outstanding assignments; the queue learns where each stands."""
    found: list[Assignment] = []
    async for message in bus.read_stream(subjects.ASSIGN, "asg.node.>"):
        try:
            assignment = decode(message.data, Assignment)
        except UsageError as error:
            log.warning("assignment %d cannot be read: %s", message.seq, error)
            continue
        found.append(assignment)
        queue.found(assignment.node, assignment.id, message.seq)
    return found


async def _read_all(bus: Bus, stream: str, kind: type[T]) -> list[T]:
    """Return every message of a stream that can be read."""
    found: list[T] = []
    async for message in bus.read_stream(stream):
        try:
            found.append(decode(message.data, kind))
        except UsageError as error:
            log.warning("on %s: %s", message.subject, error)
    return found


async def _read_ledger(bus: Bus) -> Ledger:
    ledger = Ledger()
    async for message in bus.read_stream(subjects.LEDGER):
        kind, _, rest = message.subject.removeprefix("led.").partition(".")
        try:
            if kind == "result":
                ledger.results.append((record_cid(message.data), decode_record(message.data, ResultRecord)))
            elif kind in ("accepted", "ended", "cancelled"):
                tenant, _, run = rest.partition(".")
                _note_run(ledger, kind, (tenant, run), message.data)
        except IntegrityError as error:
            log.error("ledger entry %s at %d cannot be read: %s", message.subject, message.seq, error)
    return ledger


def _note_run(ledger: Ledger, kind: str, pair: tuple[str, str], data: bytes) -> None:
    if kind == "accepted":
        ledger.acceptances[pair] = decode_record(data, Acceptance)
    elif kind == "ended":
        ledger.ends[pair] = decode_record(data, RunEnd)
    else:
        ledger.cancellations[pair] = decode_record(data, Cancellation)


async def _restore_blocks(hub: Hub, acceptance: Acceptance) -> None:
    """Small workflows are kept by the ledger itself: put them where they can be read by CID."""
    if acceptance.blocks and not hub.holds(acceptance.manifest):
        named, _ = name_blocks([acceptance.manifest], acceptance.blocks)
        hub.put_soon(named)


def _restore_results(hub: Hub, state: State, ledger: Ledger) -> None:
    """Small results are kept by the ledger itself: the hub holds them, whatever happened to its last writes."""
    named: dict[bytes, bytes] = {}
    for _, record in ledger.results:
        for block in record.inline:
            named[cid_of(RAW, block)] = block
    for cid in named:
        state.places.setdefault(cid, set()).add(subjects.HUB)
    cids = list(named)
    hub.put_soon([(cid, named[cid]) for cid, is_here in zip(cids, hub.store.has_many(cids), strict=True) if not is_here])


def _recover(hub: Hub, acceptance: Acceptance, cancellation: Cancellation | None) -> RecoveredRun | None:
    try:
        manifest = decode_record(hub.get(acceptance.manifest), Manifest)
    except FlowmeshError as error:
        log.error("run %s: its manifest cannot be read: %s", acceptance.run, error)
        return None
    return RecoveredRun(acceptance, manifest, cancellation.actor if cancellation else "")


def _note_inputs(state: State, manifest: Manifest) -> None:
    for operator in manifest.operators:
        given = [s.ref for sources in operator.inputs.values() for s in sources if s.ref is not None]
        for ref in [*given, *([operator.code] if operator.code is not None else [])]:
            state.places.setdefault(ref.cid, set()).add(subjects.HUB)
