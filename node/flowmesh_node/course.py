"""One go of a batch on a process: what it says is kept in groups, one write each, and reported as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from flowmesh_cas.errors import ExecutionError, FlowmeshError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh.clock import monotonic_ns, now_us
from flowmesh_mesh.manifest import Metered, Ref
from flowmesh_mesh.messages import Item, Log, Outcome, Reason
from flowmesh_node import frames, outputs
from flowmesh_node.executor import Watch
from flowmesh_node.held import Held, Reply
from flowmesh_node.inputs import Inputs
from flowmesh_node.logs import LineTap
from flowmesh_node.operators.base import Failed, Produced

GROUP_DELAY_S = 0.02


class Course:
    """The items at ``indices`` of an assignment, while a process runs them.

    ``fetched`` is what bringing the inputs cost; it and loading are shared out evenly, so that they add up.
    """

    def __init__(
        self,
        held: Held,
        reply: Reply,
        indices: Sequence[int],
        fetched: Metered,
        store: BlockStore,
        inputs: Inputs,
        send_log: Callable[[Log], None],
        on_numeric: Callable[[str], None] = lambda numeric: None,
        on_checkpoint: Callable[[Item, frames.Checkpointed], None] = lambda item, frame: None,
    ) -> None:
        self._held = held
        self._reply = reply
        self._indices = indices
        self._fetched = fetched
        self._store = store
        self._inputs = inputs
        self._send_log = send_log
        self._on_numeric = on_numeric
        self._on_checkpoint = on_checkpoint
        self._load_us = 0
        self._began_ns = monotonic_ns()
        self._waiting: list[tuple[int, Produced | Failed]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._tap = LineTap(self._send_lines)
        self._log: Ref | None = None

    def watch(self) -> Watch:
        """Return what the process's side calls."""
        return Watch(self._on_settled, self._tap.line, self._on_loaded, self._on_checkpointed)

    def say(self, line: str) -> None:
        """Put a line into the log of the first item."""
        self._tap.line(line)

    def _send_lines(self, lines: tuple[str, ...]) -> None:
        # What a process prints cannot be told apart by item; it goes to the first, the only one where users' code runs.
        item = self._held.assignment.items[self._indices[0]]
        self._send_log(Log(self._held.assignment.node, item.key, item.attempt, lines, now_us()))

    def _on_loaded(self, frame: frames.Loaded) -> None:
        self._load_us = frame.load_us
        self._began_ns = monotonic_ns()
        self._reply.numeric = frame.numeric
        if frame.numeric:
            self._on_numeric(frame.numeric)

    def _on_checkpointed(self, frame: frames.Checkpointed) -> None:
        if 0 <= frame.index < len(self._indices):
            self._on_checkpoint(self._held.assignment.items[self._indices[frame.index]], frame)

    def _on_settled(self, frame: frames.Settled) -> None:
        result = frame.failed or frame.produced
        if result is None or not 0 <= frame.index < len(self._indices):
            return
        self._waiting.append((self._indices[frame.index], result))
        # A lone item waits for the end of the batch, which follows at once, because its log is complete only then.
        if self._timer is None and self._keeping is None and len(self._indices) > 1:
            self._timer = asyncio.get_running_loop().call_later(GROUP_DELAY_S, self._begin_keeping)

    def _begin_keeping(self) -> None:
        self._timer = None
        self._keeping = asyncio.create_task(self._keep_waiting())

    async def _keep_waiting(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            await self._keep(group)
        self._keeping = None

    async def _keep(self, group: list[tuple[int, Produced | Failed]]) -> None:
        good = [(index, result) for index, result in group if isinstance(result, Produced)]
        for index, result in group:
            if isinstance(result, Failed):
                self._reply.fail(index, result.reason, result.error, log=self._log_of(index))
        if not good:
            return
        try:
            kept = await asyncio.to_thread(outputs.keep_all, self._store, [result for _, result in good])
        except (FlowmeshError, OSError) as error:
            for index, _ in good:
                self._reply.fail(index, Reason.INTERNAL, f"the result cannot be stored: {error}")
            return
        for (index, result), each in zip(good, kept, strict=True):
            if isinstance(each, ExecutionError):
                self._reply.fail(index, each.reason, each.message)
            else:
                self._succeed(index, result, each)

    def _succeed(self, index: int, result: Produced, kept: outputs.Kept) -> None:
        item = self._held.assignment.items[index]
        self._inputs.note_here(ref.cid for refs in kept.outputs.values() for ref in refs)
        outcome = Outcome(
            item.key,
            item.generation,
            item.attempt,
            Reason.SUCCEEDED,
            kept.result,
            kept.outputs,
            metered=self._metered(result),
            log=self._log_of(index),
        )
        self._reply.settle(index, outcome, kept.inline)

    def _metered(self, result: Produced) -> Metered:
        count = len(self._indices)
        exec_us = result.exec_us or (monotonic_ns() - self._began_ns) // 1000 // count
        return Metered(
            load_us=self._load_us // count,
            fetch_us=self._fetched.fetch_us // count,
            exec_us=exec_us,
            rows=result.rows,
            tokens_in=result.tokens_in,
            tokens_out=result.tokens_out,
            bytes_fetched=self._fetched.bytes_fetched // count,
            rows_shared=result.rows_shared,
        )

    def _log_of(self, index: int) -> Ref | None:
        return self._log if index == self._indices[0] else None

    async def finish(self) -> None:
        """Keep and report what is left; the log is complete now."""
        self._tap.flush()
        if text := self._tap.kept():
            self._log = outputs.leaf_ref("file", text)
            await asyncio.to_thread(self._store.put_many, [(self._log.cid, text)])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._keeping is not None:
            await self._keeping
        await self._keep_waiting()

    def fail_rest(self, reason: str, error: str) -> None:
        """Settle badly what the process left; the log comes with it."""
        for index in self._indices:
            self._reply.fail(index, reason, error, log=self._log_of(index))
