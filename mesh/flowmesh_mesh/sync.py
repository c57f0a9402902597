"""The synchronous twin of the client: ``with connect() as mesh: mesh.submit(workflow).result()``.

Every method is the asynchronous one, run in the event loop of a background thread; nothing is implemented twice.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from flowmesh_cas.errors import UsageError
from flowmesh_mesh import client, results

if TYPE_CHECKING:
    from flowmesh_mesh.context import Context

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flowmesh", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine to its end; an interrupt of the caller cancels it."""
        if not self._thread.is_alive():
            work.close()
            raise UsageError("the mesh is closed", hint="Use it inside `with connect() as mesh:`.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class _Twin(Generic[A]):
    """Holds the asynchronous object behind a synchronous one."""

    def __init__(self, behind: A, loop: _Loop) -> None:
        self._behind = behind
        self._loop = loop


def _blocking(method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[_Twin[A], P], R]:
    """Return the method that waits for ``method`` and returns its result."""

    def call(self: _Twin[A], /, *args: P.args, **options: P.kwargs) -> R:
        return self._loop.run(method(self._behind, *args, **options))

    return _named(call, method)


def _giving(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, B]], twin: Callable[[B, _Loop], R]
) -> Callable[Concatenate[_Twin[A], P], R]:
    """Return the method that waits for ``method`` and returns the ``twin`` of its result."""

    def call(self: _Twin[A], /, *args: P.args, **options: P.kwargs) -> R:
        return twin(self._loop.run(method(self._behind, *args, **options)), self._loop)

    return _named(call, method)


def _iterating(method: Callable[Concatenate[A, P], AsyncIterator[R]]) -> Callable[Concatenate[_Twin[A], P], Iterator[R]]:
    """Return the method that yields what the asynchronous iterator of ``method`` yields."""

    def call(self: _Twin[A], /, *args: P.args, **options: P.kwargs) -> Iterator[R]:
        iterator = method(self._behind, *args, **options)

        async def following() -> tuple[bool, Any]:
            try:
                return True, await anext(iterator)
            except StopAsyncIteration:
                return False, None

        while True:
            is_item, item = self._loop.run(following())
            if not is_item:
                return
            yield item

    return _named(call, method)


def _named(call: Callable[P, R], method: Callable[..., Any]) -> Callable[P, R]:
    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


class Output(_Twin[results.Output]):
    """One named output; see :class:`flowmesh_mesh.results.Output`."""

    rows = _blocking(results.Output.rows)
    value = _blocking(results.Output.value)
    export = _blocking(results.Output.export)

    @property
    def name(self) -> str:
        return self._behind.name

    @property
    def kind(self) -> str:
        return self._behind.kind

    @property
    def cid(self) -> str:
        return self._behind.cid


class Results(_Twin[results.Results]):
    """How a run ended and its outputs; see :class:`flowmesh_mesh.results.Results`."""

    def __getitem__(self, name: str) -> Output:
        return Output(self._behind[name], self._loop)

    def __iter__(self) -> Iterator[str]:
        return iter(self._behind)

    def __len__(self) -> int:
        return len(self._behind)

    def __contains__(self, name: object) -> bool:
        return name in self._behind

    @property
    def state(self) -> str:
        return self._behind.state

    @property
    def reason(self) -> str:
        return self._behind.reason

    @property
    def detail(self) -> str:
        return self._behind.detail

    @property
    def saved_us(self) -> int:
        return self._behind.saved_us


def _outputs(found: dict[str, results.Output], loop: _Loop) -> dict[str, Output]:
    return {name: Output(output, loop) for name, output in found.items()}


class Run(_Twin[client.Run]):
    """One run; see :class:`flowmesh_mesh.client.Run`."""

    result = _giving(client.Run.result, Results)
    wait = _giving(client.Run.wait, Results)
    cancel = _giving(client.Run.cancel, Results)
    outputs = _giving(client.Run.outputs, _outputs)
    status = _blocking(client.Run.status)
    operators = _blocking(client.Run.operators)
    operator = _blocking(client.Run.operator)
    get = _blocking(client.Run.get)
    lineage = _blocking(client.Run.lineage)
    close = _blocking(client.Run.close)
    events = _iterating(client.Run.events)
    logs = _iterating(client.Run.logs)

    @property
    def id(self) -> str:
        return self._behind.id

    def __repr__(self) -> str:
        return repr(self._behind)


class Mesh(_Twin[client.Mesh]):
    """A connection to a mesh as one tenant; see :class:`flowmesh_mesh.client.Mesh`."""

    def __init__(self, context: Context | str | Path | None = None, tenant: str | None = None) -> None:
        super().__init__(client.Mesh(context, tenant), _Loop())

    submit = _giving(client.Mesh.submit, Run)
    run = _giving(client.Mesh.run, Run)
    runs = _blocking(client.Mesh.runs)
    status = _blocking(client.Mesh.status)
    nodes = _blocking(client.Mesh.nodes)
    costs = _blocking(client.Mesh.costs)
    plan = _blocking(client.Mesh.plan)
    why = _blocking(client.Mesh.why)
    audit = _blocking(client.Mesh.audit)
    cordon = _blocking(client.Mesh.cordon)
    uncordon = _blocking(client.Mesh.uncordon)
    unquarantine = _blocking(client.Mesh.unquarantine)
    lineage = _blocking(client.Mesh.lineage)
    fetch = _blocking(client.Mesh.fetch)
    get = _blocking(client.Mesh.get)

    def __enter__(self) -> Self:
        self._loop.start()
        try:
            self._loop.run(self._behind.open())
        except BaseException:
            self._loop.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; runs go on."""
        try:
            self._loop.run(self._behind.close())
        finally:
            self._loop.close()


def connect(context: Context | str | Path | None = None, tenant: str | None = None) -> Mesh:
    """Return the mesh of a context, to be used as ``with connect() as mesh``; see :func:`flowmesh_mesh.client.connect`."""
    return Mesh(context, tenant)
