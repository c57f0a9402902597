"""What a node lacks for an operator, in words; nothing where it could run it."""

from __future__ import annotations

from flowmesh_mesh.manifest import Operator
from flowmesh_mesh.messages import NodeRecord
from flowmesh_scheduler.core.standing import CANARY, CORDONED
from flowmesh_scheduler.core.state import Node, Work

_GIB = 1024**3


def lacks(record: NodeRecord, operator: Operator) -> list[str]:
    """Return what hardware, operator type or numeric class a node has too little of."""
    needs, found = operator.resources, []
    if operator.type not in record.types:
        found.append(f"operator type {operator.type}")
    numeric = operator.numeric
    if numeric != "any" and numeric.removeprefix("exact:") not in record.numeric:
        found.append(f"numeric class {numeric}")
    if needs.gpus > len(record.devices):
        found.append(f"{needs.gpus} GPUs (has {len(record.devices)})")
    if needs.memory_bytes > record.memory_bytes:
        found.append(f"{_gib(needs.memory_bytes)} of memory (has {_gib(record.memory_bytes)})")
    if needs.cpus > record.cpus:
        found.append(f"{needs.cpus:g} CPUs (has {record.cpus:g})")
    largest = max((d.memory_bytes for d in record.devices), default=0)
    if needs.vram_bytes > largest:
        found.append(f"a GPU with {_gib(needs.vram_bytes)} (has {_gib(largest)})")
    return found


def hindrances(node: Node, work: Work) -> list[str]:
    """Return why a node cannot be given this work, however idle it is."""
    found = lacks(node.record, work.operator)
    if node.disconnected_at_us and node.state != "gone":
        found.append("its connection ended")
    elif node.state != "active":
        found.append(f"it is {node.state}")
    elif node.health.state == CORDONED:
        found.append(f"it is cordoned{': ' if node.health.reason else ''}{node.health.reason}")
    elif node.health.state == CANARY:
        found.append(f"it is tried with small work before it gets more: {node.health.reason}")
    if node.name in work.unfit:
        found.append("it failed here: the model or a requirement is missing there")
    return found


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB"
