"""What each role may and may not do, tried on a real broker: the table in docs/security.md is the one that holds."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from tests.fixtures_broker import MeshBroker

from flowmesh_cas.errors import TransientError, UsageError
from flowmesh_deploy.keyring import Keyring
from flowmesh_mesh import roles, streams, subjects
from flowmesh_mesh.bus import Bus, CredentialsRefusedError, Delivery, NoAnswerError, NotAllowedError
from flowmesh_mesh.credentials import Credentials, Key, sign_claims, user_jwt

WAIT_S = 0.15
"""How long a test listens for what must not come; what may come takes a few milliseconds."""


class Played:
    """The parties of a mesh, connected, with work in the streams."""

    def __init__(self, mesh: MeshBroker, leader: Bus, node: Bus, other: Bus, client: Bus, stranger: Bus) -> None:
        self.mesh = mesh
        self.leader = leader
        self.node = node
        self.other = other
        self.client = client
        self.stranger = stranger
        self.faults: list[str] = []


@pytest_asyncio.fixture
async def played(mesh_broker: MeshBroker) -> AsyncIterator[Played]:
    leader = await mesh_broker.scheduler()
    faults: list[str] = []

    def note(error: Exception) -> None:
        faults.append(str(error))

    made = Played(
        mesh_broker,
        leader,
        await mesh_broker.node("n1", on_error=note),
        await mesh_broker.node("n2"),
        await mesh_broker.client("team-a", on_error=note),
        await mesh_broker.client("team-b"),
    )
    made.faults = faults
    for node in ("n1", "n2"):
        await leader.ensure_consumer(subjects.ASSIGN, streams.assign_consumer(node))
        await leader.store(subjects.assign(node, "a1"), node.encode())
    yield made


async def _refused(faults: list[str]) -> str:
    """Return the broker's refusal; fail when none comes."""
    deadline = time.monotonic() + 20
    while not faults:
        assert time.monotonic() < deadline, "the broker did not refuse"
        await asyncio.sleep(0.005)
    return faults.pop(0)


# --- what a node may do


async def test_a_node_pulls_and_settles_its_own_assignments(played: Played) -> None:
    taken: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(delivery: Delivery) -> None:
        await delivery.ack()
        await taken.put(delivery.data)

    await played.node.pull(subjects.ASSIGN, subjects.assign_consumer("n1"), take)
    assert await asyncio.wait_for(taken.get(), 20) == b"n1"
    deadline = time.monotonic() + 20
    while (
        state := await played.leader.consumer_state(subjects.ASSIGN, subjects.assign_consumer("n1"))
    ) is None or state.num_ack_pending:
        assert time.monotonic() < deadline, "the assignment was not settled"
        await asyncio.sleep(0.01)
    assert taken.empty(), "the assignment of the other node arrived too"


async def test_a_node_stores_results_and_its_record(played: Played) -> None:
    assert await played.node.store(subjects.node_done("n1"), b"done") == 1
    assert await played.node.store(subjects.node_record("n1"), b"record") == 1


async def test_a_node_asks_any_holder_and_answers_for_its_own_blocks(played: Played) -> None:
    async def answer(delivery: Delivery) -> None:
        for part in range(3):
            await delivery.respond(b"part %d" % part)

    await played.other.subscribe(subjects.blocks("n2"), answer)
    await played.other.flush()
    assert await played.node.request(subjects.blocks("n2"), b"?") == b"part 0"
    assert await played.leader.request(subjects.blocks("n2"), b"?") == b"part 0"


async def test_a_node_answers_the_leader_and_hears_what_is_for_all(played: Played) -> None:
    heard: list[str] = []

    def hear(delivery: Delivery) -> None:
        heard.append(delivery.subject)
        delivery.post_respond(b"yes")

    await played.node.subscribe(subjects.node_control("n1"), hear)
    await played.node.subscribe(subjects.ALL_NODES_CONTROL, hear)
    await played.node.flush()
    assert await played.leader.request(subjects.node_control("n1"), b"") == b"yes"
    await played.leader.publish(subjects.ALL_NODES_CONTROL, b"")
    await played.leader.flush()
    await asyncio.sleep(WAIT_S)
    assert heard == [subjects.node_control("n1"), subjects.ALL_NODES_CONTROL]


# --- what a node may not do


