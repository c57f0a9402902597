"""Tenants as people meet them: names in the configuration, rows of their shares, refusals of quotas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import operator, workflow

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.cli.meshes import _tenant_row
from flowmesh_scheduler.config import load_config
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings, TenantSettings
from flowmesh_scheduler.tenants import check_quota, rows

NAMES = {"ta": "anna", "tb": "bert"}


def written(folder: Path, **settings: Any) -> Path:
    document = {
        "urls": ["nats://localhost"], "credentials": "c", "store": "s", "mesh": "m",
        "tenants": {"anna": "ta", "bert": "tb"}, "settings": settings,
    }  # fmt: skip
    (folder / "scheduler.json").write_text(json.dumps(document))
    return folder


def desk() -> Desk:
    tenants = {"ta": TenantSettings(weight=3.0, max_runs=2, max_operators=4), "tb": TenantSettings()}
    made = Desk(Settings(tenants=tenants))
    made.submit(workflow([operator(f"o{n}", type="train.sft", params={"seed": n}) for n in range(3)]), "r1", "ta")
    made.submit(workflow([operator("o", type="train.sft", params={"seed": 9})]), "r1", "tb")
    made.join("n1")
    return made


def test_settings_name_tenants_and_the_core_knows_them_by_account(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, tenants={"anna": {"weight": 2.0, "max_runs": 5}}))
    assert config.settings.tenants == {"ta": TenantSettings(weight=2.0, max_runs=5)}


def test_settings_of_a_tenant_that_does_not_exist_are_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names carl, who is no tenant") as caught:
        load_config(written(tmp_path, tenants={"carl": {"weight": 2.0}}))
    assert caught.value.hint == "Known: anna, bert."


def test_a_row_tells_weight_share_demand_and_quotas() -> None:
    found = {row["tenant"]: row for row in rows(desk().state, NAMES, "ta", all_tenants=True)}
    anna = found["anna"]
    assert (anna["weight"], anna["share"], found["bert"]["share"]) == (3.0, 0.75, 0.25)
    assert anna["ready"] + anna["running"] == anna["operators"] == 3
    assert sum(row["running"] for row in found.values()) == sum(row["slots"] for row in found.values()) == 1
    assert anna["limits"] == {"runs": 2, "operators": 4, "slots": 0}
    assert _tenant_row(anna)[-1] == "1/2 runs, 3/4 operators"


def test_where_nothing_is_shared_a_tenant_sees_only_itself() -> None:
    assert [row["tenant"] for row in rows(desk().state, NAMES, "tb", all_tenants=False)] == ["bert"]


def test_a_run_beyond_a_quota_is_refused_with_what_is_in_use_and_what_to_do() -> None:
    state = desk().state
    check_quota(state, "ta", 1)
    with pytest.raises(UsageError, match="quota of 4 operators at a time does not hold 2 more: 3 have not ended") as caught:
        check_quota(state, "ta", 2)
    assert "flowmesh ls" in caught.value.hint


def test_a_slot_that_a_quota_lets_go_is_used_at_once_by_work_of_any_kind() -> None:
    made = Desk(Settings(tenants={"tb": TenantSettings(max_slots=1)}))
    made.join("n1")
    made.submit(workflow([operator("call", type="python.call", params={"function": "f"})]), "r1", "tb")
    made.submit(workflow([operator("train", type="train.sft", params={"seed": 1})]), "r2", "tb")
    assert not made.is_assigned("train")
    made.succeed(made.named("call"))
    assert made.is_assigned("train")


def test_a_queue_of_two_tenants_goes_on_for_one_while_the_other_is_at_its_quota() -> None:
    made = Desk(Settings(tenants={"tb": TenantSettings(max_slots=1)}))
    made.apply(e.CutOff())
    for number, (tenant, model) in enumerate((t, m) for m in ("hf:a", "hf:b") for t in ("tb", "tc")):
        params = {"prompt": f"p{number}", "dtype": "float32"}
        flow = workflow([operator(f"{tenant} {model}", type="llm.generate", params=params, models={"model": model})])
        made.submit(flow, f"r{number}", tenant, models={"hf:a": "sha256:a", "hf:b": "sha256:b"})
    made.join("n1")
    made.apply(e.Restored())
    made.join("n2")
    assert sorted(len(a.items) for a in made.assigned.values()) == [1, 2], "both nodes have work, and no second slot is tb's"
