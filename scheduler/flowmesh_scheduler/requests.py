"""What tenants send: submissions, cancellations, questions, blocks.

A request is taken from its subject at once. Its copy in the stream is the one that must not be lost: it is read a little later,
finds its run known in nearly every case, and is removed once the ledger shows what became of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas import dag
from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_mesh import messages, streams, subjects
from flowmesh_mesh.bus import Delivery, Pull, StoredMessage, Subscription
from flowmesh_mesh.clock import monotonic_s
from flowmesh_mesh.messages import Answer, Cancel, Ready, Submit, decode, encode, is_json
from flowmesh_scheduler import asks, intake
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.guarded import patiently
from flowmesh_scheduler.intake import Submission
from flowmesh_scheduler.reports import read
from flowmesh_scheduler.tenants import check_quota

if TYPE_CHECKING:
    from flowmesh_scheduler.service import Leader

log = logging.getLogger("flowmesh.scheduler")

ACCEPTANCE_INLINE_MAX_BYTES = 64 * 1024
COPY_WAIT_S = 3.0
"""How long a refusal waits for the copy of its submission to be read from the stream."""

COPY_LOOK_S = 0.05
VERIFIED_BYTES = 64 * 1024 * 1024
"""How much of each content is read through before a run that needs it is accepted."""


class Requests:
    """The leader's desk for tenants."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._accepting: dict[tuple[str, str], asyncio.Future[bool]] = {}
        self._cancelling: dict[tuple[str, str], asyncio.Future[bool]] = {}
        self._recording: set[tuple[str, str]] = set()
        self._unsettled: set[int] = set()
        self._copies: dict[asyncio.Future[bool], int] = {}
        self._read = 0
        self._removed = 0
        self.answering = 0
        """How many questions are being answered."""

    async def listen(self, listening: list[Subscription | Pull]) -> None:
        """Subscribe to what tenants send, and take what waited for a leader.

        Each subscription is added to ``listening`` at once: a take-over that fails here must leave nobody behind who answers.
        """
        bus = self._leader.bus
        await patiently(self.ensure_consumer)
        for subject, handler in (
            (subjects.submit("*"), self._on_request),
            (subjects.cancel("*"), self._on_request),
            (subjects.ask("*"), self._on_ask),
            (subjects.put("*"), self._on_put),
            (subjects.get("*"), self._on_get),
        ):
            listening.append(await bus.subscribe(subject, handler))
        listening.append(await bus.pull(subjects.READY, "leader", self._on_ready))
        await patiently(self.sweep)

    async def ensure_consumer(self) -> None:
        """Make the consumer of ready operators, which a broker that restarted has forgotten."""
        await self._leader.bus.ensure_consumer(subjects.READY, streams.leader_consumer("leader"))

    async def sweep(self) -> None:
        """Read the copies of requests that came since the last sweep; remove what is settled, up to the first that is not."""
        bus = self._leader.bus
        found = await bus.stream_state(subjects.SUBMIT)
        if found is None or not found.messages:
            return
        if found.last_seq > self._read:
            async for message in bus.read_stream(subjects.SUBMIT, from_seq=self._read + 1):
                self._read = message.seq
                self._take_copy(message)
        settled = min(self._unsettled) - 1 if self._unsettled else self._read
        if settled > self._removed:
            await bus.purge(subjects.SUBMIT, below_seq=settled + 1)
            self._removed = settled

    def _take_copy(self, message: StoredMessage) -> None:
        future = self._take(message.subject, message.data, is_copy=True)
        if future is not None:
            self._unsettled.add(message.seq)
            self._copies[future] = message.seq
            future.add_done_callback(lambda done: None if done.cancelled() else self._unsettled.discard(message.seq))
            future.add_done_callback(self._copies.pop)

    def _on_ready(self, delivery: Delivery) -> None:
        message = read(delivery.subject, delivery.data, Ready)
        if message is not None:
            self._leader.apply(e.ReadySeen(message.tenant, message.run))
        delivery.post_ack()

    def _on_request(self, delivery: Delivery) -> None:
        self._take(delivery.subject, delivery.data, is_copy=False)

    def _take(self, subject: str, data: bytes, *, is_copy: bool) -> asyncio.Future[bool] | None:
        """Take a submission or cancellation; the future tells when the ledger shows it, None that nobody has to wait."""
        tenant = subject.rpartition(".")[2]
        if subject.startswith(subjects.cancel("")):
            return self._cancel(tenant, data)
        return self._submission(tenant, data, is_copy=is_copy)

    def _submission(self, tenant: str, data: bytes, *, is_copy: bool) -> asyncio.Future[bool] | None:
        try:
            run, encoding = intake.run_of(data)
        except UsageError as error:
            encoding = "json" if is_json(data) else "msgpack"
            self._reject((tenant, intake.fallback_run(data)), encoding, error)
            return None
        pair = (tenant, run)
        if pair in self._leader.state.runs or pair in self._leader.state.ended:
            if pair not in self._accepting and not is_copy:
                self._repeat(pair)
            return self._accepting.get(pair)
        if self._leader.keepers.returning.take(pair, data):
            return None
        future = self._accepting.get(pair)
        if future is None:
            future = self._accepting[pair] = asyncio.get_running_loop().create_future()
            self._take_in(pair, encoding, data)
        return future

    def _take_in(self, pair: tuple[str, str], encoding: str, data: bytes) -> None:
        """Accept at once what is small and complete; everything else takes a task."""
        try:
            if encoding == "msgpack" and len(data) < ACCEPTANCE_INLINE_MAX_BYTES:
                submission = intake.open_submission(pair[0], data, self._leader.hub)
                models = self._pin_now(submission)
                is_copied = not submission.elsewhere or not self._leader.keepers.wants_copies
                if models is not None and is_copied and not self._absent(submission):
                    self._submit(submission, models, [block for _, block in submission.blocks])
                    return
            self._leader.spawn(self._take_in_slowly(pair, encoding, data))
        except intake.InputsAbsentError:
            self._leader.spawn(self._take_in_slowly(pair, encoding, data))  # somebody else may have it
        except FlowmeshError as error:
            self._leader.spawn(self._refuse(pair, encoding, error))

    def _pin_now(self, submission: Submission) -> dict[str, str] | None:
        assert submission.manifest is not None
        wanted = intake.references(submission.manifest)
        return self._leader.resolver.known(wanted) if wanted else {}

    def _absent(self, submission: Submission) -> list[bytes]:
        """Return the roots under the manifest that neither came along nor are here."""
        return [cid for cid in submission.elsewhere if not self._leader.hub.holds(cid)]

    async def _take_in_slowly(self, pair: tuple[str, str], encoding: str, data: bytes) -> None:
        tenant, run = pair
        try:
            if encoding == "json":
                submission = await asyncio.to_thread(intake.compile_submission, tenant, run, data)
            else:
                submission = await self._open(tenant, data)
            if absent := await asyncio.to_thread(self._absent, submission):
                await self._leader.keepers.returning.fetch_lost(absent)
            await self._check_present(submission)
            assert submission.manifest is not None
            models = await self._leader.resolver.resolve(intake.references(submission.manifest))
            inline: list[bytes] = []
            if sum(len(block) for _, block in submission.blocks) <= ACCEPTANCE_INLINE_MAX_BYTES:
                inline = [block for _, block in submission.blocks]
            else:
                await self._leader.hub.put(submission.blocks)
            if submission.elsewhere or not inline:
                roots = submission.elsewhere if inline else [submission.manifest_cid]
                if not await self._leader.keepers.copied(pair, roots):
                    await self._check_present(submission)  # that nobody could fetch them may be because ours have gone bad
            self._submit(submission, models, inline)
        except FlowmeshError as error:
            await self._refuse(pair, encoding, error)

    async def _open(self, tenant: str, data: bytes) -> Submission:
        """Read a submission; what was put to an earlier leader is brought from where that stands by."""
        try:
            return await asyncio.to_thread(intake.open_submission, tenant, data, self._leader.hub)
        except intake.InputsAbsentError:
            await self._leader.keepers.returning.fetch_lost([decode(data, Submit).manifest])
            return await asyncio.to_thread(intake.open_submission, tenant, data, self._leader.hub)

    async def _check_present(self, submission: Submission) -> None:
        """Raise InputsAbsentError unless everything that did not come along is here, and sound as far as a look may cost."""
        store, roots = self._leader.hub.store, submission.elsewhere
        absent = await asyncio.to_thread(lambda: [c for c in roots if not dag.is_whole(store, c, max_bytes=VERIFIED_BYTES)])
        if absent:
            raise intake.InputsAbsentError(
                f"{len(absent)} contents of the inputs are not held by the mesh", hint="Put them before submitting."
            )

    def _submit(self, submission: Submission, models: dict[str, str], inline: list[bytes]) -> None:
        assert submission.manifest is not None
        pair = (submission.tenant, submission.run)
        check_quota(self._leader.state, submission.tenant, len(submission.manifest.operators))
        if submission.blocks:
            self._leader.hub.put_soon(submission.blocks)
        if inline:
            self._leader.inline[pair] = inline
        given: list[bytes] = []
        for operator in submission.manifest.operators:
            given += (s.ref.cid for sources in operator.inputs.values() for s in sources if s.ref is not None)
            if operator.code is not None:
                given.append(operator.code.cid)
        self._leader.hub_holds(given)
        share = self._leader.config.share
        known = self._leader.resolver.sizes
        sizes = {digest: known[digest] for digest in models.values() if digest in known}
        event = e.Submitted(*pair, submission.manifest, submission.manifest_cid, models, submission.encoding, share, sizes)
        self._leader.apply(event)

    async def _refuse(self, pair: tuple[str, str], encoding: str, error: FlowmeshError) -> None:
        """Reject a submission once no other leader can still accept it: its copy is gone, and we have led until then."""
        leader, future = self._leader, self._accepting.get(pair)
        until_s = monotonic_s() + COPY_WAIT_S
        while future is not None and future not in self._copies and monotonic_s() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(COPY_LOOK_S)
        seq = self._copies.get(future, 0) if future is not None else 0
        while True:
            try:
                if seq:
                    await leader.bus.delete_message(subjects.SUBMIT, seq)
                if not await leader.ledger.is_current():
                    return
                break
            except TransientError:
                await asyncio.sleep(random.uniform(0.2, 0.5))
        self._reject(pair, encoding, error)

    def _reject(self, pair: tuple[str, str], encoding: str, error: FlowmeshError) -> None:
        log.info("rejected run %s: %s", pair[1], error.message)
        feed = self._leader.feeds.feed(*pair, encoding)
        self._leader.feeds.send(feed, "rejected", intake.rejection(error))
        self._leader.feeds.forget(*pair)
        self.settle(pair, False)

    def is_accepting(self, pair: tuple[str, str]) -> bool:
        """Tell whether a submission of this run is on its way into the ledger."""
        return pair in self._accepting

    def accepting(self, pair: tuple[str, str]) -> asyncio.Future[bool] | None:
        """Return what tells when the ledger shows a run that is on its way into it, None for any other."""
        return self._accepting.get(pair)

    def settle(self, pair: tuple[str, str], is_accepted: bool) -> None:
        future = self._accepting.pop(pair, None)
        if future is not None and not future.done():
            future.set_result(is_accepted)

    def _repeat(self, pair: tuple[str, str]) -> None:
        """A run is submitted again: say where it stands."""
        state, feeds = self._leader.state, self._leader.feeds
        run = state.runs.get(pair)
        end = asks.told_end(self._leader, run) if run is not None else state.ended[pair][0]
        feed = feeds.feed(*pair, run.acceptance.encoding if run is not None else "msgpack")
        if run is not None:
            feeds.send(feed, "accepted", {"name": run.manifest.name, "operators": len(run.vertices)})
        if end is not None:
            feeds.send(feed, "ended", asks.plain_end(end))

    def _cancel(self, tenant: str, data: bytes) -> asyncio.Future[bool] | None:
        """Take a cancellation; the future tells when the ledger shows it: until then its copy in the stream must stay."""
        try:
            message = msgspec.json.decode(data, type=asks.JsonCancel) if is_json(data) else decode(data, Cancel)
        except (msgspec.DecodeError, UsageError) as error:
            log.info("unreadable cancellation: %s", error)
            return None
        actor = message.actor or self._leader.tenant_names.get(tenant, "tenant")
        cancel = e.CancelRequested(tenant, message.run, actor)
        pair = (tenant, message.run)
        accepting = self._accepting.get(pair)
        if accepting is None:
            self._leader.apply(cancel)
            return self._cancelling.get(pair)

        def accepted(done: asyncio.Future[bool]) -> None:
            if not done.cancelled():
                self._leader.apply(cancel)
                if pair not in self._recording:
                    self.cancelled(pair)

        # the run is still on its way in: it is cancelled as soon as it is there
        accepting.add_done_callback(accepted)
        return self._cancelled_later(pair)

    def recording(self, pair: tuple[str, str]) -> None:
        """A cancellation is on its way into the ledger."""
        self._recording.add(pair)
        self._cancelled_later(pair)

    def _cancelled_later(self, pair: tuple[str, str]) -> asyncio.Future[bool]:
        future = self._cancelling.get(pair)
        if future is None:
            future = self._cancelling[pair] = asyncio.get_running_loop().create_future()
        return future

    def cancelled(self, pair: tuple[str, str]) -> None:
        """The ledger shows a cancellation, or there is nothing to cancel."""
        self._recording.discard(pair)
        future = self._cancelling.pop(pair, None)
        if future is not None and not future.done():
            future.set_result(True)

    @property
    def _may_be_deposed(self) -> bool:
        """Tell whether another may lead by now: then this one knows too little to answer, and what it is given may be lost."""
        return self._leader.is_cut_off or not self._leader.lease.is_held

    def _on_ask(self, delivery: Delivery) -> None:
        if self._may_be_deposed:
            return
        self._leader.spawn(self._counted(self._answer(delivery, asks.answer)))

    def _on_put(self, delivery: Delivery) -> None:
        if self._may_be_deposed:
            return
        self._leader.spawn(self._counted(self._answer(delivery, asks.put)))

    def _on_get(self, delivery: Delivery) -> None:
        self._leader.spawn(self._counted(asks.get(self._leader, delivery.subject.rpartition(".")[2], delivery)))

    async def _counted(self, answering: Coroutine[Any, Any, None]) -> None:
        self.answering += 1
        try:
            await answering
        finally:
            self.answering -= 1

    async def _answer(self, delivery: Delivery, work: Callable[[Leader, str, bytes], Awaitable[Any]]) -> None:
        try:
            answer = Answer(await work(self._leader, delivery.subject.rpartition(".")[2], delivery.data))
        except FlowmeshError as error:
            answer = Answer(None, error.message, error.hint, type(error).__name__)
        answer = msgspec.structs.replace(answer, wire=messages.WIRE_VERSION, wire_oldest=messages.WIRE_OLDEST)
        plain = is_json(delivery.data)
        delivery.post_respond(msgspec.json.encode(asks.plain_answer(answer)) if plain else encode(answer))
