"""What follows in a chain on a node: run at once on local outputs, reported together, ended when it should end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from flowmesh_cas.cid import RAW, cid_of
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.hops import inputs_after, key_of
from flowmesh_mesh.identity import identity_record, operator_key, private_salt
from flowmesh_mesh.manifest import Operator, Ref, Source
from flowmesh_mesh.messages import Abort, Assignment, Commit, Done, Hop, Item, Outcome, Reason
from flowmesh_node.held import Held, Reply
from flowmesh_node.inline import Inline
from flowmesh_node.intake import Intake
from flowmesh_node.outputs import leaf_ref, manifest_of

NULL = leaf_ref("value", b"null")


class Epochs:
    """Epochs that nobody changes."""

    is_written = True
    highest = 5

    def is_stale(self, epoch: int) -> bool:
        return False

    def see(self, epoch: int) -> bool:
        return False

    async def write(self) -> None:
        return None


class Sent:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.done: list[Done] = []

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for done in self.done for outcome in done.outcomes]

    def is_complete(self, assignment: str) -> bool:
        return False

    def settle(self, assignment: str) -> None:
        return None

    def sign(self, assignment: Assignment, outcomes: tuple[Outcome, ...], *, numeric: str, blocks: Any, is_last: bool) -> Done:
        return Done("n", assignment.id, assignment.epoch, outcomes, "U", b"", numeric, blocks, is_last)

    def send(self, done: Done, *, is_safe_first: bool = False) -> None:
        self.done.append(done)


class Here:
    """Everything that was noted is here, and what is asked for can be had."""

    def __init__(self) -> None:
        self.noted: set[bytes] = set()
        self.brought: list[bytes] = []

    def note_here(self, cids: Any) -> None:
        self.noted.update(cids)

    def lacks(self, located: Any) -> dict[bytes, Any]:
        return {each.ref.cid: each for each in located if each.ref.cid not in self.noted}

    async def bring(self, wanted: dict[bytes, Any]) -> tuple[set[bytes], int]:
        self.brought += wanted
        self.noted.update(wanted)
        return set(), 0


class Processes:
    """Stands for executor processes: each item waits for its turn, then gives ``null`` or fails as told."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: dict[str, str] = {}
        self.numeric: dict[str, str] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()

    async def run(self, held: Held, reply: Reply, indices: list[int], kind: str, fetched: object) -> None:
        for index in indices:
            item = held.assignment.items[index]
            self.ran.append(item.name)
            self.began.set()
            await self.gate.wait()
            reply.numeric = self.numeric.get(item.name, "")
            if item.name in self.fails:
                reply.fail(index, self.fails[item.name], "as told")
            else:
                kept = manifest_of({"out": [NULL]}, [b"null"])
                outcome = Outcome(item.key, item.generation, item.attempt, Reason.SUCCEEDED, kept.result, kept.outputs)
                reply.settle(index, outcome, kept.inline)


class Rig:
    """A node's intake with everything around it in memory."""

    def __init__(self) -> None:
        self.sent, self.inputs, self.processes = Sent(), Here(), Processes()
        self.store = MemoryStore()
        parts = (Epochs(), self.sent, Inline(self.store), self.inputs, self.processes, lambda: None)
        self.intake = Intake("n", ("flow.noop", "python.call"), *cast(Any, parts))

    async def warm(self) -> None:
        """Let the node know what a no-op gives, as it does after the first."""
        self.intake.hear(assignment("warm", []))
        await until(lambda: bool(self.sent.done))
        self.sent.done.clear()

    @property
    def names(self) -> list[int]:
        """Return how many outcomes each message has."""
        return [len(done.outcomes) for done in self.sent.done]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():  # noqa: ASYNC110 - there is nothing that would tell
            await asyncio.sleep(0.001)


def noop(name: str, nonce: int = 0, **params: Any) -> Operator:
    return Operator(name, "flow.noop", 1, {"nonce": nonce, **params}, {"after": [Source(op=0, port="out")]})


def call(name: str) -> Operator:
    return Operator(name, "python.call", 1, {"function": name}, {"t": [Source(op=0, port="out")]})


