"""What a client remembers of its submissions, so that it can submit them again should the mesh have lost them.

One file per run under the user's state folder, from its acceptance until its end was seen: the submission as it was sent, and the
contents that were put before it where they are not too large. Bounded in number, size and age; losing it loses nothing that the
mesh has. Writing it never makes a submission fail.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh_cas.cid import codec_of
from flowmesh_cas.errors import FlowmeshError, NotFoundError, TransientError, UsageError
from flowmesh_cas.store import MemoryStore
from flowmesh_mesh import subjects
from flowmesh_mesh.clock import now_us
from flowmesh_mesh.messages import Submit, decode, encode

if TYPE_CHECKING:
    from flowmesh_cas.store import BlockStore
    from flowmesh_mesh.bus import Bus
    from flowmesh_mesh.context import Context

log = logging.getLogger("flowmesh.client")

VARIABLE = "FLOWMESH_STATE"
SUFFIX = ".submission"
ENTRIES_MAX = 1000
TOTAL_MAX_BYTES = 512 * 1024 * 1024
AGE_MAX_S = 14 * 24 * 3600
BLOCKS_MAX_BYTES = 32 * 1024 * 1024
"""Contents of one submission beyond the message itself; larger ones are remembered by their CID alone."""

PRUNED_EVERY = 100
STORE_TIMEOUT_S = 5.0


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """A submission that was accepted: the message as it was sent, and the blocks that were put before, with their codecs."""

    run: str
    mesh: str
    tenant: str
    at_us: int
    payload: bytes
    blocks: tuple[tuple[int, bytes], ...] = ()


def state_folder() -> Path:
    """Return the user's folder for what FlowMesh remembers."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "flowmesh"


def journal_of(context: Context | str | os.PathLike[str] | None, tenant: str | None) -> Journal:
    """Return the journal of a tenant of a mesh."""
    from flowmesh_mesh.context import Context, find_context

    found = context if isinstance(context, Context) else find_context(context)
    return Journal(state_folder() / "submissions", found.mesh, found.tenant(tenant or "").account)