def _publications(account: str) -> dict[str, str]:
    return {
        "an assignment": subjects.assign("n2", "evil"),
        "an epoch": subjects.assign_epoch(9),
        "a ledger record": "led.result.ab.0",
        "a result of another node": subjects.node_done("n2"),
        "a heartbeat of another node": subjects.node_beat("n2"),
        "a record of another node": subjects.node_record("n2"),
        "control of another node": subjects.node_control("n2"),
        "control of all nodes": subjects.ALL_NODES_CONTROL,
        "a submission": subjects.submit(account),
        "a question": subjects.ask(account),
        "an event of a run": subjects.run_event(account, "r1"),
        "the lease": subjects.LEASE_SUBJECT,
        "a ready operator": subjects.ready("ab"),
        "an answer to somebody": "_INBOX_n2.x",
        "an answer to the leader": "_INBOX_scheduler.x",
        "creating a consumer": "$JS.API.CONSUMER.CREATE.SUBMIT.x.fm.submit.*",
        "creating a durable": "$JS.API.CONSUMER.DURABLE.CREATE.SUBMIT.x",
        "creating a stream": "$JS.API.STREAM.CREATE.Z",
        "deleting a stream": "$JS.API.STREAM.DELETE.ASSIGN",
        "purging a stream": "$JS.API.STREAM.PURGE.LEDGER",
        "looking at a stream": "$JS.API.STREAM.INFO.ASSIGN",
        "reading a message": "$JS.API.STREAM.MSG.GET.SUBMIT",
        "reading directly": "$JS.API.DIRECT.GET.SUBMIT",
        "deleting a message": "$JS.API.STREAM.MSG.DELETE.LEDGER",
        "pulling for another node": "$JS.API.CONSUMER.MSG.NEXT.ASSIGN.node_n2",
        "pulling submissions": "$JS.API.CONSUMER.MSG.NEXT.SUBMIT.leader",
        "settling for another node": "$JS.ACK.ASSIGN.node_n2.1.2.2.0.0",
        "changing an account": "$SYS.REQ.CLAIMS.UPDATE",
    }


@pytest.mark.parametrize("what", _publications(""))
async def test_a_node_may_not_publish(played: Played, what: str) -> None:
    subject = _publications(played.mesh.account("team-a"))[what]
    with pytest.raises(NotAllowedError):
        await played.node.request(subject, b"{}", timeout_s=3)
    assert played.node.connected


NODE_EARS = [
    ">",
    "fm.>",
    "fm.submit.>",
    "fm.node.>",
    "fm.nodes.*",
    "fm.ctl.*",
    "fm.ctl.n2",
    "fm.blocks.*",
    "fm.blocks.n2",
    "fm.blocks.hub",
    "asg.>",
    "led.>",
    "_INBOX.>",
    "_INBOX_n2.>",
    "_INBOX_scheduler.>",
    "$JS.ACK.>",
    "$JS.EVENT.>",
    "$JS.API.>",
    "$KV.>",
    "$SYS.>",
]


@pytest.mark.parametrize("subject", NODE_EARS)
async def test_a_node_may_not_listen(played: Played, subject: str) -> None:
    await played.node.subscribe(subject, lambda _: None)
    assert "permissions violation for subscription" in (await _refused(played.faults)).lower()
    assert played.node.connected


async def test_a_node_cannot_be_used_to_answer_where_it_was_not_asked(played: Played) -> None:
    heard: list[bytes] = []
    await played.other.subscribe(f"{played.mesh.keyring.node('n2').inbox}.mine", lambda delivery: heard.append(delivery.data))
    await played.other.flush()
    await played.node.publish("_INBOX_n2.mine", b"forged")
    await _refused(played.faults)
    await asyncio.sleep(WAIT_S)
    assert heard == []


# --- tenants


async def test_a_submission_carries_the_key_of_its_tenant(played: Played) -> None:
    first = await played.client.store(subjects.TENANT_SUBMIT, b"{}", message_id="m")
    assert await played.client.store(subjects.TENANT_SUBMIT, b"{}", message_id="m") == first
    assert await played.stranger.store(subjects.TENANT_CANCEL, b"{}") == first + 1
    found = [message.subject async for message in played.leader.read_stream(subjects.SUBMIT)]
    assert found == [subjects.submit(played.mesh.account("team-a")), subjects.cancel(played.mesh.account("team-b"))]


