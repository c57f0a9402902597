"""A fake leader on a real broker: it answers a client the way a test wants, right or wrong, which a real leader would not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flowmesh_cas import dag
from flowmesh_cas.cid import cid_of, cid_text, codec_of
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.messages import Answer, Ask, Blocks, Cancel, Get, Put, RunEvent, Submit, decode, encode
from flowmesh_mesh.streams import StreamConfig


class FakeLeader:
    """Holds blocks and runs in memory; ``on_submit`` decides what follows a submission."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.store = MemoryStore()
        self.submissions: list[Submit] = []
        self.cancelled: list[str] = []
        self.puts: list[Put] = []
        self.seqs: dict[str, int] = {}
        self.states: dict[str, dict[str, Any]] = {}
        self.on_submit: Callable[[Submit], None] = lambda submit: self.emit(submit.run, "accepted", {"name": "w", "operators": 1})
        self.answers: dict[str, Callable[[dict[str, Any]], Answer]] = {"run": self._run, "runs": self._runs}
        self.spoil: Callable[[Blocks], Blocks] = lambda blocks: blocks

    @classmethod
    async def start(cls, url: str) -> FakeLeader:
        bus = await Bus.connect(url, None, name="fake leader", inbox="_INBOX_fake")
        leader = cls(bus)
        await bus.ensure_stream(
            StreamConfig("SUBMIT", [subjects.TENANT_SUBMIT, subjects.TENANT_CANCEL], duplicate_window=120 * 10**9)
        )
        for subject, handler in (
            (subjects.TENANT_SUBMIT, leader._submit),
            (subjects.TENANT_CANCEL, leader._cancel),
            (subjects.TENANT_ASK, leader._ask),
            (subjects.TENANT_PUT, leader._put),
            (subjects.TENANT_GET, leader._get),
        ):
            await bus.subscribe(subject, handler)
        await bus.flush()
        return leader

    def emit(self, run: str, kind: str, body: dict[str, Any] | None = None, *, is_lost: bool = False) -> None:
        """Publish the next event of a run, or only count it when it is to be lost."""
        self.seqs[run] = self.seqs.get(run, 0) + 1
        state = self.states.setdefault(run, {"run": run, "state": "accepted", "operators": [], "total": 0})
        state["seq"] = self.seqs[run]
        if kind == "ended":
            state.update(body or {})
        if not is_lost:
            event = RunEvent(run, self.seqs[run], time.time_ns() // 1000, kind, body or {})
            self.bus.post(subjects.tenant_run_event(run), encode(event))

    def end(self, run: str, state: str = "succeeded", *, is_lost: bool = False, **body: Any) -> None:
        self.emit(run, "ended", {"state": state, "reason": state, "actor": "mesh", "outputs": {}, **body}, is_lost=is_lost)

    async def close(self) -> None:
        await self.bus.close()

    def _submit(self, message: Delivery) -> None:
        submit = decode(message.data, Submit)
        if any(submit.run == known.run for known in self.submissions):
            return  # the stream would not store the same message id again
        self.submissions.append(submit)
        self.on_submit(submit)

    def _cancel(self, message: Delivery) -> None:
        run = decode(message.data, Cancel).run
        self.cancelled.append(run)
        self.end(run, "cancelled", actor="tenant")

    def _ask(self, message: Delivery) -> None:
        ask = decode(message.data, Ask)
        known = self.answers.get(ask.what)
        answer = known(ask.args) if known else Answer(error=f"unknown question {ask.what!r}", kind="UsageError")
        self.bus.post(message.reply, encode(answer))

    def _run(self, args: dict[str, Any]) -> Answer:
        state = self.states.get(args["run"])
        return Answer(state) if state else Answer(error=f"no run {args['run']!r}", kind="NotFoundError")

    def _runs(self, _: dict[str, Any]) -> Answer:
        return Answer([{"run": run, "name": "w", "state": state["state"]} for run, state in self.states.items()])

    def _put(self, message: Delivery) -> None:
        put = decode(message.data, Put)
        self.puts.append(put)
        self.store.put_many([(cid_of(codec, block), block) for codec, block in zip(put.codecs, put.blocks, strict=True)])
        absent = dag.missing(self.store, put.root) if put.root else []
        self.bus.post(message.reply, encode(Answer({"missing": [cid_text(cid) for cid in absent]})))

    def _get(self, message: Delivery) -> None:
        get = decode(message.data, Get)
        if not self.store.has(get.root):
            self.bus.post(message.reply, encode(Blocks((), error="not held")))
            return
        cids = list(dag.walk(self.store, get.root))
        part = cids[get.cursor : get.cursor + 2]
        after = get.cursor + len(part)
        blocks = tuple(self.store.get_many(part))
        answer = Blocks(blocks, tuple(codec_of(cid) for cid in part), after if after < len(cids) else -1)
        self.bus.post(message.reply, encode(self.spoil(answer)))
