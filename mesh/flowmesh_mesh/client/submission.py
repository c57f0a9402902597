"""Submission: compile here, send once, return when the mesh has taken the run over."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas.cid import DAG_CBOR, cid_text
from flowmesh_cas.errors import FlowmeshError, TransientError, UsageError
from flowmesh_mesh import messages, subjects
from flowmesh_mesh.client.blocks import put
from flowmesh_mesh.client.questions import ask
from flowmesh_mesh.client.run import Run
from flowmesh_mesh.messages import INLINE_MAX_BYTES, Submit, encode
from flowmesh_mesh.names import check_name

if TYPE_CHECKING:
    from flowmesh_cas.store import BlockStore
    from flowmesh_mesh.bus import Bus
    from flowmesh_mesh.client.mesh import Mesh
    from flowmesh_mesh.compiler import Compiled, Draft
    from flowmesh_mesh.sharding import Settled

log = logging.getLogger("flowmesh.client")

PUTS = 3
"""How often contents are put before a submission is given up whose contents the mesh has lost again."""

WISHES_MAX = 500
"""Most operators whose shards are asked for in one question."""

STORE_TIMEOUT_S = 2.0
"""How long one publication waits for the broker's acknowledgement before it is repeated under the same run id."""


def new_run_id() -> str:
    """Return a fresh run id: 26 characters of base32 over 16 random bytes."""
    return base64.b32encode(os.urandom(16)).decode().rstrip("=").lower()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A compiled workflow and the store that holds its blocks until the mesh does.

    While there is a ``draft``, numbers of shards are yet to be settled, and the workflow is compiled as if they were 1.
    """

    compiled: Compiled
    store: BlockStore
    draft: Draft | None = None
    settled: tuple[Settled, ...] = ()


def prepare(workflow: Any, params: Mapping[str, Any] | None, store: BlockStore) -> Prepared:
    """Compile a workflow given as path, document, builder or Compiled (whose content ``store`` or the mesh must hold).

    Paths in a document file stand from its folder, in others from the current one. Raise DocumentError with all problems.
    """
    from flowmesh_mesh.compiler import Compiled, Draft, draft_file

    if isinstance(workflow, Compiled):
        store.put(DAG_CBOR, workflow.block)
        return Prepared(workflow, store)
    if isinstance(workflow, (str, os.PathLike)):
        draft = draft_file(Path(workflow), params=params, store=store)
    else:
        draft = Draft(workflow, base=Path.cwd(), params=params, store=store)
    return Prepared(draft.compile({}), store, draft if draft.auto else None)


async def settle(bus: Bus, prepared: Prepared) -> Prepared:
    """Ask the mesh for every number of shards that is to be settled, and compile with them; what is settled stays as it is."""
    from flowmesh_mesh.sharding import Choice, Settled

    draft = prepared.draft
    if draft is None:
        return prepared
    wishes = await asyncio.to_thread(draft.wishes)
    distinct = list({id(wish): wish for wish in wishes.values()}.values())
    choices: dict[int, Choice] = {}
    for start in range(0, len(distinct), WISHES_MAX):
        some = distinct[start : start + WISHES_MAX]
        answer = await ask(bus, "shards", {"operators": msgspec.to_builtins(some)})
        told = msgspec.convert(answer["choices"], list[Choice])
        choices |= {id(wish): choice for wish, choice in zip(some, told, strict=True)}
    settled = tuple(Settled(name, choices[id(wish)]) for name, wish in wishes.items())
    compiled = await asyncio.to_thread(draft.compile, {each.operator: each.choice.shards for each in settled})
    return replace(prepared, compiled=compiled, draft=None, settled=settled)


def inline_blocks(store: BlockStore, root: bytes) -> tuple[bytes, ...] | None:
    """Return all blocks under ``root`` that are held here, the root first; None when they are too large to travel inline."""
    from flowmesh_cas.dag import links

    blocks: list[bytes] = []
    size_bytes = 0
    seen = {root}
    stack = [root]
    while stack:
        cid = stack.pop()
        if not store.has(cid):
            continue  # named by its CID only: the mesh must hold it
        block = store.get(cid)
        size_bytes += len(block)
        if size_bytes > INLINE_MAX_BYTES:
            return None
        blocks.append(block)
        fresh = [link for link in links(cid, block) if link not in seen]
        seen.update(fresh)
        stack.extend(reversed(fresh))
    return tuple(blocks)


def begin(bus: Bus, run: str, payload: bytes) -> asyncio.Future[int]:
    """Send the submission to the broker's stream now; the future holds its sequence, or why it has none."""
    stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def settle(answer: int | FlowmeshError) -> None:
        if stored.done():
            return
        if isinstance(answer, int):
            stored.set_result(answer)
        else:
            stored.set_exception(answer)

    try:
        bus.store_then(subjects.TENANT_SUBMIT, payload, settle, message_id=run, timeout_s=STORE_TIMEOUT_S)
        bus.push()
    except TransientError as error:
        settle(error)
    return stored


