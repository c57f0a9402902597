"""The process of one user function: ``python -m flowmesh_node.function FOLDER``.

It reads ``request.json`` of the folder, calls the function, and leaves ``result`` and then ``status.json`` there. Its
standard output belongs to the user. It imports little, because it starts for every call.
"""

from __future__ import annotations

import contextlib
import ctypes
import linecache
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

SOURCE_NAME = "<python.call>"
TRACEBACK_FRAMES = 20
_PR_SET_PDEATHSIG = 1
_FILE_MAX_BYTES = 16 * 2**30


class GivenInput(msgspec.Struct, frozen=True):
    """One content of a port."""

    kind: str
    path: str


class Request(msgspec.Struct, frozen=True):
    """What to call, with what; ``data_limit_bytes`` 0 means none."""

    function: str
    args: dict[str, Any]
    inputs: dict[str, list[GivenInput]]
    returns: str
    requires: tuple[str, ...] = ()
    python: str = ""
    data_limit_bytes: int = 0
    parent: int = 0


class Status(msgspec.Struct, frozen=True):
    """How it went: an empty ``reason`` is success."""

    reason: str = ""
    error: str = ""
    rows: int = -1


class _Refusal(Exception):
    """What to tell the author, without a traceback of ours."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def restrict(request: Request) -> None:
    """Set limits that the watching process cannot: no core files, memory that cannot be had, death with the parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != request.parent:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_MAX_BYTES, _FILE_MAX_BYTES))
    if request.data_limit_bytes:
        # A backstop for one big allocation between two looks at the resident size.
        resource.setrlimit(resource.RLIMIT_DATA, (request.data_limit_bytes, request.data_limit_bytes))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(folder: Path) -> None:
    """Call the function and write how it went."""
    request = msgspec.json.decode((folder / "request.json").read_bytes(), type=Request)
    restrict(request)
    try:
        status = _call(request, folder)
    except _Refusal as refusal:
        status = Status(refusal.reason, str(refusal))
    except MemoryError:
        status = Status("oom", "MemoryError: the function asked for more memory than it may have")
    except SystemExit as exit_:
        status = Status("crashed", f"the function called sys.exit({exit_.code!r}) instead of returning")
    except BaseException as error:
        status = Status("user-error", _traceback_of(error))
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    (folder / "status.part").write_bytes(msgspec.json.encode(status))
    (folder / "status.part").rename(folder / "status.json")
    # Threads of the function's and its atexit handlers have no say any more.
    os._exit(0)


def _call(request: Request, folder: Path) -> Status:
    _check_surroundings(request)
    function = _function(request.function, (folder.parent / "code.py").read_text())
    arguments = {port: _argument(contents) for port, contents in request.inputs.items()}
    both = sorted(arguments.keys() & request.args.keys())
    if both:
        raise _Refusal("user-error", f"{both[0]!r} is both an input port and an entry of 'args'")
    returned = function(**arguments, **request.args)
    if request.returns == "rows":
        return Status(rows=_write_rows(returned, folder / "result"))
    (folder / "result").write_bytes(_json(returned, "what the function returned"))
    return Status()


def _check_surroundings(request: Request) -> None:
    have = f"{sys.version_info.major}.{sys.version_info.minor}"
    if request.python and have != ".".join(request.python.split(".")[:2]):
        raise _Refusal("unsatisfiable", f"this node runs Python {have}, the function wants {request.python}")
    if not request.requires:
        return
    from importlib import metadata

    for requirement in request.requires:
        name, _, version = (part.strip() for part in requirement.partition("=="))
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise _Refusal("unsatisfiable", f"this node has no {name}, the function requires {requirement}") from None
        if version and installed != version:
            raise _Refusal("unsatisfiable", f"this node has {name} {installed}, the function requires {requirement}")


def _function(name: str, source: str) -> Callable[..., Any]:
    linecache.cache[SOURCE_NAME] = (len(source), None, source.splitlines(keepends=True), SOURCE_NAME)
    module = type(sys)("flowmesh_function")
    module.__file__ = SOURCE_NAME
    sys.modules["flowmesh_function"] = module
    exec(compile(source, SOURCE_NAME, "exec"), module.__dict__)
    function = module.__dict__.get(name)
    if not callable(function):
        known = ", ".join(sorted(key for key, value in module.__dict__.items() if callable(value) and not key.startswith("_")))
        raise _Refusal("user-error", f"the source defines no function {name!r}; it has {known or 'none'}")
    return function  # type: ignore[no-any-return]


def _argument(contents: list[GivenInput]) -> Any:
    """Return what the function sees of a port: its rows, or its value or path, or the list of several."""
    if contents and all(each.kind == "rows" for each in contents):
        return [msgspec.json.decode(line) for each in contents for line in Path(each.path).read_bytes().splitlines() if line]
    read = [msgspec.json.decode(Path(each.path).read_bytes()) if each.kind == "value" else each.path for each in contents]
    return read[0] if len(read) == 1 else read


def _json(value: Any, what: str) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _Refusal("user-error", f"{what} cannot be written as JSON: {error}") from None


def _write_rows(returned: Any, path: Path) -> int:
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes, dict)):
        raise _Refusal("user-error", f"the function must return rows (dicts), not {type(returned).__name__}")
    count = 0
    with path.open("wb") as file:
        for row in returned:
            if not isinstance(row, dict):
                raise _Refusal("user-error", f"row {count} is not a dict but {type(row).__name__}")
            file.write(_json(row, f"row {count}") + b"\n")
            count += 1
    return count


def _traceback_of(error: BaseException) -> str:
    """Return the traceback as the user would see it: from the first line of their source on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != SOURCE_NAME:
        frames = frames.tb_next
    shown = traceback.format_exception(type(error), error, frames, limit=-TRACEBACK_FRAMES)
    return "".join(shown)[-8000:].strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
