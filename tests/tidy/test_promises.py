"""Every promise has its section in docs/guarantees.md, and names tests that exist."""

from __future__ import annotations

import re

from tests.tidy.tree import ROOT, text_of

PAGE = ROOT / "docs" / "guarantees.md"


def sections() -> dict[str, str]:
    """Return the text of each promise's section."""
    found = re.split(r"^## ", text_of(PAGE), flags=re.MULTILINE)
    return {match.group(1): part for part in found if (match := re.match(r"(P\d+):", part))}


def test_every_promise_has_its_section() -> None:
    assert list(sections()) == [f"P{number}" for number in range(1, 11)]


def test_every_promise_names_tests_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    wrong = []
    for promise, text in sections().items():
        tested = text.partition("**Tests.**")[2]
        files = re.findall(r"`(tests/[\w/]+\.py)`", tested)
        made = re.findall(r"`make ([a-z-]+)", tested)
        if not files and not made:
            wrong.append(f"{promise} names no test")
        wrong += [f"{promise}: {name}" for name in files if not (ROOT / name).is_file()]
        wrong += [f"{promise}: make {name}" for name in made if name not in targets]
    assert not wrong


def test_what_breaks_a_promise_is_told() -> None:
    lacking = [
        promise for promise, text in sections().items() if "**What breaks it.**" not in text and "Not kept yet" not in text
    ]
    assert not lacking
