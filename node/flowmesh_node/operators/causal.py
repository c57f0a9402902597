"""What the operators on a causal language model share: loading, and rows that are computed once for all that ask."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from flowmesh_cas.errors import ExecutionError
from flowmesh_node.operators import engine
from flowmesh_node.operators.base import Batch, Emit, Failed, Input, Item, Produced, Row

P = TypeVar("P")
R = TypeVar("R", bound=Hashable)
A = TypeVar("A")


@dataclass
class Work(Generic[P, R]):
    """An item under way. A request is all that determines the answer to it, and nothing else."""

    params: P
    rows: list[Row]
    requests: list[R]
    """In the order of the rows that come out."""

    waiting: set[R] = field(default_factory=set)
    exec_us: float = 0.0
    rows_shared: int = 0


@dataclass(frozen=True)
class Answers(Generic[R, A]):
    """What one group of requests has brought, and the seconds that they took together."""

    of: dict[R, A]
    seconds: float = 0.0


class CausalOperator(Generic[P, R, A]):
    """Runs batches whose rows are requests to a causal language model, equal requests of all its items once."""

    types: tuple[str, ...] = ()
    noun: str = ""
    """What a request brings, for the log."""

    numeric: str = ""
    """Numeric class of what was loaded last; empty when this process does not repeat itself."""

    def prepare(self, item: Item, loaded: engine.Loaded) -> Work[P, R]:
        """Return the item's requests; raise ExecutionError when it cannot be computed."""
        raise NotImplementedError

    def answers(self, loaded: engine.Loaded, requests: Iterable[R]) -> Iterator[Answers[R, A]]:
        """Answer different requests, group by group; an answer does not depend on the others."""
        raise NotImplementedError

    def produced(self, work: Work[P, R], answers: Mapping[R, A], loaded: engine.Loaded) -> Produced:
        """Return the item's result; what it cost is added to it."""
        raise NotImplementedError

    def resident(self) -> tuple[str, ...]:
        """Return the digests of the models in memory."""
        return engine.resident()

    def load(self, batch: Batch) -> None:
        """Load the model; the first time, prove that company changes no bit."""
        from flowmesh_node.operators import selftest

        dtype = _dtype(batch)
        engine.load(batch.models["model"], dtype)
        self.numeric = selftest.numeric_class(dtype)

    def run(self, batch: Batch, emit: Emit, log: Callable[[str], None]) -> None:
        """Answer all rows of all items together; an item that cannot be prepared fails alone."""
        loaded = engine.load(batch.models["model"], _dtype(batch))
        works = self._works(batch, loaded, emit)
        started = time.perf_counter()
        loaded.use_adapter(adapter_of(batch.items[0]))
        share_us = 1e6 * (time.perf_counter() - started) / max(1, len(works))
        for work in works.values():
            work.exec_us += share_us
        askers = askers_of(works)
        answers: dict[R, A] = {}

        def settle(index: int) -> None:
            work = works[index]
            result = self.produced(work, answers, loaded)
            emit(index, replace(result, exec_us=round(work.exec_us), rows_shared=work.rows_shared))

        for index, work in works.items():
            if not work.waiting:
                settle(index)
        for group in self.answers(loaded, askers):
            answers.update(group.of)
            share_us = group.seconds * 1e6 / len(group.of)
            for request in group.of:
                for index in askers[request]:
                    works[index].waiting.discard(request)
                    works[index].exec_us += share_us / len(askers[request])
            for index in sorted({index for request in group.of for index in askers[request]}):
                if not works[index].waiting:
                    settle(index)
            log(f"{len(answers)} of {len(askers)} {self.noun}")

    def _works(self, batch: Batch, loaded: engine.Loaded, emit: Emit) -> dict[int, Work[P, R]]:
        works: dict[int, Work[P, R]] = {}
        for index, item in enumerate(batch.items):
            started = time.perf_counter()
            try:
                works[index] = self.prepare(item, loaded)
            except ExecutionError as error:
                emit(index, Failed(error.reason, error.message))
                continue
            works[index].exec_us = 1e6 * (time.perf_counter() - started)
        return works


def askers_of(works: Mapping[int, Work[P, R]]) -> dict[R, list[int]]:
    """Return, per request, the items that wait for it; note in each which of its rows repeat a row before, in any item."""
    askers: dict[R, list[int]] = defaultdict(list)
    for index, work in works.items():
        work.waiting = set(work.requests)
        fresh = len(work.waiting - askers.keys())
        work.rows_shared = len(work.requests) - fresh
        for request in dict.fromkeys(work.requests):
            askers[request].append(index)
    return askers


def neighbours(requests: Iterable[R], prompt_of: Callable[[R], Sequence[int]]) -> list[R]:
    """Return the requests with those of one prompt next to each other, prompts in the order of their first request."""
    groups: dict[Sequence[int], list[R]] = {}
    for request in requests:
        groups.setdefault(prompt_of(request), []).append(request)
    return [request for group in groups.values() for request in group]


def adapter_of(item: Item) -> Input | None:
    """Return the LoRA adapter of the item, which its whole batch shares."""
    adapters = item.inputs.get("adapter", [])
    return adapters[0] if adapters else None


def _dtype(batch: Batch) -> str:
    return str(batch.items[0].params.get("dtype", "float32"))
