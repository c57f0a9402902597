"""The checker: a pure function from a history to its violations.

Five kinds, each a promise of the README that would be broken:

- *lost* (P1): a run that was accepted has no end in the ledger, or an end without a reason or an actor;
- *doubled* (P2): two results under one key and generation, two ends of one run, an effect that took place more often than
  attempts explain;
- *stale* (P3): a write of a deposed leader was stored after the epoch record of its successor, or a node began work of an epoch
  below one that it had seen;
- *wrong* (P7): a run told to have succeeded whose results cannot be had or are not what they must be, a failure that nothing
  explains, a cancelled run that nobody cancelled, or two different ends told of one run;
- *died*: a process ended that nobody ended.

What nobody can know (a submission whose answer was lost) is counted as unknown, not as a violation: but once the ledger shows
that it was accepted, it must end like any other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from chaos.history import (
    Begun,
    CancelAsked,
    Complaint,
    Died,
    Executed,
    Fault,
    History,
    Issued,
    LedgerAcceptance,
    LedgerCancellation,
    LedgerEnd,
    Reported,
    Stored,
    Submitted,
    Told,
    Verified,
    Wiped,
)

LOST, DOUBLED, STALE, WRONG, DIED = "lost", "doubled", "stale", "wrong", "died"
KINDS = (LOST, DOUBLED, STALE, WRONG, DIED)
STATES = ("succeeded", "failed", "cancelled", "rejected")

EXPLAINED = frozenset({"node-lost", "preempted", "lease-expired", "poison"})
"""Reasons of a failure that faults on nodes may bring about, although the work itself is sound."""

NODE_FAULTS = ("node-", "cut", "hole", "swallow", "half-open", "power-loss", "disk-full", "brokers-", "slow")
_ONCE = ("result", "accepted", "ended", "cancelled")


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise: its kind, what it is about, and what was seen."""

    kind: str
    subject: str
    what: str


@dataclass(slots=True)
class Verdict:
    """What a history amounts to: violations, and counts of everything else by name."""

    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def of(self, kind: str) -> list[Violation]:
        """Return the violations of one kind."""
        return [violation for violation in self.violations if violation.kind == kind]


def check(history: History) -> Verdict:
    """Return every violation in a history, and what else there is to count."""
    verdict = Verdict()
    for part in (_lost, _doubled, _effects, _stale_writes, _stale_work, _wrong, _died):
        verdict.violations += part(history)
    verdict.counts = _counts(history)
    return verdict


def state_of(reason: str) -> str:
    """Return the state of a run whose end has this reason."""
    return reason if reason in ("succeeded", "cancelled", "rejected") else "failed"


# --- lost ------------------------------------------------------------------------------------------------------------


def _lost(history: History) -> Iterator[Violation]:
    ends = {entry.run: entry for entry in history.of(LedgerEnd)}
    in_ledger = {entry.run for entry in history.of(LedgerAcceptance)}
    yield from _too_soon(history)
    told = {entry.run for entry in history.of(Told) if entry.what == "accepted"}
    for run in sorted(told - in_ledger):
        yield Violation(LOST, run, "the client was told that it is accepted; the ledger does not know it")
    for run in sorted((told | in_ledger) - ends.keys()):
        yield Violation(LOST, run, "accepted, and never ended")
    for run, end in sorted(ends.items()):
        if not end.reason or not end.actor:
            yield Violation(LOST, run, f"ended without saying why and by whom (reason {end.reason!r}, actor {end.actor!r})")


def _too_soon(history: History) -> Iterator[Violation]:
    """Yield what clients were told before the ledger showed it: had the leader died then, nobody would have known."""
    shown: dict[str, int] = {}
    for stored in history.of(Stored):
        if stored.kind == "accepted":
            shown.setdefault(stored.subject.rpartition(".")[2], stored.at_us)
    for entry in history.of(Told):
        if entry.what == "accepted" and entry.at_us < shown.get(entry.run, 0):
            early_s = (shown[entry.run] - entry.at_us) / 1e6
            yield Violation(
                LOST, entry.run, f"the client was told that it is accepted {early_s:.3f} s before the ledger showed it"
            )


# --- doubled ---------------------------------------------------------------------------------------------------------


