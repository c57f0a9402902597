"""``llm.generate``: completions, batched over rows and operators, each row's bits its own."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import GenerateParams
from flowmesh_node.operators import engine, sampling
from flowmesh_node.operators.base import Batch, Emit, Failed, Input, Item, Produced, Row, table
from flowmesh_node.operators.text import add_column, at_row, params_of, prompt_tokens, template


@dataclass(frozen=True)
class Request:
    """One completion to make: what determines it, and nothing else, so that equal requests are made once."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    stream: bytes


@dataclass
class _Work:
    """An item under way: its requests in the order of its output rows."""

    item: Item
    params: GenerateParams
    rows: list[Row]
    requests: list[Request]
    waiting: set[Request]
    exec_us: float = 0.0


@dataclass
class Completions:
    """What a group of rows has brought: tokens per request, and the seconds they took together."""

    tokens: dict[Request, list[int]] = field(default_factory=dict)
    seconds: float = 0.0


class Generate(engine.CausalOperator):
    """Runs llm.generate."""

    types: tuple[str, ...] = ("llm.generate",)

    def run(self, batch: Batch, emit: Emit, log: Callable[[str], None]) -> None:
        """Complete all rows of all items together; an item that cannot be fails alone."""
        loaded = engine.load(batch.models["model"], str(batch.items[0].params.get("dtype", "float32")))
        works: dict[int, _Work] = {}
        for index, item in enumerate(batch.items):
            try:
                works[index] = _prepare(item, loaded)
            except ExecutionError as error:
                emit(index, Failed(error.reason, error.message))
        askers: dict[Request, list[int]] = defaultdict(list)
        for index, work in works.items():
            for request in work.waiting:
                askers[request].append(index)
            if not work.waiting:
                emit(index, _produced(work, {}, loaded))
        loaded.use_adapter(adapter_of(batch.items[0]))
        done: dict[Request, list[int]] = {}
        ordered = [request for work in works.values() for request in work.requests]
        for group in complete(loaded, ordered):
            done.update(group.tokens)
            share = group.seconds * 1e6 / len(group.tokens)
            for request in group.tokens:
                for index in askers[request]:
                    works[index].waiting.discard(request)
                    works[index].exec_us += share / len(askers[request])
            for index in sorted({index for request in group.tokens for index in askers[request]}):
                if not works[index].waiting:
                    emit(index, _produced(works[index], done, loaded))
            log(f"{len(done)} of {len(askers)} completions")


def adapter_of(item: Item) -> Input | None:
    """Return the LoRA adapter of the item, which its whole batch shares."""
    adapters = item.inputs.get("adapter", [])
    return adapters[0] if adapters else None


def _prepare(item: Item, loaded: engine.Loaded) -> _Work:
    params = params_of(item, GenerateParams)
    rows = item.rows()
    render = template(params.prompt)
    requests = []
    for number, row in enumerate(rows):
        with at_row(number):
            tokens = prompt_tokens(loaded.tokenizer, render(row), system=params.system, chat=params.chat)
            if len(tokens) + params.max_new_tokens > loaded.max_tokens:
                raise ExecutionError(
                    f"prompt of {len(tokens)} tokens and {params.max_new_tokens} new ones exceed the model's {loaded.max_tokens}"
                )
        requests += [_request(params, tokens, sample) for sample in range(params.samples)]
    return _Work(item, params, rows, requests, set(requests))


def _request(params: GenerateParams, tokens: Sequence[int], sample: int) -> Request:
    stream = sampling.stream(params.seed, tokens, sample) if params.temperature else b""
    return Request(tuple(tokens), params.max_new_tokens, params.temperature, params.top_p, stream)


def _produced(work: _Work, done: dict[Request, list[int]], loaded: engine.Loaded) -> Produced:
    rows = []
    for number, request in enumerate(work.requests):
        text = loaded.tokenizer.decode(done[request], skip_special_tokens=True)
        row, sample = divmod(number, work.params.samples)
        rows.append(add_column(work.rows[row], sample=sample, **{work.params.column: text}))
    return Produced(
        {"rows": [table(rows)]},
        rows=len(rows),
        tokens_in=sum(len(request.tokens) for request in work.requests[:: work.params.samples]),
        tokens_out=sum(len(done[request]) for request in work.requests),
        exec_us=round(work.exec_us),
    )


def complete(loaded: engine.Loaded, requests: Iterable[Request]) -> Iterator[Completions]:
    """Make all completions, in groups of equal padded length; equal requests once."""
    groups: dict[int, dict[Request, None]] = defaultdict(dict)
    for request in requests:
        groups[engine.bucket(len(request.tokens))][request] = None
    for length in sorted(groups):
        # Rows of one prompt next to each other share its prefill; long ones together leave fewer rows idle.
        waiting = sorted(groups[length], key=lambda request: -request.max_new_tokens)
        prefixes: OrderedDict[tuple[int, ...], engine.Prefix] = OrderedDict()
        while waiting:
            started = time.perf_counter()
            rows = waiting[: engine.DECODE_ROWS]
            _prefill_ahead(loaded, prefixes, rows, waiting, length)
            tokens = _decode(loaded, rows, [prefixes[row.tokens] for row in rows], length)
            waiting = waiting[len(rows) :]
            kept = {row.tokens for row in waiting}
            for prompt in [prompt for prompt in prefixes if prompt not in kept]:
                del prefixes[prompt]
            yield Completions(dict(zip(rows, tokens, strict=True)), time.perf_counter() - started)


def _prefill_ahead(
    loaded: engine.Loaded,
    prefixes: OrderedDict[tuple[int, ...], engine.Prefix],
    rows: Sequence[Request],
    waiting: Sequence[Request],
    length: int,
) -> None:
    """Prefill what ``rows`` need, filling up each pass with the prompts that come next."""
    for row in rows:
        if row.tokens in prefixes:
            continue
        missing = dict.fromkeys(later.tokens for later in waiting if later.tokens not in prefixes)
        prompts = list(missing)[: engine.PREFILL_ROWS]
        prefixes.update(zip(prompts, engine.prefill(loaded, prompts, length), strict=True))


def _decode(loaded: engine.Loaded, rows: Sequence[Request], prefixes: Sequence[engine.Prefix], length: int) -> list[list[int]]:
    """Return the new tokens of each row, its stop token included."""
    chosen: list[list[int]] = [[] for _ in rows]
    logits = [prefix.logits for prefix in prefixes]
    decoding = None
    step = 0
    while True:
        open_rows = 0
        for index, row in enumerate(rows):
            if _is_complete(chosen[index], row, loaded):
                continue
            u = sampling.uniform(row.stream, step) if row.temperature else 0.0
            chosen[index].append(sampling.draw(logits[index], row.temperature, row.top_p, u))
            open_rows += not _is_complete(chosen[index], row, loaded)
        if not open_rows:
            return chosen
        if decoding is None:
            decoding = engine.Decoding(loaded, prefixes, [len(row.tokens) for row in rows], length)
        logits = decoding.step([tokens[-1] for tokens in chosen])
        step += 1


def _is_complete(tokens: Sequence[int], row: Request, loaded: engine.Loaded) -> bool:
    return len(tokens) >= row.max_new_tokens or (bool(tokens) and tokens[-1] in loaded.stop_ids)
