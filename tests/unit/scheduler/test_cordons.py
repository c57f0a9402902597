"""Who may do what concerns every tenant, and what they are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.flows import chain

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_scheduler import cordons
from flowmesh_scheduler.core import commands as c


def leader_of(made: Desk, *, operators: tuple[str, ...] = ("alice",), all_may: bool = False) -> Any:
    config = SimpleNamespace(tenants_may_cordon=all_may, operators=list(operators))
    return SimpleNamespace(state=made.state, config=config, tenant_names={"ta": "alice", "tb": "bob"}, apply=made.apply)


def desk() -> Desk:
    made = Desk()
    made.join("n1", "n2", "n3", "n4")
    return made


@pytest.mark.parametrize(
    ("ask", "args"),
    [(cordons.cordon, {"node": "n1"}), (cordons.uncordon, {"node": "n1"}), (cordons.unquarantine, {"key": "0" * 64})],
)
def test_a_tenant_who_is_no_operator_is_refused_and_nothing_changes(ask: Any, args: dict[str, Any]) -> None:
    made = desk()
    with pytest.raises(UsageError, match="bob may not do what concerns every tenant") as refused:
        ask(leader_of(made), "tb", args)
    assert '"operators"' in refused.value.hint
    assert not made.of(made.commands, c.RecordHealth)


def test_every_tenant_may_where_the_configuration_says_so() -> None:
    made = desk()
    told = cordons.cordon(leader_of(made, operators=(), all_may=True), "tb", {"node": "n2", "reason": "mine"})
    assert (told["before"], told["health"]["state"], told["health"]["by"], told["nodes_left"]) == ("ok", "cordoned", "bob", 3)


def test_an_unknown_node_is_told_as_such() -> None:
    with pytest.raises(NotFoundError, match="no node 'n9'"):
        cordons.cordon(leader_of(desk()), "ta", {"node": "n9"})
    with pytest.raises(NotFoundError):
        cordons.cordon(leader_of(desk()), "ta", {})


def test_asking_twice_is_asking_once() -> None:
    made = desk()
    leader = leader_of(made)
    cordons.cordon(leader, "ta", {"node": "n1"})
    told = cordons.cordon(leader, "ta", {"node": "n1"})
    assert told["before"] == "cordoned"
    cordons.uncordon(leader, "ta", {"node": "n1"})
    cordons.uncordon(leader, "ta", {"node": "n1"})
    assert [r.health.state for r in made.of(made.commands, c.RecordHealth)] == ["cordoned", "ok"]


def test_an_order_takes_over_a_cordon_of_the_schedulers_own() -> None:
    made = desk()
    node = made.state.nodes["n1"]
    node.health.state, node.health.by, made.state.ward.patients["n1"] = "cordoned", "scheduler", None
    cordons.cordon(leader_of(made), "ta", {"node": "n1"})
    made.wait(7200, beating=["n1", "n2", "n3", "n4"])
    assert (node.health.state, node.health.by) == ("cordoned", "alice")


def test_a_quarantine_is_lifted_by_the_beginning_of_its_key() -> None:
    made = desk()
    made.submit(chain(1))
    key = made.only().items[0].key
    for _ in range(3):
        made.lose(made.only().node)
    leader = leader_of(made)
    with pytest.raises(NotFoundError, match="no quarantined operator key"):
        cordons.unquarantine(leader, "ta", {"key": key.hex()[:4]})
    told = cordons.unquarantine(leader, "ta", {"key": key.hex()[:16].upper()})
    assert (told["operator"], told["key"], len(told["nodes"])) == ("o0", key.hex(), 3)
    assert not made.state.ward.quarantine