def _doubled(history: History) -> Iterator[Violation]:
    wiped = [entry.at_us for entry in history.of(Wiped)]
    seen: dict[tuple[str, int], Stored] = {}
    for entry in history.of(Stored):
        if entry.stream != "LEDGER" or entry.kind not in _ONCE:
            continue
        key = (entry.subject, sum(at_us <= entry.at_us for at_us in wiped))
        first = seen.setdefault(key, entry)
        if first.seq != entry.seq:
            yield Violation(DOUBLED, entry.subject, f"stored at {first.seq} and again at {entry.seq}")


def _effects(history: History) -> Iterator[Violation]:
    executed = Counter(entry.token for entry in history.of(Executed))
    submitted = {entry.token: entry for entry in history.of(Submitted) if entry.token}
    issued: dict[str, set[tuple[str, int, int]]] = defaultdict(set)
    for each in history.of(Issued):
        issued[each.name].add((each.key, each.generation, each.attempt))
    numbered = {(entry.run, entry.name): entry.attempt for entry in history.of(Reported)}
    for token, times in sorted(executed.items()):
        submission = submitted.get(token)
        if submission is None:
            yield Violation(DOUBLED, token, f"an effect of no submission took place {times} times")
            continue
        allowed = max(len(issued[submission.operator]), numbered.get((submission.run, submission.operator), 0))
        if times > allowed:
            yield Violation(DOUBLED, submission.run, f"its effect took place {times} times; {allowed} attempts were issued")


# --- stale -----------------------------------------------------------------------------------------------------------


def _stale_writes(history: History) -> Iterator[Violation]:
    streams: dict[str, dict[int, Stored]] = defaultdict(dict)
    for entry in history.of(Stored):
        streams[entry.stream][entry.seq] = entry
    for stream, entries in sorted(streams.items()):
        record: Stored | None = None
        for seq in sorted(entries):
            entry = entries[seq]
            if entry.kind == "epoch":
                if record is not None and entry.epoch <= record.epoch:
                    yield Violation(STALE, f"{stream} {seq}", f"epoch {entry.epoch} was stored after epoch {record.epoch}")
                record = entry
            elif record is not None and (fault := _stale(entry, record)):
                yield Violation(STALE, f"{stream} {seq}", f"{entry.subject}: {fault}")


def _stale(entry: Stored, record: Stored) -> str:
    """Return why a write must not stand behind the epoch record ``record``, empty where it may."""
    if not entry.fence:
        return "it named no epoch record"
    if 0 < entry.fence < record.seq:
        return f"it named the epoch record at {entry.fence}; epoch {record.epoch} had been stored at {record.seq}"
    if entry.kind == "assignment" and entry.epoch < record.epoch:
        return f"it carries epoch {entry.epoch}; epoch {record.epoch} had been stored at {record.seq}"
    return ""


def _stale_work(history: History) -> Iterator[Violation]:
    highest: dict[str, int] = {}
    for entry in history.of(Begun):
        seen = max(entry.highest, highest.get(entry.node, 0))
        if entry.epoch < seen:
            yield Violation(STALE, entry.assignment, f"{entry.node} began it under epoch {entry.epoch}, having seen {seen}")
        highest[entry.node] = max(seen, entry.epoch)


# --- wrong -----------------------------------------------------------------------------------------------------------


def _wrong(history: History) -> Iterator[Violation]:
    ends = {entry.run: entry for entry in history.of(LedgerEnd)}
    cancellations = {entry.run: entry for entry in history.of(LedgerCancellation)}
    asked = {entry.run for entry in history.of(CancelAsked)}
    verified = _last_verified(history)
    has_lost_nodes = any(fault.kind.startswith(NODE_FAULTS) for fault in history.of(Fault))
    reasons: dict[str, set[str]] = defaultdict(set)
    for row in history.of(Reported):
        reasons[row.run].add(row.reason)
    for submission in history.of(Submitted):
        end = ends.get(submission.run)
        if end is not None:
            fault = _fault(submission, end, reasons[submission.run], has_lost_nodes, submission.run in asked)
            if fault:
                yield Violation(WRONG, submission.run, f"{submission.kind}: {fault}")
            yield from _unverified(submission, end, verified.get(submission.run))
    for run, cancellation in sorted(cancellations.items()):
        end = ends.get(run)
        if end is not None and end.reason == "succeeded" and cancellation.seq < end.seq:
            yield Violation(WRONG, run, "it was cancelled, and succeeded after that")
    yield from _told_otherwise(history, ends)