class Journal:
    """The submissions of one tenant to one mesh. Methods block, but for the few that talk to the mesh."""

    def __init__(self, folder: Path, mesh: str, tenant: str) -> None:
        self.folder = folder / tenant
        self._mesh = mesh
        self._tenant = tenant
        self._kept = 0
        self._expected: set[str] = set()

    def _path(self, run: str) -> Path:
        return self.folder / f"{run}{SUFFIX}"

    def expect(self, run: str) -> None:
        """Note that a submission is about to be remembered."""
        self._expected.add(run)

    def keep(self, run: str, payload: bytes, store: BlockStore | None) -> None:
        """Remember a submission; ``store`` holds what was put before it, None where everything is in the message.

        It may run in a thread, after :meth:`expect` in the loop: what is dropped meanwhile stays forgotten.
        """
        try:
            blocks = _blocks(store, decode(payload, Submit).manifest) if store is not None else ()
            entry = Remembered(run, self._mesh, self._tenant, now_us(), payload, blocks)
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self._path(run).with_suffix(f".{os.getpid()}")
            temporary.write_bytes(encode(entry))
            temporary.replace(self._path(run))
        except (OSError, FlowmeshError) as error:
            log.info("run %s is not remembered: %s", run, error)
        self.drop(run)  # the first of two takes it from what is expected, the second removes the file
        self._kept += 1
        if self._kept % PRUNED_EVERY == 1:
            self.prune()

    def is_expected(self, run: str) -> bool:
        """Tell whether a submission is still to be remembered."""
        return run in self._expected

    def drop(self, run: str) -> None:
        """Forget a run: its end was seen. What is expected still leaves no file then."""
        try:
            self._expected.remove(run)
            return
        except KeyError:
            pass
        try:
            self._path(run).unlink(missing_ok=True)
        except OSError as error:
            log.info("run %s is still remembered: %s", run, error)

    def find(self, run: str) -> Remembered | None:
        """Return what is remembered of a run, given by its id or by a beginning of it that only one has."""
        exact = self._path(run)
        paths = [exact] if exact.exists() else sorted(self.folder.glob(f"{run}*{SUFFIX}"))
        return self._read(paths[0]) if len(paths) == 1 else None

    def entries(self) -> Iterator[Remembered]:
        """Yield everything that is remembered."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            entry = self._read(path)
            if entry is not None:
                yield entry

    def _read(self, path: Path) -> Remembered | None:
        try:
            return decode(path.read_bytes(), Remembered)
        except FileNotFoundError:
            return None
        except (OSError, UsageError) as error:
            log.info("%s cannot be read: %s", path.name, error)
            path.unlink(missing_ok=True)
            return None

    def prune(self) -> None:
        """Forget what is too old, and the oldest of what is too much."""
        try:
            found = sorted(((path.stat(), path) for path in self.folder.glob(f"*{SUFFIX}")), key=lambda each: -each[0].st_mtime)
            left_bytes, oldest_s = TOTAL_MAX_BYTES, now_us() / 1e6 - AGE_MAX_S
            for number, (stat, path) in enumerate(found):
                left_bytes -= stat.st_size
                if number >= ENTRIES_MAX or left_bytes < 0 or stat.st_mtime < oldest_s:
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.info("the journal cannot be pruned: %s", error)

    # --- submitting again

    async def submit_again(self, bus: Bus, run: str) -> str:
        """Submit a run once more under its id, if it is remembered; return the full id, empty if it is not.

        It is safe at any time: a mesh that knows the run does nothing.
        """
        entry = self.find(run)
        if entry is None:
            return ""
        if entry.blocks:
            await _put_again(bus, entry)
        name = f"{entry.run}.again.{now_us()}"
        await bus.store(subjects.TENANT_SUBMIT, entry.payload, message_id=name, timeout_s=STORE_TIMEOUT_S)
        log.warning("the mesh did not know run %s any more: it was submitted again", entry.run)
        return entry.run

    async def offer(self, bus: Bus, *, is_repairing: bool) -> list[dict[str, Any]]:
        """Return a finding for each remembered run that the mesh does not know; ``is_repairing`` submits it again."""
        from flowmesh_mesh.client.events import ENDS
        from flowmesh_mesh.client.questions import ask

        findings: list[dict[str, Any]] = []
        for entry in list(self.entries()):
            try:
                state = (await ask(bus, "run", {"run": entry.run, "limit": 1})).get("state")
                if state in ENDS:
                    self.drop(entry.run)
                continue
            except NotFoundError as error:
                if not is_unknown_run(error):
                    continue
            repaired, note = False, ""
            if is_repairing:
                try:
                    repaired = bool(await self.submit_again(bus, entry.run))
                except (TransientError, UsageError) as error:
                    note = error.message
            findings.append(_finding(entry.run, repaired=repaired, note=note))
        return findings


def is_unknown_run(error: NotFoundError) -> bool:
    """Tell whether an answer says that the mesh has no such run, rather than that something of it is gone."""
    return error.message.startswith("no run ")


def _finding(run: str, *, repaired: bool, note: str) -> dict[str, Any]:
    failed = f"; submitting it again failed: {note}" if note else ""
    return {
        "kind": "submission-lost",
        "run": run,
        "what": f"run {run} was accepted, and the mesh does not know it",
        "why": f"the ledger was lost, and no keeper has told of the run{failed}",
        "repair": "submit it again from this client's journal",
        "repaired": repaired,
    }


def _blocks(store: BlockStore, root: bytes) -> tuple[tuple[int, bytes], ...]:
    """Return the blocks under ``root`` that are here, with their codecs; none if they are too many bytes."""
    from flowmesh_cas.dag import links

    found: list[tuple[int, bytes]] = []
    size, stack, seen = 0, [root], {root}
    while stack:
        cid = stack.pop()
        if not store.has(cid):
            continue
        block = store.get(cid)
        size += len(block)
        if size > BLOCKS_MAX_BYTES:
            return ()
        found.append((codec_of(cid), block))
        for link in links(cid, block):
            if link not in seen:
                seen.add(link)
                stack.append(link)
    return tuple(found)


async def _put_again(bus: Bus, entry: Remembered) -> None:
    from flowmesh_mesh.client.blocks import put

    store = MemoryStore()
    for codec, block in entry.blocks:
        store.put(codec, block)
    await put(bus, store, decode(entry.payload, Submit).manifest)
