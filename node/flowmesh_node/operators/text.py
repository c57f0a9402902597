"""Text in and out of rows: templates, chat prompts, and what is wrong with a row. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from flowmesh_cas.errors import ExecutionError
from flowmesh_node.operators.base import Item, Row

P = TypeVar("P")
Render = Callable[[Row], str]

TEXT_MAX_CHARACTERS = 4 * 1024 * 1024
"""Longest text that a template may produce."""


def params_of(item: Item, kind: type[P]) -> P:
    """Return the item's parameters as their record; raise ExecutionError for what does not fit."""
    try:
        return msgspec.convert(item.params, kind)
    except msgspec.ValidationError as error:
        raise ExecutionError(f"bad parameters: {error}") from error


@lru_cache(maxsize=256)
def template(source: str) -> Render:
    """Return the function that renders a Jinja2 template over a row's columns (and ``row``, the row itself).

    The environment is sandboxed; an unknown column is an error. Raises ExecutionError, also from the returned function.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    try:
        compiled = environment.from_string(source)
    except TemplateError as error:
        raise ExecutionError(f"bad template {_shown(source)}: {error}") from error

    def render(row: Row) -> str:
        try:
            text = compiled.render({"row": row, **row})
        except Exception as error:  # a template may fail in as many ways as an expression
            raise ExecutionError(f"template {_shown(source)}: {error}") from error
        if len(text) > TEXT_MAX_CHARACTERS:
            raise ExecutionError(f"template {_shown(source)}: the text is longer than {TEXT_MAX_CHARACTERS} characters")
        return text

    return render


def _shown(source: str) -> str:
    return repr(source if len(source) <= 60 else source[:57] + "...")


@contextmanager
def at_row(number: int) -> Iterator[None]:
    """Name the row (counted from 0) in ExecutionErrors raised within."""
    try:
        yield
    except ExecutionError as error:
        raise ExecutionError(f"row {number}: {error.message}", reason=error.reason, hint=error.hint) from error


def add_column(row: Row, **columns: Any) -> Row:
    """Return the row with columns set; those that were there keep their place."""
    return {**row, **columns}


def messages(system: str, prompt: str) -> list[dict[str, str]]:
    """Return a chat of one question; without ``system`` the model's template decides whether it has one of its own."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": prompt}]


def prompt_tokens(tokenizer: Any, prompt: str, *, system: str = "", chat: bool = True) -> list[int]:
    """Return the token ids that a completion follows; raise ExecutionError for a prompt that cannot be completed."""
    if not prompt.strip():
        raise ExecutionError("the prompt is empty")
    if not chat:
        if system:
            raise ExecutionError("'system' needs 'chat': a plain prompt has no system message")
        tokens: list[int] = tokenizer(prompt)["input_ids"]
        return tokens
    if not tokenizer.chat_template:
        raise ExecutionError("the model has no chat template", hint="Set chat: false.")
    try:
        text = tokenizer.apply_chat_template(messages(system, prompt), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like, a refused system message for one
        raise ExecutionError(f"the model's chat template refuses the prompt: {error}") from error
    # The template writes the special tokens itself.
    chat_tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat_tokens
