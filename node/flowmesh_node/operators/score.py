"""``llm.score``: how likely a completion is after a prompt, in the same canonical shapes as generation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import LlmScoreParams
from flowmesh_node.operators import engine, sampling
from flowmesh_node.operators.base import Item, Produced, table
from flowmesh_node.operators.causal import Answers, CausalOperator, Work, neighbours
from flowmesh_node.operators.text import add_column, at_row, params_of, prompt_tokens, template


@dataclass(frozen=True)
class Request:
    """One completion to score after one prompt, both as tokens."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


class Score(CausalOperator[LlmScoreParams, Request, float]):
    """Runs llm.score."""

    types: tuple[str, ...] = ("llm.score",)
    noun = "scores"

    def prepare(self, item: Item, loaded: engine.Loaded) -> Work[LlmScoreParams, Request]:
        params = params_of(item, LlmScoreParams)
        prompt, completion = template(params.prompt), template(params.completion)
        work: Work[LlmScoreParams, Request] = Work(params, item.rows(), [])
        for number, row in enumerate(work.rows):
            with at_row(number):
                before = prompt_tokens(loaded.tokenizer, prompt(row), system=params.system, chat=params.chat)
                after = loaded.tokenizer(completion(row), add_special_tokens=False)["input_ids"]
                if len(before) + len(after) > loaded.max_tokens:
                    raise ExecutionError(f"{len(before) + len(after)} tokens exceed the model's {loaded.max_tokens}")
            work.requests.append(Request(tuple(before), tuple(after)))
        return work

    def answers(self, loaded: engine.Loaded, requests: Iterable[Request]) -> Iterator[Answers[Request, float]]:
        return score(loaded, requests)

    def produced(self, work: Work[LlmScoreParams, Request], answers: Mapping[Request, float], loaded: engine.Loaded) -> Produced:
        column = work.params.column
        rows = [
            add_column(row, **{column: answers[request], f"{column}_tokens": len(request.completion)})
            for row, request in zip(work.rows, work.requests, strict=True)
        ]
        tokens_in = sum(len(request.prompt) + len(request.completion) for request in work.requests)
        return Produced({"rows": [table(rows)]}, rows=len(rows), tokens_in=tokens_in)


def score(loaded: engine.Loaded, requests: Iterable[Request]) -> Iterator[Answers[Request, float]]:
    """Yield log-probabilities (nats, summed over the completion) group by group, with the seconds each took."""
    groups: dict[tuple[int, int], list[Request]] = defaultdict(list)
    for request in neighbours(requests, lambda request: request.prompt):
        if not request.completion:
            yield Answers({request: 0.0})
            continue
        length = engine.bucket(len(request.prompt) + len(request.completion))
        groups[length, engine.bucket(len(request.completion))].append(request)
    for (length, tail), members in sorted(groups.items()):
        for first in range(0, len(members), engine.PREFILL_ROWS):
            started = time.perf_counter()
            part = members[first : first + engine.PREFILL_ROWS]
            sums = _pass(loaded, part, length, min(tail + 1, length))
            yield Answers(dict(zip(part, sums, strict=True)), time.perf_counter() - started)


def _pass(loaded: engine.Loaded, requests: Sequence[Request], length: int, tail: int) -> list[float]:
    """Return the score of each request, from logits of the last ``tail`` positions."""
    logits = engine.tail_logits(loaded, [request.prompt + request.completion for request in requests], length, tail)
    sums = []
    for row, request in zip(logits, requests, strict=False):
        # The logits at a position are about the token after it.
        first = tail - len(request.completion) - 1
        row = row.float().cpu().numpy()
        sums.append(sum(sampling.log_softmax_at(row[first + at], token) for at, token in enumerate(request.completion)))
    return sums
