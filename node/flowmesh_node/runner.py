"""One assignment on executor processes: inputs laid out, a process lent, the batch run, each item settled."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from flowmesh_cas.cid import cid_parse
from flowmesh_cas.errors import ExecutionError, FlowmeshError, IntegrityError, NotFoundError
from flowmesh_cas.store import BlockStore
from flowmesh_mesh.manifest import Metered
from flowmesh_mesh.messages import Item, Located, Log, Reason
from flowmesh_node import frames
from flowmesh_node.checkpoints import Checkpoints
from flowmesh_node.course import Course
from flowmesh_node.executor import Executor
from flowmesh_node.executors import Executors
from flowmesh_node.held import Held, Reply
from flowmesh_node.inputs import Inputs
from flowmesh_node.operators import base
from flowmesh_node.settings import Settings

log = logging.getLogger("flowmesh.node")

T = TypeVar("T")

USER_GRACE_S = 15.0
"""How much later than the process that watches a user's function the agent loses patience."""


class _SharedGoneError(FlowmeshError):
    """Content that all the items of an assignment need is not here after all."""

    def __init__(self, cid: bytes, error: FlowmeshError) -> None:
        super().__init__(error.message)
        self.cid = cid


class Runner:
    """Runs assignments of the kinds ``data``, ``user``, ``engine`` and ``train``."""

    def __init__(
        self,
        settings: Settings,
        store: BlockStore,
        inputs: Inputs,
        executors: Executors,
        send_log: Callable[[Log], None],
        memory_bytes: int,
        on_numeric: Callable[[str], None] = lambda numeric: None,
        checkpoints: Checkpoints | None = None,
        hazard_per_hour: float = 0.0,
    ) -> None:
        self._checkpoints = checkpoints
        self._hazard_per_hour = hazard_per_hour
        self._settings = settings
        self._store = store
        self._inputs = inputs
        self._executors = executors
        self._send_log = send_log
        self._on_numeric = on_numeric
        self._user_memory_bytes = settings.user_memory_bytes or memory_bytes // 2
        self._scratch = settings.folder / "scratch"
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)

    async def run(self, held: Held, reply: Reply, indices: Sequence[int], kind: str, fetched: Metered) -> None:
        """Settle the items at ``indices``, whose inputs are here. What a crash leaves of a batch is tried item by item."""
        assignment = held.assignment
        refs = [each.ref for index in indices for port in assignment.items[index].inputs.values() for each in port]
        with self._inputs.cache.holding([*refs, *([assignment.code.ref] if assignment.code else [])]):
            items = await self._items(held, reply, indices)
            await self._go(held, reply, items, kind, fetched)
            for index in [index for index in reply.unsettled if index in items]:
                await self._go(held, reply, {index: items[index]}, kind, Metered())

    async def _items(self, held: Held, reply: Reply, indices: Sequence[int]) -> dict[int, base.Item]:
        """Lay out the inputs of each item; an item whose content is damaged fails alone."""
        laid: dict[int, base.Item] = {}
        cache: dict[bytes, base.Input] = {}
        for index in indices:
            item = held.assignment.items[index]
            try:
                laid[index] = await self._item(item, cache)
            except (NotFoundError, IntegrityError) as error:
                cids = {each.ref.cid for port in item.inputs.values() for each in port}
                self._inputs.note_gone(cids)
                reply.fail(index, Reason.INPUT_MISSING, error.message, missing=sorted(cids))
            except (FlowmeshError, OSError) as error:
                reply.fail(index, Reason.INTERNAL, f"inputs cannot be laid out: {error}")
        return laid

    async def _item(self, item: Item, cache: dict[bytes, base.Input]) -> base.Item:
        ports: dict[str, list[base.Input]] = {}
        for port, contents in item.inputs.items():
            ports[port] = []
            for each in contents:
                identity = each.ref.cid + each.ref.kind.encode()
                if identity not in cache:
                    cache[identity] = await self._inputs.lay_out(each.ref)
                ports[port].append(cache[identity])
        return base.Item(item.key.hex(), item.name, item.params, ports, item.generation, item.attempt)

    async def _with_checkpoints(self, held: Held, items: dict[int, base.Item], course: Course) -> dict[int, base.Item]:
        """Lay out what earlier attempts have left; who cannot have it begins at the beginning."""
        found = dict(items)
        for index, item in items.items():
            at = held.assignment.items[index].checkpoint
            if at is not None:
                held.state = "fetching"
                path = await self._checkpoint(at, course)
                found[index] = dataclasses.replace(item, checkpoint=path)
        return found

    async def _checkpoint(self, at: Located, course: Course) -> str:
        """Return the folder of a checkpoint, fetched anew if what is here is damaged; empty if nobody has it whole."""
        why = "nobody has it"
        for _ in range(2):
            missing, _ = await self._inputs.bring(self._inputs.lacks([at]))
            if missing:
                break
            try:
                return (await self._inputs.lay_out(at.ref)).path
            except FlowmeshError as error:
                why = error.message
                self._inputs.note_gone([at.ref.cid])
        course.say(f"beginning at the beginning: the checkpoint cannot be had: {why}")
        return ""

    async def _go(self, held: Held, reply: Reply, items: dict[int, base.Item], kind: str, fetched: Metered) -> None:
        """Run these items in one process; each is settled afterwards, unless the process died with several in it."""
        if not items:
            return
        scratch = self._scratch / uuid.uuid4().hex
        lent: list[Executor] = []

        def keep(item: Item, frame: frames.Checkpointed) -> None:
            if self._checkpoints is not None:
                self._checkpoints.take(held.assignment, item, frame, lent[0].note_kept)

        course = Course(held, reply, list(items), fetched, self._store, self._inputs, self._send_log, self._on_numeric, keep)
        try:
            items = await self._with_checkpoints(held, items, course)
            batch = await self._batch(held, list(items.values()), scratch)
            held.state = "queued"
            async with self._executors.lent(
                kind, [each.digest for each in batch.models.values()], batch.memory_bytes
            ) as executor:
                lent.append(executor)
                held.state = "running"
                patience_s = batch.timeout_s + USER_GRACE_S if kind == "user" else batch.timeout_s
                await executor.run(batch, course.watch(), patience_s)
            await course.finish()
            course.fail_rest(Reason.INTERNAL, "the process settled neither well nor badly")
        except ExecutionError as error:
            await course.finish()
            if error.reason == Reason.CRASHED and len(items) > 1:
                log.warning("%s: %s; trying what is left one by one", held.assignment.id, error.message)
                return
            course.fail_rest(error.reason, error.message)
        except _SharedGoneError as error:
            for index in list(items):
                reply.fail(index, Reason.INPUT_MISSING, error.message, missing=[error.cid])
        except FlowmeshError as error:
            reason = Reason.MODEL_MISSING if isinstance(error, NotFoundError) else Reason.INTERNAL
            course.fail_rest(reason, f"{error.message} ({error.hint})" if error.hint else error.message)
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, scratch, True))

    async def _batch(self, held: Held, items: list[base.Item], scratch: Path) -> base.Batch:
        assignment = held.assignment
        is_user = assignment.type == "python.call"
        code = None
        if assignment.code is not None:
            code = await self._shared(assignment.code.ref.cid, self._inputs.lay_out(assignment.code.ref))
        await asyncio.to_thread(scratch.mkdir, 0o700)
        models = {
            role: await self._model(reference, assignment.model_digests.get(role) or assignment.model_digests.get(reference, ""))
            for role, reference in assignment.models.items()
        }
        return base.Batch(
            assignment.type,
            assignment.version,
            items,
            models,
            code,
            str(scratch),
            assignment.timeout_s or (self._settings.user_timeout_s if is_user else 0.0),
            assignment.memory_bytes or (self._user_memory_bytes if is_user else 0),
            assignment.numeric,
            self._settings.checkpoint_s,
            self._hazard_per_hour,
        )

    async def _model(self, reference: str, digest: str) -> base.Model:
        """Return the model as far as the agent takes it: content of the mesh is laid out, the process unpacks and checks."""
        if not reference.startswith("cid:"):
            return base.Model(reference, digest, "")
        cid = cid_parse(reference.removeprefix("cid:"))
        path = await self._shared(cid, self._inputs.lay_out_folder(cid))
        return base.Model(reference, digest, str(path))

    async def _shared(self, cid: bytes, laying_out: Awaitable[T]) -> T:
        """Lay out what all the items need; what turns out damaged or gone is fetched anew by the next attempt."""
        try:
            return await laying_out
        except (NotFoundError, IntegrityError) as error:
            self._inputs.note_gone([cid])
            raise _SharedGoneError(cid, error) from error