@pytest.mark.parametrize("subject", [subjects.TENANT_ASK, subjects.TENANT_PUT, subjects.TENANT_GET])
async def test_questions_reach_the_leader_with_the_key_of_their_tenant(played: Played, subject: str) -> None:
    await played.leader.subscribe(f"{subject}.*", lambda delivery: delivery.post_respond(delivery.subject.encode()))
    await played.leader.flush()
    assert await played.client.request(subject, b"") == f"{subject}.{played.mesh.account('team-a')}".encode()
    assert await played.stranger.request(subject, b"") == f"{subject}.{played.mesh.account('team-b')}".encode()


async def test_events_of_a_run_reach_their_tenant_only_under_a_short_subject(played: Played) -> None:
    heard: dict[str, list[str]] = {"a": [], "b": []}
    await played.client.subscribe("fm.runs.*", lambda delivery: heard["a"].append(delivery.subject))
    await played.client.subscribe("fm.runs.r1", lambda delivery: heard["a"].append(delivery.subject))
    await played.stranger.subscribe("fm.runs.*", lambda delivery: heard["b"].append(delivery.subject))
    await asyncio.gather(played.client.flush(), played.stranger.flush())
    await played.leader.store(subjects.run_event(played.mesh.account("team-a"), "r1"), b"{}")
    await played.leader.publish(subjects.run_event(played.mesh.account("team-b"), "r2"), b"{}")
    await played.leader.flush()
    await asyncio.sleep(WAIT_S)
    assert heard == {"a": ["fm.runs.r1", "fm.runs.r1"], "b": ["fm.runs.r2"]}


async def test_a_tenant_cannot_speak_for_another(played: Played) -> None:
    with pytest.raises(NotAllowedError):
        await played.client.request(subjects.submit(played.mesh.account("team-b")), b"{}", timeout_s=3)
    state = await played.leader.stream_state(subjects.SUBMIT)
    assert state is not None
    assert state.messages == 0


CLIENT_VOICES = [
    "fm.runs.r1",
    "asg.node.n1.x",
    "led.x",
    "fm.node.n1.done",
    "fm.ctl.n1",
    "fm.blocks.hub",
    "$JS.API.STREAM.INFO.SUBMIT",
    "$JS.API.STREAM.CREATE.X",
    "$JS.API.CONSUMER.CREATE.SUBMIT.x",
    "$JS.API.INFO",
    "$SYS.REQ.CLAIMS.UPDATE",
    "$SYS.REQ.USER.INFO",
]


@pytest.mark.parametrize("subject", CLIENT_VOICES)
async def test_a_tenant_may_not_publish(played: Played, subject: str) -> None:
    with pytest.raises((NotAllowedError, NoAnswerError)):
        await played.client.request(subject, b"{}", timeout_s=3)
    assert await played.leader.last_message(subjects.ASSIGN, "asg.node.n1.x") is None


@pytest.mark.parametrize("subject", [">", "fm.>", "fm.submit", "fm.ask", "$SYS.>", "$JS.>", "_INBOX_team-b.>"])
async def test_a_tenant_may_not_listen(played: Played, subject: str) -> None:
    await played.client.subscribe(subject, lambda _: None)
    await _refused(played.faults)


async def test_a_bare_client_listens_on_the_usual_inbox(played: Played) -> None:
    credentials = played.mesh.keyring.client("team-a")
    bare = await Bus.connect(played.mesh.url, credentials, name="bare", inbox="_INBOX")
    try:
        assert await bare.store(subjects.TENANT_SUBMIT, b"{}") > 0
    finally:
        await bare.close()


async def test_what_is_between_nodes_is_out_of_reach_for_tenants(played: Played) -> None:
    heard: list[str] = []
    await played.leader.subscribe(">", lambda delivery: heard.append(delivery.subject))
    await played.leader.flush()
    for subject in ("fm.node.n1.beat", "fm.ctl.all", "fm.leader.alive"):
        await played.client.publish(subject, b"")
    await played.client.flush()
    await asyncio.sleep(WAIT_S)
    assert not [subject for subject in heard if subject.startswith("fm.")]


# --- the watcher


