"""What runs inside the agent: ``flow.noop``. Thousands a second, so that nothing here may wait or repeat itself."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from flowmesh_cas.store import BlockStore
from flowmesh_cas.unixfs import import_bytes
from flowmesh_mesh.manifest import Metered, Ref
from flowmesh_mesh.messages import Item, Outcome, Reason
from flowmesh_node.held import Held, Reply
from flowmesh_node.operators.noop import noop_value
from flowmesh_node.outputs import INLINE_MAX_BYTES, Kept, leaf_ref, manifest_of

_REMEMBERED = 4096
_LEAF_BYTES = 1024 * 1024
_YIELD_ITEMS = 64
_YIELD_BYTES = 16 * 1024 * 1024
_METERED = Metered()


class Inline:
    """Runs no-ops. Results that were stored once are remembered by what they depend on."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._known: OrderedDict[tuple[int, int], Kept] = OrderedDict()

    def run_known(self, held: Held, reply: Reply) -> bool:
        """Settle the whole batch at once when nothing in it has to wait (its inputs are here); tell whether that was so."""
        known = self._known
        found: list[Kept] = []
        for item in held.assignment.items:
            kept = known.get(_identity(item))
            if kept is None or item.params.get("sleep_s"):
                return False
            found.append(kept)
        for index, (item, kept) in enumerate(zip(held.assignment.items, found, strict=True)):
            _settle(reply, index, item, kept)
        return True

    async def run(self, held: Held, reply: Reply, indices: list[int]) -> None:
        """Settle these items, each after its sleep; they sleep side by side and share the time, so that it adds up."""
        items = held.assignment.items
        by_sleep: dict[float, list[int]] = {}
        for index in indices:
            by_sleep.setdefault(float(items[index].params.get("sleep_s", 0.0)), []).append(index)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        left, share_s, before_s = len(indices), 0.0, 0.0
        for sleep_s in sorted(by_sleep):
            if sleep_s:
                await asyncio.sleep(began_s + sleep_s - loop.time())
            share_s += (sleep_s - before_s) / left
            left, before_s = left - len(by_sleep[sleep_s]), sleep_s
            await self._settle_all(held, reply, by_sleep[sleep_s], round(share_s * 1e6))

    async def _settle_all(self, held: Held, reply: Reply, indices: list[int], exec_us: int) -> None:
        largest = max((held.assignment.items[index].params.get("bytes", 0) for index in indices), default=0)
        step = max(1, min(_YIELD_ITEMS, _YIELD_BYTES // max(1, largest)))
        for begin in range(0, len(indices), step):
            part = [index for index in indices[begin : begin + step] if not held.is_aborted(held.assignment.items[index])]
            items = [held.assignment.items[index] for index in part]
            kept = await self._keep(items)
            for index, item, each in zip(part, items, kept, strict=True):
                _settle(reply, index, item, each, exec_us)
            await asyncio.sleep(0)

    async def _keep(self, items: list[Item]) -> list[Kept]:
        found: dict[tuple[int, int], Kept] = {}
        fresh: dict[tuple[int, int], Item] = {}
        for item in items:
            identity = _identity(item)
            kept = self._known.get(identity)
            if kept is not None:
                found[identity] = kept
            else:
                fresh[identity] = item
        if fresh:
            found |= await asyncio.to_thread(self._make, fresh)
            for identity in fresh:
                if identity[0] <= INLINE_MAX_BYTES:
                    self._known[identity] = found[identity]
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return [found[_identity(item)] for item in items]

    def _make(self, fresh: dict[tuple[int, int], Item]) -> dict[tuple[int, int], Kept]:
        """Store the values of several no-ops with one write; blocking."""
        made: dict[tuple[int, int], Kept] = {}
        blocks: list[tuple[bytes, bytes]] = []
        for identity, item in fresh.items():
            data = noop_value(item.params)
            if len(data) <= _LEAF_BYTES:
                ref = leaf_ref("value", data)
                blocks.append((ref.cid, data))
            else:
                imported = import_bytes(self._store, data)
                ref = Ref("value", imported.cid, imported.digest, imported.size)
            kept = made[identity] = manifest_of({"out": [ref]}, [data])
            blocks.append((kept.result, kept.inline[0][1]))
        self._store.put_many(blocks)
        return made


def _identity(item: Item) -> tuple[int, int]:
    """Return what the value of a no-op depends on."""
    size_bytes = item.params.get("bytes", 0)
    return (size_bytes, item.params.get("nonce", 0)) if size_bytes > 1 else (size_bytes, 0)


def _settle(reply: Reply, index: int, item: Item, kept: Kept, exec_us: int = 0) -> None:
    metered = Metered(exec_us=exec_us) if exec_us else _METERED
    outcome = Outcome(item.key, item.generation, item.attempt, Reason.SUCCEEDED, kept.result, kept.outputs, metered=metered)
    reply.settle(index, outcome, kept.inline)
