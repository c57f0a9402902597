"""The leader at work: events in, ``step``, commands out. All decisions are the core's; here is only input and output."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh import streams, subjects
from flowmesh_mesh.bus import Bus, Delivery, Pull, Subscription
from flowmesh_mesh.manifest import encode_record, record_cid
from flowmesh_mesh.messages import (
    Answer,
    Beat,
    Cancel,
    Done,
    Log,
    NodeRecord,
    Ready,
    decode,
    encode,
    is_json,
)
from flowmesh_scheduler import asks, intake
from flowmesh_scheduler.assignments import AssignmentQueue
from flowmesh_scheduler.config import Config
from flowmesh_scheduler.core import commands as c
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step
from flowmesh_scheduler.feeds import Feeds, plain_outputs
from flowmesh_scheduler.guarded import GuardedStream
from flowmesh_scheduler.hub import Hub, check_codecs, name_blocks
from flowmesh_scheduler.intake import Resolver, Submission
from flowmesh_scheduler.lease import RENEW_S, SchedulerLease
from flowmesh_scheduler.receipt_check import check_receipt
from flowmesh_scheduler.takeover import read_state

log = logging.getLogger("flowmesh.scheduler")

TICK_S = 0.1
ACCEPTANCE_INLINE_MAX_BYTES = 64 * 1024
KEEP_DEADLINE_S = 120.0
ENDS_GATHERED_S = 0.05
SWEEP_S = 2.0
REPORTS_REMEMBERED = 4096


def now_us() -> int:
    """Return the wall clock in microseconds."""
    return time.time_ns() // 1000


class Leader:
    """One epoch of leadership, from take-over until the lease or the fence is lost."""

    def __init__(self, bus: Bus, config: Config, name: str, lease: SchedulerLease, store: BlockStore, secret: bytes) -> None:
        self.bus = bus
        self.config = config
        self.name = name
        self.lease = lease
        self.hub = Hub(bus, store)
        self.state = State(config.settings)
        self.tenant_names = {key: tenant for tenant, key in config.tenants.items()}
        for key in config.tenants.values():
            self.state.tenant_secrets[key] = secret
        self.since_us = now_us()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.feeds = Feeds(bus.post, now_us)
        self.resolver = Resolver(bus, lambda: [n.name for n in self.state.nodes.values() if n.is_usable])
        self.ledger = GuardedStream(bus, subjects.LEDGER, subjects.LEDGER_EPOCHS, subjects.ledger_epoch, self._fenced)
        self.assign = GuardedStream(bus, subjects.ASSIGN, subjects.ASSIGN_EPOCHS, subjects.assign_epoch, self._fenced)
        self._ending: dict[tuple[str, str], bytes] = {}
        self.queue = AssignmentQueue(bus)
        self._requests: set[int] = set()
        self._requests_swept = 0
        self._last_request = 0
        self.tenant_roots: dict[str, set[bytes]] = {}
        self._inline: dict[tuple[str, str], list[bytes]] = {}
        self._accepting: dict[tuple[str, str], asyncio.Future[bool]] = {}
        self._reports: dict[int, None] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listening: list[Subscription | Pull] = []
        self._is_ready = False
        self._early: list[e.Event] = []

    # --- life

    async def run(self) -> str:
        """Lead until it is lost; return why."""
        try:
            await self._take_over()
            self._spawn(self._tick())
            self._spawn(self._renew())
            self._spawn(self._sweep())
            return await self.lost
        finally:
            await self._close()

    async def _take_over(self) -> None:
        """Fence, read, rebuild, listen, act: in the order of docs/guarantees."""
        at_us = now_us()
        epoch = await self.ledger.raise_epoch(at_us // 1000, self.name, self.lease.revision, at_us)
        epoch = await self.assign.raise_epoch(epoch, self.name, self.lease.revision, at_us)
        self.state.epoch = epoch
        self.feeds = Feeds(self.bus.post, now_us, first=epoch)
        await self._listen_to_nodes()
        found = await read_state(self.bus, self.hub, self.state, self.queue)
        for record in found.nodes:
            await self._join(record)
        self._is_ready = True
        self.apply(found.recovered)
        for acceptance in found.recovered.runs:
            feed = self.feeds.feed(acceptance.acceptance.tenant, acceptance.acceptance.run, acceptance.acceptance.encoding)
            self.feeds.open(feed)
        early, self._early = self._early, []
        for event in early:
            self.apply(event)
        await self._listen_to_tenants()
        await self.bus.flush()
        log.info("leading with epoch %d: %d runs, %d results", epoch, len(self.state.runs), len(self.state.results))

    async def _listen_to_nodes(self) -> None:
        subscribe = self.bus.subscribe
        self._listening += [
            await subscribe("fm.node.*.beat", self._on_beat),
            await subscribe("fm.node.*.done", self._on_done),
            await subscribe("fm.node.*.log", self._on_log),
            await subscribe("fm.nodes.*", self._on_node_record),
        ]

    async def _listen_to_tenants(self) -> None:
        bus = self.bus
        await bus.ensure_consumer(subjects.SUBMIT, streams.leader_consumer("leader"))
        await bus.ensure_consumer(subjects.DONE, streams.leader_consumer("leader"))
        await bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader"))
        self._listening += [
            await bus.subscribe(subjects.LEADER_ALIVE, lambda d: d.post_respond(self.name.encode())),
            await bus.subscribe(subjects.submit("*"), self._on_request),
            await bus.subscribe(subjects.cancel("*"), self._on_request),
            await bus.subscribe(subjects.ask("*"), self._on_ask),
            await bus.subscribe(subjects.put("*"), self._on_put),
            await bus.subscribe(subjects.get("*"), self._on_get),
            await bus.pull(subjects.SUBMIT, "leader", self._on_stored_request),
            await bus.pull(subjects.DONE, "leader", self._on_stored_done),
            await bus.pull(subjects.READY, "leader", self._on_ready),
        ]
        from flowmesh_mesh.transfer import serve_blocks

        self._listening.append(await serve_blocks(bus, self.hub.store, subjects.HUB, now_us=now_us))

    async def _close(self) -> None:
        self._is_ready = False
        for listening in self._listening:
            with contextlib.suppress(FlowmeshError):
                await (listening.unsubscribe() if isinstance(listening, Subscription) else listening.stop())
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(self.ledger.close(), self.assign.close())
        await self.hub.drain()

    def stop(self, why: str) -> None:
        """End this leadership."""
        if not self.lost.done():
            self.lost.set_result(why)

    def _fenced(self, error: Exception) -> None:
        self.stop(f"fenced: {error}")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        log.error("leader task failed", exc_info=error)
        if not isinstance(error, TransientError | UsageError):
            self.stop(f"internal error: {error!r}")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.apply(e.Tick())

    async def _sweep(self) -> None:
        """Remove what is settled from the streams of requests and assignments."""
        while True:
            await asyncio.sleep(SWEEP_S)
            with contextlib.suppress(TransientError):
                await self.queue.sweep()
                settled = self._last_request if not self._requests else min(self._requests) - 1
                if settled > self._requests_swept:
                    await self.bus.purge(subjects.SUBMIT, below_seq=settled + 1)
                    self._requests_swept = settled

    async def _renew(self) -> None:
        """Keep the lease; fail closed when it cannot be kept."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                if not await self.lease.renew(now_us()):
                    self.stop("the lease was taken by another scheduler")
                    return
                if self.state.is_cut_off:
                    self.apply(e.Restored())
            except TransientError as error:
                if loop.time() > self.lease.held_until - RENEW_S and not self.state.is_cut_off:
                    log.warning("cut off: %s", error)
                    self.apply(e.CutOff())

    # --- the loop: event, step, commands

    def apply(self, event: e.Event) -> None:
        """Let the core decide about an event and carry out what it wants."""
        if not self._is_ready:
            self._early.append(event)
            return
        try:
            for command in step(self.state, event, now_us()):
                _CARRY_OUT[type(command)](self, command)
        except Exception as error:
            log.exception("step failed on %s", type(event).__name__)
            self.stop(f"internal error: {error!r}")

    def _accept(self, command: c.Accept) -> None:
        acceptance = command.acceptance
        pair = (acceptance.tenant, acceptance.run)
        inline = self._inline.pop(pair, [])
        record = msgspec.structs.replace(acceptance, blocks=inline)
        future = self.ledger.write(subjects.ledger_accepted(*pair), encode_record(record))
        feed = self.feeds.feed(*pair, acceptance.encoding)

        def accepted(done: asyncio.Future[int]) -> None:
            if not done.cancelled() and done.exception() is None:
                self.feeds.send(feed, "accepted", {"name": command.name, "operators": command.operators})
                self.feeds.open(feed)
                self._settle(pair, True)

        future.add_done_callback(accepted)

    def _assign(self, command: c.Assign) -> None:
        assignment = command.assignment
        future = self.assign.write(subjects.assign(assignment.node, assignment.id), encode(assignment))

        self.queue.note(assignment.node, assignment.id, future)

    def _commit(self, command: c.CommitResults) -> None:
        waiting = [
            (key, record_cid(block), self.ledger.write(subjects.ledger_result(key.hex(), generation), block))
            for key, generation, block in command.records
        ]
        remaining = len(waiting)

        def stored(_: asyncio.Future[int]) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                done = [(key, record) for key, record, future in waiting if not future.cancelled() and not future.exception()]
                if len(done) == len(waiting):
                    self.apply(e.Committed(done))
                elif not self.lost.done():
                    self.stop("internal error: a result could not be written")

        for _, _, future in waiting:
            future.add_done_callback(stored)

    def _tell(self, command: c.Tell) -> None:
        message = command.message
        self.bus.post(subjects.node_control(command.node), encode(message))
        if getattr(message, "closed", False):
            self.queue.settle(command.node, message.assignment)

    def _release(self, command: c.Release) -> None:
        sequence = self.queue.settle(command.node, command.assignment)
        if sequence:
            self._spawn(self.queue.delete(sequence))

    def _locate(self, command: c.Locate) -> None:
        self._spawn(self._locate_now(command))

    async def _locate_now(self, command: c.Locate) -> None:
        nodes = [n.name for n in self.state.nodes.values() if n.state != "gone"]
        self.apply(e.Located(await self.hub.locate(command.roots, nodes)))

    def _keep(self, command: c.Keep) -> None:
        self._spawn(self._keep_now(command))

    async def _keep_now(self, command: c.Keep) -> None:
        """Fetch outputs to the hub, so that they outlive the nodes that made them."""
        from flowmesh_mesh.transfer import fetch

        missing: list[bytes] = []
        limit = asyncio.Semaphore(8)

        async def one(root: bytes, holders: list[str]) -> None:
            async with limit:
                try:
                    await fetch(self.bus, self.hub.store, root, holders, deadline_s=KEEP_DEADLINE_S)
                    self.state.places.setdefault(root, set()).add(subjects.HUB)
                except FlowmeshError as error:
                    log.warning("an output cannot be had: %s", error)
                    missing.append(root)

        await asyncio.gather(*(one(root, list(holders)) for root, holders in command.roots.items()))
        self.apply(e.Kept(command.tenant, command.run, missing))

    def _record_cancel(self, command: c.RecordCancel) -> None:
        cancellation = command.cancellation
        pair = (cancellation.tenant, cancellation.run)
        self.ledger.write(subjects.ledger_cancelled(*pair), encode_record(cancellation)).add_done_callback(_ignore)
        self.feeds.tell(*pair, "cancelling", {"actor": cancellation.actor})

    def _end(self, command: c.EndRun) -> None:
        end = command.end
        pair = (end.tenant, end.run)
        body = {
            "state": command.state,
            "reason": end.reason,
            "actor": end.actor,
            "detail": end.detail,
            "counts": end.counts,
            "outputs": plain_outputs(end.outputs),
            "saved_us": end.saved_us,
        }
        self.feeds.tell(*pair, "ended", body)
        if not self._ending:
            asyncio.get_running_loop().call_later(ENDS_GATHERED_S, self._write_ends)
        self._ending[pair] = encode_record(end)

    def _write_ends(self) -> None:
        """Write the ends of a moment together: they follow from results that are in the ledger, so nobody waits for them."""
        ending, self._ending = self._ending, {}
        for pair, record in ending.items():
            future = self.ledger.write(subjects.ledger_ended(*pair), record)
            future.add_done_callback(partial(self._ended, pair))

    def _ended(self, pair: tuple[str, str], done: asyncio.Future[int]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.apply(e.Ended(*pair))

    def _change(self, command: c.Change) -> None:
        self.feeds.tell_changes(command.tenant, command.run, list(command.changes), command.counts)

    # --- nodes

    def _on_beat(self, delivery: Delivery) -> None:
        beat = _read(delivery, Beat)
        if beat is not None and delivery.subject == subjects.node_beat(beat.node):
            self.apply(e.BeatReceived(beat))

    def _on_node_record(self, delivery: Delivery) -> None:
        record = _read(delivery, NodeRecord)
        if record is not None and delivery.subject == subjects.node_record(record.node) and self._is_ready:
            self._spawn(self._join(record))

    async def _join(self, record: NodeRecord) -> None:
        await self.bus.ensure_consumer(subjects.ASSIGN, streams.assign_consumer(record.node))
        if self._is_ready:
            self.apply(e.NodeJoined(record))
        else:
            step(self.state, e.NodeJoined(record), now_us())

    def node_gone(self, public_key: str) -> None:
        """The broker saw the connection of this key end."""
        for node in self.state.nodes.values():
            if node.record.public_key == public_key:
                self.apply(e.NodeDisconnected(node.name))

    def _on_stored_done(self, delivery: Delivery) -> None:
        self._on_done(delivery)
        delivery.post_ack()

    def _on_done(self, delivery: Delivery) -> None:
        """Take a report, from the subject itself or from the stream, whichever is first; the other copy is dropped."""
        mark = hash(delivery.data)
        if self._reports.pop(mark, 0) is None:
            return
        self._reports[mark] = None
        if len(self._reports) > REPORTS_REMEMBERED:
            del self._reports[next(iter(self._reports))]
        done = _read(delivery, Done)
        if done is None:
            return
        node = self.state.nodes.get(done.node)
        if delivery.subject != subjects.node_done(done.node) or node is None:
            log.warning("report on %s from an unknown node", delivery.subject)
            return
        if not check_receipt(done, node.record.public_key):
            log.warning("report of %s on %s has no valid receipt", done.node, done.assignment)
            return
        blocks = check_codecs([codec for codec, _ in done.blocks], [block for _, block in done.blocks])
        self.hub.put_soon(blocks)
        self.apply(e.DoneReceived(done, dict(blocks)))

    def _on_log(self, delivery: Delivery) -> None:
        message = _read(delivery, Log)
        if message is None or delivery.subject != subjects.node_log(message.node):
            return
        work = self.state.works.get(message.key)
        for vertex in work.waiters if work is not None else ():
            self.feeds.note_lines(vertex.run.tenant, vertex.run.id, vertex.index, vertex.operator.name, list(message.lines))

    # --- tenants

    def _on_ready(self, delivery: Delivery) -> None:
        message = _read(delivery, Ready)
        if message is not None:
            self.apply(e.ReadySeen(message.tenant, message.run))
        delivery.post_ack()

    def _on_request(self, delivery: Delivery) -> None:
        """A submission or cancellation from the subject itself: the same comes from the stream, a little later."""
        self._take_request(delivery)

    def _take_request(self, delivery: Delivery) -> asyncio.Future[bool] | None:
        is_cancel = delivery.subject.startswith(subjects.cancel(""))
        return self._on_cancel(delivery) if is_cancel else self._on_submit(delivery)

    def _on_stored_request(self, delivery: Delivery) -> None:
        """A submission or cancellation from the stream: settled once the ledger shows it."""
        sequence = delivery.seq
        self._last_request = max(self._last_request, sequence)
        self._requests.add(sequence)
        future = self._take_request(delivery)

        def settled(done: asyncio.Future[bool]) -> None:
            if not done.cancelled():
                self._requests.discard(sequence)
                delivery.post_ack()

        if future is None:
            self._requests.discard(sequence)
            delivery.post_ack()
        else:
            future.add_done_callback(settled)

    def _on_submit(self, delivery: Delivery) -> asyncio.Future[bool] | None:
        """Take a submission, from the subject itself or from the stream, whichever is first."""
        tenant = delivery.subject.rpartition(".")[2]
        try:
            run, encoding = intake.run_of(delivery.data)
        except UsageError as error:
            encoding = "json" if is_json(delivery.data) else "msgpack"
            self._reject((tenant, intake.fallback_run(delivery.data)), encoding, error)
            return None
        pair = (tenant, run)
        if pair in self.state.runs or pair in self.state.ended:
            if pair not in self._accepting and not delivery.seq:
                self._repeat(pair)
            return self._accepting.get(pair)
        future = self._accepting.get(pair)
        if future is None:
            future = self._accepting[pair] = asyncio.get_running_loop().create_future()
            self._take_in(pair, encoding, delivery.data)
        return future

    def _take_in(self, pair: tuple[str, str], encoding: str, data: bytes) -> None:
        """Accept at once what is small and complete; everything else takes a task."""
        try:
            if encoding == "msgpack" and len(data) < ACCEPTANCE_INLINE_MAX_BYTES:
                submission = intake.open_submission(pair[0], data, self.hub)
                models = self._pin_now(submission)
                if models is not None and not self._absent(submission):
                    self._submit(submission, models, [block for _, block in submission.blocks])
                    return
            self._spawn(self._take_in_slowly(pair, encoding, data))
        except FlowmeshError as error:
            self._reject(pair, encoding, error)

    def _pin_now(self, submission: Submission) -> dict[str, str] | None:
        assert submission.manifest is not None
        wanted = intake.references(submission.manifest)
        return self.resolver.known(wanted) if wanted else {}

    def _absent(self, submission: Submission) -> list[bytes]:
        """Return the CIDs under the manifest that neither came along nor are here."""
        _, unknown = name_blocks([submission.manifest_cid], [block for _, block in submission.blocks])
        return [cid for cid in unknown if not self.hub.holds(cid)]

    async def _take_in_slowly(self, pair: tuple[str, str], encoding: str, data: bytes) -> None:
        tenant, run = pair
        try:
            if encoding == "json":
                submission = await asyncio.to_thread(intake.compile_submission, tenant, run, data)
            else:
                submission = await asyncio.to_thread(intake.open_submission, tenant, data, self.hub)
            absent = await asyncio.to_thread(self._absent, submission)
            if absent:
                raise UsageError(
                    f"{len(absent)} blocks of the inputs are not held by the mesh", hint="Put them before submitting."
                )
            assert submission.manifest is not None
            models = await self.resolver.resolve(intake.references(submission.manifest))
            inline: list[bytes] = []
            if sum(len(block) for _, block in submission.blocks) <= ACCEPTANCE_INLINE_MAX_BYTES:
                inline = [block for _, block in submission.blocks]
            else:
                await self.hub.put(submission.blocks)
            self._submit(submission, models, inline)
        except FlowmeshError as error:
            self._reject(pair, encoding, error)

    def _submit(self, submission: Submission, models: dict[str, str], inline: list[bytes]) -> None:
        assert submission.manifest is not None
        pair = (submission.tenant, submission.run)
        if submission.blocks:
            self.hub.put_soon(submission.blocks)
        if inline:
            self._inline[pair] = inline
        for operator in submission.manifest.operators:
            for sources in operator.inputs.values():
                for source in sources:
                    if source.ref is not None:
                        self.state.places.setdefault(source.ref.cid, set()).add(subjects.HUB)
            if operator.code is not None:
                self.state.places.setdefault(operator.code.cid, set()).add(subjects.HUB)
        share = self.config.share
        self.apply(e.Submitted(*pair, submission.manifest, submission.manifest_cid, models, submission.encoding, share))

    def _reject(self, pair: tuple[str, str], encoding: str, error: FlowmeshError) -> None:
        log.info("rejected run %s: %s", pair[1], error.message)
        feed = self.feeds.feed(*pair, encoding)
        self.feeds.send(feed, "rejected", intake.rejection(error))
        self.feeds.forget(*pair)
        self._settle(pair, False)

    def _settle(self, pair: tuple[str, str], is_accepted: bool) -> None:
        future = self._accepting.pop(pair, None)
        if future is not None and not future.done():
            future.set_result(is_accepted)

    def _repeat(self, pair: tuple[str, str]) -> None:
        """A run is submitted again: say where it stands."""
        run = self.state.runs.get(pair)
        feed = self.feeds.feed(*pair, run.acceptance.encoding if run else "msgpack")
        if run is not None:
            self.feeds.send(feed, "accepted", {"name": run.manifest.name, "operators": len(run.vertices)})
        ended = self.state.ended.get(pair)
        if ended is not None:
            self.feeds.send(feed, "ended", asks.plain_end(ended[0]))

    def _on_cancel(self, delivery: Delivery) -> asyncio.Future[bool] | None:
        tenant = delivery.subject.rpartition(".")[2]
        try:
            message = (
                msgspec.json.decode(delivery.data, type=asks.JsonCancel)
                if is_json(delivery.data)
                else decode(delivery.data, Cancel)
            )
        except (msgspec.DecodeError, UsageError) as error:
            log.info("unreadable cancellation: %s", error)
            return None
        self.apply(e.CancelRequested(tenant, message.run, message.actor or self.tenant_names.get(tenant, "tenant")))
        return None

    def _on_ask(self, delivery: Delivery) -> None:
        self._spawn(self._answer(delivery, lambda: asks.answer(self, delivery.subject.rpartition(".")[2], delivery.data)))

    def _on_put(self, delivery: Delivery) -> None:
        self._spawn(self._answer(delivery, lambda: asks.put(self, delivery.subject.rpartition(".")[2], delivery.data)))

    async def _answer(self, delivery: Delivery, work: Callable[[], Awaitable[Any]]) -> None:
        try:
            answer = Answer(await work())
        except FlowmeshError as error:
            answer = Answer(None, error.message, error.hint, type(error).__name__)
        plain = is_json(delivery.data)
        delivery.post_respond(msgspec.json.encode(msgspec.to_builtins(asks.plain_answer(answer))) if plain else encode(answer))

    def _on_get(self, delivery: Delivery) -> None:
        self._spawn(asks.get(self, delivery.subject.rpartition(".")[2], delivery))


def _ignore(done: asyncio.Future[int]) -> None:
    if not done.cancelled():
        done.exception()


def _read(delivery: Delivery, kind: Any) -> Any:
    try:
        return decode(delivery.data, kind)
    except UsageError as error:
        log.warning("on %s: %s", delivery.subject, error)
        return None


_CARRY_OUT: dict[type, Callable[[Leader, Any], None]] = {
    c.Accept: Leader._accept,
    c.Assign: Leader._assign,
    c.CommitResults: Leader._commit,
    c.Tell: Leader._tell,
    c.Release: Leader._release,
    c.Locate: Leader._locate,
    c.Keep: Leader._keep,
    c.RecordCancel: Leader._record_cancel,
    c.EndRun: Leader._end,
    c.Change: Leader._change,
}