async def publish(bus: Bus, run: str, payload: bytes, deadline_s: float, first: asyncio.Future[int]) -> None:
    """See that the submission is stored, once whatever happens: every try carries the run id. ``first`` is under way."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    pause = 0.1
    try:
        await first
        return
    except TransientError:
        pass
    while True:
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, 2.0)
        try:
            await bus.store(subjects.TENANT_SUBMIT, payload, message_id=run, timeout_s=STORE_TIMEOUT_S)
            return
        except TransientError:
            if loop.time() + pause >= end:
                raise


class InputsAbsentError(UsageError):
    """The mesh does not hold what was put before the submission, or no longer."""


async def submit(mesh: Mesh, prepared: Prepared, run: str | None, deadline_s: float) -> Run:
    """Send a compiled workflow and return its run once the mesh has accepted it; raise UsageError when it is refused.

    What was put is put again when whoever took it is gone before the run was accepted.
    """
    if run is not None:
        check_name(run, "run")
    prepared = await settle(mesh.bus, prepared)
    blocks = inline_blocks(prepared.store, prepared.compiled.cid)
    for _ in range(PUTS - 1 if blocks is None and run is None else 0):
        try:
            return await _submit_once(mesh, prepared, blocks, None, deadline_s)
        except InputsAbsentError as error:
            log.info("%s; putting everything again", error.message)
    return await _submit_once(mesh, prepared, blocks, run, deadline_s)


async def _submit_once(
    mesh: Mesh, prepared: Prepared, blocks: tuple[bytes, ...] | None, named: str | None, deadline_s: float
) -> Run:
    bus, compiled, run = mesh.bus, prepared.compiled, named or new_run_id()
    if blocks is None:
        await put(bus, prepared.store, compiled.cid)
    handle = Run(mesh, run)
    await handle.follow(from_start=True)
    payload = encode(Submit(run, compiled.cid, blocks or (), messages.WIRE_VERSION, messages.WIRE_OLDEST))
    stored = asyncio.create_task(publish(bus, run, payload, deadline_s, begin(bus, run, payload)))
    try:
        await _accepted(handle, stored, deadline_s)
    except BaseException:
        stored.cancel()
        await handle.close()
        raise
    mesh.keep(handle, stored)
    if handle.end is not None:
        mesh.forget(handle)
    else:
        await mesh.remember(run, payload, prepared.store if blocks is None else None)
    if named:
        await _check_same(handle, prepared)
    return handle


async def _accepted(handle: Run, stored: asyncio.Task[None], deadline_s: float) -> None:
    """Wait for acknowledgement and acceptance together: whichever speaks first saves a round trip."""
    waiting = asyncio.create_task(handle.accepted(deadline_s))
    try:
        await asyncio.wait({waiting, stored}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done() and stored.exception() is not None:
            stored.result()
        is_accepted = await waiting
    finally:
        waiting.cancel()
    if not is_accepted:
        raise TransientError(
            f"run {handle.id} was not accepted within {deadline_s:g} s",
            hint=f"It waits in the mesh's queue; submitting it again with `--run {handle.id}` is safe.",
        )
    end = handle.end
    if end is not None and end.body.get("state") == "rejected":
        raise rejection(handle.id, end.body)


def rejection(run: str, body: Mapping[str, Any]) -> UsageError:
    """Return the error of a refused submission, with every problem that the mesh found."""
    problems = [
        str(problem.get("message", problem)) if isinstance(problem, dict) else str(problem)
        for problem in body.get("problems") or ()
    ]
    text = body.get("error") or body.get("detail") or "the mesh refused the workflow"
    kind = InputsAbsentError if body.get("absent") else UsageError
    return kind(f"run {run} was rejected: {text}" + "".join(f"\n  {problem}" for problem in problems))


async def _check_same(handle: Run, prepared: Prepared) -> None:
    """Raise UsageError when the run that has this id is one of another workflow."""
    known = (await handle.status(limit=1)).get("manifest")
    if known and known != cid_text(prepared.compiled.cid):
        hint = "Choose another run id, or leave --run out."
        if prepared.settled:
            hint += " 'shards: auto' may have become another number than at first: it stands in the plan; write one instead."
        raise UsageError(f"run {handle.id} exists already, with another workflow", hint=hint)
