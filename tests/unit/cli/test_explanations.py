"""What ``why``, ``plan`` and ``replay`` print, and how they end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import node_record, operator, workflow
from typer.testing import CliRunner

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.cli import plan, why
from flowmesh_mesh.cli.app import app
from flowmesh_scheduler.core import events as e
from flowmesh_scheduler.core.settings import Settings
from flowmesh_scheduler.core.state import State
from flowmesh_scheduler.core.step import step
from flowmesh_scheduler.core.why import explain
from flowmesh_scheduler.recording import Recording
from flowmesh_scheduler.replaying import DIFFERS


def test_an_operator_is_named_by_its_run_and_name_or_by_the_beginning_of_its_key() -> None:
    assert why.split_operator("r1/load") == ("r1", "load", "")
    assert why.split_operator("ABCDEF0123") == ("", "", "abcdef0123")
    for wrong in ("r1", "r1/", "/load", "r1/a/b", "abc", "../x", "zzzzzzzz"):
        with pytest.raises(UsageError) as found:
            why.split_operator(wrong)
        assert found.value.hint


def decided() -> dict[str, Any]:
    desk = Desk()
    desk.join("cheap", price_per_hour=0.2)
    desk.join("dear", price_per_hour=2.0)
    desk.submit(workflow([operator("train", type="train.sft", params={"seed": 1})]))
    (decision,) = desk.state.decisions.values()
    return {**explain(decision), "at_us": decision.at_us}


def answer(**fields: Any) -> dict[str, Any]:
    """Return an answer as the leader gives it."""
    plain = {"run": "r1", "operator": "train", "type": "train.sft", "key": "ab" * 32, "state": "assigned", "shared": False}
    more = {"node": "cheap", "attempt": 1, "started_at_us": 0, "decision": None, "waiting": None, "source": None, "text": "so"}
    return {**plain, **more, **fields}


def test_why_shows_terms_score_gap_and_flips(capsys: pytest.CaptureFixture[str]) -> None:
    why._print(answer(decision=decided()))
    told = capsys.readouterr().out
    lines = {line.split()[0]: line for line in told.splitlines() if line.split()}
    assert "cheap x1" in told
    assert "dear x1" in told
    assert {"value", "price", "gap"} <= set(lines)
    assert "= score" in told
    assert "dear would win if its price fell to " in told
    assert "flowmesh watch r1" in told


def test_why_shows_what_each_node_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = {"kind": "no-node", "text": "no node can run it", "nodes": {"n1": ["8 GPUs (has 0)", "numeric class exact:a"]}}
    why._print(answer(state="ready", node="", waiting=waiting, text=waiting["text"]))
    told = capsys.readouterr().out
    assert "no node can run it" in told
    assert "8 GPUs (has 0), numeric class exact:a" in told


def forecast(**fields: Any) -> dict[str, Any]:
    row = {"type": "flow.noop", "model": "", "operators": 4, "hits": 1, "in_flight": 0, "merged": 1, "to_run": 2, "batches": 1}
    counts = {"operators": 4, "hits": 1, "in_flight": 0, "merged": 1, "to_run": 2, "saved_s": 1.5, "queued": 0}
    sums = {"critical_path_s": 1.0, "makespan_s": 2.0, "node_s": 2.0, "usd": 0.001, "nodes": {"n1": 2.0}}
    notes = {"unknown_sizes": 0, "unknown_models": {}, "unplaced": 0, "lacking": []}
    rows = [{**row, "node_s": 2.0, "usd": 0.001, "samples": fields.pop("samples", 0), "spread": 0.25}]
    return {"name": "flow", "manifest": "bafy", **counts, **sums, **notes, "rows": rows, **fields}


def test_a_plan_says_which_figures_are_priors(capsys: pytest.CaptureFixture[str]) -> None:
    plan._print(forecast())
    assert "prior: never measured" in capsys.readouterr().out
    plan._print(forecast(samples=12))
    told = capsys.readouterr().out
    assert "prior" not in told
    assert "12 batches, +-25 %" in told


def test_a_plan_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    lack = {"type": "llm.generate", "operators": 3, "first": "ask", "nodes": {"n1": ["operator type llm.generate"]}}
    plan._print(forecast(lacking=[lack], unplaced=3, unknown_models={"hf:x": "no node is there to tell"}, queued=7))
    told = capsys.readouterr().out
    assert "nobody can run ask (3 of type llm.generate): lacking are n1: operator type llm.generate" in told
    assert "3 operators are left out" in told
    assert "model hf:x is unknown" in told
    assert "7 operators are ready now" in told
    plan._print(forecast(lacking=[{**lack, "nodes": {}}]))
    assert "the mesh has no nodes" in capsys.readouterr().out


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Return a log of a core that gave one operator to a node."""
    state = State(Settings(), epoch=7)
    recording = Recording(tmp_path / "logs", state, 0, max_bytes=1 << 20)
    flow = workflow([operator("a", nonce=1)])
    events: list[e.Event] = [e.NodeJoined(node_record("n1")), e.Submitted("ta", "r1", flow, b"m")]
    for at_us, event in enumerate(events):
        recording.note(at_us, event, step(state, event, at_us))
    asyncio.run(recording.close("that is all"))
    return recording.path


def test_a_replay_tells_the_assignments_and_that_they_are_the_same(log: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(log.parent)])
    assert result.exit_code == 0, result.output
    assert "the same assignments, hash for hash" in result.output
    assert "7-1" in result.output
    assert "log ends   that is all" in result.output


def test_a_replay_that_differs_ends_with_a_code_of_its_own_and_names_the_event(log: Path) -> None:
    data = log.read_bytes()
    assert b"n1" in data
    log.write_bytes(data.replace(b"\xa2n1", b"\xa2n9"))
    result = CliRunner().invoke(app, ["replay", str(log), "--json"])
    assert result.exit_code == DIFFERS
    document = json.loads(result.output)
    assert not document["is_same"]
    assert document["divergence"] == {"step": 2, "at_us": 1, "kind": "Submitted"}
    assert "DIFFERENT" in CliRunner().invoke(app, ["replay", str(log)]).output


def test_a_replay_with_a_weight_compares_choices(log: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(log), "--weight", "depth_limit.inline=0"])
    assert result.exit_code == 0, result.output
    assert "1 of 1 rounds choose otherwise" in result.output
    assert "1 operators held back by the changed settings" in result.output


def test_a_replay_refuses_what_is_no_log_and_an_empty_folder(tmp_path: Path, log: Path) -> None:
    (tmp_path / "x").write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    assert CliRunner().invoke(app, ["replay", str(tmp_path / "x")]).exit_code == 2
    assert CliRunner().invoke(app, ["replay", str(tmp_path / "empty")]).exit_code == 4
    assert CliRunner().invoke(app, ["replay", str(log), "--weight", "colour=1"]).exit_code == 2
