"""What must be true at the end of the demo; its exit code is 0 only if all of it is."""

from __future__ import annotations

from dataclasses import dataclass

from demo.story import Evidence, Kill


@dataclass(frozen=True, slots=True)
class Check:
    """One statement, whether it holds, and the figures behind it."""

    text: str
    is_true: bool
    figures: str


def rewards(evidence: Evidence) -> tuple[float, float]:
    """Return the mean rewards before and after training."""
    rows = evidence.comparison
    count = max(1, len(rows))
    return sum(row["reward_before"] for row in rows) / count, sum(row["reward_after"] for row in rows) / count


def check(evidence: Evidence, *, is_killing: bool = True) -> list[Check]:
    """Return every check."""
    found = [
        _both_came_to_results(evidence),
        _exactly_the_overlap_was_shared(evidence),
        _lineage_is_whole(evidence),
        _rewards_rose(evidence),
    ]
    if is_killing:
        found[2:2] = [_kill_hit_running_work(evidence), _only_work_in_flight_was_repeated(evidence)]
    return found


def _both_came_to_results(evidence: Evidence) -> Check:
    states = {tenant: ended.state for tenant, ended in evidence.ended.items()}
    undone = [row["name"] for ended in evidence.ended.values() for row in ended.rows if row["state"] != "done"]
    is_true = list(states.values()) == ["succeeded", "succeeded"] and not undone
    return Check(
        "both runs came to their results", is_true, ", ".join(f"{tenant} {state}" for tenant, state in sorted(states.items()))
    )


def _exactly_the_overlap_was_shared(evidence: Evidence) -> Check:
    shared = sum(bool(row["shared"]) for ended in evidence.ended.values() for row in ended.rows)
    keys = {row["key"] for ended in evidence.ended.values() for row in ended.rows}
    is_true = shared == evidence.overlap.shared and len(keys) == evidence.overlap.distinct
    figures = f"{shared} shared of {evidence.overlap.shared} in common, {len(keys)} distinct of {evidence.overlap.distinct}"
    return Check("exactly the operators that the documents have in common were shared", is_true, figures)


def _kill_hit_running_work(evidence: Evidence) -> Check:
    kill = evidence.kill
    figures = f"{len(kill.running)} on {kill.node}" if kill else "no node was killed"
    return Check("the killed node was running work", kill is not None and bool(kill.running), figures)


def repeated(evidence: Evidence, kill: Kill) -> dict[str, float]:
    """Return the operators that ran again because of the kill, with the seconds that running them again took."""
    seconds: dict[str, float] = {}
    for ended in evidence.ended.values():
        for row, seen in zip(ended.rows, ended.seen, strict=True):
            if kill.node in seen.nodes[:-1] and row["node"] != kill.node and not row["shared"]:
                seconds[str(row["name"])] = (int(row["exec_us"] or 0) + int(row["load_us"] or 0)) / 1e6
    return seconds


def _only_work_in_flight_was_repeated(evidence: Evidence) -> Check:
    text = "only what it had in flight was run again"
    kill = evidence.kill
    if kill is None:
        return Check(text, False, "no node was killed")
    again = repeated(evidence, kill)
    late, needless = [], []
    for ended in evidence.ended.values():
        for row, seen in zip(ended.rows, ended.seen, strict=True):
            if kill.node in seen.nodes[:-1] and (ended.tenant, row["name"]) in kill.done_before:
                late.append(row["name"])
            if len(seen.nodes) > 1 and kill.node not in seen.nodes:
                needless.append(row["name"])
    figures = f"{len(kill.running)} in flight, {len(again)} run again, {len(late)} done ones and {len(needless)} others repeated"
    return Check(text, not late and not needless, figures)


def _lineage_is_whole(evidence: Evidence) -> Check:
    lineage = evidence.lineage
    if lineage is None:
        return Check("the adapter's lineage leads back to the questions and the model", False, "there is no adapter")
    needed = {"data.load", "llm.generate", "reward.score", "data.sql", "train.dpo"}
    is_true = (
        needed <= lineage.types()
        and bool(lineage.inputs)
        and bool(lineage.models)
        and lineage.verified == len(lineage.records) - lineage.unreachable
    )
    counts = f"{len(lineage.records)} records, {lineage.verified} receipts verified, {lineage.unreachable} out of reach"
    figures = f"{counts}, {len(lineage.inputs)} given inputs, {len(lineage.models)} models"
    return Check("the adapter's lineage leads back to the questions and the model", is_true, figures)


def _rewards_rose(evidence: Evidence) -> Check:
    before, after = rewards(evidence)
    return Check(
        "training raised the mean reward",
        bool(evidence.comparison) and after > before,
        f"{before:+.3f} before, {after:+.3f} after",
    )
