"""Stores around a store: one that gathers writes into a single durable one, one that fails on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from flowmesh_cas.errors import FlowmeshError
from flowmesh_cas.store import Block, BlockStore, Pin, Swept, check_block


class WrapperStore(BlockStore):
    """Hands every call on to ``inner``; subclasses change some. It owns ``inner`` and closes it."""

    def __init__(self, inner: BlockStore) -> None:
        self.inner = inner

    def get(self, cid: bytes) -> bytes:
        return self.inner.get(cid)

    def has_many(self, cids: Sequence[bytes]) -> list[bool]:
        return self.inner.has_many(cids)

    def put_many(self, blocks: Iterable[Block]) -> None:
        self.inner.put_many(blocks)

    def delete_many(self, cids: Iterable[bytes]) -> None:
        self.inner.delete_many(cids)

    def cids(self) -> Iterator[bytes]:
        return self.inner.cids()

    def pin_many(self, roots: Iterable[bytes], owner: str, expires_at_us: int | None = None) -> None:
        self.inner.pin_many(roots, owner, expires_at_us)

    def unpin(self, root: bytes, owner: str) -> None:
        self.inner.unpin(root, owner)

    def all_pins(self) -> list[Pin]:
        return self.inner.all_pins()

    def sweep(self, now_us: int, grace_us: int) -> Swept:
        return self.inner.sweep(now_us, grace_us)

    def close(self) -> None:
        self.inner.close()


class StagedStore(WrapperStore):
    """Keeps new blocks in memory until ``flush``, so that many small writes cost one sync. For one thread.

    Nothing staged is durable, and nobody else sees it, before ``flush`` returns.
    """

    def __init__(self, inner: BlockStore) -> None:
        super().__init__(inner)
        self.staged: dict[bytes, bytes] = {}

    def get(self, cid: bytes) -> bytes:
        block = self.staged.get(cid)
        return self.inner.get(cid) if block is None else block

    def has_many(self, cids: Sequence[bytes]) -> list[bool]:
        held = self.inner.has_many(cids)
        return [cid in self.staged or flag for cid, flag in zip(cids, held, strict=True)]

    def put_many(self, blocks: Iterable[Block]) -> None:
        for cid, block in blocks:
            check_block(cid, block)
            self.staged[cid] = block

    def delete_many(self, cids: Iterable[bytes]) -> None:
        doomed = list(cids)
        for cid in doomed:
            self.staged.pop(cid, None)
        self.inner.delete_many(doomed)

    def cids(self) -> Iterator[bytes]:
        return iter(dict.fromkeys(chain(self.inner.cids(), self.staged)))

    def flush(self) -> None:
        """Write everything staged to the inner store, durable on return."""
        self.inner.put_many(self.staged.items())
        self.staged = {}

    def sweep(self, now_us: int, grace_us: int) -> Swept:
        self.flush()
        return self.inner.sweep(now_us, grace_us)

    def close(self) -> None:
        self.flush()
        self.inner.close()


class FaultyStore(WrapperStore):
    """Fails on purpose, for tests: what ``fault`` returns for a CID decides what ``get`` does.

    None lets it pass, an error is raised, any other answer ("flip", "truncate") damages the block.
    """

    def __init__(self, inner: BlockStore, fault: Callable[[bytes], FlowmeshError | str | None]) -> None:
        super().__init__(inner)
        self._fault = fault

    def get(self, cid: bytes) -> bytes:
        block = self.inner.get(cid)
        fault = self._fault(cid)
        if fault is None:
            return block
        if isinstance(fault, FlowmeshError):
            raise fault
        if fault == "truncate":
            return block[:-1]
        return bytes((block[0] ^ 1,)) + block[1:] if block else b"\x00"
