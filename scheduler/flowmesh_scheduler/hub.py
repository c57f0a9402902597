"""The hub: the leader's own holder of blocks. It keeps manifests, given inputs and outputs of runs.

Small results come in with the nodes' reports and are written behind: a crash may lose the last fraction of a second of them here,
never in the ledger, and their nodes still hold them. What an acceptance rests on is written before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence

from flowmesh_cas import dag
from flowmesh_cas.cid import DAG_CBOR, DAG_PB, RAW, cid_of, sha256
from flowmesh_cas.errors import TransientError, UsageError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.messages import Have, Held, decode, encode
from flowmesh_scheduler.write_behind import WriteBehindStore

log = logging.getLogger("flowmesh.scheduler")

LOCATE_TIMEOUT_S = 2.0
LOCATE_MAX_ROOTS = 5000
LOCATE_LEASE_S = 120.0
CODECS = (RAW, DAG_PB, DAG_CBOR)


class Hub:
    """Blocks of the mesh's control side, and the questions to other holders."""

    def __init__(self, bus: Bus, store: BlockStore) -> None:
        self._bus = bus
        self.store = WriteBehindStore(store)

    def get(self, cid: bytes) -> bytes:
        """Return a block, also one that is not written yet."""
        return self.store.get(cid)

    def put_soon(self, blocks: Iterable[tuple[bytes, bytes]]) -> None:
        """Take blocks now and write them within a moment."""
        self.store.put_soon(blocks)

    async def put(self, blocks: Sequence[tuple[bytes, bytes]]) -> None:
        """Write blocks; durable on return."""
        await asyncio.to_thread(self.store.put_many, list(blocks))

    def holds(self, root: bytes) -> bool:
        """Tell whether the whole DAG under a root is here."""
        return not dag.missing(self.store, root)

    def missing(self, root: bytes) -> list[bytes]:
        """Return what the DAG under a root lacks here."""
        return dag.missing(self.store, root)

    def order(self, root: bytes) -> list[bytes]:
        """Return the CIDs of a DAG, depth first, each once."""
        found: dict[bytes, None] = {}
        stack = [root]
        while stack:
            cid = stack.pop()
            if cid in found:
                continue
            found[cid] = None
            if cid[1] != RAW:
                stack.extend(reversed(dag.links(cid, self.get(cid))))
        return list(found)

    async def locate(self, roots: Mapping[bytes, Sequence[str]], nodes: Sequence[str]) -> dict[bytes, list[str]]:
        """Ask who holds each root: its candidates first, all ``nodes`` and the hub if none of them says yes."""
        found: dict[bytes, list[str]] = {root: [] for root in roots}
        await self._ask_all({root: list(names) for root, names in roots.items()}, found)
        lost = [root for root, holders in found.items() if not holders]
        if lost:
            everyone = [subjects.HUB, *nodes]
            asked = {root: [n for n in everyone if n not in roots[root]] for root in lost}
            await self._ask_all(asked, found)
        return found

    async def _ask_all(self, candidates: Mapping[bytes, Sequence[str]], found: dict[bytes, list[str]]) -> None:
        by_holder: dict[str, list[bytes]] = {}
        for root, names in candidates.items():
            for name in names:
                by_holder.setdefault(name, []).append(root)
        await asyncio.gather(*(self._ask(name, roots, found) for name, roots in by_holder.items()))

    async def _ask(self, holder: str, roots: list[bytes], found: dict[bytes, list[str]]) -> None:
        if holder == subjects.HUB:
            for root in roots:
                if self.holds(root):
                    found[root].append(holder)
            return
        for start in range(0, len(roots), LOCATE_MAX_ROOTS):
            part = roots[start : start + LOCATE_MAX_ROOTS]
            message = encode(Have(tuple(part), LOCATE_LEASE_S))
            try:
                held = decode(await self._bus.request(subjects.blocks(holder), message, timeout_s=LOCATE_TIMEOUT_S), Held)
            except (TransientError, UsageError) as error:
                log.info("%s did not say what it holds: %s", holder, error)
                return
            for root, is_held in zip(part, held.held, strict=False):
                if is_held:
                    found[root].append(holder)


def name_blocks(roots: Iterable[bytes], blocks: Iterable[bytes]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """Name the blocks that the DAGs under ``roots`` link to; return them, and the CIDs that no block matches.

    Blocks travel without their names; the links say which codec each has. Blocks that nothing links to are left out.
    """
    by_digest = {sha256(block): block for block in blocks}
    named: dict[bytes, bytes] = {}
    missing: list[bytes] = []
    stack = list(dict.fromkeys(roots))
    seen: set[bytes] = set(stack)
    while stack:
        cid = stack.pop()
        block = by_digest.get(cid[4:])
        if block is None:
            missing.append(cid)
            continue
        named[cid] = block
        for link in dag.links(cid, block):
            if link not in seen:
                seen.add(link)
                stack.append(link)
    return list(named.items()), missing


def check_codecs(codecs: Sequence[int], blocks: Sequence[bytes | None]) -> list[tuple[bytes, bytes]]:
    """Return (cid, block) for blocks that travel with their codecs; raise UsageError for codecs that are not ours."""
    named: list[tuple[bytes, bytes]] = []
    for codec, block in zip(codecs, blocks, strict=False):
        if codec not in CODECS:
            raise UsageError(f"unknown codec {codec:#x}")
        if block is not None:
            named.append((cid_of(codec, block), block))
    return named
