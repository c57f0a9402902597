"""``reward.score``: a number per row, from rules or from a sequence classifier. Rules need no torch."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from functools import lru_cache

from flowmesh_cas.errors import ExecutionError
from flowmesh_mesh.catalog import RewardParams, Rule
from flowmesh_node.operators.base import Batch, Emit, Failed, Item, Produced, Row, table
from flowmesh_node.operators.text import add_column, at_row, params_of, template

Measure = Callable[[str], float]


class Reward:
    """Runs reward.score."""

    types: tuple[str, ...] = ("reward.score",)

    def resident(self) -> tuple[str, ...]:
        """Return the digests of the classifiers in memory; imports nothing to find out."""
        module = sys.modules.get("flowmesh_node.operators.classifier")
        return tuple(module.resident()) if module is not None else ()

    def load(self, batch: Batch) -> None:
        """Load the classifier, if the batch has one."""
        if "model" in batch.models:
            from flowmesh_node.operators import classifier

            classifier.load(batch.models["model"])

    def run(self, batch: Batch, emit: Emit, log: Callable[[str], None]) -> None:
        """Reward every row of every item; an item that cannot be fails alone."""
        for index, item in enumerate(batch.items):
            started = time.perf_counter()
            try:
                params = params_of(item, RewardParams)
                rows, tokens = _by_model(item, params, batch) if params.model else (_by_rules(item, params), 0)
            except ExecutionError as error:
                emit(index, Failed(error.reason, error.message))
                continue
            spent_us = round(1e6 * (time.perf_counter() - started))
            emit(index, Produced({"rows": [table(rows)]}, rows=len(rows), tokens_in=tokens, exec_us=spent_us))


def _by_rules(item: Item, params: RewardParams) -> list[Row]:
    measures = [(rule.weight, measure(rule)) for rule in params.rules]
    completion = template(params.completion)
    rows = []
    for number, row in enumerate(item.rows()):
        with at_row(number):
            text = completion(row)
        reward = sum((weight * measured(text) for weight, measured in measures), 0.0)
        rows.append(add_column(row, **{params.column: reward}))
    return rows


def _by_model(item: Item, params: RewardParams, batch: Batch) -> tuple[list[Row], int]:
    from flowmesh_node.operators import classifier

    prompt, completion = template(params.prompt), template(params.completion)
    rows, pairs = item.rows(), []
    loaded = classifier.load(batch.models["model"])
    for number, row in enumerate(rows):
        with at_row(number):
            pairs.append(classifier.tokens(loaded, prompt(row), completion(row)))
    rewards = classifier.first_logits(loaded, pairs)
    scored = [add_column(row, **{params.column: reward}) for row, reward in zip(rows, rewards, strict=True)]
    return scored, sum(len(pair) for pair in pairs)


def measure(rule: Rule) -> Measure:
    """Return what a rule measures on a text, without its weight; raise ExecutionError for a rule that makes no sense."""
    if rule.kind == "length":
        if rule.target < 1:
            raise ExecutionError("rule 'length' needs a 'target' of at least 1 word")
        return lambda text: max(-1.0, -abs(len(text.split()) - rule.target) / rule.target)
    if rule.kind == "repeats":
        return repeats
    if not rule.pattern:
        raise ExecutionError(f"rule {rule.kind!r} needs a 'pattern'")
    if rule.kind == "contains":
        return lambda text: float(rule.pattern in text)
    if rule.kind == "ends":
        return lambda text: float(text.rstrip().endswith(tuple(rule.pattern)))
    expression = _compiled(rule.pattern)
    return lambda text: float(expression.search(text) is not None)


def repeats(text: str) -> float:
    """Return minus the share of word triples that occurred before in the text."""
    words = text.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return -(1.0 - len(set(triples)) / len(triples)) if triples else 0.0


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ExecutionError(f"rule 'matches': bad regular expression {pattern[:60]!r}: {error}") from error
