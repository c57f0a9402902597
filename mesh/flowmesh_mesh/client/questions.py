"""Questions to the leader: one request, one answer, retried while nobody leads, never past the deadline."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, TypeVar

from flowmesh_cas.errors import (
    ExecutionError,
    FlowmeshError,
    IntegrityError,
    InternalError,
    NotFoundError,
    TransientError,
    UsageError,
)
from flowmesh_mesh import messages, subjects
from flowmesh_mesh.messages import Answer, Ask, decode, encode
from flowmesh_mesh.wire import check_peer

if TYPE_CHECKING:
    import msgspec

    from flowmesh_mesh.bus import Bus

M = TypeVar("M")

ANSWER_TIMEOUT_S = 5.0
"""How long one question waits for its answer before it is asked again."""

DEADLINE_S = 15.0
"""How long a question is repeated while nobody answers: longer than a change of leader."""

_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 1.0

_CLASSES: dict[str, type[FlowmeshError]] = {
    "NotFoundError": NotFoundError,
    "TransientError": TransientError,
    "NoAnswerError": TransientError,
    "UnknownOutcomeError": TransientError,
    "IntegrityError": IntegrityError,
    "ExecutionError": ExecutionError,
    "InternalError": InternalError,
}


def error_of(answer: Answer) -> FlowmeshError:
    """Return the error that an answer stands for; what cannot be told apart counts as usage."""
    return _CLASSES.get(answer.kind, UsageError)(answer.error, hint=answer.hint)


async def exchange(
    bus: Bus,
    subject: str,
    message: msgspec.Struct,
    reply: type[M],
    *,
    deadline_s: float = DEADLINE_S,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> M:
    """Send a request until it is answered; raise TransientError when nobody has answered by the deadline.

    The message must be safe to repeat: an answer may be lost after the leader has acted.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    pause = _BACKOFF_FIRST_S
    payload = encode(message)
    while True:
        left = end - loop.time()
        try:
            data = await bus.request(subject, payload, timeout_s=max(0.05, min(timeout_s, left)))
            return decode(bytes(data), reply)
        except TransientError as error:
            if loop.time() + pause >= end:
                raise TransientError(
                    f"nobody answered {subject} within {deadline_s:g} s: {error.message}",
                    hint="The mesh may be between two leaders, or its scheduler may be down: see `flowmesh up`, then try again.",
                ) from error
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _BACKOFF_MAX_S)


async def ask(
    bus: Bus,
    what: str,
    args: dict[str, Any] | None = None,
    *,
    deadline_s: float = DEADLINE_S,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> Any:
    """Return the body of the leader's answer; raise the error that it names, OutdatedError where the versions do not fit."""
    question = Ask(what, args or {}, messages.WIRE_VERSION, messages.WIRE_OLDEST)
    answer = await exchange(bus, subjects.TENANT_ASK, question, Answer, deadline_s=deadline_s, timeout_s=timeout_s)
    check_peer("this client", "the mesh's leader", answer.wire, answer.wire_oldest)
    if answer.error:
        raise error_of(answer)
    return answer.body
