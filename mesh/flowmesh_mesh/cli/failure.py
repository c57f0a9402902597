"""From an error to what a person reads and a script gets: message, place, hint, exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from flowmesh_cas.errors import FlowmeshError

INTERRUPTED = 130
INTERNAL = 70
DEBUG = "FLOWMESH_DEBUG"


def boundary(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``command`` with every error turned into a message on stderr and its exit code.

    With ``--json`` the error is also the one JSON document on stdout. FLOWMESH_DEBUG=1 shows tracebacks instead.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **options: Any) -> Any:
        is_json = bool(options.get("as_json"))
        try:
            result = command(*args, **options)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `flowmesh ls | head` is no failure
            raise typer.Exit(0) from None
        except FlowmeshError as error:
            if os.environ.get(DEBUG) == "1":
                raise
            fail(error, is_json=is_json)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if os.environ.get(DEBUG) == "1" or _is_usage(error):
                raise
            _fail_internal(error, is_json=is_json)

    return guarded


def _is_usage(error: Exception) -> bool:
    """Tell whether this is the command line library's own report of a wrong option."""
    return isinstance(error, typer.BadParameter)


def plain_error(error: FlowmeshError) -> dict[str, Any]:
    """Return an error as the JSON document that scripts read."""
    plain: dict[str, Any] = {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    reason = getattr(error, "reason", "")
    if reason:
        plain["reason"] = str(reason)
    problems = getattr(error, "problems", None)
    if problems:
        names = ("file", "path", "line", "column", "message", "hint")
        plain["problems"] = [{name: getattr(problem, name) for name in names} for problem in problems]
    return plain


def fail(error: FlowmeshError, *, is_json: bool) -> NoReturn:
    """Print an error and leave with its exit code."""
    problems = getattr(error, "problems", None)
    if problems:
        from flowmesh_mesh.problems import render_problems

        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        print(f"error: {count} in the workflow\n{render_problems(problems)}", file=sys.stderr)
    else:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
    if is_json:
        import json

        print(json.dumps({"error": plain_error(error)}, ensure_ascii=False))
    raise typer.Exit(error.exit_code) from None


def _fail_internal(error: Exception, *, is_json: bool) -> NoReturn:
    from flowmesh_cas.errors import InternalError

    text = f"{type(error).__name__}: {error}".strip()
    fail(
        InternalError(f"internal error: {text}", hint=f"This is a fault of FlowMesh: repeat with {DEBUG}=1 and report it."),
        is_json=is_json,
    )
