"""Which role may use which subjects: the one table, as data. The broker enforces it, docs/security.md shows it.

A role is bound to a signing key of its account; whoever that key signs has exactly these rights. ``{{name()}}`` stands for the
name that was signed. ``hub`` and ``all`` are words of subjects, and every role listens on an inbox named after it, so
nodes must not bear those names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowmesh_cas.errors import UsageError
from flowmesh_mesh import subjects
from flowmesh_mesh.names import check_name

NAME = "{{name()}}"
_OWN_INBOX = f"_INBOX_{NAME}.>"

RESERVED_NODE_NAMES = frozenset({subjects.HUB, "all", "scheduler", "schedulers", "watcher", "registrar", "inspector"})

BLOCK_RESPONSES = 1024
"""Messages that a node may send to one reply subject: an answer may come in parts."""


@dataclass(frozen=True)
class Role:
    """Rights of a role in its account. An empty list means: nothing."""

    name: str
    account: str
    """``mesh``, ``system`` or ``tenant``."""
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    responses: int = 0
    """How many messages may answer one request, 0: none."""
    response_ttl_s: float = 60.0
    purpose: str = ""
    template: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rights: dict[str, Any] = {
            "subs": -1,
            "data": -1,
            "payload": -1,
            "pub": {"allow": list(self.publish)} if self.publish else {"deny": [">"]},
            "sub": {"allow": list(self.subscribe)} if self.subscribe else {"deny": [">"]},
        }
        if self.responses:
            rights["resp"] = {"max": self.responses, "ttl": int(self.response_ttl_s * 1e9)}
        self.template.update(rights)


SCHEDULER = Role(
    "scheduler",
    "mesh",
    publish=(">",),
    subscribe=(">",),
    purpose="Leader and standbys: streams, assignments, ledger, answers to tenants.",
)

NODE = Role(
    "node",
    "mesh",
    publish=(
        f"$JS.API.CONSUMER.MSG.NEXT.{subjects.ASSIGN}.{subjects.assign_consumer(NAME)}",
        f"$JS.ACK.{subjects.ASSIGN}.{subjects.assign_consumer(NAME)}.>",
        f"fm.node.{NAME}.>",
        subjects.node_record(NAME),
        subjects.blocks("*"),
    ),
    subscribe=(_OWN_INBOX, subjects.node_control(NAME), subjects.ALL_NODES_CONTROL, subjects.blocks(NAME)),
    responses=BLOCK_RESPONSES,
    purpose="Pull and settle its own assignments, report as itself, give and ask for blocks.",
)

WATCHER = Role(
    "watcher",
    "system",
    publish=(),
    subscribe=("$SYS.ACCOUNT.*.CONNECT", "$SYS.ACCOUNT.*.DISCONNECT"),
    purpose="See which connections come and go.",
)

REGISTRAR = Role(
    "registrar",
    "system",
    publish=("$SYS.REQ.CLAIMS.UPDATE",),
    subscribe=(_OWN_INBOX,),
    purpose="Hand the broker new or changed accounts; used by `flowmesh up` alone.",
)

INSPECTOR = Role(
    "inspector",
    "system",
    publish=("$SYS.REQ.SERVER.PING.VARZ", "$SYS.REQ.SERVER.PING.HEALTHZ"),
    subscribe=(_OWN_INBOX,),
    purpose="Ask the brokers how they are set up and how they are; used by `flowmesh doctor` alone.",
)

CLIENT = Role(
    "client",
    "tenant",
    publish=(
        subjects.TENANT_SUBMIT,
        subjects.TENANT_CANCEL,
        subjects.TENANT_ASK,
        subjects.TENANT_PUT,
        subjects.TENANT_GET,
    ),
    subscribe=(f"{subjects.TENANT_RUNS}.>", _OWN_INBOX, "_INBOX.>"),
    purpose="Submit, cancel, ask, put and get content, follow runs: of its own tenant only.",
)

ROLES = (SCHEDULER, NODE, CLIENT, WATCHER, REGISTRAR, INSPECTOR)

_SERVICES = (
    (subjects.TENANT_SUBMIT, subjects.submit),
    (subjects.TENANT_CANCEL, subjects.cancel),
    (subjects.TENANT_ASK, subjects.ask),
    (subjects.TENANT_PUT, subjects.put),
    (subjects.TENANT_GET, subjects.get),
)


def check_node_name(name: str) -> str:
    """Return ``name`` if it may be signed for a node; raise UsageError otherwise."""
    check_name(name, "node")
    if name in RESERVED_NODE_NAMES or name.startswith(("scheduler-", f"{subjects.HUB}-")):
        raise UsageError(f"node name {name!r} is reserved", hint="Choose another name, such as the name of the machine.")
    return name


def mesh_exports() -> list[dict[str, Any]]:
    """What the mesh account offers to tenants: the third token is the key of the account that imports, so it cannot be forged."""
    services = [
        {"name": local, "subject": subject("*"), "type": "service", "account_token_position": 3} for local, subject in _SERVICES
    ]
    events = {
        "name": subjects.TENANT_RUNS,
        "subject": subjects.run_event("*", "*"),
        "type": "stream",
        "account_token_position": 3,
    }
    return [*services, events]


def tenant_imports(mesh_account: str, tenant: str) -> list[dict[str, Any]]:
    """What the account of ``tenant`` takes from the mesh account, under subjects without a key."""
    services = [
        {"name": local, "subject": subject(tenant), "account": mesh_account, "type": "service", "local_subject": local}
        for local, subject in _SERVICES
    ]
    events = {
        "name": subjects.TENANT_RUNS,
        "subject": subjects.run_event(tenant, "*"),
        "account": mesh_account,
        "type": "stream",
        "local_subject": f"{subjects.TENANT_RUNS}.$1",
    }
    return [*services, events]
