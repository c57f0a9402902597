"""Random workflows for the world: which operators, how they depend on one another, how each will fare."""

from __future__ import annotations

import random
from typing import Any

from tests.unit.scheduler.flows import content, operator, output_port, workflow
from tests.unit.scheduler.world import Request

from flowmesh_mesh.manifest import Manifest, Operator, Ref, Source

TYPES = ("flow.noop", "flow.noop", "data.sql", "data.split", "python.call", "train.sft")
LIGHT_TYPES = TYPES[:5]
FATES = ("ok",) * 9 + ("bad", "crashes-twice", "crashes-twice", "draws", "model", "crashes")


def random_workflow(draw: random.Random, name: str, *, is_kind: bool, deadline_s: float = 0.0) -> Manifest:
    """Return a workflow of up to a dozen operators; contents and numbers are few, so that runs share.

    A kind one has only operators that succeed. Half of them are mostly chains.
    """
    operators: list[Operator] = []
    is_chain = draw.random() < 0.5
    for index in range(draw.randint(1, 12)):
        operators.append(_random_operator(draw, operators, index, is_kind=is_kind, deadline_s=deadline_s, is_chain=is_chain))
    users = {s.op for o in operators for port in o.inputs.values() for s in port if s.op >= 0}
    ends = [index for index in range(len(operators)) if index not in users]
    return workflow(operators, {f"out{i}": i for i in ends if draw.random() < 0.8}, name)


def _random_operator(
    draw: random.Random, earlier: list[Operator], index: int, *, is_kind: bool, deadline_s: float, is_chain: bool
) -> Operator:
    kind = draw.choice(LIGHT_TYPES if is_chain else TYPES)
    fate = "ok" if is_kind else draw.choice(FATES)
    params: dict[str, Any] = {"nonce": draw.randrange(4), "fate": fate}
    if kind == "data.split":
        params["parts"] = draw.choice((1, 2, 3))
    if kind == "python.call" and draw.random() < 0.3:
        params["effect"] = True
    after: list[int | Ref | Source] = []
    sources = sorted(draw.sample(range(len(earlier)), min(len(earlier), draw.choice((0, 1, 1, 2, 3)))))
    for source in [index - 1] if is_chain and earlier and draw.random() < 0.9 else sources:
        parts = earlier[source].params.get("parts", 1)
        item = draw.randrange(parts) if parts > 1 and draw.random() < 0.7 else -1
        after.append(Source(op=source, port=output_port(earlier[source].type), item=item))
    if draw.random() < 0.3:
        after.append(content(f"given {draw.randrange(3)}"))
    elif not is_kind and draw.random() < 0.03:
        after.append(content(f"gone {draw.randrange(3)}", size=-1))
    fields: dict[str, Any] = {"share": "private"} if draw.random() < 0.1 else {}
    if deadline_s and draw.random() < 0.3:
        fields["deadline_s"] = deadline_s
    fields["priority"] = 0 if is_chain else draw.choice((0, 0, 0, 1))
    fields["timeout_s"] = draw.choice((0.0, 0.0, 9.0))
    return operator(f"o{index}", type=kind, params=params, after=after, **fields)


def random_requests(draw: random.Random, *, is_kind: bool = False, count: int = 0) -> list[Request]:
    """Return runs of two tenants, some of the same workflow."""
    flows = [random_workflow(draw, f"flow{i}", is_kind=is_kind) for i in range(draw.randint(1, 3))]
    found = []
    for number in range(count or draw.randint(1, 5)):
        share = "private" if draw.random() < 0.1 else "mesh"
        found.append(Request(draw.choice(("ta", "tb")), f"r{number}", draw.choice(flows), share))
    return found
