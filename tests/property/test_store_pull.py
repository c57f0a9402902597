"""A pull session against peers of every kind: it ends, it stores nothing false, it gets whatever an honest peer has."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowmesh_cas import dag
from flowmesh_cas.cid import DAG_CBOR, RAW, cid_of, encode_dag_cbor
from flowmesh_cas.pull import Asking, Pull
from flowmesh_cas.store import MemoryStore


@dataclass
class Peer:
    """``lacks`` and ``lies`` are CIDs; ``fails`` is the share of questions that it does not answer."""

    lacks: set[bytes]
    lies: set[bytes]
    fails: float
    room: int

    def is_honest(self) -> bool:
        return not self.lies and self.fails == 0


def build(random: Random) -> tuple[MemoryStore, bytes]:
    """Return a store with a random DAG that shares blocks, and its root."""
    store = MemoryStore()
    level = [store.put(RAW, random.randbytes(random.randint(0, 40))) for _ in range(random.randint(1, 30))]
    for _ in range(random.randint(0, 3)):
        level += [
            store.put(DAG_CBOR, encode_dag_cbor(random.sample(level, random.randint(1, min(len(level), 6)))))
            for _ in range(random.randint(1, 8))
        ]
    return store, store.put(DAG_CBOR, encode_dag_cbor(level))


def answer(random: Random, peer: Peer, source: MemoryStore, asking: Asking) -> list[bytes | None] | None:
    if random.random() < peer.fails:
        return None
    blocks: list[bytes | None] = []
    for cid in asking.cids[: peer.room]:
        if cid in peer.lies:
            blocks.append(source.get(cid) + b"!")
        else:
            blocks.append(None if cid in peer.lacks else source.get(cid))
    return blocks


def run(random: Random, source: MemoryStore, root: bytes, peers: dict[str, Peer], target: MemoryStore) -> tuple[Pull, int]:
    """Drive a session to its end, answers in any order; return it and the number of questions."""
    pull = Pull()
    pull.want(dag.missing(target, root), list(peers))
    flying: list[Asking] = []
    questions = 0
    while not pull.is_done:
        asks = pull.asks()
        questions += len(asks)
        flying += asks
        assert len(flying) <= 4
        if not flying:
            break
        asking = flying.pop(random.randrange(len(flying)))
        blocks = answer(random, peers[asking.peer], source, asking)
        if blocks is None:
            pull.failed(asking, "no answer")
            continue
        verified = pull.answered(asking, blocks)
        target.put_many(verified.blocks)
        pull.want(dag.missing(target, *verified.children), verified.candidates)
    assert not flying
    assert pull.is_done
    return pull, questions


@settings(max_examples=150, deadline=None)
@example(seed=0, kinds=["lacks", "lacks"])
@given(seed=st.integers(0, 10**9), kinds=st.lists(st.sampled_from(["good", "lacks", "lies", "dead", "flaky"]), max_size=5))
def test_a_pull_ends_and_gets_whatever_an_honest_peer_holds(seed: int, kinds: list[str]) -> None:
    random = Random(seed)
    source, root = build(random)
    cids = list(dag.walk(source, root))

    def some() -> set[bytes]:
        return set(random.sample(cids, random.randint(1, len(cids))))

    peers = {
        f"{kind}-{number}": Peer(
            lacks=some() if kind == "lacks" else set(),
            lies=some() if kind == "lies" else set(),
            fails={"dead": 1.0, "flaky": 0.2}.get(kind, 0.0),
            room=random.randint(1, 50),
        )
        for number, kind in enumerate(kinds)
    }
    target = MemoryStore()
    held_before = random.sample(cids, random.randint(0, len(cids)))
    target.put_many((cid, source.get(cid)) for cid in held_before)
    pull, questions = run(random, source, root, peers, target)
    assert all(source.get(cid) == target.get(cid) for cid in target.cids())
    assert not set(pull.dropped) & {name for name, peer in peers.items() if peer.is_honest()}
    held_by_honest = set().union(*[set(cids) - peer.lacks for peer in peers.values() if peer.is_honest()])
    if "good" in kinds:
        assert dag.missing(target, root) == []
        assert not pull.missing
    assert not held_by_honest & set(pull.missing)
    assert sorted(dag.missing(target, root)) == sorted(pull.missing)
    assert questions <= (len(cids) + 3) * (len(peers) + 1) * 2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_no_block_is_asked_for_twice_of_honest_peers(seed: int) -> None:
    random = Random(seed)
    source, root = build(random)
    asked: list[bytes] = []
    pull = Pull()
    pull.want([root], ["a", "b"])
    while asks := pull.asks():
        for asking in asks:
            asked += asking.cids
            verified = pull.answered(asking, [source.get(cid) for cid in asking.cids])
            pull.want(verified.children, verified.candidates)
    assert sorted(asked) == sorted(dag.walk(source, root))


def test_a_cid_of_nothing_is_missing_when_there_are_no_peers() -> None:
    pull = Pull()
    pull.want([cid_of(RAW, b"x")], [])
    assert pull.asks() == []
    assert pull.missing == [cid_of(RAW, b"x")]
    assert pull.is_done