async def test_the_watcher_sees_who_comes_and_goes_and_nothing_else(played: Played) -> None:
    faults: list[str] = []
    events: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()

    def see(delivery: Delivery) -> None:
        client = json.loads(delivery.data)["client"]
        events.put_nowait((delivery.subject.rpartition(".")[2], client["acc"], client.get("name", "")))

    def note(error: Exception) -> None:
        faults.append(str(error))

    watcher = await played.mesh.watcher(on_error=note)
    for kind in ("CONNECT", "DISCONNECT"):
        await watcher.subscribe(f"$SYS.ACCOUNT.*.{kind}", see)
    await watcher.flush()
    node = await played.mesh.node("n3")
    mesh = played.mesh.keyring.mesh_account
    assert await asyncio.wait_for(events.get(), 20) == ("CONNECT", mesh, "n3")
    began = time.monotonic()
    node.connection._transport._io_writer.transport.abort()
    assert await asyncio.wait_for(events.get(), 20) == ("DISCONNECT", mesh, "n3")
    assert time.monotonic() - began < 20
    assert faults == [], "connecting asks for no right that the role lacks"
    for subject in ("$SYS.>", "$SYS.ACCOUNT.*.SERVER.CONNS", "$SYS.SERVER.>", ">", "_INBOX.>"):
        faults.clear()
        await watcher.subscribe(subject, lambda _: None)
        assert "subscription" in await _refused(faults)
    for subject in ("$SYS.REQ.CLAIMS.UPDATE", "$SYS.REQ.SERVER.PING", "fm.ctl.all", "x"):
        faults.clear()
        await watcher.publish(subject, b"")
        assert "publish" in await _refused(faults)


# --- credentials that are not what they seem


async def test_a_role_is_not_widened_by_claims_of_its_own(broker: MeshBroker) -> None:
    signer, user = broker.keyring._roles["node"], Key.new(20 << 3)
    rights = {"pub": {"allow": [">"]}, "sub": {"allow": [">"]}, "subs": -1, "data": -1, "payload": -1}
    nats = {"type": "user", "version": 2, "issuer_account": broker.keyring.mesh_account, **rights}
    jwt = sign_claims({"sub": user.public_key, "name": "n1", "nats": nats}, signer)
    with pytest.raises(CredentialsRefusedError):
        await broker.connect(Credentials(jwt, user.seed))


async def test_a_seed_of_another_user_does_not_open_the_door(broker: MeshBroker) -> None:
    jwt = broker.keyring.node("n1").jwt
    with pytest.raises(CredentialsRefusedError):
        await broker.connect(Credentials(jwt, Key.new(20 << 3).seed))


async def test_expired_credentials_are_refused(broker: MeshBroker) -> None:
    made = broker.keyring.node("n1")
    jwt = user_jwt(
        broker.keyring._roles["node"], made.public_key, "n1", broker.keyring.mesh_account, expires_at_s=int(time.time()) - 5
    )
    with pytest.raises(CredentialsRefusedError):
        await broker.connect(Credentials(jwt, made.seed))


@pytest.mark.parametrize("make", [lambda keys: keys.node("hub"), lambda keys: keys.node("*"), lambda keys: keys.node("a.b")])
def test_the_signer_refuses_names_that_are_rights(make: Callable[[Keyring], Credentials], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        make(Keyring.open(tmp_path / "keyring.json", "m"))


async def test_a_tenant_is_added_to_a_running_broker(broker: MeshBroker) -> None:
    from flowmesh_deploy.control import register_tenants
    from flowmesh_deploy.layout import Layout, write_json

    leader = await broker.scheduler()
    await leader.subscribe("fm.ask.*", lambda delivery: delivery.post_respond(b"hello"))
    await leader.flush()
    broker.keyring.add_tenants(["team-c"])
    with pytest.raises((CredentialsRefusedError, TransientError)):
        await broker.client("team-c", deadline_s=1)
    layout = Layout(broker.folder)
    write_json(layout.state, {"urls": [broker.url]})
    await register_tenants(layout, broker.keyring, ["team-c"])
    assert await (await broker.client("team-c")).request(subjects.TENANT_ASK, b"") == b"hello"


async def test_the_registrar_may_only_hand_over_accounts(broker: MeshBroker) -> None:
    registrar = await broker.connect(broker.keyring.registrar())
    attempts: list[Callable[[], Awaitable[bytes]]] = [
        lambda: registrar.request("$SYS.REQ.SERVER.PING", b"", timeout_s=2),
        lambda: registrar.request("$SYS.REQ.CLAIMS.DELETE", b"", timeout_s=2),
        lambda: registrar.request("$SYS.REQ.ACCOUNT.X.CONNZ", b"", timeout_s=2),
    ]
    for attempt in attempts:
        with pytest.raises(NotAllowedError):
            await attempt()


# --- the document


def test_the_document_shows_the_table_that_is_enforced() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    for role in roles.ROLES:
        for subject in (*role.publish, *role.subscribe):
            shown = subject.replace(roles.NAME, "<name>")
            assert f"`{shown}`" in text, f"{role.name}: {shown}"
