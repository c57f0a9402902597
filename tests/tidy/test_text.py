"""What must not stand in any tracked file, and what documents may only say if it is so."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from tests.tidy.tree import ROOT, shown, text_of, tracked_files

# Written with brackets so that this file does not find itself.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:wor[k]|far[m]|roo[t])/",
    "a folder of one person": r"(?<![\w.])/hom[e]/\w+",
    "a package registry's host": r"pypi\.or[g]|pythonhoste[d]|registry\.npmj[s]|deb\.debia[n]",
    "a word that does not belong here": r"\b(?:Claud[e]|ChatGP[T]|AI assistan[t]|language model assistan[t])\b",
    "an unfinished spot": r"\b(?:TOD[O]|FIXM[E]|XX[X])\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KE[Y]-----|\bS[UAO][A-Z2-7]{5[6]}\b",
}
ALLOWED_UNDER_ROOT = {"LICENSE"}


def test_no_tracked_file_holds_what_must_not_be_published() -> None:
    found = []
    for path in tracked_files():
        text = text_of(path)
        for what, pattern in FORBIDDEN.items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{shown(path)}:{line}: {what}: {match.group()!r}")
    assert not found, "\n".join(found)


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in tracked_files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text_of(path)):
                if not (path.parent / target).exists():
                    broken.append(f"{shown(path)}: {target}")
    assert not broken


def test_every_workflow_that_stands_in_a_page_or_file_is_valid(tmp_path: Path) -> None:
    from flowmesh_cas.errors import UsageError
    from flowmesh_mesh.compiler import check_document

    shown_documents = [
        (path, block)
        for path in tracked_files()
        for block in (re.findall(r"^```yaml\n(.*?)^```", text_of(path), re.DOTALL | re.MULTILINE) if path.suffix == ".md" else [])
    ]
    kept = [(path, text_of(path)) for path in tracked_files() if path.is_relative_to(ROOT / "demo") and path.suffix == ".yaml"]
    documents = [(path, text) for path, text in shown_documents + kept if re.search(r"^apiVersion:", text, re.MULTILINE)]
    assert len(documents) >= 3
    wrong = []
    for path, text in documents:
        base = path.parent
        if path.suffix == ".md":
            base = tmp_path
            for named in re.findall(r"path: ([\w./-]+)", text):
                (tmp_path / named).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / named).touch()
        try:
            check_document(yaml.safe_load(text), base=base, params={})
        except UsageError as error:
            wrong.append(f"{shown(path)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_two_commands_of_the_readme_are_targets() -> None:
    makefile = text_of(ROOT / "Makefile")
    named = set(re.findall(r"^make (\w+)", text_of(ROOT / "README.md"), re.MULTILINE))
    assert {"demo", "test"} <= named
    missing = [name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)]
    assert not missing


def test_every_target_says_what_it_does() -> None:
    targets = re.findall(r"^([a-z]+):(.*)$", text_of(ROOT / "Makefile"), re.MULTILINE)
    assert all("## " in rest for _, rest in targets)


def test_promises_are_told_one_by_one() -> None:
    readme = text_of(ROOT / "README.md")
    assert [f"P{number}" for number in range(1, 11)] == re.findall(r"^\| (P\d+) \|", readme, re.MULTILINE)
