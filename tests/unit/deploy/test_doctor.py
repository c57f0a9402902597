"""Every finding of the doctor with the fault that it is for, planted; and a mesh without faults."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from flowmesh_deploy.doctor import checks, local
from flowmesh_deploy.doctor.facts import Facts, Place, Secret, Server
from flowmesh_deploy.doctor.findings import Finding, Severity, worst
from flowmesh_deploy.doctor.start import at_start
from flowmesh_deploy.keyring import Keyring
from flowmesh_deploy.layout import Layout, prepare, read_json, write_json
from flowmesh_mesh import streams
from flowmesh_mesh.credentials import ACCOUNT, Key, issue
from flowmesh_mesh.messages import WIRE_VERSION, NodeRecord, SchedulerBeat
from flowmesh_mesh.stream_api import Replica, StreamCluster, StreamInfo, StreamState

NOW_S = 1_800_000_000.0
DISK = Place("the store of broker", Path("/srv/mesh/broker"), "ext4", 50 << 30, 100 << 30)
RECORD = NodeRecord("n1", "K", 0, ("flow.noop",), "3.11.7", 1.0, 1 << 30, versions={"flowmesh": "0.1.0"}, wire=WIRE_VERSION)


def stream(config: streams.StreamConfig, **changed: object) -> StreamInfo:
    """Return a stream as the broker would tell of it."""
    copies = [Replica("broker-2", True), Replica("broker-3", True)]
    return StreamInfo({**msgspec.to_builtins(config), **changed}, cluster=StreamCluster("broker", copies))


def healthy() -> Facts:
    """Return what a mesh of three brokers and three schedulers without faults looks like."""
    names = ("broker", "broker-2", "broker-3")
    schedulers = [{"scheduler": f"scheduler-{number}", "role": "standby", "same_secret": True} for number in (2, 3)]
    return Facts(
        NOW_S,
        folder=Path("/srv/mesh"),
        replicas=3,
        brokers=3,
        schedulers=3,
        servers=[Server(name, True, "2.15.1", 0.01) for name in names],
        streams={config.name: stream(config) for config in streams.mesh_streams(0, 3)},
        places=[DISK],
        secrets=[Secret(Path("/srv/mesh/private.key"), 0o600)],
        status={"leader": {"id": "scheduler-1"}, "schedulers": schedulers, "nodes": [{"node": "n1", "state": "active"}]},
        beats={"scheduler-1": SchedulerBeat("scheduler-1", 0, "leader", version="0.1.0", wire=WIRE_VERSION)},
        nodes={"n1": RECORD},
        skews_s={"n1": -0.01},
    )


def test_a_mesh_without_faults_has_none() -> None:
    found = checks.examine(healthy())
    assert [finding for finding in found if finding.severity is not Severity.OK] == []
    assert {finding.check for finding in found} == {
        "leader", "nodes", "wire", "versions", "clocks", "sync", "brokers", "broker-versions", "streams", "replicas", "peers",
        "consumers", "stores", "disks", "secrets", "expiry",
    }  # fmt: skip


def _servers(facts: Facts, **changed: object) -> None:
    facts.servers[1] = dataclasses.replace(facts.servers[1], **changed)  # type: ignore[arg-type]


def _stream(facts: Facts, name: str = "LEDGER", **changed: object) -> None:
    info = facts.streams[name]
    assert info is not None
    facts.streams[name] = StreamInfo({**info.config, **changed}, info.state, None, info.cluster)


def _cluster(facts: Facts, cluster: StreamCluster) -> None:
    info = facts.streams["LEDGER"]
    assert info is not None
    facts.streams["LEDGER"] = StreamInfo(info.config, info.state, None, cluster)


def _consumers(facts: Facts, count: int) -> None:
    info = facts.streams["ASSIGN"]
    assert info is not None
    facts.streams["ASSIGN"] = StreamInfo(info.config, StreamState(consumer_count=count), None, info.cluster)


def _place(facts: Facts, **changed: object) -> None:
    facts.places = [dataclasses.replace(DISK, **changed)]  # type: ignore[arg-type]


def _record(facts: Facts, **changed: object) -> None:
    facts.nodes["n2"] = msgspec.structs.replace(RECORD, node="n2", **changed)


def _secret(facts: Facts, mode: int = 0o600, expires_at_s: int = 0) -> None:
    facts.secrets.append(Secret(Path("/srv/mesh/credentials/x.creds"), mode, expires_at_s))


def _one_broker(facts: Facts) -> None:
    facts.replicas = facts.brokers = 1
    facts.servers = [Server("broker", False, "2.15.1")]


OK, WARN, FAIL = Severity.OK, Severity.WARN, Severity.FAIL

PLANTED: list[tuple[str, Callable[[Facts], object], Severity, str, str]] = [
    ("sync", _one_broker, FAIL, "acknowledge before they sync", "sync_interval"),
    ("sync", lambda f: _servers(f, is_synced=False), WARN, "broker-2 acknowledge before they sync", "sync_interval"),
    ("sync", lambda f: f.servers.clear(), WARN, "not known", "--dir"),
    ("brokers", lambda f: f.servers.pop(), WARN, "2 of 3 brokers answer", "flowmesh broker run"),
    ("brokers", lambda f: _servers(f, is_asked=False), WARN, "2 of 3 brokers answer", "flowmesh up"),
    ("brokers", lambda f: (f.servers.pop(), f.servers.pop()), FAIL, "1 of 3 brokers answer", "flowmesh up"),
    ("brokers", lambda f: _servers(f, unhealthy="JetStream stream x is not current"), WARN, "is not current", "log"),
    ("brokers", lambda f: f.silent.update(brokers="refused"), WARN, "not known", "--dir"),
    ("broker-versions", lambda f: _servers(f, version="2.11.6"), FAIL, "nats-server 2.11.6", "pip install"),
    ("broker-versions", lambda f: _servers(f, version="3.0.0"), WARN, "nats-server 3.0.0", "pip install"),
    ("broker-versions", lambda f: _servers(f, version="2.14.9"), WARN, "brokers differ", "newest"),
    ("streams", lambda f: f.streams.update(LEDGER=None), FAIL, "missing: LEDGER", "flowmesh up"),
    ("streams", lambda f: _stream(f, max_msgs_per_subject=5), FAIL, "max_msgs_per_subject is 5, should be 1", "Restart"),
    ("streams", lambda f: f.silent.update(streams="no"), WARN, "not known", "--dir"),
    ("replicas", lambda f: _stream(f, num_replicas=1), FAIL, "LEDGER has 1", "three brokers"),
    ("replicas", lambda f: f.streams.clear(), WARN, "not known", "--dir"),
    ("peers", lambda f: _cluster(f, StreamCluster("broker", [Replica("b2", offline=True)])), WARN, "b2 is offline", "Start b2"),
    ("peers", lambda f: _cluster(f, StreamCluster("broker", [Replica("b2", True, lag=9999)])), WARN, "9999 messages", "b2"),
    ("peers", lambda f: _cluster(f, StreamCluster("broker", [Replica("b2")])), WARN, "not up to date", "Start b2"),
    ("peers", lambda f: _cluster(f, StreamCluster("", [])), FAIL, "no leading copy", "Start the brokers"),
    ("consumers", lambda f: _consumers(f, 16_500), WARN, "16500 of 20000", "nodes"),
    ("consumers", lambda f: _consumers(f, 19_900), FAIL, "19900 of 20000", "nodes"),
    ("leader", lambda f: f.status.clear(), FAIL, "nobody leads", "flowmesh scheduler"),
    ("leader", lambda f: f.status["schedulers"].clear(), WARN, "nobody stands by", "--schedulers 3"),
    ("leader", lambda f: f.status["schedulers"][0].update(same_secret=False), FAIL, "another secret", "secret"),
    ("leader", lambda f: f.silent.update(mesh="refused"), FAIL, "does not answer", "flowmesh up"),
    ("leader", lambda f: f.status.update(warnings=["too few keepers"]), WARN, "too few keepers", "scheduler.md"),
    ("nodes", lambda f: f.status["nodes"].clear(), WARN, "no node is active", "flowmesh-node join"),
    ("nodes", lambda f: f.status["nodes"][0].update(health={"state": "cordoned"}), WARN, "cordoned: n1", "uncordon"),
    ("wire", lambda f: _record(f, wire=0, wire_oldest=0), FAIL, "n2", "Install"),
    ("wire", lambda f: _record(f, wire=99, wire_oldest=99), FAIL, "n2", "Install"),
    ("wire", lambda f: f.status["nodes"].append({"node": "n3", "state": "refused"}), FAIL, "n3", "Install"),
    ("versions", lambda f: _record(f, python="3.10.1"), FAIL, "Python too old: n2 3.10.1", "3.11"),
    ("versions", lambda f: _record(f, python="3.12.1"), WARN, "nodes differ in Python", "one minor"),
    ("versions", lambda f: _record(f, versions={"flowmesh": "0.2.0"}), WARN, "flowmesh differs", "same version"),
    ("clocks", lambda f: f.skews_s.update(n1=-4.0), WARN, "n1 -4.0 s", "chrony"),
    ("clocks", lambda f: _servers(f, skew_s=120.0), FAIL, "broker-2 +120.0 s", "chrony"),
    ("stores", lambda f: _place(f, filesystem="tmpfs"), WARN, "in memory (tmpfs)", "flowmesh up --dir"),
    ("stores", lambda f: _place(f, path=Path("/tmp/mesh")), WARN, "temporary files", "flowmesh up --dir"),
    ("disks", lambda f: _place(f, free_bytes=5 << 30), WARN, "5.0 GiB (5 %) free", "room"),
    ("disks", lambda f: _place(f, free_bytes=1 << 30), FAIL, "1.0 GiB (1 %) free", "room"),
    ("secrets", lambda f: _secret(f, mode=0o640), FAIL, "1 secret files can be read by others", "chmod 600 /srv"),
    ("expiry", lambda f: _secret(f, expires_at_s=int(NOW_S + 86_400)), WARN, "expires in 1.0 days", "flowmesh up"),
    ("expiry", lambda f: _secret(f, expires_at_s=int(NOW_S - 1)), FAIL, "has expired", "flowmesh up"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "plant", "severity", "finding", "mend"), PLANTED)
def test_a_planted_fault_is_found_with_its_reason_and_the_way_to_mend_it(
    check: str, plant: Callable[[Facts], object], severity: Severity, finding: str, mend: str
) -> None:
    facts = healthy()
    plant(facts)
    found = [each for each in checks.examine(facts) if each.check == check and each.severity is not OK]
    assert [each for each in found if each.severity is severity and finding in each.finding and mend in each.mend], found
    assert all(each.why for each in found)


def test_a_full_disk_of_terabytes_is_not_judged_by_its_share_alone() -> None:
    facts = healthy()
    _place(facts, free_bytes=100 << 30, total_bytes=10 << 40)
    assert worst(checks.disks(facts)) is OK


def test_many_copies_behind_are_told_in_a_few_lines() -> None:
    facts = healthy()
    behind = StreamCluster("broker", [Replica("b2", offline=True)])
    facts.streams = {name: StreamInfo(info.config, cluster=behind) for name, info in facts.streams.items() if info is not None}
    found = checks.peers(facts)
    assert len(found) == 4
    assert "7 more" in found[-1].finding


def test_who_has_only_a_context_is_told_what_the_leader_knows() -> None:
    facts = dataclasses.replace(healthy(), folder=None, places=[], servers=[], streams={}, secrets=[])
    assert {finding.check for finding in checks.examine(facts)} == {"leader", "nodes", "wire", "versions", "clocks"}


def test_the_worst_finding_decides() -> None:
    found = [Finding("a", severity, "") for severity in (OK, FAIL, WARN)]
    assert worst(found) is FAIL
    assert worst(found[::2]) is WARN
    assert worst([]) is OK


# --- what lies on this machine


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "m")
    prepare(made, nodes=1, tenants=["team-a"], brokers=3, schedulers=2)
    return made


def test_what_lies_in_the_folder_is_found(layout: Layout) -> None:
    facts = Facts(time.time())
    local.look(facts, layout)
    assert (facts.replicas, facts.brokers, facts.schedulers) == (3, 3, 2)
    names = {str(secret.path.relative_to(layout.folder)) for secret in facts.secrets}
    assert {"private.key", "keys/keyring.json", "keys/cluster.key", "credentials/scheduler.creds", "nodes/node-1.join"} <= names
    assert {place.what for place in facts.places} >= {
        "the store of broker-3",
        "the blocks of scheduler-2",
        "the folder of the nodes",
    }
    assert all(place.filesystem and place.total_bytes for place in facts.places)
    assert worst(checks.secrets(facts)) is OK


def test_a_secret_that_others_can_read_is_found_in_the_folder(layout: Layout) -> None:
    layout.secret.chmod(0o644)
    facts = Facts(time.time())
    local.look(facts, layout)
    assert str(layout.secret) in checks.secrets(facts)[0].mend


def test_credentials_that_end_soon_are_found_in_the_folder(layout: Layout) -> None:
    keyring = Keyring.open(layout.keys, "m")
    signer = Key.new(ACCOUNT)
    issue(signer, "watcher", keyring.system_account, expires_at_s=int(time.time() + 3600)).save(
        layout.credentials / "watcher.creds"
    )
    joined = read_json(layout.join_file("node-1"))
    ended = issue(signer, "node-1", keyring.mesh_account, expires_at_s=int(time.time() - 3600)).text()
    write_json(layout.join_file("node-1"), {**joined, "credentials": ended})
    facts = Facts(time.time())
    local.look(facts, layout)
    assert {(each.finding, each.severity) for each in checks.expiry(facts)} == {
        ("watcher.creds expires in 0.0 days", WARN),
        ("node-1.join has expired", FAIL),
    }


def test_the_configuration_of_a_broker_that_does_not_answer_is_read(layout: Layout) -> None:
    (layout.broker_folder("broker-2") / "broker.conf").write_text("jetstream {\n  sync_interval: 2m\n}\n")
    (layout.broker_folder("broker-3") / "broker.conf").write_text("jetstream {\n  sync_interval: always\n}\n")
    assert [(server.name, server.is_synced) for server in local.configured(layout)] == [("broker-2", False), ("broker-3", True)]


def test_a_mesh_of_one_broker_that_does_not_sync_is_not_started(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "m")
    prepare(layout, nodes=1, tenants=["team-a"])
    assert at_start(layout)[0] is None
    write_json(layout.desired, {**read_json(layout.desired), "sync": "2m"})
    refusal, _ = at_start(layout)
    assert refusal is not None
    assert refusal.check == "sync"


def test_a_mesh_of_three_brokers_that_do_not_sync_is_warned_of(layout: Layout) -> None:
    write_json(layout.desired, {**read_json(layout.desired), "sync": "2m"})
    refusal, warnings = at_start(layout)
    assert refusal is None
    assert "sync" in {warning.check for warning in warnings}


def test_a_store_in_memory_is_recognised() -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.R_OK):
        pytest.skip("this machine has no file system in memory")
    place = local.place_of("x", shared / "not-there")
    assert place is not None
    assert checks.is_temporary(place)
