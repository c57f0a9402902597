"""Two tenants at work: they submit, follow, cancel and verify all the time, and write down what they did and were told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import time
from typing import Any

from chaos.history import CancelAsked, Executed, History, Reported, Submitted, Told, Verified
from chaos.processes import TENANTS, ChaosMesh
from chaos.workload import Wish, Workload
from flowmesh_cas.errors import ExecutionError, FlowmeshError, IntegrityError, NotFoundError, TransientError, UsageError
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.client.run import Run
from flowmesh_mesh.results import Results

SUBMIT_S = 40.0
END_S = 20.0
"""How long a client listens for the end before it looks at something else; the run is looked at again in the end."""
OPEN_MAX = 60
"""Most runs under way; more submissions wait, so that the load stays what two cores can carry."""


def now_us() -> int:
    """Return the time of this machine."""
    return time.time_ns() // 1000


def run_id(source: random.Random) -> str:
    """Return a run id that the seed decides."""
    return base64.b32encode(source.randbytes(16)).decode().rstrip("=").lower()


class Traffic:
    """Submissions of both tenants, at ``rate`` a second, until it is told to stop."""

    def __init__(self, mesh: ChaosMesh, history: History, seed: int, rate: float = 3.0) -> None:
        self._mesh = mesh
        self._history = history
        self._random = random.Random(f"{seed}/traffic")
        self._effects = mesh.folder / "effects"
        self._workload = Workload(seed, self._effects)
        self._rate = rate
        self._clients: dict[str, Mesh] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._feeding: asyncio.Task[None] | None = None
        self._wishes: dict[str, tuple[str, Wish]] = {}
        self._right: set[str] = set()

    async def ready(self, timeout_s: float = 60.0) -> None:
        """Connect, and wait until a leader answers and counts the nodes."""
        async with asyncio.timeout(timeout_s):
            for tenant in TENANTS:
                self._clients[tenant] = await _connected(self._mesh, tenant)
            client = self._clients[TENANTS[0]]
            while True:
                with contextlib.suppress(FlowmeshError):
                    if len(await client.nodes()) >= self._mesh.shape.nodes:
                        return
                await asyncio.sleep(0.2)

    @property
    def client(self) -> Mesh:
        """Return the first tenant's client."""
        return self._clients[TENANTS[0]]

    def start(self) -> None:
        """Begin to submit."""
        self._feeding = asyncio.create_task(self._feed())

    async def _feed(self) -> None:
        while True:
            await asyncio.sleep(self._random.expovariate(self._rate))
            while len(self._tasks) >= OPEN_MAX:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            wish = await asyncio.to_thread(self._workload.next)
            for tenant in TENANTS if wish.is_shared else [self._random.choice(TENANTS)]:
                self.begin(tenant, wish)

    def begin(self, tenant: str, wish: Wish) -> None:
        """Submit a workflow and follow it beside everything else."""
        task = asyncio.create_task(self.live(tenant, wish))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def open_runs(self) -> int:
        """Return how many runs are being followed."""
        return len(self._tasks)

    async def stop(self) -> None:
        """Submit nothing more, and wait until every client has heard what it waits for, or has given up."""
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    async def close(self) -> None:
        """Stop at once and disconnect."""
        for task in [*self._tasks, *([self._feeding] if self._feeding else [])]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    # --- one run

    def _tell(self, run: str, what: str, reason: str = "", actor: str = "", detail: str = "") -> None:
        self._history.add(Told(now_us(), run, what, reason, actor, detail[:300]))

    async def live(self, tenant: str, wish: Wish) -> None:
        """Submit a workflow, follow it, and write down what was said."""
        name = run_id(self._random)
        self._wishes[name] = (tenant, wish)
        self._history.add(Submitted(now_us(), tenant, name, wish.kind, wish.expected, wish.reason, wish.token, wish.operator))
        try:
            run = await self._clients[tenant].submit(wish.document, run=name, deadline_s=SUBMIT_S)
        except TransientError as error:
            self._tell(name, "unknown", detail=error.message)
            return
        except UsageError as error:
            self._tell(name, "rejected" if "rejected" in error.message else "unknown", detail=error.message)
            return
        except FlowmeshError as error:
            self._tell(name, "unknown", detail=f"{type(error).__name__}: {error.message}")
            return
        self._tell(name, "accepted")
        if wish.cancel_s is not None:
            await asyncio.sleep(wish.cancel_s)
            await self._cancel(name, run)
        await self._await_end(name, run, wish)

    async def _cancel(self, name: str, run: Run) -> None:
        self._history.add(CancelAsked(now_us(), name))
        try:
            self._told_end(name, await run.cancel("chaos"))
        except FlowmeshError as error:
            self._tell(name, "unknown", detail=f"cancel: {error.message}")

    async def _await_end(self, name: str, run: Run, wish: Wish) -> None:
        with contextlib.suppress(FlowmeshError):
            results = await run.wait(END_S)
            self._told_end(name, results)
            if results.state == "succeeded":
                await self._verify(name, results, wish, is_last=False)

    def _told_end(self, name: str, results: Results) -> None:
        self._tell(name, results.state, results.reason, results.actor, results.detail)

    async def _verify(self, name: str, results: Results, wish: Wish, *, is_last: bool) -> None:
        """Fetch every output and compare it; what cannot be had while things are broken is looked at again in the end."""
        try:
            for output, wanted in wish.values.items():
                found: Any = await (results[output].rows() if isinstance(wanted, list) else results[output].value())
                if found != wanted:
                    self._history.add(Verified(now_us(), name, False, f"value of {output} is {found!r}, not {wanted!r}"[:300]))
                    return
        except (TransientError, NotFoundError, IntegrityError, ExecutionError, UsageError) as error:
            if is_last:
                self._history.add(
                    Verified(now_us(), name, False, f"cannot be had: {type(error).__name__}: {error.message}"[:300])
                )
            return
        self._right.add(name)
        self._history.add(Verified(now_us(), name, True))

    # --- in the end

    async def settle(self, timeout_s: float) -> list[str]:
        """Wait until every run that the mesh knows has ended, by its own word; return those that have not by the deadline."""
        deadline = time.monotonic() + timeout_s
        open_runs = set(self._wishes)
        while open_runs and time.monotonic() < deadline:
            for name in sorted(open_runs):
                with contextlib.suppress(FlowmeshError):
                    if not await self._is_open(name):
                        open_runs.discard(name)
                if time.monotonic() > deadline:
                    break
            await asyncio.sleep(0.5)
        return sorted(open_runs)

    async def _is_open(self, name: str) -> bool:
        tenant, _ = self._wishes[name]
        try:
            status = await Run(self._clients[tenant], name).status(limit=1)
        except NotFoundError:
            return False
        return status["state"] not in ("succeeded", "failed", "cancelled", "rejected")

    async def look_again(self) -> None:
        """Ask for the end of every run that the mesh knows, verify what has not been verified, and note its operators."""
        for name, (tenant, wish) in self._wishes.items():
            run = Run(self._clients[tenant], name)
            try:
                rows = await run.operators()
                results = await run.wait(END_S)
            except NotFoundError:
                continue
            except FlowmeshError as error:
                self._tell(name, "unknown", detail=f"in the end: {error.message}")
                continue
            finally:
                await run.close()
            for row in rows:
                self._history.add(
                    Reported(
                        name, row["name"], row["state"], row.get("reason") or "", row.get("attempt") or 0, row.get("key") or ""
                    )
                )
            self._told_end(name, results)
            if results.state == "succeeded" and name not in self._right:
                await self._verify(name, results, wish, is_last=True)

    def read_effects(self) -> None:
        """Add to the history what took place outside."""
        with contextlib.suppress(FileNotFoundError):
            for line in self._effects.read_text().splitlines():
                at_us, token, pid = line.split()
                self._history.add(Executed(int(at_us), token, int(pid)))


async def _connected(mesh: ChaosMesh, tenant: str) -> Mesh:
    while True:
        client = connect(mesh.context(tenant), tenant)
        try:
            await client.open()
        except TransientError:
            await asyncio.sleep(0.2)
        else:
            client.journal = None  # or it would submit again what the mesh lost, and hide the loss
            return client
