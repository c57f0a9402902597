"""The source of a live function, made to stand alone: its imports, constants and the functions that it calls go with it."""

from __future__ import annotations

import ast
import dis
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from flowmesh_cas.errors import UsageError

_MOVE = "Move it into a file and give 'function=\"code.py:name\"', or hand it over as an argument."


def capture_function(function: Callable[..., Any]) -> str:
    """Return source text that defines ``function`` and everything of its module that it uses.

    Raise UsageError for what cannot be pinned down: lambdas, methods, async and decorated functions, and functions that
    use values which are neither imports, plain constants nor such functions themselves.
    """
    capture = _Capture()
    capture.add(function)
    head = ["from __future__ import annotations", *sorted(capture.imports), *sorted(capture.constants)]
    return "\n".join(head) + "\n\n\n" + "\n\n".join(text for _, text in sorted(capture.functions.items()))


class _Capture:
    """What a function needs, gathered."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.constants: set[str] = set()
        self.functions: dict[str, str] = {}
        self._bound: dict[str, Any] = {}

    def add(self, function: Any) -> None:
        """Add a function and, in turn, what it uses."""
        name = getattr(function, "__name__", repr(function))
        if not isinstance(function, FunctionType):
            raise UsageError(f"{name} is not a plain function", hint=_MOVE)
        if name == "<lambda>":
            raise UsageError("a lambda has no name by which a node could call it", hint="Write it as 'def name(...):'.")
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise UsageError(f"{name} is an async function", hint="Write a plain function ('def').")
        if hasattr(function, "__wrapped__"):
            raise UsageError(f"{name} is decorated", hint=_MOVE)
        try:
            source = textwrap.dedent(inspect.getsource(function))
            tree = ast.parse(source)
        except (OSError, TypeError, SyntaxError) as error:
            raise UsageError(f"the source of {name} cannot be found", hint=_MOVE) from error
        definition = tree.body[0]
        if not isinstance(definition, ast.FunctionDef) or definition.name != name:
            raise UsageError(f"{name} is not defined by a plain 'def'", hint=_MOVE)
        if definition.decorator_list:
            raise UsageError(f"{name} is decorated", hint=_MOVE)
        self.functions[name] = source.rstrip() + "\n"
        known = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
        for used in sorted({*_globals(function.__code__), *function.__code__.co_freevars, *_defaults(definition)}):
            if used in known and used != name:
                self._bind(used, known[used], name)

    def _bind(self, name: str, value: Any, user: str) -> None:
        if name in self._bound:
            if self._bound[name] is not value:
                raise UsageError(f"{user} and a function that it calls mean different things by {name!r}", hint=_MOVE)
            return
        self._bound[name] = value
        if isinstance(value, ModuleType):
            self.imports.add(f"import {value.__name__} as {name}" if value.__name__ != name else f"import {name}")
        elif _is_constant(value):
            self.constants.add(f"{name} = {value!r}")
        elif isinstance(value, FunctionType) and value.__name__ == name and not _is_importable(value):
            self.add(value)
        elif _is_importable(value):
            origin = f"from {value.__module__} import {value.__name__}"
            self.imports.add(origin if value.__name__ == name else f"{origin} as {name}")
        else:
            raise UsageError(f"{user} uses {name!r}, a {type(value).__name__}, which cannot be pinned down", hint=_MOVE)


def _globals(code: CodeType) -> Iterator[str]:
    """Yield the global names that a code object reads, those of inner functions too."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(inner)


def _defaults(definition: ast.FunctionDef) -> Iterator[str]:
    for default in (*definition.args.defaults, *definition.args.kw_defaults):
        if default is not None:
            yield from (node.id for node in ast.walk(default) if isinstance(node, ast.Name))


def _is_constant(value: Any) -> bool:
    """Tell whether a value is plain data that ``repr`` writes out and a node reads back as the same."""
    try:
        json.dumps(value, allow_nan=False)
        return bool(ast.literal_eval(repr(value)) == value)
    except (TypeError, ValueError, SyntaxError, RecursionError):
        return False


def _is_importable(value: Any) -> bool:
    """Tell whether a value comes from an installed package, so that a node can import it by name."""
    import importlib
    import sys

    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return False
    top = sys.modules.get(module.split(".")[0])
    file = getattr(top, "__file__", None)
    is_installed = module.split(".")[0] in sys.stdlib_module_names or (file is not None and "site-packages" in file)
    return is_installed and getattr(importlib.import_module(module), name, None) is value