def assignment(name: str, tail: list[Operator], kind: str = "flow.noop", salt: bytes = b"") -> Assignment:
    item = Item(b"k" * 32, 0, 1, {"nonce": 1}, {}, "head")
    hops = tuple(Hop(operator, salt) for operator in tail)
    return Assignment(5, name, "n", kind, 1, "b", (item,), tails=(hops,) if hops else ())


def expected_keys(tail: list[Operator], salt: bytes = b"") -> list[bytes]:
    """Return the keys of hops that each take the ``null`` of the one before, as the leader computes them."""
    found = []
    for operator in tail:
        port = next(iter(operator.inputs))
        found.append(operator_key(identity_record(operator, {port: [NULL]}, {}, salt)))
    return found


async def test_a_chain_runs_in_one_go_and_is_reported_in_one_message() -> None:
    rig = Rig()
    await rig.warm()
    tail = [noop(f"o{i}", i) for i in range(40)]
    rig.intake.hear(assignment("a", tail))
    assert rig.names == [41], "nothing has to wait, so nothing may"
    assert rig.sent.done[0].last
    assert [outcome.key for outcome in rig.sent.outcomes[1:]] == expected_keys(tail)
    assert {(o.generation, o.attempt, o.reason) for o in rig.sent.outcomes} == {(0, 1, "succeeded")}
    assert rig.intake.busy == 0


async def test_a_long_chain_lets_everything_else_have_its_turn() -> None:
    rig = Rig()
    await rig.warm()
    tail = [noop(f"o{i}", i) for i in range(1000)]
    rig.intake.hear(assignment("a", tail))
    assert len(rig.sent.outcomes) < 1001
    await until(lambda: len(rig.sent.outcomes) == 1001)
    assert [done.last for done in rig.sent.done] == [False] * (len(rig.sent.done) - 1) + [True]


async def test_a_salt_enters_the_keys_of_what_follows() -> None:
    rig = Rig()
    await rig.warm()
    salt = private_salt(b"secret", "t")
    rig.intake.hear(assignment("a", [noop("x", 1)], salt=salt))
    assert [outcome.key for outcome in rig.sent.outcomes[1:]] == expected_keys([noop("x", 1)], salt)


async def test_a_chain_crosses_from_one_kind_of_executor_to_another() -> None:
    rig = Rig()
    tail = [call("f"), noop("x", 1), noop("y", 2), call("g")]
    rig.intake.hear(assignment("a", tail))
    await until(lambda: bool(rig.sent.done) and rig.sent.done[-1].last)
    assert rig.processes.ran == ["f", "g"]
    assert [outcome.key for outcome in rig.sent.outcomes[1:]] == expected_keys(tail)


async def test_given_content_of_a_hop_is_fetched_before_it_runs() -> None:
    rig = Rig()
    await rig.warm()
    given = Ref("value", cid_of(RAW, b"7"), b"d" * 32, 1)
    hop = Operator("x", "flow.noop", 1, {"nonce": 1}, {"after": [Source(ref=given), Source(op=3, port="out")]})
    rig.intake.hear(assignment("a", [hop]))
    await until(lambda: bool(rig.sent.done) and rig.sent.done[-1].last)
    assert rig.inputs.brought == [given.cid]
    assert rig.sent.outcomes[1].key == operator_key(identity_record(hop, {"after": [given, NULL]}, {}))


async def test_a_hop_that_fails_ends_the_chain() -> None:
    rig = Rig()
    rig.processes.fails["f"] = "user-error"
    rig.intake.hear(assignment("a", [call("f"), noop("x", 1)]))
    await until(lambda: bool(rig.sent.done) and rig.sent.done[-1].last)
    assert [outcome.reason for outcome in rig.sent.outcomes] == ["succeeded", "user-error"]


async def test_a_head_that_fails_begins_nothing() -> None:
    rig = Rig()
    rig.processes.fails["head"] = "crashed"
    rig.intake.hear(assignment("a", [noop("x", 1)], "python.call"))
    await until(lambda: bool(rig.sent.done) and rig.sent.done[-1].last)
    assert [outcome.reason for outcome in rig.sent.outcomes] == ["crashed"]


