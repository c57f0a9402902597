"""What one step wants done: commands in order, and what is gathered until its end (changes, questions, runs to look at)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flowmesh_mesh.manifest import Ref
from flowmesh_scheduler.core.commands import Assign, Change, Command, CommitResults, EndRun, Locate
from flowmesh_scheduler.core.state import Run, Vertex, VertexState, Work


@dataclass(slots=True)
class Outbox:
    """Gathers the commands of one step."""

    commands: list[Command] = field(default_factory=list)
    commits: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    assigns: list[Assign] = field(default_factory=list)
    ends: list[EndRun] = field(default_factory=list)
    locate: dict[bytes, list[str]] = field(default_factory=dict)
    entering: list[Vertex] = field(default_factory=list)
    queueing: list[Work] = field(default_factory=list)
    changed: dict[tuple[str, str], Run] = field(default_factory=dict)
    touched: dict[tuple[str, str], Run] = field(default_factory=dict)
    now_us: int = 0
    identified: dict[Vertex, tuple[Mapping[str, list[Ref]], bytes, Mapping[str, str]]] = field(default_factory=dict)
    """Inputs, key and digests of vertices that are about to enter, where they had to be known before."""

    def add(self, command: Command) -> None:
        self.commands.append(command)

    def set_state(self, vertex: Vertex, state: VertexState) -> None:
        """Move a vertex and note it for whoever watches."""
        before = vertex.state
        if before is state:
            return
        run, word = vertex.run, state.word
        counts = run.counts
        counts[before.word] -= 1
        counts[word] = counts.get(word, 0) + 1
        vertex.ended_at_us = self.now_us if state.is_final else 0
        if state.is_final is not before.is_final:
            change = -1 if state.is_final else 1
            run.unfinished += change
            run.account.operators += change
        vertex.state = state
        pair = run.id_pair
        if state is not VertexState.READY and state is not VertexState.WAITING:
            run.changes.append((vertex.index, word, vertex.node, vertex.reason, vertex.shared))
            self.changed[pair] = run
        self.touched[pair] = run

    def close(self) -> list[Command]:
        """Return all commands of the step: first what others wait for, ends of runs last.

        Work that has effects is assigned after whatever accepts its run.
        """
        commands: list[Command] = [CommitResults(self.commits)] if self.commits else []
        commands += (assign for assign in self.assigns if assign.may_run_in_vain)
        commands += self.commands
        commands += (assign for assign in self.assigns if not assign.may_run_in_vain)
        if self.locate:
            commands.append(Locate(self.locate))
        for run in self.changed.values():
            if run.changes:
                commands.append(Change(run.tenant, run.id, run.changes, {k: n for k, n in run.counts.items() if n}))
                run.changes = []
        commands.extend(self.ends)
        return commands
