"""The demo's documents and what it expects of them."""

from __future__ import annotations

import json
from pathlib import Path

from demo.overlap import overlap, signatures
from demo.story import WORKFLOWS

from flowmesh_cas.store import MemoryStore
from flowmesh_mesh.compiler import compile_document, compile_file
from flowmesh_mesh.manifest import Manifest


def manifest(tenant: str) -> Manifest:
    return compile_file(WORKFLOWS / f"{tenant}.yaml", store=MemoryStore()).manifest


def chain(*nonces: int) -> Manifest:
    operators = {
        f"n{place}": {"type": "flow.noop", "with": {"nonce": nonce}}
        | ({"inputs": {"after": f"n{place - 1}.out"}} if place else {})
        for place, nonce in enumerate(nonces)
    }
    document = {"apiVersion": "flowmesh/v1", "name": "chain", "operators": operators}
    return compile_document(document, base=None, store=MemoryStore()).manifest


def test_the_two_teams_have_everything_up_to_the_rewards_in_common() -> None:
    team_a, team_b = manifest("team-a"), manifest("team-b")
    found = overlap(team_a, team_b)
    # load, split, eight shards, concat, rewards
    assert found.between == 12
    assert found.operators == len(team_a.operators) + len(team_b.operators)
    # team-a cuts its questions in two twice, for the answers before and after
    assert found.shared == 13


def test_names_do_not_decide_what_is_common() -> None:
    one, other = manifest("team-a"), manifest("team-b")
    names = {operator.name for operator in one.operators} & {operator.name for operator in other.operators}
    assert not names
    assert set(signatures(one)) & set(signatures(other))


def test_what_comes_after_a_difference_is_not_common() -> None:
    assert overlap(chain(1, 2, 3), chain(1, 2, 3)).between == 3
    assert overlap(chain(1, 2, 3), chain(1, 2, 4)).between == 2
    assert overlap(chain(1, 2, 3), chain(0, 2, 3)).between == 0


def test_prompts_are_32_different_questions() -> None:
    rows = [json.loads(line) for line in Path(WORKFLOWS.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 32
    assert all(row["prompt"].endswith(("?", ".")) and row["topic"] for row in rows)
