"""The reference of operator types, made from the catalog: ``python -m flowmesh_mesh.reference`` writes docs/operators.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from flowmesh_mesh.catalog import CATALOG, OperatorType, Params, Port

REFERENCE_FILE = "docs/operators.md"
_HEAD = """# Operators

Made from the catalog by `python -m flowmesh_mesh.reference`; do not edit. How to write them into a workflow stands in
[workflows.md](workflows.md).

Ports carry `rows` (a table, as JSON lines), a `value` (any JSON), a `file` or a `folder`. **Determinism** says when a
result may stand for another run: `pure` and `seeded` results are shared, `effect` never is. **Shards**: whether `shards: N` (or
`auto`) may cut the operator.
"""


def reference_text() -> str:
    """Return the page as it is published."""
    return "\n".join([_HEAD, *(line for name in sorted(CATALOG) for line in _type(CATALOG[name]))]).rstrip() + "\n"


def _type(kind: OperatorType) -> Iterator[str]:
    determinism = "by its parameters" if callable(kind.determinism) else kind.determinism
    yield f"## {kind.name}\n"
    yield f"{kind.doc} {_sentence(kind.params)}\n"
    yield f"Determinism: {determinism}. Shards: {'yes' if kind.shards_by else 'no'}.\n"
    yield "| port | | kind | |"
    yield "|---|---|---|---|"
    for name, port in kind.inputs.items():
        yield _port("in", name, port)
    if kind.open_inputs:
        yield f"| any name | in | {kind.open_inputs} | names are the author's |"
    for name, port in kind.outputs.items():
        yield _port("out", name, port)
    yield ""
    fields = msgspec.structs.fields(kind.params)
    if fields:
        yield "| parameter | type | default |"
        yield "|---|---|---|"
        yield from (_field(field) for field in fields if (kind.name, field.name) != ("python.call", "function"))
        yield ""


def _port(direction: str, name: str, port: Port) -> str:
    notes = [port.doc, "" if port.required or direction == "out" else "optional", "" if port.is_many else "one source"]
    kind = "rows or value" if port.kind == "any" else port.kind
    return f"| `{name}` | {direction} | {kind} | {'; '.join(note for note in notes if note)} |"


def _field(field: msgspec.structs.FieldInfo) -> str:
    default = "required" if field.required else f"`{_default(field)}`"
    return f"| `{field.name}` | {_words(inspect.type_info(field.type))} | {default} |"


def _default(field: msgspec.structs.FieldInfo) -> str:
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return msgspec.json.encode(value).decode()


def _words(info: Any) -> str:
    """Return a type as people say it."""
    if isinstance(info, inspect.LiteralType):
        return " or ".join(f"`{value}`" for value in info.values)
    if isinstance(info, inspect.VarTupleType):
        return f"list of {_words(info.item_type)}"
    if isinstance(info, inspect.DictType):
        return f"mapping to {_words(info.value_type)}"
    if isinstance(info, inspect.StructType):
        fields = (f"`{field.name}` ({_words(field.type)})" for field in info.fields)
        return f"{{{', '.join(fields)}}}"
    words = {"IntType": "integer", "FloatType": "number", "StrType": "text", "BoolType": "true or false", "AnyType": "any JSON"}
    return words[type(info).__name__] + _bounds(info)


def _bounds(info: Any) -> str:
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    found = [f"{word} {getattr(info, key)}" for key, word in words.items() if getattr(info, key, None) is not None]
    return " " + " ".join(found) if found else ""


def _sentence(params: type[Params]) -> str:
    return " ".join((params.__doc__ or "").replace("``", "`").replace("|", "\\|").split())


def main(arguments: list[str]) -> int:
    """Write the page to a file (default: where it is published, from the repository's root) or, with ``-``, to the output."""
    target = arguments[0] if arguments else REFERENCE_FILE
    if target == "-":
        sys.stdout.write(reference_text())
    else:
        Path(target).write_text(reference_text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
