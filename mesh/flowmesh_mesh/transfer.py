"""Blocks over the broker: pulling a DAG from those who hold it, and answering those who pull.

Works wherever two nodes reach the same broker; bulk belongs on a connection of its own, so that control messages do
not queue behind it. Which block to ask from whom is decided in :mod:`flowmesh_cas.pull`; here is only the input and output.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from flowmesh_cas import dag
from flowmesh_cas.cid import RAW, codec_of
from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_cas.pull import WINDOW, Asking, Pull
from flowmesh_cas.store import BLOCK_MAX_BYTES, Block, BlockStore
from flowmesh_mesh import subjects
from flowmesh_mesh.messages import BlockAsk, Blocks, Have, Held, decode, encode

REQUEST_TIMEOUT_S = 10.0
"""How long a holder may take for one answer of about 1 MiB."""
BACKOFF_S = 0.1
"""Pause before a holder that failed is asked again; doubles with each failure."""
INLINE_BYTES = 64 * 1024
INLINE_BLOCKS = 64
"""Work up to this size is done at once; more goes to a thread, so that the event loop stays free."""
WRITE_BYTES = 8 * 1024 * 1024
"""Received blocks are stored when so much has gathered, so that one sync serves many blocks."""
VERIFY_BYTES = 16 * 1024 * 1024
"""How much of a DAG is read and verified before Have is answered with yes; larger ones are looked up in the index."""
SERVED_BLOCKS_MAX = 1024
ROOTS_MAX = 10_000

T = TypeVar("T")


class Delivered(Protocol):
    """A message that came in."""

    @property
    def data(self) -> bytes: ...
    @property
    def reply(self) -> str: ...


class Requester(Protocol):
    """What fetching needs of the bus."""

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes: ...


class Server(Protocol):
    """What serving needs of the bus."""

    async def publish(self, subject: str, data: bytes) -> None: ...
    async def subscribe(self, subject: str, callback: Callable[[Any], Awaitable[None]]) -> Any: ...


# --- fetching --------------------------------------------------------------------------------------------------------


async def fetch(bus: Requester, store: BlockStore, root: bytes, holders: Sequence[str], *, deadline_s: float = 60.0) -> int:
    """Pull what is not here of the DAG under ``root``, every block verified; return the bytes fetched.

    Holders are asked side by side; one that lies is dropped, one that lacks a block or is gone is replaced by the others.
    Raises BlocksMissingError (a NotFoundError with ``missing``) when nobody has a block, TransientError after ``deadline_s``
    seconds. What came until then stays, so that another try resumes.
    """
    return await fetch_many(bus, store, {root: holders}, deadline_s=deadline_s)


async def fetch_many(
    bus: Requester, store: BlockStore, wanted: Mapping[bytes, Sequence[str]], *, deadline_s: float = 60.0
) -> int:
    """Pull several DAGs at once, each root with the names of its holders; see :func:`fetch`."""
    if not await _absent(store, list(wanted)):
        return 0
    fetching = _Fetching(bus, store)
    try:
        async with asyncio.timeout(deadline_s):
            await fetching.run(wanted)
    except TimeoutError as error:
        raise TransientError(f"fetching blocks took longer than {deadline_s:g} s", hint="Try again: it resumes.") from error
    fetching.pull.raise_if_missing()
    return fetching.fetched_bytes


class _Fetching:
    """One run of a pull session over the bus."""

    def __init__(self, bus: Requester, store: BlockStore) -> None:
        self.pull = Pull(window=WINDOW)
        self.fetched_bytes = 0
        self._bus = bus
        self._store = store
        self._unwritten: list[Block] = []
        self._unwritten_bytes = 0

    async def run(self, wanted: Mapping[bytes, Sequence[str]]) -> None:
        """Ask until nothing is missing or nobody is left; store what came, also when cancelled."""
        flying: set[asyncio.Task[tuple[Asking, Blocks | FlowmeshError]]] = set()
        try:
            await self._want_roots(wanted)
            while True:
                flying |= {asyncio.create_task(self._ask(asking)) for asking in self.pull.asks()}
                if not flying:
                    break
                landed, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
                for task in landed:
                    await self._take(*task.result())
        finally:
            for task in flying:
                task.cancel()
            await self._write()

    async def _want_roots(self, wanted: Mapping[bytes, Sequence[str]]) -> None:
        groups: dict[tuple[str, ...], list[bytes]] = {}
        for root, holders in wanted.items():
            groups.setdefault(tuple(dict.fromkeys(holders)), []).append(root)
        for holders, roots in groups.items():
            self.pull.want(await _absent(self._store, roots), holders)

    async def _ask(self, asking: Asking) -> tuple[Asking, Blocks | FlowmeshError]:
        if asking.strikes:
            await asyncio.sleep(BACKOFF_S * 2 ** (asking.strikes - 1) * random.uniform(0.5, 1.5))
        try:
            question = encode(BlockAsk(asking.cids))
            answer = await self._bus.request(subjects.blocks(asking.peer), question, timeout_s=REQUEST_TIMEOUT_S)
            return asking, decode(answer, Blocks)
        except FlowmeshError as error:
            return asking, error

    async def _take(self, asking: Asking, answer: Blocks | FlowmeshError) -> None:
        if isinstance(answer, FlowmeshError):
            self.pull.failed(asking, answer.message)
            return
        if answer.error:
            self.pull.failed(asking, answer.error)
            return
        verified = self.pull.answered(asking, answer.blocks)
        self._unwritten += verified.blocks
        size = sum(len(block) for _, block in verified.blocks)
        self._unwritten_bytes += size
        self.fetched_bytes += size
        if verified.children:
            self.pull.want(await _absent(self._store, verified.children), verified.candidates)
        if self._unwritten_bytes >= WRITE_BYTES:
            await self._write()

    async def _write(self) -> None:
        blocks, self._unwritten = self._unwritten, []
        size, self._unwritten_bytes = self._unwritten_bytes, 0
        if blocks:
            await _run(size <= INLINE_BYTES and len(blocks) <= INLINE_BLOCKS, self._store.put_many, blocks)


async def _absent(store: BlockStore, roots: Sequence[bytes]) -> list[bytes]:
    """Return what is not here of the DAGs under ``roots``; small ones are looked through at once."""
    absent: list[bytes] = []
    seen: set[bytes] = set()
    level = list(dict.fromkeys(roots))
    while level:
        seen.update(level)
        lacking, children = await _run(len(level) <= INLINE_BLOCKS, dag.frontier, store, level)
        absent += lacking
        level = [cid for cid in dict.fromkeys(children) if cid not in seen]
    return absent


async def _run(at_once: bool, function: Callable[..., T], *arguments: object) -> T:
    return function(*arguments) if at_once else await asyncio.to_thread(function, *arguments)


# --- serving ---------------------------------------------------------------------------------------------------------


async def serve_blocks(bus: Server, store: BlockStore, holder_name: str, *, now_us: Callable[[], int]) -> Any:
    """Answer, as ``holder_name``, whoever asks for blocks of ``store`` or whether it holds a DAG; return the subscription.

    A yes to Have pins the root for the lease asked for. A block that went bad is answered as lacking.
    """

    async def answer(delivery: Delivered) -> None:
        if delivery.reply:
            await bus.publish(delivery.reply, encode(await _answer(store, delivery.data, now_us)))

    return await bus.subscribe(subjects.blocks(holder_name), answer)


async def _answer(store: BlockStore, data: bytes, now_us: Callable[[], int]) -> Blocks | Held:
    try:
        question = decode(data, BlockAsk | Have)  # type: ignore[arg-type]
        if isinstance(question, Have):
            return Held(tuple(await asyncio.to_thread(_hold, store, question, now_us())))
        return Blocks(tuple(await _blocks(store, question)))
    except FlowmeshError as error:
        return Blocks((), error=error.message)


async def _blocks(store: BlockStore, ask: BlockAsk) -> list[bytes | None]:
    return await asyncio.to_thread(_read_fitting, store, ask.cids[:SERVED_BLOCKS_MAX], min(ask.max_bytes, BLOCK_MAX_BYTES))


def _read_fitting(store: BlockStore, cids: Sequence[bytes], max_bytes: int) -> list[bytes | None]:
    """Return the first blocks of ``cids`` that fit into ``max_bytes`` together, the very first in any case."""
    blocks: list[bytes | None] = []
    left = max_bytes
    step = 1
    while len(blocks) < len(cids):
        # Few blocks at first, more while they are small, so that little is read in vain.
        for block in store.get_many(cids[len(blocks) : len(blocks) + step]):
            left -= len(block) if block is not None else 0
            if left < 0 and blocks:
                return blocks
            blocks.append(block)
        step = min(step * 4, 64)
    return blocks


def _hold(store: BlockStore, have: Have, now_us: int) -> list[bool]:
    """Pin each root that is whole, then tell which are."""
    if len(have.roots) > ROOTS_MAX:
        raise UsageError(f"more than {ROOTS_MAX} roots in one question")
    roots = list(dict.fromkeys(have.roots))
    held = {root: _is_whole(store, root) for root in roots}
    expires_at_us = now_us + int(max(have.lease_s, 0.0) * 1e6)
    store.pin_many([root for root in roots if held[root]], "lease", expires_at_us)
    return [held[root] for root in have.roots]


def _is_whole(store: BlockStore, root: bytes) -> bool:
    if codec_of(root) == RAW:
        return store.get_many((root,))[0] is not None
    return dag.is_whole(store, root, max_bytes=VERIFY_BYTES)
