"""The ``python.call`` of a document: its code is found, parsed and compared with what it is called with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmesh_mesh.feeds import Given, find_path
from flowmesh_mesh.names import is_identifier
from flowmesh_mesh.problems import Place, Problems, shown
from flowmesh_mesh.source import check_call, check_imports, check_source, read_source
from flowmesh_mesh.substitution import MISSING, is_unicode

if TYPE_CHECKING:
    import ast


class CallReader:
    """Reads calls; each source only once."""

    def __init__(self, problems: Problems, base: Path | None) -> None:
        self._problems = problems
        self._base = base
        self._codes: dict[str, tuple[str, Given]] = {}
        self._called: dict[tuple[str, str], ast.FunctionDef | None] = {}

    def read(self, entry: dict[str, Any], values: dict[str, Any], place: Place) -> tuple[Any, Given | None]:
        """Return the parameters of a call (MISSING with a problem noted) and its code.

        ``values`` are the entry's ``with``, ``inputs`` and ``function`` with references replaced.
        """
        given = values.get("with") or {}
        if given is MISSING or not isinstance(given, dict):
            return given, None
        for name in ("function", "source"):
            if name in given:
                self._problems.add(
                    (*place, "with", name), f"{name!r} does not stand under 'with'", f"Write '{name}:' beside 'type:'.", key=True
                )
        if "function" not in entry:
            self._problems.add(place, "python.call has no function", "Add 'function: \"code.py:name\"'.")
            return MISSING, None
        text = values["function"]
        if text is MISSING:
            return MISSING, None
        found = self._code(text, entry.get("source"), place)
        if found is None:
            return MISSING, None
        function, code, definition = found
        self._check_names(given, values.get("inputs"), definition, place)
        python = given.get("python") or f"{sys.version_info[0]}.{sys.version_info[1]}"
        return {**given, "function": function, "python": python}, code

    def _check_names(self, given: dict[str, Any], inputs: Any, definition: ast.FunctionDef | None, place: Place) -> None:
        ports = list(inputs) if isinstance(inputs, dict) else []
        arguments = list(given["args"]) if isinstance(given.get("args"), dict) else []
        for name in sorted(set(ports) & set(arguments)):
            self._problems.add((*place, "with", "args", name), f"{name!r} is an input port too", "Rename one of them.", key=True)
        if definition is not None:
            check_call(definition, [*ports, *arguments], (*place, "function"), self._problems)

    def _code(self, text: Any, source: Any, place: Place) -> tuple[str, Given, ast.FunctionDef | None] | None:
        at = (*place, "function")
        file, _, function = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        if not is_identifier(function) or bool(file) == (source is not None):
            if source is not None:
                self._problems.add(at, f"function must name a function of 'source', not {shown(text)}", "Write 'function: name'.")
            else:
                self._problems.add(
                    at, f"function must be 'file.py:name', not {shown(text)}", "Write 'function: \"code.py:name\"'."
                )
            return None
        if source is not None and (not isinstance(source, str) or not is_unicode(source)):
            self._problems.add(
                (*place, "source"), f"source must be text, not {shown(source)}", "Write 'source: |' and the code below."
            )
            return None
        key = file or "\0" + str(source)
        if key not in self._codes:
            read = self._file(file, at) if source is None else source
            if read is None:
                return None
            self._codes[key] = read, Given("file", "source", read, at)
        read, code = self._codes[key]
        if (key, function) not in self._called:
            self._called[key, function] = check_source(read, file or "source", function, at, self._problems)
        return function, code, self._called[key, function]

    def _file(self, file: str, place: Place) -> str | None:
        path = find_path(file, self._base, place, self._problems)
        text = None if path is None else read_source(path, place, self._problems)
        if path is not None and text is not None:
            check_imports(text, path, place, self._problems)
        return text
