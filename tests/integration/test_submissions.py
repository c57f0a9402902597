"""What the leader does with submissions that are wrong, unreadable or repeated: a reason, and nothing half-done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from flowmesh_cas.cid import DAG_CBOR, cid_of, cid_text
from flowmesh_cas.errors import UsageError
from flowmesh_deploy.embedded import EmbeddedMesh, embedded_mesh
from flowmesh_mesh import subjects
from flowmesh_mesh.bus import Bus, Delivery
from flowmesh_mesh.client import connect
from flowmesh_mesh.client.mesh import Mesh
from flowmesh_mesh.manifest import Manifest, Operator, Ref, Source, encode_record
from flowmesh_mesh.messages import Answer, Ask, Put, RunEvent, Submit, decode, encode

DEADLINE_S = 20.0
HEAD = {"apiVersion": "flowmesh/v1", "name": "x"}


class BareClient:
    """A tenant with nothing but a connection: it publishes bytes and listens to events."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def receive(self, delivery: Delivery) -> None:
        if delivery.data[:1] == b"{":
            self.events.put_nowait(msgspec.json.decode(delivery.data))
        else:
            self.events.put_nowait({"json": False, **msgspec.to_builtins(decode_event(delivery.data))})

    async def next(self, *kinds: str) -> dict[str, Any]:
        """Return the next event of one of these kinds."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                event = await self.events.get()
                if event["kind"] in kinds:
                    return event

    async def ask(self, what: str, **args: Any) -> Answer:
        return decode(await self.bus.request(subjects.TENANT_ASK, encode(Ask(what, args)), timeout_s=DEADLINE_S), Answer)


def decode_event(data: bytes) -> dict[str, Any]:
    event = decode(data, RunEvent)
    return {"run": event.run, "seq": event.seq, "kind": event.kind, **event.body}


@pytest_asyncio.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[EmbeddedMesh]:
    async with embedded_mesh(tmp_path / "mesh", nodes=1) as found:
        yield found


@pytest_asyncio.fixture
async def client(mesh: EmbeddedMesh) -> AsyncIterator[Mesh]:
    async with connect(context=mesh) as found:
        yield found


@pytest_asyncio.fixture
async def bare(client: Mesh) -> BareClient:
    found = BareClient(client.bus)
    await client.bus.subscribe(f"{subjects.TENANT_RUNS}.*", found.receive)
    await client.bus.flush()
    return found


def noop(name: str = "a", **fields: Any) -> Operator:
    return Operator(name=name, type="flow.noop", version=1, params={"nonce": 1, "bytes": 0, "sleep_s": 0.0}, **fields)


def model(reference: str) -> Operator:
    params = {"model": reference, "prompt": "hi"}
    return Operator(name="a", type="llm.generate", version=1, params=params, models={"model": reference})


def submission(manifest: Manifest, run: str = "mine") -> bytes:
    block = encode_record(manifest)
    return encode(Submit(run, cid_of(DAG_CBOR, block), (block,)))


async def nothing_is_left(bare: BareClient) -> None:
    """No run, no work, and the next good submission goes through."""
    status = (await bare.ask("status")).body
    assert status["runs"] == {"active": 0, "ended": 0}
    assert status["queues"] == {"waiting": 0, "ready": 0, "assigned": 0}
    await bare.bus.store(subjects.TENANT_SUBMIT, submission(Manifest(name="good", operators=[noop()]), "good"))
    assert (await bare.next("ended"))["state"] == "succeeded"


async def test_a_json_document_is_accepted_and_answered_in_json(bare: BareClient) -> None:
    document = {"apiVersion": "flowmesh/v1", "name": "x", "operators": {"a": {"type": "flow.noop"}}}
    await bare.bus.store(subjects.TENANT_SUBMIT, msgspec.json.encode({"v": 1, "run": "plain", "workflow": document}))
    ended = await bare.next("ended")
    assert ended["run"] == "plain"
    assert ended["state"] == "succeeded"
    assert "json" not in ended


async def test_a_json_submission_without_a_run_id_is_named_after_its_bytes(bare: BareClient) -> None:
    document = {"apiVersion": "flowmesh/v1", "name": "x", "operators": {"a": {"type": "flow.noop"}}}
    body = msgspec.json.encode({"workflow": document})
    await bare.bus.store(subjects.TENANT_SUBMIT, body)
    first = await bare.next("ended")
    await bare.bus.store(subjects.TENANT_SUBMIT, body)
    second = await bare.next("ended")
    assert first["run"] == second["run"]
    assert len((await bare.ask("runs")).body) == 1


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"\xc1garbage", "unreadable"),
        (b"", "unreadable"),
        (b"{broken", "not a submission"),
        (b'{"workflow": {}}', "problem"),
        (b'{"workflow": {"apiVersion": "flowmesh/v1", "name": "x", "operators": {"a": {"type": "no.such"}}}}', "no.such"),
        (b'{"workflow": {"name": "x"}, "surprise": 1}', "surprise"),
        (b'{"run": "a.b*c", "workflow": {"name": "x"}}', "not allowed"),
        (
            msgspec.json.encode(
                {"workflow": {**HEAD, "operators": {"a": {"type": "data.load", "inputs": {"file": {"path": "secrets"}}}}}}
            ),
            "path",
        ),
    ],
)
async def test_what_cannot_be_read_is_rejected_with_the_reason(bare: BareClient, body: bytes, complaint: str) -> None:
    await bare.bus.store(subjects.TENANT_SUBMIT, body)
    rejected = await bare.next("rejected")
    assert complaint in str(rejected)
    await nothing_is_left(bare)


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        (Manifest(name="x", operators=[]), "1 to"),
        (Manifest(name="a b", operators=[noop()]), "not allowed"),
        (Manifest(name="x", operators=[noop("*")]), "not allowed"),
        (Manifest(name="x", operators=[noop(), noop()]), "two operators"),
        (Manifest(name="x", operators=[noop(inputs={"after": [Source(op=0, port="out")]})]), "before"),
        (Manifest(name="x", operators=[noop(inputs={"other": [Source(op=-1)]})]), "no input"),
        (Manifest(name="x", operators=[noop(), noop("b", inputs={"after": [Source(op=0, port="nope")]})]), "no output"),
        (Manifest(name="x", operators=[Operator(name="a", type="flow.noop", version=9)]), "version 9"),
        (Manifest(name="x", operators=[Operator(name="a", type="flow.noop", version=1, params={"nonce": -1})]), "nonce"),
        (Manifest(name="x", operators=[Operator(name="a", type="rm.rf", version=1)]), "rm.rf"),
        (Manifest(name="x", operators=[noop(determinism="effect")]), "determinism"),
        (Manifest(name="x", operators=[model("/etc")]), "no model reference"),
    ],
)
async def test_a_manifest_that_no_compiler_wrote_is_rejected(bare: BareClient, manifest: Manifest, complaint: str) -> None:
    await bare.bus.store(subjects.TENANT_SUBMIT, submission(manifest))
    rejected = await bare.next("rejected")
    assert complaint in str(rejected)
    await nothing_is_left(bare)


async def test_a_manifest_whose_inputs_nobody_holds_is_rejected(bare: BareClient) -> None:
    lost = b"nobody has this"
    ref = Ref("value", cid_of(0x55, lost), b"\0" * 32, len(lost))
    await bare.bus.store(
        subjects.TENANT_SUBMIT, submission(Manifest(name="x", operators=[noop(inputs={"after": [Source(ref=ref)]})]))
    )
    assert "not held by the mesh" in str(await bare.next("rejected"))
    await nothing_is_left(bare)


async def test_a_manifest_that_was_not_sent_along_is_rejected(bare: BareClient) -> None:
    await bare.bus.store(subjects.TENANT_SUBMIT, encode(Submit("mine", cid_of(DAG_CBOR, b"away"))))
    assert "manifest" in str(await bare.next("rejected"))
    await nothing_is_left(bare)


async def test_a_missing_model_is_named_with_what_the_nodes_said(client: Mesh) -> None:
    operators = {
        "a": {
            "type": "llm.generate",
            "inputs": {"rows": {"rows": [{"prompt": "hi"}]}},
            "with": {"model": "wheel:no-such-model==1.0"},
        }
    }
    with pytest.raises(UsageError, match="no-such-model") as caught:
        await client.submit({"apiVersion": "flowmesh/v1", "name": "x", "operators": operators})
    assert "node-1" in str(caught.value)
    assert await client.runs() == []


async def test_blocks_that_lie_about_their_codec_are_refused(bare: BareClient) -> None:
    answer = decode(await bare.bus.request(subjects.TENANT_PUT, encode(Put((b"x",), (0x99,)))), Answer)
    assert "codec" in answer.error
    answer = decode(await bare.bus.request(subjects.TENANT_PUT, encode(Put((b"x",), ()))), Answer)
    assert answer.error


async def test_put_tells_what_is_still_missing(bare: BareClient) -> None:
    leaf = b"a leaf"
    root = encode_record(
        Manifest(name="x", operators=[noop(inputs={"after": [Source(ref=Ref("value", cid_of(0x55, leaf), b"", 6))]})])
    )
    cid = cid_of(DAG_CBOR, root)
    answer = decode(await bare.bus.request(subjects.TENANT_PUT, encode(Put((root,), (DAG_CBOR,), cid, True))), Answer)
    assert answer.body == {"missing": [cid_text(cid_of(0x55, leaf))]}
    answer = decode(await bare.bus.request(subjects.TENANT_PUT, encode(Put((leaf,), (0x55,), cid, True))), Answer)
    assert answer.body == {"missing": []}


@pytest.mark.parametrize("what", ["nothing", "run", "lineage", "log"])
async def test_a_question_that_cannot_be_answered_gets_an_error(bare: BareClient, what: str) -> None:
    answer = await bare.ask(what, run="no-such-run", operator="a")
    assert answer.error
    assert answer.hint


async def test_cancelling_what_does_not_exist_does_nothing(bare: BareClient) -> None:
    await bare.bus.store(subjects.TENANT_CANCEL, b'{"run": "no-such-run"}')
    await bare.bus.store(subjects.TENANT_CANCEL, b"\xc1")
    await nothing_is_left(bare)
