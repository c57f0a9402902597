"""``llm.generate``: completions, batched over rows and operators, each row's bits its own."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import GenerateParams
from flowmesh_node.operators import engine, sampling
from flowmesh_node.operators.base import Item, Produced, table
from flowmesh_node.operators.causal import Answers, CausalOperator, Work, neighbours
from flowmesh_node.operators.text import add_column, at_row, params_of, prompt_tokens, template


@dataclass(frozen=True)
class Request:
    """One completion to make: what determines it, and nothing else, so that equal requests are made once."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    stream: bytes


Tokens = list[int]
"""The new tokens of one request, its stop token included."""


class Generate(CausalOperator[GenerateParams, Request, Tokens]):
    """Runs llm.generate."""

    types: tuple[str, ...] = ("llm.generate",)
    noun = "completions"

    def prepare(self, item: Item, loaded: engine.Loaded) -> Work[GenerateParams, Request]:
        params = params_of(item, GenerateParams)
        work: Work[GenerateParams, Request] = Work(params, item.rows(), [])
        render = template(params.prompt)
        for number, row in enumerate(work.rows):
            with at_row(number):
                tokens = prompt_tokens(loaded.tokenizer, render(row), system=params.system, chat=params.chat)
                if len(tokens) + params.max_new_tokens > loaded.max_tokens:
                    asked = f"prompt of {len(tokens)} tokens and {params.max_new_tokens} new ones"
                    raise ExecutionError(f"{asked} exceed the model's {loaded.max_tokens}")
            work.requests += [_request(params, tokens, sample) for sample in range(params.samples)]
        return work

    def answers(self, loaded: engine.Loaded, requests: Iterable[Request]) -> Iterator[Answers[Request, Tokens]]:
        return complete(loaded, requests)

    def produced(self, work: Work[GenerateParams, Request], answers: Mapping[Request, Tokens], loaded: engine.Loaded) -> Produced:
        samples, rows = work.params.samples, []
        for number, request in enumerate(work.requests):
            text = loaded.tokenizer.decode(answers[request], skip_special_tokens=True)
            row, sample = divmod(number, samples)
            rows.append(add_column(work.rows[row], sample=sample, **{work.params.column: text}))
        return Produced(
            {"rows": [table(rows)]},
            rows=len(rows),
            tokens_in=sum(len(request.tokens) for request in work.requests[::samples]),
            tokens_out=sum(len(answers[request]) for request in work.requests),
        )


def _request(params: GenerateParams, tokens: Sequence[int], sample: int) -> Request:
    stream = sampling.stream(params.seed, tokens, sample) if params.temperature else b""
    return Request(tuple(tokens), params.max_new_tokens, params.temperature, params.top_p, stream)


def complete(loaded: engine.Loaded, requests: Iterable[Request]) -> Iterator[Answers[Request, Tokens]]:
    """Make all completions, in groups of equal padded length; equal requests once.

    A whole prompt is computed once for all its requests. A mere beginning that prompts share is not: a pass over the rest
    alone would have another shape, and with it other bits.
    """
    groups: dict[int, dict[Request, None]] = defaultdict(dict)
    for request in requests:
        groups[engine.bucket(len(request.tokens))][request] = None
    for length in sorted(groups):
        # Rows of one prompt next to each other hold its prefill no longer than they must; long ones together leave
        # fewer rows idle.
        waiting = sorted(neighbours(groups[length], lambda request: request.tokens), key=lambda request: -request.max_new_tokens)
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
            yield Answers(dict(zip(rows, tokens, strict=True)), time.perf_counter() - started)


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
