"""A store on disk against a dict, in any order of operations, reopenings included."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowmesh_cas.cid import DAG_CBOR, RAW, cid_of, encode_dag_cbor
from flowmesh_cas.errors import NotFoundError
from flowmesh_cas.pack_store import PackStore

LEAVES = [(cid_of(RAW, data), data) for data in (b"", b"a", b"b" * 300, b"c" * 5000, *(bytes((n,)) * n for n in range(1, 9)))]
PARENTS = [
    (cid_of(DAG_CBOR, data), data)
    for data in (encode_dag_cbor([cid for cid, _ in LEAVES[at : at + 3]]) for at in range(0, len(LEAVES), 3))
]
GRAND = (lambda data: (cid_of(DAG_CBOR, data), data))(encode_dag_cbor({"all": [cid for cid, _ in PARENTS]}))
UNIVERSE = [*LEAVES, *PARENTS, GRAND]
CHILDREN = {cid: [child for child, _ in LEAVES[3 * at : 3 * at + 3]] for at, (cid, _) in enumerate(PARENTS)}
CHILDREN[GRAND[0]] = [cid for cid, _ in PARENTS]
GRACE_US = 10

blocks = st.sampled_from(UNIVERSE)
roots = st.sampled_from([cid for cid, _ in UNIVERSE])
owners = st.sampled_from(["a", "b"])


class StoreMachine(RuleBasedStateMachine):
    """The model: a dict of blocks, when each was condemned, and the pins."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = PackStore(Path(self.folder.name), sync=False)
        self.second: PackStore | None = None
        self.model: dict[bytes, bytes] = {}
        self.condemned: dict[bytes, int] = {}
        self.pins: dict[tuple[bytes, str], float] = {}
        self.now_us = 0

    @initialize()
    def start(self) -> None:
        self.now_us = 1

    def spare(self, cid: bytes) -> None:
        self.condemned.pop(cid, None)

    @rule(chosen=st.lists(blocks, max_size=8))
    def put(self, chosen: list[tuple[bytes, bytes]]) -> None:
        self.store.put_many(chosen)
        for cid, data in chosen:
            self.model[cid] = data
            self.spare(cid)

    @rule(block=blocks)
    def get(self, block: tuple[bytes, bytes]) -> None:
        cid, _ = block
        if cid in self.model:
            assert self.store.get(cid) == self.model[cid]
            self.spare(cid)
        else:
            with pytest.raises(NotFoundError):
                self.store.get(cid)

    @rule(chosen=st.lists(blocks, max_size=8))
    def has(self, chosen: list[tuple[bytes, bytes]]) -> None:
        assert self.store.has_many([cid for cid, _ in chosen]) == [cid in self.model for cid, _ in chosen]
        for cid, _ in chosen:
            self.spare(cid)

    @rule(block=blocks)
    def delete(self, block: tuple[bytes, bytes]) -> None:
        self.store.delete(block[0])
        self.model.pop(block[0], None)
        self.spare(block[0])

    @rule(root=roots, owner=owners, expires=st.none() | st.integers(0, 200))
    def pin(self, root: bytes, owner: str, expires: int | None) -> None:
        self.store.pin(root, owner, expires)
        limit = float("inf") if expires is None else expires
        self.pins[root, owner] = max(self.pins.get((root, owner), 0), limit)
        self.spare(root)

    @rule(root=roots, owner=owners)
    def unpin(self, root: bytes, owner: str) -> None:
        self.store.unpin(root, owner)
        self.pins.pop((root, owner), None)

    @rule(passed_us=st.integers(0, 15))
    def sweep(self, passed_us: int) -> None:
        self.now_us += passed_us
        self.pins = {pin: limit for pin, limit in self.pins.items() if limit > self.now_us}
        live = self.live()
        for cid in live:
            self.spare(cid)  # the mark reads them
        for cid in self.model.keys() - live:
            self.condemned.setdefault(cid, self.now_us)
        doomed = [cid for cid, since_us in self.condemned.items() if self.now_us - since_us >= GRACE_US]
        assert self.store.sweep(self.now_us, GRACE_US).removed_blocks == len(doomed)
        for cid in doomed:
            del self.model[cid], self.condemned[cid]

    def live(self) -> set[bytes]:
        found: set[bytes] = set()
        pending = [root for root, _ in self.pins]
        while pending:
            cid = pending.pop()
            if cid in self.model and cid not in found:
                found.add(cid)
                pending.extend(CHILDREN.get(cid, []))
        return found

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = PackStore(Path(self.folder.name), sync=False)

    @precondition(lambda self: self.second is None)
    @rule()
    def another_opens_it_too(self) -> None:
        self.second = PackStore(Path(self.folder.name), sync=False)
        self.store, self.second = self.second, self.store

    @precondition(lambda self: self.second is not None)
    @rule()
    def they_take_turns(self) -> None:
        assert self.second is not None
        self.store, self.second = self.second, self.store

    @invariant()
    def the_same_blocks_are_here(self) -> None:
        assert set(self.store.cids()) == self.model.keys()

    def teardown(self) -> None:
        for cid, data in self.model.items():
            assert self.store.get(cid) == data
        self.store.close()
        if self.second is not None:
            self.second.close()
        self.folder.cleanup()


TestStoreAgainstADict = StoreMachine.TestCase
TestStoreAgainstADict.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
