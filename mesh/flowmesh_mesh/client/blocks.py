"""Blocks between a client and the mesh: put before a large submission, fetched for results; each block is verified."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flowmesh_cas.cid import cid_of, cid_parse, cid_text, codec_of
from flowmesh_cas.errors import IntegrityError, NotFoundError, TransientError, UsageError
from flowmesh_mesh import subjects
from flowmesh_mesh.client.questions import error_of, exchange
from flowmesh_mesh.messages import Answer, Blocks, Get, Put

if TYPE_CHECKING:
    from flowmesh_cas.store import BlockStore
    from flowmesh_mesh.bus import Bus

BUNDLE_BYTES = 900 * 1024
"""Blocks of one Put together; a single block may be larger."""

WINDOW = 4
"""Bundles under way at a time."""

_ROUNDS = 64


def bundles(store: BlockStore, cids: Sequence[bytes]) -> Iterator[Put]:
    """Yield Put messages that carry these blocks, each of at most BUNDLE_BYTES or of one block."""
    blocks: list[bytes] = []
    codecs: list[int] = []
    size = 0
    for cid in cids:
        block = store.get(cid)
        if blocks and size + len(block) > BUNDLE_BYTES:
            yield Put(tuple(blocks), tuple(codecs))
            blocks, codecs, size = [], [], 0
        blocks.append(block)
        codecs.append(codec_of(cid))
        size += len(block)
    if blocks:
        yield Put(tuple(blocks), tuple(codecs))


async def _put(bus: Bus, message: Put) -> Answer:
    answer = await exchange(bus, subjects.TENANT_PUT, message, Answer)
    if answer.error:
        raise error_of(answer)
    return answer


async def _send(bus: Bus, store: BlockStore, cids: Sequence[bytes]) -> None:
    queue = bundles(store, cids)

    async def drain() -> None:
        for message in queue:
            await _put(bus, message)

    async with asyncio.TaskGroup() as group:
        for _ in range(WINDOW):
            group.create_task(drain())


async def put_blocks(bus: Bus, store: BlockStore, cids: Sequence[bytes]) -> None:
    """Give the mesh single blocks, without what hangs under them: for questions about them."""
    try:
        await _send(bus, store, cids)
    except* (UsageError, TransientError, IntegrityError) as group:
        raise group.exceptions[0] from None


async def put(bus: Bus, store: BlockStore, root: bytes) -> None:
    """Give the mesh what is here of the DAG under ``root``, sending only the blocks it lacks; once whole, it is pinned.

    The mesh answers with what it misses: the root first, then what hangs under the blocks just sent, level by level. So a
    DAG that it holds already costs one question. Raise TransientError when the mesh keeps missing what was sent.
    """
    sent: set[bytes] = set()
    for _ in range(_ROUNDS):
        answer = await _put(bus, Put((), (), root=root, last=True))
        missing = [cid_parse(text) for text in answer.body.get("missing", ())]
        # What is named by its CID alone may be held by a node: the leader looks for it on submission.
        wanted = [cid for cid, held in zip(missing, store.has_many(missing), strict=True) if held]
        if not wanted:
            return
        if all(cid in sent for cid in wanted):
            raise TransientError(
                f"the mesh does not keep block {cid_text(wanted[0])}", hint="Submit again; if it stays, free its disk."
            )
        try:
            await _send(bus, store, wanted)
        except* (UsageError, TransientError, IntegrityError) as group:
            raise group.exceptions[0] from None
        sent.update(wanted)
    raise UsageError(f"the DAG under {cid_text(root)} is deeper than {_ROUNDS} levels")


async def fetch(bus: Bus, store: BlockStore, root: bytes) -> int:
    """Bring the DAG under ``root`` into ``store``; return the bytes received.

    Every block must be one that the DAG names (its CID is computed from what came), so a holder can neither change nor
    add anything. Raise NotFoundError for what the mesh does not hold, IntegrityError for what does not belong.
    """
    from flowmesh_cas.dag import links

    expected = {root}
    received: set[bytes] = set()
    cursor = size_bytes = 0
    while cursor >= 0 and expected:
        answer = await exchange(bus, subjects.TENANT_GET, Get(root, cursor), Blocks)
        if answer.error:
            raise NotFoundError(
                f"{cid_text(root)}: {answer.error}", hint="It was never held, is another tenant's, or has been removed."
            )
        fresh: list[tuple[bytes, bytes]] = []
        for codec, block in zip(answer.codecs, answer.blocks, strict=True):
            if block is None:
                raise NotFoundError(
                    f"the mesh no longer holds a block under {cid_text(root)}", hint="Run the workflow again to remake it."
                )
            cid = cid_of(codec, block)
            if cid in received:
                continue
            if cid not in expected:
                raise IntegrityError(f"received block {cid_text(cid)}, which is no part of {cid_text(root)}")
            expected.discard(cid)
            received.add(cid)
            expected.update(link for link in links(cid, block) if link not in received)
            fresh.append((cid, block))
            size_bytes += len(block)
        store.put_many(fresh)
        if answer.cursor >= 0 and answer.cursor <= cursor:
            raise IntegrityError(f"the holder of {cid_text(root)} makes no progress at block {cursor}")
        cursor = answer.cursor
    if expected:
        raise NotFoundError(
            f"{len(expected)} blocks under {cid_text(root)} did not come", hint="Try again, or run the workflow again."
        )
    return size_bytes
