"""The shape of the code: sizes, names, docstrings."""

from __future__ import annotations

import ast
from statistics import median

from tests.tidy.tree import modules, shown, text_of

LARGEST_LINES = 600
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc", "core_utils"}


def test_no_module_is_larger_than_one_idea() -> None:
    large = {shown(path): lines for path in modules() if (lines := text_of(path).count("\n")) > LARGEST_LINES}
    assert not large, f"modules past {LARGEST_LINES} lines: {large}"


def test_half_the_modules_are_small() -> None:
    assert median(text_of(path).count("\n") for path in modules()) <= 200


def test_modules_are_named_for_what_they_hold() -> None:
    wrong = [shown(path) for path in modules() if NAMES_THAT_SAY_NOTHING.intersection(path.with_suffix("").parts)]
    assert not wrong


def test_every_module_says_what_it_is_for() -> None:
    silent = [shown(path) for path in modules() if text_of(path).strip() and not ast.get_docstring(ast.parse(text_of(path)))]
    assert not silent


def test_every_public_class_says_what_it_is() -> None:
    silent = []
    for path in modules():
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{shown(path)}: {node.name}")
    assert not silent
