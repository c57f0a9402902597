"""Assignments as they arrive: refused, held already, or begun; and what the leader says about them afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from flowmesh_cas.cid import cid_parse
from flowmesh_cas.errors import FlowmeshError, UsageError
from flowmesh_mesh import tasks
from flowmesh_mesh.bus import Delivery as Message
from flowmesh_mesh.catalog import CATALOG
from flowmesh_mesh.clock import monotonic_ns
from flowmesh_mesh.manifest import Metered, Ref
from flowmesh_mesh.messages import Abort, Assignment, Commit, Located, Reason, decode
from flowmesh_node.delivery import Delivery
from flowmesh_node.epochs import Epochs
from flowmesh_node.held import Held, Post, Reply
from flowmesh_node.inline import Inline
from flowmesh_node.inputs import Inputs
from flowmesh_node.runner import Runner
from flowmesh_node.tail import Tails, tails_of

log = logging.getLogger("flowmesh.node")

CLOSED_REMEMBERED = 4096
"""Closed assignments whose stored copy may still arrive."""

GIVES_BACK_FROM = 2
"""Version of the wire from which on a leader knows that work can be given back."""

RENEW_S = 10.0
"""How often the broker is told that a held assignment is still in hand; well below the consumer's 30 s."""


@dataclass(slots=True)
class Intake:
    """Holds every assignment of this node. ``on_change`` is called when something is taken up or let go."""

    node: str
    types: tuple[str, ...]
    epochs: Epochs
    delivery: Delivery
    inline: Inline
    inputs: Inputs
    runner: Runner
    on_change: Callable[[], None]
    held: dict[str, Held] = field(default_factory=dict)
    closed: OrderedDict[str, None] = field(default_factory=OrderedDict)
    is_draining: bool = False
    life: int = 0
    """When this agent started, as its record says; 0: nobody asks."""
    taken: int = 0
    settled: int = 0
    tails: Tails = field(init=False)

    def __post_init__(self) -> None:
        self.tails = Tails(self.inputs, self._begin, lambda: not self.is_draining)

    @property
    def busy(self) -> int:
        """Return how many assignments are not answered yet."""
        return sum(held.state != "answered" for held in self.held.values())

    @property
    def queued(self) -> int:
        """Return how many of these are not at work yet: inputs on their way, or the process busy with another batch."""
        return sum(not held.has_begun for held in self.held.values())

    # --- arrivals

    def receive(self, message: Message) -> None:
        """Take an assignment from the stream. Called in the read loop: begins what can begin and returns."""
        try:
            assignment = decode(message.data, Assignment)
        except UsageError as error:
            log.warning("refused an assignment: %s", error.message)
            self._refuse(message)
            return
        if assignment.node != self.node or self.epochs.is_stale(assignment.epoch):
            log.warning("refused %s: epoch %d of %s", assignment.id, assignment.epoch, assignment.node)
            self._refuse(message)
            return
        if assignment.id in self.held:
            self.held[assignment.id].message = message  # it came again; the latest delivery is the one to acknowledge
        elif self._is_of_another_life(assignment):
            log.info("refused %s: it was given to an earlier start of this node", assignment.id)
            self._refuse(message)
        elif assignment.id in self.closed:
            message.post_ack()
        elif not self.is_draining:
            self._take(assignment, message)

    def hear(self, assignment: Assignment) -> None:
        """Begin an assignment that the leader is still writing to the stream: only work that may run in vain comes this way."""
        if assignment.node != self.node or self.epochs.is_stale(assignment.epoch):
            log.warning("refused %s: epoch %d of %s", assignment.id, assignment.epoch, assignment.node)
        elif self._is_of_another_life(assignment):
            log.info("refused %s: it was given to an earlier start of this node", assignment.id)
        elif assignment.id not in self.held and assignment.id not in self.closed and not self.is_draining:
            self._take(assignment, None)

    def _is_of_another_life(self, assignment: Assignment) -> bool:
        """Tell whether the leader gave this to an earlier start of the node: it takes that back, and another may be at it.

        What that start has answered completely is still offered, so that it is not done again.
        """
        known = self.life and assignment.life
        return bool(known) and assignment.life != self.life and not self.delivery.is_complete(assignment.id)

    def _refuse(self, message: Message) -> None:
        task = asyncio.ensure_future(message.term())
        task.add_done_callback(lambda done: done.exception())

    def _take(self, assignment: Assignment, message: Message | None) -> None:
        self.epochs.see(assignment.epoch)
        self.taken += 1
        log.info("took %s of epoch %d, highest %d", assignment.id, assignment.epoch, self.epochs.highest)
        held = self.held[assignment.id] = Held(assignment, message)
        if self.delivery.is_complete(assignment.id):
            held.state = "answered"  # by an earlier life of this agent; its spool is being offered
            return
        held.tails = tails_of(assignment)
        self._begin(held, Reply(held, Post(held, self.delivery), self.tails))

    def _begin(self, held: Held, reply: Reply) -> None:
        """Settle at once what nothing has to wait for; let everything else run beside."""
        assignment = held.assignment
        if assignment.type == "flow.noop" and self.epochs.is_written:
            lacking = self.inputs.lacks(located_of(assignment))
            if not lacking and self.inline.run_known(held, reply):
                return
        held.task = asyncio.create_task(self._run(held, reply))
        self.on_change()

    async def _run(self, held: Held, reply: Reply) -> None:
        try:
            await self.epochs.write()
            await self._settle(held, reply)
        except asyncio.CancelledError:
            reply.cancel_aborted()
            if not held.is_given_back:
                raise
            reply.fail_rest(Reason.PREEMPTED, "given back before it began: its node is draining")
        except Exception as error:
            log.exception("assignment %s", held.assignment.id)
            reply.fail_rest(Reason.INTERNAL, f"the node failed: {type(error).__name__}: {error}")
        finally:
            self.on_change()

    async def _settle(self, held: Held, reply: Reply) -> None:
        assignment = held.assignment
        kind = CATALOG.get(assignment.type)
        if kind is None or assignment.type not in self.types or assignment.version != kind.version:
            text = f"this node cannot run {assignment.type} version {assignment.version}"
            reply.fail_rest(Reason.UNSATISFIABLE, text)
            return
        indices, fetched = await self._bring_inputs(held, reply)
        reply.cancel_aborted()
        indices = [index for index in indices if not held.is_aborted(assignment.items[index])]
        if kind.executor == "inline":
            held.state = "running"
            await self.inline.run(held, reply, indices)
        elif indices:
            await self.runner.run(held, reply, indices, kind.executor, fetched)
        reply.cancel_aborted()

    async def _bring_inputs(self, held: Held, reply: Reply) -> tuple[list[int], Metered]:
        """Fetch what is not here; items whose inputs nobody has fail at once. Return the others and what it cost."""
        assignment = held.assignment
        wanted = self.inputs.lacks(located_of(assignment))
        everything = list(range(len(assignment.items)))
        if not wanted:
            return everything, Metered()
        held.state = "fetching"
        began_ns = monotonic_ns()
        missing, fetched_bytes = await self.inputs.bring(wanted)
        cost = Metered(fetch_us=(monotonic_ns() - began_ns) // 1000, bytes_fetched=fetched_bytes)
        if not missing:
            return everything, cost
        shared = {each.ref.cid for each in shared_of(assignment)} & missing
        rest = []
        for index in everything:
            lacks = shared | {each.ref.cid for port in assignment.items[index].inputs.values() for each in port} & missing
            if lacks:
                reply.fail(index, Reason.INPUT_MISSING, "no holder could give an input", missing=sorted(lacks))
            else:
                rest.append(index)
        return rest, cost

    # --- what the leader says

    def commit(self, message: Commit) -> None:
        """Let go of a closed assignment: acknowledge it, forget its messages, stop what may still run."""
        if self.epochs.is_stale(message.epoch):
            log.warning("ignored a commit of epoch %d", message.epoch)
            return
        self.epochs.see(message.epoch)
        if not message.closed:
            return
        self.settled += 1
        self.closed[message.assignment] = None
        if len(self.closed) > CLOSED_REMEMBERED:
            self.closed.popitem(last=False)
        held = self.held.pop(message.assignment, None)
        self.delivery.settle(message.assignment)
        if held is not None:
            held.close()
            if held.message is not None:
                held.message.post_ack()
            self.on_change()

    def abort(self, message: Abort) -> None:
        """Stop working on some items and what follows them, or on all; the rest of the batch goes on."""
        if self.epochs.is_stale(message.epoch):
            log.warning("ignored an abort of epoch %d", message.epoch)
            return
        self.epochs.see(message.epoch)
        held = self.held.get(message.assignment)
        if held is not None:
            held.stop(message.keys)

    async def renew(self) -> None:
        """Keep telling the broker that what is held is in hand, for ever."""
        while True:
            await asyncio.sleep(RENEW_S)
            for held in list(self.held.values()):
                if held.message is not None:
                    try:
                        await held.message.in_progress()
                    except FlowmeshError as error:
                        log.info("cannot renew %s: %s", held.assignment.id, error.message)

    def give_back(self) -> int:
        """Give back what has not begun, so that other nodes take it at once; return how many assignments that were.

        A leader of version 1 would take that for a failure of the operator: for such a one it is finished here.
        """
        if self.epochs.wire < GIVES_BACK_FROM:
            return 0
        waiting = [held for held in self.held.values() if not held.has_begun and held.task is not None and not held.task.done()]
        for held in waiting:
            held.is_given_back = True
            if held.task is not None:
                held.task.cancel()
        return len(waiting)

    async def stop(self) -> None:
        """Cancel what runs, without a word to the leader: another node takes it over."""
        await tasks.end([task for held in self.held.values() for task in held.tasks()])


def shared_of(assignment: Assignment) -> list[Located]:
    """Return what all the items need: code, and models that are content of the mesh."""
    shared = [assignment.code] if assignment.code is not None else []
    for reference in assignment.models.values():
        if reference.startswith("cid:"):
            cid = cid_parse(reference.removeprefix("cid:"))
            shared.append(Located(Ref("folder", cid, cid[4:], 0)))
    return shared


def located_of(assignment: Assignment) -> list[Located]:
    """Return everything that must be here before the assignment can run."""
    found = shared_of(assignment) if assignment.code is not None or assignment.models else []
    for item in assignment.items:
        for contents in item.inputs.values():
            found.extend(contents)
    return found
