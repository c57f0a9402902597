"""From a document to a manifest: everything is checked first, all problems are told at once, then content is stored.

The order of operators in a document carries no meaning: the manifest's order depends on the graph and the names only, so
that one workflow has one CID, by whatever road and in whatever order its keys came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmesh_cas.errors import FlowmeshError
from flowmesh_mesh.document import load_document
from flowmesh_mesh.feeds import Edge, Feed, Given
from flowmesh_mesh.manifest import Manifest, Operator, Output, Ref, Source, encode_record, record_cid
from flowmesh_mesh.planning import Drawing, Plan, draw_document, lay_out
from flowmesh_mesh.problems import Locator, Problems
from flowmesh_mesh.references import content_cid, content_reference
from flowmesh_mesh.sharding import Wish, wishes
from flowmesh_mesh.vertices import Vertex

if TYPE_CHECKING:
    from flowmesh_cas.store import BlockStore
    from flowmesh_mesh.workflow import Workflow


@dataclass(frozen=True, slots=True)
class Compiled:
    """A workflow ready to be submitted: its record, that record's block and CID, and the content that came with it.

    ``roots`` are the given inputs, sources and models, each once; the store holds their blocks and the manifest's.
    """

    manifest: Manifest
    block: bytes
    cid: bytes
    roots: list[Ref]

    @property
    def manifest_block(self) -> bytes:
        """The DAG-CBOR bytes of the manifest."""
        return self.block


@dataclass(frozen=True, slots=True)
class Checked:
    """What a valid document would become: its name, how many operators, and the names of its outputs.

    ``auto`` names the operators whose number of shards is settled at submission; they are counted as one each.
    """

    name: str
    operators: int
    outputs: list[str]
    auto: list[str]


class Draft:
    """A checked workflow that is compiled as soon as every ``shards: auto`` in it has become a number.

    Content is read once, however often it is compiled. Raise DocumentError with every problem.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | Workflow,
        *,
        base: Path | None,
        params: Mapping[str, Any] | None = None,
        store: BlockStore,
        positions: Locator | None = None,
    ) -> None:
        self._drawing, self._problems = _draw(data, base, params, positions)
        self._store = store
        self._writer = _Writer(store, self._problems)
        self._order: list[int] = []

    @property
    def auto(self) -> list[str]:
        """The names of the operators whose number of shards is to be settled, sorted."""
        return _auto(self._drawing)

    def compile(self, counts: Mapping[str, int]) -> Compiled:
        """Return the workflow with a number for each ``shards: auto``, by the operator's name; 1 where it has none."""
        from flowmesh_cas.store import BLOCK_MAX_BYTES

        plan, problems = lay_out(self._drawing, counts, self._problems), self._problems
        problems.check()
        self._order = plan.order
        self._writer.roots = {}
        manifest = self._writer.manifest(plan)
        problems.check()
        block = encode_record(manifest)
        if len(block) > BLOCK_MAX_BYTES:
            message = f"the compiled workflow has {len(block)} bytes; at most {BLOCK_MAX_BYTES} are allowed"
            problems.add(("operators",), message, "Give each operator more rows, or submit several workflows.")
            problems.check()
        cid = record_cid(block)
        self._store.put_many([(cid, block)])
        return Compiled(manifest, block, cid, list(self._writer.roots.values()))

    def refuse_unsettled(self, counts: Mapping[str, int]) -> None:
        """Note every ``shards: auto`` that has no number: only a client that asks the mesh can settle it."""
        for vertex in self._drawing.vertices:
            if vertex.shards.is_auto and vertex.name not in counts:
                hint = "Write a number; 'flowmesh submit' and the Python client settle it by asking the mesh (question `shards`)."
                self._problems.add((*vertex.place, "shards"), "'auto' is settled by the client that submits", hint)

    def wishes(self) -> dict[str, Wish]:
        """Return what the mesh is to be asked for, by operator. It must have been compiled before, with any numbers."""
        return wishes(self._drawing.vertices, self._order, self._writer.put)


def draft_file(path: str | Path, *, params: Mapping[str, Any] | None = None, store: BlockStore) -> Draft:
    """Return the draft of a workflow file; paths in it stand from its folder."""
    data, positions = load_document(path)
    return Draft(data, base=Path(path).absolute().parent, params=params, store=store, positions=positions)


def compile_document(
    data: Mapping[str, Any] | Workflow,
    *,
    base: Path | None,
    params: Mapping[str, Any] | None = None,
    store: BlockStore,
    positions: Locator | None = None,
    shards: Mapping[str, int] | None = None,
) -> Compiled:
    """Check a workflow and compile it; put its content and its manifest into ``store``.

    Paths in the document stand from ``base``; with None they are refused (a document from the wire). ``positions`` is what
    ``load_document`` returned beside the data, ``shards`` the number for each operator with ``shards: auto``. Raise DocumentError
    with every problem, of which an auto without a number is one; nothing is stored then.
    """
    draft = Draft(data, base=base, params=params, store=store, positions=positions)
    draft.refuse_unsettled(shards or {})
    return draft.compile(shards or {})


def compile_file(
    path: str | Path, *, params: Mapping[str, Any] | None = None, store: BlockStore, shards: Mapping[str, int] | None = None
) -> Compiled:
    """Compile a workflow file; paths in it stand from its folder."""
    data, positions = load_document(path)
    base = Path(path).absolute().parent
    return compile_document(data, base=base, params=params, store=store, positions=positions, shards=shards)


