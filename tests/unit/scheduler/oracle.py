"""The dumb second implementation: a run evaluated one operator after the other, by somebody who knows how each will fare."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.unit.scheduler.flows import result_of
from tests.unit.scheduler.world import label_of

from flowmesh_mesh.manifest import Manifest, Operator, Ref

STATES = {"bad": "user-error", "crashes": "crash"}


@dataclass
class Verdict:
    """How a run must end: the state of each operator, and its outputs where chance has no part in them."""

    states: list[str] = field(default_factory=list)
    outputs: list[dict[str, list[Ref]] | None] = field(default_factory=list)

    @property
    def succeeds(self) -> bool:
        return all(state == "done" for state in self.states)


def judge(manifest: Manifest) -> Verdict:
    """Return how a run of this workflow must end, if nobody stops it."""
    verdict = Verdict()
    for operator in manifest.operators:
        sources = [s for port in operator.inputs.values() for s in port]
        if any(s.ref is None and verdict.states[s.op] != "done" for s in sources):
            state, outputs = "skipped", None
        elif any(s.ref is not None and s.ref.size < 0 for s in sources) or operator.params["fate"] in STATES:
            state, outputs = "failed", None
        else:
            state, outputs = "done", _outputs(verdict, operator)
        verdict.states.append(state)
        verdict.outputs.append(outputs)
    return verdict


def _outputs(verdict: Verdict, operator: Operator) -> dict[str, list[Ref]] | None:
    digests: list[bytes] = []
    for source in (s for port in operator.inputs.values() for s in port):
        if source.ref is not None:
            digests.append(source.ref.digest)
            continue
        known = verdict.outputs[source.op]
        if known is None:
            return None
        refs = known[source.port]
        digests += [ref.digest for ref in (refs if source.item < 0 else refs[source.item : source.item + 1])]
    if operator.params["fate"] == "draws":
        return None
    label = label_of(operator.type, operator.params, digests)
    return result_of(operator.type, label, operator.params.get("parts", 1))[0]
