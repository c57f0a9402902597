"""Which blocks to ask from whom next: the decisions of a transfer, without its network.

A session is told what is wanted and from whom (``want``), gives the questions to send (``asks``), and is told how each
went (``answered``, ``failed``). It verifies every block. A peer whose block does not verify is dropped for good; one that
lacks a block is not asked for it again; one that does not answer is asked last, and dropped after some failures in a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flowmesh_cas.cid import cid_of, cid_text, codec_of
from flowmesh_cas.dag import links
from flowmesh_cas.errors import NotFoundError
from flowmesh_cas.store import BLOCK_MAX_BYTES, Block

WINDOW = 4
"""Questions under way at once."""
STRIKES_MAX = 3
"""Failures in a row after which a peer is dropped."""
ASK_MAX_BLOCKS = 1024
ANSWER_BYTES = 960 * 1024
"""What one answer aims at."""

Peers = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Asking:
    """A question to send. ``strikes`` is how often in a row the peer has failed: wait the longer before sending."""

    peer: str
    cids: tuple[bytes, ...]
    candidates: Peers
    strikes: int


@dataclass(frozen=True, slots=True)
class Verified:
    """What an answer brought: blocks to store, and what they link to, with the peers to ask for it."""

    blocks: list[Block]
    children: list[bytes]
    candidates: Peers


class BlocksMissingError(NotFoundError):
    """No peer could give these blocks; what others gave is in the store, so that another try resumes."""

    def __init__(self, missing: Sequence[bytes], peers: dict[str, str]) -> None:
        shown = ", ".join(cid_text(cid) for cid in missing[:3]) + (", ..." if len(missing) > 3 else "")
        reasons = "; ".join(f"{peer}: {reason}" for peer, reason in sorted(peers.items()))
        super().__init__(
            f"{len(missing)} blocks are held by nobody that was asked: {shown}" + (f" ({reasons})" if reasons else ""),
            hint="Name another holder, or run the operator that made them again.",
        )
        self.missing = tuple(missing)
        self.peers = peers


class Pull:
    """One transfer. ``dropped`` tells which peers were given up, and why."""

    def __init__(self, *, window: int = WINDOW, strikes_max: int = STRIKES_MAX) -> None:
        self._window = window
        self._strikes_max = strikes_max
        # Queues by who may still be asked; a block moves to a smaller group when a peer lacks it.
        self._queues: dict[Peers, deque[bytes]] = {}
        # Whom each block was ever wanted from, whom of them to fall back to, what came, and what nobody could give.
        self._known: dict[bytes, Peers] = {}
        self._fallback: dict[bytes, Peers] = {}
        self._got: set[bytes] = set()
        self._given_up: dict[bytes, None] = {}
        self._flying: dict[str, int] = {}
        self._strikes: dict[str, int] = {}
        self._mean_bytes = float(BLOCK_MAX_BYTES) / 64
        self.dropped: dict[str, str] = {}

    def want(self, cids: Iterable[bytes], candidates: Sequence[str]) -> None:
        """Add blocks to get from any of ``candidates``; who is named for a block a second time is asked when the first fail."""
        peers = tuple(candidates)
        fresh = []
        for cid in dict.fromkeys(cids):
            if cid not in self._known:
                self._known[cid] = peers
                fresh.append(cid)
            elif cid not in self._got:
                self._add_fallback(cid, peers)
        self._queue(peers, fresh)

    @property
    def missing(self) -> list[bytes]:
        """What nobody could give so far."""
        return list(self._given_up)

    def asks(self) -> list[Asking]:
        """Return the questions to send now, as many as the window lets through."""
        asks: list[Asking] = []
        looked: set[Peers] = set()
        # Groups may appear while looking, when blocks fall back to other peers.
        while sum(self._flying.values()) < self._window and (group := self._group_beyond(looked)) is not None:
            asking = self._next(group)
            if asking is None:
                looked.add(group)
                continue
            self._flying[asking.peer] = self._flying.get(asking.peer, 0) + 1
            asks.append(asking)
        return asks

    @property
    def is_done(self) -> bool:
        """Tell whether nothing is under way and nothing can be asked any more."""
        return not self._flying and not self._queues

    def answered(self, asking: Asking, blocks: Sequence[bytes | None]) -> Verified:
        """Take an answer: ``blocks`` in the order of the question, None for one that the peer lacks, fewer for no room.

        Whatever verifies is kept, also of a peer that is dropped for the rest.
        """
        self._landed(asking)
        if not blocks or len(blocks) > len(asking.cids):
            self._strike(asking.peer, "answered with nothing that was asked")
            self._queue(asking.candidates, asking.cids, first=True)
            return Verified([], [], asking.candidates)
        self._strikes.pop(asking.peer, None)
        kept, lacking, again = self._verify(asking, blocks)
        others = tuple(peer for peer in asking.candidates if peer != asking.peer)
        self._queue(others, lacking)
        self._queue(asking.candidates, [*again, *asking.cids[len(blocks) :]], first=True)
        self._got.update(cid for cid, _ in kept)
        if kept:
            self._mean_bytes = sum(len(block) for _, block in kept) / len(kept)
        children = [child for cid, block in kept for child in links(cid, block)]
        return Verified(kept, children, self._holders_of_children(asking, kept))

    def _holders_of_children(self, asking: Asking, kept: Sequence[Block]) -> Peers:
        """Return whom to ask for the children: also those who lacked the parent, for they may hold a part of the DAG."""
        known = dict.fromkeys(peer for cid, _ in kept for peer in self._known[cid])
        return asking.candidates + tuple(peer for peer in known if peer not in asking.candidates)

    def failed(self, asking: Asking, reason: str) -> None:
        """Take note that a peer did not answer, or not readably."""
        self._landed(asking)
        self._strike(asking.peer, reason)
        self._queue(asking.candidates, asking.cids, first=True)

    def raise_if_missing(self) -> None:
        """Raise BlocksMissingError when nobody could give some of the blocks."""
        if self._given_up:
            raise BlocksMissingError(self.missing, self.dropped)

    def _verify(self, asking: Asking, blocks: Sequence[bytes | None]) -> tuple[list[Block], list[bytes], list[bytes]]:
        """Sort an answer into blocks that verify, CIDs that the peer lacks, and CIDs to ask for again."""
        kept: list[Block] = []
        lacking: list[bytes] = []
        again: list[bytes] = []
        for cid, block in zip(asking.cids, blocks, strict=False):
            if block is None:
                lacking.append(cid)
            elif len(block) <= BLOCK_MAX_BYTES and cid_of(codec_of(cid), block) == cid:
                kept.append((cid, block))
            else:
                self.dropped[asking.peer] = f"lied about {cid_text(cid)}"
                again.append(cid)
        return kept, lacking, again

    def _group_beyond(self, looked: set[Peers]) -> Peers | None:
        return next((group for group in self._queues if group not in looked), None)

    def _next(self, candidates: Peers) -> Asking | None:
        queue = self._queues.get(candidates)
        if not queue:
            self._queues.pop(candidates, None)
            return None
        alive = [peer for peer in candidates if peer not in self.dropped]
        if not alive:
            self._give_up(self._queues.pop(candidates))
            return None
        peer = min(alive, key=lambda name: (self._strikes.get(name, 0), self._flying.get(name, 0)))
        strikes = self._strikes.get(peer, 0)
        if strikes and self._flying.get(peer):
            return None
        cids = tuple(queue.popleft() for _ in range(self._share(len(queue))))
        if not queue:
            del self._queues[candidates]
        return Asking(peer, cids, candidates, strikes)

    def _share(self, waiting: int) -> int:
        """Return how many blocks to ask for at once: what fits an answer, and leaves the rest of the window some."""
        fitting = max(1, min(ASK_MAX_BLOCKS, int(ANSWER_BYTES / max(self._mean_bytes, 64.0))))
        return min(waiting, fitting, max(1, 16, -(-waiting // self._window)))

    def _queue(self, candidates: Peers, cids: Sequence[bytes], *, first: bool = False) -> None:
        if not cids:
            return
        if not candidates:
            self._give_up(cids)
            return
        queue = self._queues.setdefault(candidates, deque())
        if first:
            queue.extendleft(reversed(cids))
        else:
            queue.extend(cids)

    def _give_up(self, cids: Iterable[bytes]) -> None:
        for cid in cids:
            fallback = self._fallback.pop(cid, ())
            if fallback:
                self._queue(fallback, (cid,))
            else:
                self._given_up[cid] = None

    def _add_fallback(self, cid: bytes, peers: Peers) -> None:
        others = tuple(peer for peer in peers if peer not in self._known[cid])
        if not others:
            return
        self._known[cid] += others
        if cid in self._given_up:
            del self._given_up[cid]
            self._queue(others, (cid,))
        else:
            self._fallback[cid] = self._fallback.get(cid, ()) + others

    def _landed(self, asking: Asking) -> None:
        self._flying[asking.peer] -= 1
        if not self._flying[asking.peer]:
            del self._flying[asking.peer]

    def _strike(self, peer: str, reason: str) -> None:
        self._strikes[peer] = self._strikes.get(peer, 0) + 1
        if self._strikes[peer] >= self._strikes_max:
            self.dropped.setdefault(peer, reason)
