"""The settings that people read about are the settings that there are, with the defaults that they have."""

from __future__ import annotations

import json
import re

import msgspec
from tests.tidy.tree import ROOT, text_of

from flowmesh_scheduler.config import Config
from flowmesh_scheduler.core.settings import Settings, TenantSettings

PAGE = ROOT / "docs" / "scheduler.md"


def test_every_setting_stands_in_its_page_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)`[^|]*\|", text_of(PAGE).split("### Settings")[1], re.MULTILINE)
    made = {**msgspec.to_builtins(Settings()), **msgspec.to_builtins(TenantSettings())}
    assert dict(rows) == {name: json.dumps(value) for name, value in made.items()}


def test_every_key_of_the_configuration_stands_in_its_page() -> None:
    section = text_of(PAGE).split("## Configuration")[1].split("### Settings")[0]
    named = {name for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(Config.__struct_fields__)


def test_every_module_of_the_core_stands_in_its_page() -> None:
    names = {path.stem for path in (ROOT / "scheduler" / "flowmesh_scheduler" / "core").glob("*.py")} - {"__init__", "settings"}
    section = text_of(PAGE).split("## What the leader does")[1].split("## The life")[0]
    assert names <= {
        name for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
