"""The one tree of errors: the class of an error decides what is done about it.

It lives in the lowest layer so that every component can raise from it; third-party errors are
chained (``raise ... from``), never leaked.
"""

from __future__ import annotations


class FlowmeshError(Exception):
    """Base of all. ``hint`` tells how to mend it, in one imperative sentence.

    ``exit_code`` is what the command line returns for the class (docs/cli.md).
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(FlowmeshError):
    """The caller's fault; never retried."""

    exit_code = 2


class NotFoundError(UsageError):
    """What was named does not exist, or is not this tenant's."""

    exit_code = 4


class TransientError(FlowmeshError):
    """May go away by itself. ``retry_after_s`` says when to try again, in seconds."""

    exit_code = 5

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class FencedError(FlowmeshError):
    """Authority is lost (a newer epoch exists): stop, never retry."""

    exit_code = 6


class IntegrityError(FlowmeshError):
    """Bytes are not what their name says: quarantine the source, ask another."""

    exit_code = 7


class ExecutionError(FlowmeshError):
    """The operator failed. ``reason`` is a reason code of :class:`flowmesh_mesh.messages.Reason`."""

    exit_code = 3

    def __init__(self, message: str, *, reason: str = "user-error", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class InternalError(FlowmeshError):
    """Our bug: crash loudly."""

    exit_code = 70
