"""Blocks by CID: what every store promises, and the store that lives in memory.

A store gives back only what the CID names: ``put_many`` refuses a block that is not what its CID says, ``get`` checks
again, and a block that went bad on disk is dropped so that a peer can heal it. What is not reachable from a pin is
removed by ``sweep``, never sooner than a grace period after a sweep first saw it so; any use in between spares it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from flowmesh_cas.cid import cid_of, cid_text, codec_of, verify
from flowmesh_cas.errors import IntegrityError, NotFoundError, UsageError

BLOCK_MAX_BYTES = 2 * 1024 * 1024 - 4096
"""Largest block: what still fits whole, with its envelope, into one message of the broker (2 MiB)."""

Block = tuple[bytes, bytes]
"""A CID and the bytes that it names."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A named reason to keep the DAG under ``root``; without ``expires_at_us`` it holds until it is removed."""

    root: bytes
    owner: str
    expires_at_us: int | None = None

    def is_expired(self, now_us: int) -> bool:
        return self.expires_at_us is not None and self.expires_at_us <= now_us


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did: blocks kept for a pin, waiting out their grace, removed; and pins that had expired."""

    live_blocks: int
    condemned_blocks: int
    removed_blocks: int
    removed_bytes: int
    expired_pins: int


def check_block(cid: bytes, block: bytes) -> None:
    """Raise UsageError for a block that is too large, IntegrityError for one that its CID does not name."""
    if len(block) > BLOCK_MAX_BYTES:
        raise UsageError(
            f"block of {len(block)} bytes is larger than {BLOCK_MAX_BYTES}",
            hint="Store it as a file, which is cut into blocks of 1 MiB.",
        )
    verify(cid, block)


def absent(cid: bytes) -> NotFoundError:
    """Return the error that says that a block is not here."""
    return NotFoundError(f"no block {cid_text(cid)} in this store", hint="Fetch it from a holder first.")


def later(first: int | None, second: int | None) -> int | None:
    """Return the later of two expiries, where None is never."""
    return None if first is None or second is None else max(first, second)


class BlockStore(ABC):
    """Blocks by CID, and pins. Every method may be called from any thread."""

    @abstractmethod
    def get(self, cid: bytes) -> bytes:
        """Return the block; raise NotFoundError when it is not here, IntegrityError when it went bad (it is dropped then)."""

    @abstractmethod
    def has_many(self, cids: Sequence[bytes]) -> list[bool]:
        """Tell for each CID whether its block is here. Whoever is told yes has the sweep's grace period to use it."""

    @abstractmethod
    def put_many(self, blocks: Iterable[Block]) -> None:
        """Store blocks, durable on return; raise UsageError or IntegrityError for a block that does not fit its CID."""

    @abstractmethod
    def delete_many(self, cids: Iterable[bytes]) -> None:
        """Remove blocks, whatever pins them; those that are not here are passed over."""

    @abstractmethod
    def cids(self) -> Iterator[bytes]:
        """Yield the CIDs of all the blocks that were here when the call began."""

    @abstractmethod
    def pin_many(self, roots: Iterable[bytes], owner: str, expires_at_us: int | None = None) -> None:
        """Keep the DAGs under ``roots`` (here or not yet) for ``owner``. A second pin extends the first, it never shortens it."""

    @abstractmethod
    def unpin(self, root: bytes, owner: str) -> None:
        """End a pin; one that does not exist is passed over."""

    @abstractmethod
    def all_pins(self) -> list[Pin]:
        """Return every pin, the expired ones that no sweep has removed yet included."""

    @abstractmethod
    def sweep(self, now_us: int, grace_us: int) -> Swept:
        """Remove expired pins, and blocks that sweeps have found unreachable and unused for ``grace_us``."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files; closing twice is harmless."""

    def get_many(self, cids: Sequence[bytes]) -> list[bytes | None]:
        """Return each block, None for one that is not here or went bad."""
        return [self._get_or_none(cid) for cid in cids]

    def has(self, cid: bytes) -> bool:
        """Tell whether the block is here."""
        return self.has_many((cid,))[0]

    def put(self, codec: int, block: bytes) -> bytes:
        """Store one block and return its CID."""
        cid = cid_of(codec, block)
        self.put_many(((cid, block),))
        return cid

    def delete(self, cid: bytes) -> None:
        """Remove one block."""
        self.delete_many((cid,))

    def pin(self, root: bytes, owner: str, expires_at_us: int | None = None) -> None:
        """Keep the DAG under ``root`` for ``owner``; see :meth:`pin_many`."""
        self.pin_many((root,), owner, expires_at_us)

    def pins(self, root: bytes) -> list[Pin]:
        """Return the pins on one root."""
        return [pin for pin in self.all_pins() if pin.root == root]

    def _get_or_none(self, cid: bytes) -> bytes | None:
        try:
            return self.get(cid)
        except (NotFoundError, IntegrityError):
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MemoryStore(BlockStore):
    """Blocks in a dict: for tests, and for what need not outlive the process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._blocks: dict[bytes, bytes] = {}
        self._condemned: dict[bytes, int] = {}
        self._pins: dict[tuple[bytes, str], int | None] = {}

    def get(self, cid: bytes) -> bytes:
        with self._lock:
            block = self._blocks.get(cid)
            self._condemned.pop(cid, None)
        if block is None:
            codec_of(cid)
            raise absent(cid)
        return block

    def has_many(self, cids: Sequence[bytes]) -> list[bool]:
        with self._lock:
            for cid in cids:
                self._condemned.pop(cid, None)
            return [cid in self._blocks for cid in cids]

    def put_many(self, blocks: Iterable[Block]) -> None:
        for cid, block in blocks:
            check_block(cid, block)
            with self._lock:
                self._blocks[cid] = bytes(block)
                self._condemned.pop(cid, None)

    def delete_many(self, cids: Iterable[bytes]) -> None:
        with self._lock:
            for cid in cids:
                self._blocks.pop(cid, None)
                self._condemned.pop(cid, None)

    def cids(self) -> Iterator[bytes]:
        with self._lock:
            return iter(list(self._blocks))

    def pin_many(self, roots: Iterable[bytes], owner: str, expires_at_us: int | None = None) -> None:
        with self._lock:
            for root in roots:
                codec_of(root)
                held = (root, owner) in self._pins
                self._pins[root, owner] = later(self._pins[root, owner], expires_at_us) if held else expires_at_us
                self._condemned.pop(root, None)

    def unpin(self, root: bytes, owner: str) -> None:
        with self._lock:
            self._pins.pop((root, owner), None)

    def all_pins(self) -> list[Pin]:
        with self._lock:
            return [Pin(root, owner, expires) for (root, owner), expires in self._pins.items()]

    def sweep(self, now_us: int, grace_us: int) -> Swept:
        from flowmesh_cas.dag import reachable

        with self._lock:
            expired = [pin for pin in self.all_pins() if pin.is_expired(now_us)]
            for pin in expired:
                del self._pins[pin.root, pin.owner]
            live = reachable(self, [root for root, _ in self._pins])
            for cid in self._blocks.keys() - live:
                self._condemned.setdefault(cid, now_us)
            doomed = [cid for cid, since_us in self._condemned.items() if now_us - since_us >= grace_us]
            removed_bytes = sum(len(self._blocks[cid]) for cid in doomed)
            self.delete_many(doomed)
            return Swept(len(live), len(self._condemned), len(doomed), removed_bytes, len(expired))

    def close(self) -> None:
        return