def _last_verified(history: History) -> dict[str, Verified]:
    """Return the last look at each run's results; one wrong value is never made good by a later look."""
    found: dict[str, Verified] = {}
    for entry in history.of(Verified):
        before = found.get(entry.run)
        if before is None or before.is_right or not before.detail.startswith("value"):
            found[entry.run] = entry
    return found


def _fault(submission: Submitted, end: LedgerEnd, reasons: set[str], has_lost_nodes: bool, was_asked: bool) -> str:
    """Return what is wrong with how a run ended, empty where nothing is."""
    state = state_of(end.reason)
    if state == "cancelled":
        return "" if was_asked else f"cancelled by {end.actor!r}; nobody had asked for it"
    if submission.expected == "succeeded" and state == "succeeded":
        return ""
    if submission.expected == "failed" and state == "failed" and submission.reason in {end.reason, *reasons}:
        return ""
    if state == "failed" and ({end.reason} | (reasons & EXPLAINED)) & EXPLAINED and has_lost_nodes:
        return ""
    return f"ended as {state} ({end.reason}, by {end.actor}), expected was {submission.expected} {submission.reason}".rstrip()


def _unverified(submission: Submitted, end: LedgerEnd, verified: Verified | None) -> Iterator[Violation]:
    if end.reason != "succeeded":
        return
    if verified is None:
        yield Violation(WRONG, submission.run, f"{submission.kind}: succeeded, and nobody could verify its result")
    elif not verified.is_right:
        yield Violation(WRONG, submission.run, f"{submission.kind}: succeeded, but {verified.detail}")


def _told_otherwise(history: History, ends: dict[str, LedgerEnd]) -> Iterator[Violation]:
    for entry in history.of(Told):
        if entry.what not in STATES:
            continue
        end = ends.get(entry.run)
        if entry.what == "rejected":
            if end is not None:
                yield Violation(WRONG, entry.run, f"the client was told that it is rejected; the ledger says {end.reason}")
        elif end is not None and (entry.what, entry.reason) != (state_of(end.reason), end.reason):
            yield Violation(
                WRONG,
                entry.run,
                f"the client was told {entry.what} ({entry.reason}); the ledger says {end.reason} by {end.actor}",
            )
        elif end is None:
            yield Violation(WRONG, entry.run, f"the client was told that it {entry.what}; the ledger knows no end")


# --- died, counts ----------------------------------------------------------------------------------------------------


def _died(history: History) -> Iterator[Violation]:
    for entry in history.of(Died):
        yield Violation(DIED, entry.process, f"ended by itself with status {entry.status}")


def _counts(history: History) -> Counter[str]:
    in_ledger = {entry.run for entry in history.of(LedgerAcceptance)}
    told = {entry.run for entry in history.of(Told) if entry.what == "accepted"}
    submitted = {entry.run for entry in history.of(Submitted)}
    rejected = {entry.run for entry in history.of(Told) if entry.what == "rejected"}
    counts: Counter[str] = Counter(
        submitted=len(submitted),
        accepted=len(in_ledger),
        rejected=len(rejected),
        unknown=len(submitted - told - rejected),
        unknown_accepted=len((submitted - told) & in_ledger),
        verified=sum(entry.is_right for entry in _last_verified(history).values()),
        effects=len(history.of(Executed)),
        writes=len({(entry.stream, entry.seq) for entry in history.of(Stored)}),
        epochs=len({entry.seq for entry in history.of(Stored) if entry.kind == "epoch" and entry.stream == "LEDGER"}),
        begun=len(history.of(Begun)),
    )
    for complaint in history.of(Complaint):
        counts[f"complaint {complaint.text[:100]}"] += 1
    for end in history.of(LedgerEnd):
        counts[f"ended {end.reason}"] += 1
    for fault in history.of(Fault):
        counts[f"fault {fault.kind}"] += 1
    for submission in history.of(Submitted):
        counts[f"kind {submission.kind}"] += 1
    return counts