async def test_aborting_what_has_been_done_ends_the_chain_that_goes_on_from_it() -> None:
    rig = Rig()
    rig.processes.gate.clear()
    rig.intake.hear(assignment("a", [call("f"), call("g")]))
    await rig.processes.began.wait()
    rig.intake.abort(Abort(5, "a", (b"k" * 32,)))
    await until(lambda: bool(rig.sent.done) and rig.sent.done[-1].last)
    assert rig.processes.ran == ["f"]
    assert [outcome.reason for outcome in rig.sent.outcomes] == ["succeeded", "cancelled"]


async def test_aborting_a_hop_before_its_turn_ends_the_chain_there() -> None:
    rig = Rig()
    rig.processes.gate.clear()
    tail = [call("f"), call("g")]
    rig.intake.hear(assignment("a", tail))
    await rig.processes.began.wait()
    rig.intake.abort(Abort(5, "a", (expected_keys(tail)[1],)))
    rig.processes.gate.set()
    await until(lambda: bool(rig.sent.done) and rig.sent.done[-1].last)
    assert rig.processes.ran == ["f"]
    assert [outcome.reason for outcome in rig.sent.outcomes] == ["succeeded", "succeeded"]


async def test_a_closed_assignment_runs_nothing_more() -> None:
    rig = Rig()
    rig.processes.gate.clear()
    rig.intake.hear(assignment("a", [call("f"), call("g")]))
    await rig.processes.began.wait()
    tasks = rig.intake.held["a"].tasks()
    rig.intake.commit(Commit(5, "a"))
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks] == [True]
    assert rig.processes.ran == ["f"]


async def test_a_node_that_leaves_ends_its_chains_and_says_so() -> None:
    rig = Rig()
    rig.processes.gate.clear()
    rig.intake.hear(assignment("a", [call("f"), call("g")]))
    await rig.processes.began.wait()
    rig.intake.is_draining = True
    rig.processes.gate.set()
    await until(lambda: rig.intake.busy == 0)
    assert rig.processes.ran == ["f"]
    assert rig.sent.done[-1].last


async def test_what_ran_in_another_class_of_numbers_goes_in_a_message_of_its_own() -> None:
    rig = Rig()
    rig.processes.numeric["f"] = "exact:x"
    rig.intake.hear(assignment("a", [call("f"), noop("x", 1), noop("y", 2)]))
    await until(lambda: bool(rig.sent.done) and rig.sent.done[-1].last)
    assert [(done.numeric, len(done.outcomes)) for done in rig.sent.done] == [("", 1), ("exact:x", 1), ("", 2)]


async def test_the_tails_of_a_batch_do_not_wait_for_one_another() -> None:
    rig = Rig()
    await rig.warm()
    items = tuple(Item(bytes([i]) * 32, 0, 1, {"nonce": i}, {}, f"h{i}") for i in range(3))
    tails = tuple((Hop(noop(f"x{i}", 10 + i)),) * (i != 1) for i in range(3))
    rig.intake.hear(Assignment(5, "a", "n", "flow.noop", 1, "b", items, tails=tails))
    assert rig.names == [5]
    hops = expected_keys([noop("x0", 10), noop("x2", 12)])
    assert [o.key for o in rig.sent.outcomes] == [items[0].key, hops[0], items[1].key, items[2].key, hops[1]]


def test_inputs_of_a_hop_are_what_its_sources_name() -> None:
    parts = [Ref("rows", bytes([i]) * 36, bytes([i]) * 32, i) for i in range(3)]
    sources = {
        "a": [Source(op=4, port="parts", item=2)],
        "b": [Source(op=4, port="parts"), Source(ref=NULL)],
        "c": [Source(op=4, port="no")],
    }
    operator = Operator("x", "data.sql", 1, {"query": "q"}, sources)
    assert inputs_after(operator, {"parts": parts}) == {"a": [parts[2]], "b": [*parts, NULL], "c": []}
    assert key_of(Hop(operator), {"a": [NULL]}) == operator_key(identity_record(operator, {"a": [NULL]}, {}))
