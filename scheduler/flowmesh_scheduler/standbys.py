"""Standing by: when the lease may be taken, and who else is there.

A standby looks at the lease again and again. It takes what was given back at once, what ran out soon, and the place of a leader
who is no longer connected within a tenth of a second. Where the broker itself was away it lets everybody come back first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowmesh_cas.errors import FlowmeshError, NotFoundError, TransientError, UsageError
from flowmesh_mesh import __version__, messages, subjects, tasks
from flowmesh_mesh.bus import Bus, Delivery, NoAnswerError, Subscription
from flowmesh_mesh.clock import monotonic_s, now_us
from flowmesh_mesh.messages import SchedulerBeat, decode, encode
from flowmesh_scheduler.lease import LEASE_S, Sight, look

log = logging.getLogger("flowmesh.scheduler")

LOOK_S = 0.06
PROBE_S = 0.15
"""A leader that does not answer within this says nothing: its lease decides."""

FRESH_S = 0.15
"""A lease that was taken just now is not doubted: its holder may not listen yet."""

GRACE_S = 1.5
"""A leader whose lease ran out and who still answers may take it again within this."""

SETTLE_S = 2.5
"""After the broker was away, everybody connects anew within this: nobody is missed before."""

BEAT_S = 1.0
ABSENT_S = 3.5
FORGOTTEN_S = 600.0


def digest_of_secret(secret: bytes) -> str:
    """Return what tells whether two schedulers have the same secret, and nothing else of it."""
    return hashlib.sha256(b"flowmesh secret of a mesh\0" + secret).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Vacancy:
    """The lease may be taken over ``seq``. ``last_sign_s`` is the last sign of life of the one who had it, 0: none was seen."""

    seq: int
    why: str
    previous: str = ""
    last_sign_s: float = 0.0


class LeaseWatch:
    """What a standby has seen of the lease."""

    def __init__(self, bus: Bus, secret: str) -> None:
        self._bus = bus
        self._secret = secret
        self._seen = Sight(-1)
        self._since_s = 0.0
        self._quiet_until_s = 0.0
        self.previous = ""
        self.last_sign_s = 0.0

    def disturb(self) -> None:
        """The broker was away."""
        self._quiet_until_s = monotonic_s() + SETTLE_S

    async def turn(self) -> Vacancy | None:
        """Look once; tell whether the lease may be taken. Raise UsageError if its holder has another secret."""
        self._note(await look(self._bus))
        if self._seen.is_released:
            return self._vacancy("it gave the lease back")
        answer = await self._probe()
        if answer:
            self.last_sign_s = monotonic_s()
        why = self._reason(answer)
        if not why:
            return None
        await asyncio.sleep(random.uniform(0.01, 0.05))  # several standbys: one is first, the others see it
        seen = await look(self._bus)
        if seen.seq != self._seen.seq or (self._seen.holder and await self._probe()):
            self._note(seen)
            return None
        return self._vacancy(why)

    def _note(self, seen: Sight) -> None:
        if seen.seq == self._seen.seq and seen.holder == self._seen.holder:
            return
        self._seen, self._since_s = seen, monotonic_s()
        if seen.holder:
            self.previous, self.last_sign_s = seen.holder, self._since_s
            self._check_secret(seen)

    def _check_secret(self, seen: Sight) -> None:
        if seen.secret and seen.secret != self._secret:
            raise UsageError(
                f"this scheduler has another secret than {seen.holder}, who leads",
                hint="All schedulers of a mesh need the same secret: copy the file that scheduler.json names as `secret` "
                "from the machine of the leader, and start again.",
            )

    async def _probe(self) -> bool | None:
        """Ask the leader whether it is alive: True, False if nobody listens, None without an answer."""
        try:
            await self._bus.request(subjects.LEADER_ALIVE, b"", timeout_s=PROBE_S)
        except NoAnswerError:
            return False
        except TransientError:
            return None
        return True

    def _reason(self, answer: bool | None) -> str:
        """Return why the lease may be taken, empty if it may not."""
        now_s = monotonic_s()
        age_s = now_s - self._since_s
        if now_s < self._quiet_until_s:
            return ""
        if not self._seen.holder:
            return "" if answer and age_s < GRACE_S else "its lease ran out" if self.previous else "nobody led"
        if answer is False and age_s > FRESH_S:
            return "its connection ended"
        if not answer and age_s > LEASE_S:
            return "it was silent, and its lease ran out"
        return ""

    def _vacancy(self, why: str) -> Vacancy:
        return Vacancy(self._seen.seq, why, self.previous, self.last_sign_s)


@dataclass(slots=True)
class Seen:
    """A scheduler as others see it."""

    beat: SchedulerBeat
    at_s: float


@dataclass(slots=True)
class Presence:
    """The schedulers of a mesh: each tells the others once a second that it is there."""

    name: str
    secret: str
    role: str = "standby"
    epoch: int = 0
    refused_writes: int = 0
    started_at_us: int = field(default_factory=now_us)
    others: dict[str, Seen] = field(default_factory=dict)
    _heard: Subscription | None = None
    _beating: asyncio.Task[None] | None = None
    _complained: set[str] = field(default_factory=set)

    async def open(self, bus: Bus) -> None:
        """Listen and begin to tell."""
        self._heard = await bus.subscribe(subjects.scheduler_beat("*"), self._on_beat)
        self._beating = asyncio.get_running_loop().create_task(self._beat(bus))

    async def close(self) -> None:
        """Tell nothing more."""
        if self._beating is not None:
            await tasks.end([self._beating])
        if self._heard is not None:
            with contextlib.suppress(FlowmeshError):
                await self._heard.unsubscribe()

    async def _beat(self, bus: Bus) -> None:
        while True:
            if bus.connected:
                with contextlib.suppress(FlowmeshError):
                    bus.post(subjects.scheduler_beat(self.name), encode(self.beat()))
            await asyncio.sleep(BEAT_S)

    def beat(self) -> SchedulerBeat:
        """Return what this scheduler tells of itself."""
        return SchedulerBeat(
            self.name,
            now_us(),
            self.role,
            subjects.hub_of(self.name),
            self.started_at_us,
            self.epoch,
            __version__,
            messages.WIRE_VERSION,
            messages.WIRE_OLDEST,
            memory_bytes(),
            self.secret,
            self.refused_writes,
        )

    def _on_beat(self, delivery: Delivery) -> None:
        try:
            beat = decode(delivery.data, SchedulerBeat)
        except UsageError as error:
            log.warning("on %s: %s", delivery.subject, error)
            return
        if delivery.subject != subjects.scheduler_beat(beat.scheduler):
            return
        if beat.scheduler != self.name:
            self.others[beat.scheduler] = Seen(beat, monotonic_s())
        self._complain(beat)

    def _complain(self, beat: SchedulerBeat) -> None:
        """Say once what is wrong between us and another scheduler."""
        if beat.scheduler == self.name and beat.started_at_us != self.started_at_us:
            text = f"another scheduler is named {self.name} too: give each its own `name` in scheduler.json"
        elif beat.secret and beat.secret != self.secret:
            text = f"{beat.scheduler} has another secret than this scheduler: it cannot stand in for it"
        else:
            return
        if text not in self._complained:
            self._complained.add(text)
            log.error("%s", text)

    def standbys(self) -> list[str]:
        """Return the names of the schedulers that stand by now, with the secret of this mesh."""
        now_s = monotonic_s()
        return sorted(
            name
            for name, seen in self.others.items()
            if now_s - seen.at_s < ABSENT_S and seen.beat.role == "standby" and seen.beat.secret in ("", self.secret)
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return this scheduler and every other for people."""
        now_s = monotonic_s()
        self.others = {name: seen for name, seen in self.others.items() if now_s - seen.at_s < FORGOTTEN_S}
        found = [(self.beat(), 0.0), *((seen.beat, now_s - seen.at_s) for _, seen in sorted(self.others.items()))]
        return [self._row(beat, age_s) for beat, age_s in found]

    def _row(self, beat: SchedulerBeat, age_s: float) -> dict[str, Any]:
        return {
            "scheduler": beat.scheduler,
            "role": beat.role if age_s < ABSENT_S else "silent",
            "seen_ago_s": round(age_s, 3),
            "up_s": round(max(0, beat.at_us - beat.started_at_us) / 1e6, 3),
            "version": beat.version,
            "memory_bytes": beat.memory_bytes,
            "epoch": beat.epoch,
            "refused_writes": beat.refused_writes,
            "same_secret": beat.secret in ("", self.secret),
        }


