"""The code of a ``python.call``: read from a file or taken from a live function, and pinned as text."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

from flowmesh_mesh.problems import Place, Problems, nearest

SOURCE_MAX_BYTES = 1024 * 1024


def read_source(path: Path, place: Place, problems: Problems) -> str | None:
    """Return the text of a source file; None when a problem was noted."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        problems.add(place, f"{path.name} is not UTF-8 text", "Save the file as UTF-8.")
        return None
    except OSError as error:
        problems.add(place, f"cannot read {path.name}: {error.strerror}", "Name a Python file that you may read.")
        return None
    return text


def check_source(text: str, file: str, function: str, place: Place, problems: Problems) -> ast.FunctionDef | None:
    """Return the definition of ``function`` in a source; None when it has none that can be checked, problems noted."""
    if len(text.encode()) > SOURCE_MAX_BYTES:
        problems.add(place, f"the source {file} is larger than {SOURCE_MAX_BYTES} bytes", "Keep data out of the source.")
        return None
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line, column = getattr(error, "lineno", 0) or 0, getattr(error, "offset", 0) or 0
        message = f"{file}:{line}:{column} is not Python: {getattr(error, 'msg', error)}"
        problems.add(place, message, "Mend the source.")
        return None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    found = functions.get(function)
    if isinstance(found, ast.AsyncFunctionDef):
        problems.add(place, f"{function} in {file} is an async function", "Write a plain function ('def').")
        return None
    if found is None and function not in _assigned(tree):
        problems.add(place, f"there is no function {function!r} in {file}", nearest(function, functions, "functions"))
    return found


def check_call(function: ast.FunctionDef, names: Iterable[str], place: Place, problems: Problems) -> None:
    """Note input ports and arguments that a function does not take, and parameters that it lacks."""
    spec = function.args
    takes = [argument.arg for argument in (*spec.args, *spec.kwonlyargs)]
    given = set(names)
    if spec.posonlyargs:
        shown = ", ".join(argument.arg for argument in spec.posonlyargs)
        problems.add(place, f"{function.name}() takes {shown} by position only", "Remove the '/': it is called with names.")
        return
    if function.decorator_list:
        return
    if not spec.kwarg:
        for name in sorted(given - set(takes)):
            problems.add(place, f"{function.name}() takes no {name!r}", nearest(name, takes, "parameters of the function"))
    needed = takes[: len(spec.args) - len(spec.defaults)]
    needed += [a.arg for a, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if default is None]
    for name in needed:
        if name not in given:
            hint = f"Connect an input port {name!r}, or add it to 'with: {{args: ...}}'."
            problems.add(place, f"{function.name}() needs {name!r}, which nothing gives", hint)


def check_imports(text: str, path: Path, place: Place, problems: Problems) -> None:
    """Note imports of modules that lie beside a source: only the source itself travels."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # told where the function is looked up
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            top = name.split(".")[0]
            beside = path.parent / f"{top}.py", path.parent / top / "__init__.py"
            if not top or (top not in sys.stdlib_module_names and any(file.is_file() for file in beside)):
                message = f"{path.name} imports {name!r}, which lies beside it and does not travel"
                problems.add(place, message, "Move what it needs into the file, or pin a distribution with 'requires'.")


def _assigned(tree: ast.Module) -> set[str]:
    """Return the names that a module gets otherwise than by a plain 'def' at its top."""
    names: set[str] = set()
    outer = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    for node in (inner for part in outer for inner in ast.walk(part)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names