def check_document(
    data: Mapping[str, Any] | Workflow,
    *,
    base: Path | None,
    params: Mapping[str, Any] | None = None,
    positions: Locator | None = None,
) -> Checked:
    """Check a workflow without reading its content; raise DocumentError with every problem."""
    drawing, problems = _draw(data, base, params, positions)
    auto = _auto(drawing)
    plan = lay_out(drawing, {}, problems)
    problems.check()
    return Checked(plan.name, len(plan.order), sorted(plan.outputs), auto)


def check_file(path: str | Path, *, params: Mapping[str, Any] | None = None) -> Checked:
    """Check a workflow file; raise DocumentError with every problem."""
    data, positions = load_document(path)
    return check_document(data, base=Path(path).absolute().parent, params=params, positions=positions)


def _auto(drawing: Drawing) -> list[str]:
    return sorted(vertex.name for vertex in drawing.vertices if vertex.shards.is_auto)


def _draw(
    data: Mapping[str, Any] | Workflow, base: Path | None, params: Mapping[str, Any] | None, positions: Locator | None
) -> tuple[Drawing, Problems]:
    """Return a drawing, and the problems noted so far: more may come when it is laid out, so they are told then."""
    to_document: Callable[[], dict[str, Any]] | None = getattr(data, "to_document", None)
    if to_document is not None:
        data, base = to_document(), base or Path.cwd()
    problems = Problems(positions)
    drawing = draw_document(data, base, params or {}, problems)
    if drawing is None:
        problems.check()
    assert drawing is not None
    return drawing, problems


class _Writer:
    """Turns a plan into records and stores the content that came with it, each content once."""

    def __init__(self, store: BlockStore, problems: Problems) -> None:
        self.roots: dict[bytes, Ref] = {}
        self._store = store
        self._problems = problems
        self._paths: dict[tuple[str, Path], Ref] = {}
        self._refs: dict[int, Ref | None] = {}
        self._sources: dict[int, list[Source]] = {}
        self._numbers: list[int] = []

    def manifest(self, plan: Plan) -> Manifest:
        """Return the manifest of a plan; problems with the content are noted."""
        self._numbers = [0] * len(plan.vertices)
        self._sources = {}  # they hold numbers
        for number, vertex in enumerate(plan.order):
            self._numbers[vertex] = number
        operators = [self._operator(plan.vertices[vertex]) for vertex in plan.order]
        outputs = {name: Output(self._numbers[edge.vertex], edge.port) for name, edge in plan.outputs.items()}
        given = {cid for operator in operators for name in operator.models.values() if (cid := content_cid(name))}
        return Manifest(plan.name, operators, outputs, models=sorted(given))

    def _operator(self, vertex: Vertex) -> Operator:
        params, models = vertex.params, dict(vertex.models)
        for role, given in vertex.folders.items():
            ref = self.put(given)
            if ref is not None:
                models[role] = content_reference(ref.cid)
                params = {**params, vertex.kind.models[role]: models[role]}
        settings = vertex.settings
        return Operator(
            name=vertex.name,
            type=vertex.kind.name,
            version=vertex.kind.version,
            params=params,
            inputs={port: self._feeds(feeds) for port, feeds in vertex.feeds.items()},
            models=models,
            code=self.put(vertex.code) if vertex.code is not None else None,
            determinism=vertex.kind.determinism_of(params),
            numeric=settings.numeric,
            reusable=settings.reusable,
            resources=settings.resources,
            retry=settings.retry,
            timeout_s=settings.timeout_s,
            priority=settings.priority,
            deadline_s=settings.deadline_s,
            share=vertex.share,
        )

    def _feeds(self, feeds: list[Feed]) -> list[Source]:
        known = self._sources.get(id(feeds))
        if known is None:
            known = self._sources[id(feeds)] = [source for feed in feeds if (source := self._source(feed)) is not None]
        return known

    def _source(self, feed: Feed) -> Source | None:
        if isinstance(feed, Edge):
            return Source(op=self._numbers[feed.vertex], port=feed.port, item=feed.item)
        ref = self.put(feed)
        return None if ref is None else Source(ref=ref)

    def put(self, given: Given) -> Ref | None:
        """Store given content, once; return None, a problem noted, for what cannot be stored."""
        if id(given) not in self._refs:
            try:
                self._refs[id(given)] = self._content(given)
            except (FlowmeshError, OSError) as error:
                hint = getattr(error, "hint", "") or "Check that the file is readable and does not change meanwhile."
                self._problems.add(given.place, f"cannot be stored: {error}", hint)
                self._refs[id(given)] = None
        ref = self._refs[id(given)]
        if ref is not None and given.form != "cid":
            self.roots[ref.cid] = ref
        return ref

    def _content(self, given: Given) -> Ref:
        from flowmesh_mesh import content

        if given.form == "cid":
            assert isinstance(given.content, Ref)
            return given.content
        if given.form == "rows":
            return content.put_rows(self._store, given.content)
        if given.form == "value":
            return content.put_value(self._store, given.content)
        if given.form == "source":
            return content.put_file_bytes(self._store, given.content.encode())
        known = self._paths.get((given.kind, given.content))
        if known is None:
            put = content.put_folder if given.kind == "folder" else content.put_file
            known = self._paths[given.kind, given.content] = put(self._store, given.content)
        return known
