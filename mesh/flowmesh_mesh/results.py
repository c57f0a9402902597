"""What a run produced, as its author reads it: named outputs, each a table, a value, a file or a folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flowmesh_cas.cid import cid_parse, cid_text
from flowmesh_cas.errors import IntegrityError, NotFoundError, UsageError
from flowmesh_mesh.manifest import Ref

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from flowmesh_cas.store import BlockStore

SUFFIXES = {"rows": ".jsonl", "value": ".json", "file": "", "folder": ""}


class Fetches(Protocol):
    """What brings contents here: a :class:`flowmesh_mesh.client.Mesh`."""

    def local(self, ref: Ref) -> AbstractAsyncContextManager[BlockStore]:
        """Fetch and verify the DAG of ``ref`` into a store that lives as long as the context."""
        ...


def plain_ref(plain: Mapping[str, Any]) -> Ref:
    """Return the Ref of its plain form {"kind", "cid" (text), "digest" (hex), "size", "rows"}."""
    try:
        return Ref(
            kind=str(plain["kind"]),
            cid=cid_parse(plain["cid"]),
            digest=bytes.fromhex(plain["digest"]),
            size=int(plain["size"]),
            rows=int(plain.get("rows", -1)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"not a reference to content: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Output:
    """One named output: a list of contents, nearly always one."""

    name: str
    refs: tuple[Ref, ...]
    source: Fetches

    @property
    def kind(self) -> str:
        """Return rows, value, file or folder."""
        return self.refs[0].kind if self.refs else ""

    @property
    def cid(self) -> str:
        """Return the text of the only content's CID; raise UsageError when there are several."""
        return cid_text(self._only().cid)

    def _only(self) -> Ref:
        if len(self.refs) != 1:
            raise UsageError(
                f"output {self.name!r} has {len(self.refs)} parts", hint="Use rows() for tables, or export() for all parts."
            )
        return self.refs[0]

    async def rows(self) -> list[dict[str, Any]]:
        """Return the table, parts joined in order; raise UsageError when the output is no table."""
        from flowmesh_mesh import content

        rows: list[dict[str, Any]] = []
        for ref in self.refs:
            if ref.kind != "rows":
                raise UsageError(f"output {self.name!r} is a {ref.kind}, not a table", hint="Use value() or export().")
            async with self.source.local(ref) as store:
                rows.extend(content.read_rows(store, ref))
        return rows

    async def value(self) -> Any:
        """Return the JSON value; raise UsageError when the output is something else."""
        from flowmesh_mesh import content

        ref = self._only()
        if ref.kind != "value":
            raise UsageError(f"output {self.name!r} is a {ref.kind}, not a value", hint="Use rows() or export().")
        async with self.source.local(ref) as store:
            return content.read_value(store, ref)

    async def export(self, folder: str | Path) -> list[Path]:
        """Write every part under ``folder`` and return the paths: ``name.jsonl``, ``name.json``, ``name``; parts are numbered."""
        paths: list[Path] = []
        for number, ref in enumerate(self.refs):
            stem = self.name if len(self.refs) == 1 else f"{self.name}.{number}"
            path = Path(folder) / (stem + SUFFIXES.get(ref.kind, ""))
            async with self.source.local(ref) as store:
                await asyncio.to_thread(_write, store, ref, path)
            paths.append(path)
        return paths


def _write(store: BlockStore, ref: Ref, path: Path) -> None:
    from flowmesh_mesh import content

    path.parent.mkdir(parents=True, exist_ok=True)
    content.export(store, ref, path)


@dataclass(frozen=True, slots=True)
class Results:
    """How a run ended, and its outputs by name. ``reason`` is a reason code, ``saved_us`` the microseconds that sharing saved.

    A run with very many outputs (``outputs_total``) names none here: ``Run.outputs`` asks for them, all or one.
    """

    run: str
    state: str
    reason: str
    outputs: Mapping[str, Output]
    actor: str = ""
    detail: str = ""
    counts: Mapping[str, int] | None = None
    saved_us: int = 0
    outputs_total: int = 0

    def __getitem__(self, name: str) -> Output:
        found = self.outputs.get(name)
        if found is None and self.outputs_total > len(self.outputs):
            raise UsageError(
                f"run {self.run} has {self.outputs_total} outputs, too many to be named with its end",
                hint=f"Ask for it: `await run.outputs({name!r})`.",
            )
        if found is None:
            raise NotFoundError(
                f"run {self.run} has no output {name!r}", hint=f"Its outputs: {', '.join(self.outputs) or 'none'}."
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def __contains__(self, name: object) -> bool:
        return name in self.outputs


def plain_outputs(body: Mapping[str, Any], source: Fetches) -> dict[str, Output]:
    """Return the outputs of a plain map of name -> references."""
    return {name: Output(name, tuple(plain_ref(ref) for ref in refs), source) for name, refs in body.items()}


def plain_results(run: str, body: Mapping[str, Any], source: Fetches) -> Results:
    """Return the results that the body of an ``ended`` event tells of."""
    return Results(
        run=run,
        state=str(body.get("state", "")),
        reason=str(body.get("reason", "")),
        outputs=plain_outputs(body.get("outputs") or {}, source),
        actor=str(body.get("actor") or ""),
        detail=str(body.get("detail") or ""),
        counts=body.get("counts"),
        saved_us=int(body.get("saved_us") or 0),
        outputs_total=int(body.get("outputs_total") or 0),
    )
