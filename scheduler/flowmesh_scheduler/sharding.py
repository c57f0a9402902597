"""The answer to ``shards``: into how many parts the operators of a workflow are best cut, before it is submitted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.catalog import operator_type
from flowmesh_mesh.sharding import Wish
from flowmesh_scheduler.core.sharding import choose
from flowmesh_scheduler.explanations import known_models

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

ASKED_MAX = 1000
_SLICE = 20
_EXAMPLE = 'Send {"operators": [{"type": "llm.generate", "params": {...}, "models": {"model": "hf:..."}, "rows": 4000}]}.'


async def shards(leader: Leader, tenant: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return a choice for each operator that is asked for, in this order."""
    wishes = _read(args.get("operators"))
    models, _ = await known_models(leader, {name for wish in wishes for name in wish.models.values()}, asks_for_content=False)
    given = {name: size for wish in wishes for name, size in wish.model_bytes.items()}
    sizes = leader.resolver.sizes
    told = {digest: sizes[digest] for digest in models.values() if digest in sizes}
    costs = leader.state.costs.beside({**given, **told})
    choices = []
    for number, wish in enumerate(wishes):
        digests = {role: models.get(name, name) for role, name in wish.models.items()}
        choices.append(msgspec.to_builtins(choose(leader.state, costs, wish, digests)))
        if number % _SLICE == _SLICE - 1:
            await asyncio.sleep(0)
    return {"choices": choices}


def _read(plain: Any) -> list[Wish]:
    try:
        wishes = msgspec.convert(plain, list[Wish])
    except msgspec.ValidationError as error:
        raise UsageError(f"not a question for shards: {error}", hint=_EXAMPLE) from error
    if len(wishes) > ASKED_MAX:
        raise UsageError(f"{len(wishes)} operators in one question", hint=f"Ask for at most {ASKED_MAX} at a time.")
    for wish in wishes:
        if not operator_type(wish.type).shards_by:
            raise UsageError(f"{wish.type} cannot be cut into shards", hint="docs/operators.md tells which types can.")
    return wishes