def memory_bytes() -> int:
    """Return how much memory this process has resident, 0 where that cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


@dataclass(slots=True)
class Highest:
    """The highest epoch and sequence of an epoch record that this scheduler has seen, kept on disk where there is a ``path``.

    Both only grow, also where the broker's store was wiped or a clock was put back.
    """

    path: Path | None = None
    epoch: int = 0
    sequence: int = 0
    _claims: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Highest:
        """Read what was kept; without it everything begins with the clock."""
        try:
            epoch, sequence = map(int, path.read_text().split())
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read, beginning with the clock: %s", path, error)
            return cls(path)
        return cls(path, epoch, sequence)

    def note(self, epoch: int, sequence: int = 0) -> bool:
        """Take notice; tell whether something grew, so that it must be written."""
        before = (self.epoch, self.sequence)
        self.epoch, self.sequence = max(self.epoch, epoch), max(self.sequence, sequence)
        return before != (self.epoch, self.sequence)

    def write(self) -> None:
        """Keep it, durable on return; a full disk costs the memory of it, no leadership."""
        if self.path is None:
            return
        beside = self.path.with_suffix(".new")
        try:
            with beside.open("w") as file:
                file.write(f"{self.epoch} {self.sequence}\n")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            log.warning("the highest epoch is not kept in %s: %s", self.path, error)

    def accepts(self, node: str, epoch: int) -> bool:
        """Tell whether to believe a node that has seen a higher epoch: once a minute each, and nothing from the far future."""
        now_s = monotonic_s()
        if epoch > now_us() // 1000 + _FAR_MS or now_s - self._claims.get(node, -_CLAIM_S) < _CLAIM_S:
            return False
        self._claims[node] = now_s
        return True


_FAR_MS = 10 * 366 * 24 * 3600 * 1000
_CLAIM_S = 60.0


async def read_highest(bus: Bus, highest: Highest) -> bool:
    """Take notice of the epochs that stand in the guarded streams; tell whether something grew."""
    grew = False
    pairs = ((subjects.LEDGER, subjects.LEDGER_EPOCHS), (subjects.ASSIGN, subjects.ASSIGN_EPOCHS))
    for stream, epochs in pairs:
        with contextlib.suppress(TransientError, UsageError, NotFoundError):
            last = await bus.last_message(stream, epochs)
            if last is not None:
                grew = highest.note(decode(last.data, messages.Epoch).epoch, last.seq) or grew
    return grew
