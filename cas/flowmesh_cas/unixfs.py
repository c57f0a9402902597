"""Files and folders as UnixFS DAGs of profile unixfs-v1-2025, so that their CIDs are those of IPFS tools.

The profile: sha2-256, raw leaves of 1 MiB, nodes of at most 1024 links, folders sorted by the UTF-8 bytes of their names.
The reader takes any valid UnixFS file, whatever its chunks and its shape, and bounds what it costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

from flowmesh_cas import dag_pb
from flowmesh_cas.cid import DAG_PB, RAW, cid_from_digest, cid_of, cid_text, codec_of, encode_dag_cbor, sha256
from flowmesh_cas.dag_pb import Link, encode_varint
from flowmesh_cas.errors import IntegrityError, UsageError
from flowmesh_cas.store import Block, BlockStore

CHUNK_BYTES = 1024 * 1024
WIDTH = 1024
FOLDER_NODE_MAX_BYTES = 256 * 1024
"""A folder whose node is larger would be sharded by IPFS tools; we refuse it."""
READ_MAX_BYTES = 1024 * 1024 * 1024
EXPORT_MAX_BYTES = 1 << 40
EXPORT_MAX_ENTRIES = 1_000_000
DEPTH_MAX = 32

_RAW_TYPE, _FOLDER_TYPE, _FILE_TYPE = 0, 1, 2
_FOLDER_DATA = b"\x08\x01"

Entry = tuple[str, bytes, int]
"""A file of a folder: its path with slashes, the SHA-256 of its bytes, its size in bytes."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Where a file or folder begins (``cid``), what it is (``digest``, as in a Ref), and its size in bytes."""

    cid: bytes
    digest: bytes
    size: int


class TooLargeError(UsageError):
    """A file or folder holds more bytes than the reader was willing to take."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A subtree: its CID, the size of its blocks, the size of the file's bytes in it."""

    cid: bytes
    tsize: int
    size: int


def folder_digest(entries: Iterable[Entry]) -> bytes:
    """Return the SHA-256 of the canonical listing of a folder's files; empty folders do not count."""
    listing = [list(entry) for entry in sorted(entries, key=lambda entry: entry[0].encode())]
    return sha256(encode_dag_cbor(listing))


# --- writing ---------------------------------------------------------------------------------------------------------


def import_bytes(store: BlockStore, data: bytes) -> Imported:
    """Store ``data`` as a file."""
    if len(data) <= CHUNK_BYTES:
        digest = sha256(data)
        cid = cid_from_digest(RAW, digest)
        store.put_many(((cid, data),))
        return Imported(cid, digest, len(data))
    chunks = (data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))
    file = _FileWriter()
    store.put_many(file.blocks(chunks))
    return file.imported()


def import_file(store: BlockStore, path: Path | str) -> Imported:
    """Store the file at ``path``; raise UsageError when it is not a readable regular file."""
    source = Path(path)
    if not source.is_file():
        raise UsageError(f"{source} is not a file", hint="Name an existing regular file.")
    file = _FileWriter()
    store.put_many(file.blocks(_chunks(source)))
    return file.imported()


def import_folder(store: BlockStore, path: Path | str) -> Imported:
    """Store the folder at ``path``, hidden files included; raise UsageError for links, devices and too many files."""
    source = Path(path)
    if source.is_symlink() or not source.is_dir():
        raise UsageError(f"{source} is not a folder", hint="Name an existing folder, not a link to one.")
    folder = _FolderWriter()
    store.put_many(folder.blocks(source))
    return folder.imported()


class _FileWriter:
    """Builds the balanced DAG of one file. Holds one pending group per level, whatever the size of the file."""

    def __init__(self) -> None:
        self._levels: list[list[_Part]] = [[]]
        self._hash = hashlib.sha256()
        self._leaves = 0
        self.root = _Part(b"", 0, 0)

    def blocks(self, chunks: Iterable[bytes]) -> Iterator[Block]:
        """Yield the blocks of the file in the order in which they are complete; the root comes last."""
        for chunk in chunks:
            self._hash.update(chunk)
            yield from self._add_leaf(chunk)
        if self._leaves == 0:
            yield from self._add_leaf(b"")
        yield from self._finish()

    def imported(self) -> Imported:
        """Return the finished file."""
        return Imported(self.root.cid, self._hash.digest(), self.root.size)

    def _add_leaf(self, chunk: bytes) -> Iterator[Block]:
        cid = cid_of(RAW, chunk)
        self._leaves += 1
        yield cid, chunk
        yield from self._push(0, _Part(cid, len(chunk), len(chunk)))

    def _push(self, level: int, part: _Part) -> Iterator[Block]:
        if level == len(self._levels):
            self._levels.append([])
        # A full group is closed only when one more comes: exactly 1024 leaves have a single parent.
        if len(self._levels[level]) == WIDTH:
            yield from self._close(level)
        self._levels[level].append(part)

    def _close(self, level: int) -> Iterator[Block]:
        parts, self._levels[level] = self._levels[level], []
        size = sum(part.size for part in parts)
        node = dag_pb.encode([Link(part.cid, "", part.tsize) for part in parts], _file_data(size, [part.size for part in parts]))
        cid = cid_of(DAG_PB, node)
        yield cid, node
        yield from self._push(level + 1, _Part(cid, len(node) + sum(part.tsize for part in parts), size))

    def _finish(self) -> Iterator[Block]:
        level = 0
        while level < len(self._levels) - 1 or len(self._levels[level]) > 1:
            yield from self._close(level)
            level += 1
        self.root = self._levels[level][0]


class _FolderWriter:
    """Builds the DAG of a folder and the listing of its files."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._root = _Part(b"", 0, 0)

    def blocks(self, path: Path) -> Iterator[Block]:
        """Yield the blocks of all the files and folders under ``path``; the root comes last."""
        self._root = yield from self._folder(path, "", 0)

    def imported(self) -> Imported:
        """Return the finished folder."""
        return Imported(self._root.cid, folder_digest(self._entries), self._root.size)

    def _folder(self, path: Path, prefix: str, depth: int) -> Generator[Block, None, _Part]:
        if depth > DEPTH_MAX:
            raise UsageError(f"{path} is nested deeper than {DEPTH_MAX} folders")
        links: list[Link] = []
        size = 0
        for name, child in _children(path):
            part = yield from self._child(child, prefix + name, depth)
            links.append(Link(part.cid, name, part.tsize))
            size += part.size
        node = dag_pb.encode(links, _FOLDER_DATA)
        if len(node) > FOLDER_NODE_MAX_BYTES:
            raise UsageError(
                f"{path} holds too many files ({len(links)}) for one folder",
                hint="Spread them over sub-folders of some thousand files, or pack them into one file.",
            )
        cid = cid_of(DAG_PB, node)
        yield cid, node
        return _Part(cid, len(node) + sum(link.tsize for link in links), size)

    def _child(self, path: Path, name: str, depth: int) -> Generator[Block, None, _Part]:
        if path.is_symlink():
            raise UsageError(f"{path} is a symbolic link", hint="Replace it by what it points to, or leave it out.")
        if path.is_dir():
            return (yield from self._folder(path, name + "/", depth + 1))
        if not path.is_file():
            raise UsageError(f"{path} is neither a file nor a folder", hint="Leave sockets, pipes and devices out.")
        file = _FileWriter()
        yield from file.blocks(_chunks(path))
        imported = file.imported()
        self._entries.append((name, imported.digest, imported.size))
        return file.root


def _file_data(size: int, sizes: list[int]) -> bytes:
    return b"\x08\x02\x18" + encode_varint(size) + b"".join(b"\x20" + encode_varint(part) for part in sizes)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield _filled(file, chunk)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="Check its permissions.") from error


def _filled(file: RawIOBase, chunk: bytes) -> bytes:
    # A read may come short before the end; a chunk may not, or the CID would differ.
    while len(chunk) < CHUNK_BYTES and (more := file.read(CHUNK_BYTES - len(chunk))):
        chunk += more
    return chunk


def _children(path: Path) -> list[tuple[str, Path]]:
    try:
        children = [(child.name.encode(), child) for child in path.iterdir()]
    except UnicodeEncodeError as error:
        raise UsageError(f"{path} holds a file whose name is not UTF-8", hint="Rename it.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="Check its permissions.") from error
    return [(name.decode(), child) for name, child in sorted(children)]


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Data:
    """The UnixFS record inside a dag-pb node."""

    type: int
    data: bytes
    size: int
    sizes: tuple[int, ...]


def read_chunks(store: BlockStore, root: bytes, *, max_bytes: int = EXPORT_MAX_BYTES) -> Iterator[bytes]:
    """Yield the bytes of the file under ``root``, piece by piece, every block verified.

    Raises NotFoundError on a gap, IntegrityError for what is no valid file, UsageError when it is a folder, TooLargeError when
    it is larger than ``max_bytes`` (before the first piece).
    """
    pending: list[tuple[bytes, int, int]] = [(root, -1, 0)]
    while pending:
        cid, expected, depth = pending.pop()
        if depth > DEPTH_MAX:
            raise IntegrityError(f"file {cid_text(root)} is nested deeper than {DEPTH_MAX} levels")
        block = store.get(cid)
        node = None if codec_of(cid) == RAW else _file_node(cid, block)
        size = len(block) if node is None else node[0].size
        if expected not in (-1, size):
            raise IntegrityError(f"block {cid_text(cid)} holds {size} bytes where its parent says {expected}")
        if size > max_bytes:
            raise TooLargeError(f"file {cid_text(root)} of {size} bytes is larger than the limit of {max_bytes}")
        if node is None:
            yield block
        else:
            record, links = node
            if record.data:
                yield record.data
            pairs = zip(links, record.sizes, strict=True)
            pending.extend((link.cid, part, depth + 1) for link, part in reversed(list(pairs)))


def read_bytes(store: BlockStore, root: bytes, *, max_bytes: int = READ_MAX_BYTES) -> bytes:
    """Return the whole file under ``root``; errors as in :func:`read_chunks`."""
    return b"".join(read_chunks(store, root, max_bytes=max_bytes))


def export(
    store: BlockStore,
    root: bytes,
    target_path: Path | str,
    *,
    max_bytes: int = EXPORT_MAX_BYTES,
    expected: Imported | None = None,
) -> Imported:
    """Write the file or folder under ``root`` to ``target_path``, all of it or nothing, and return what it is.

    An existing file is replaced; an existing folder must be empty. Raises as :func:`read_chunks`, and IntegrityError when
    digest or size are not as ``expected``.
    """
    target = Path(target_path)
    part = target.with_name(f".{target.name}.part")
    try:
        if target.is_dir() and any(target.iterdir()):
            raise UsageError(f"{target} is a folder that is not empty", hint="Name a new folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        exported = _Export(store, max_bytes).entry(root, part)
        if expected is not None and (exported.digest, exported.size) != (expected.digest, expected.size):
            raise IntegrityError(f"content under {cid_text(root)} is not what its reference says")
        _replace(part, target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", hint="Check permissions and free space.") from error
    finally:
        _remove(part)
    return exported


class _Export:
    """Writes one DAG below one new path, within bounds of bytes, entries and depth."""

    def __init__(self, store: BlockStore, max_bytes: int) -> None:
        self._store = store
        self._left_bytes = max_bytes
        self._left_entries = EXPORT_MAX_ENTRIES
        self._entries: list[Entry] = []

    def entry(self, root: bytes, path: Path) -> Imported:
        """Write ``root`` to ``path``, which does not exist."""
        links = self._folder_links(root)
        if links is None:
            digest, size = self._file(root, path)
            return Imported(root, digest, size)
        size = self._folder(links, path, "", 0)
        return Imported(root, folder_digest(self._entries), size)

    def _folder(self, links: tuple[Link, ...], path: Path, prefix: str, depth: int) -> int:
        if depth > DEPTH_MAX:
            raise IntegrityError(f"{path} is nested deeper than {DEPTH_MAX} folders")
        self._left_entries -= len(links)
        if self._left_entries < 0:
            raise UsageError(f"more than {EXPORT_MAX_ENTRIES} files and folders")
        path.mkdir()
        total = 0
        for link in links:
            child = self._folder_links(link.cid)
            if child is None:
                digest, size = self._file(link.cid, path / link.name)
                self._entries.append((prefix + link.name, digest, size))
            else:
                size = self._folder(child, path / link.name, f"{prefix}{link.name}/", depth + 1)
            total += size
        return total

    def _folder_links(self, cid: bytes) -> tuple[Link, ...] | None:
        """Return the checked links of a folder, None when ``cid`` is a file."""
        if codec_of(cid) == RAW:
            return None
        node = _node(cid, self._store.get(cid))
        if _data(cid, node).type != _FOLDER_TYPE:
            return None
        names = [link.name for link in node.links]
        if len(set(names)) != len(names) or any(name in ("", ".", "..") or "/" in name or "\0" in name for name in names):
            raise IntegrityError(f"folder {cid_text(cid)} holds a name that is not allowed, or one twice")
        return node.links

    def _file(self, root: bytes, path: Path) -> tuple[bytes, int]:
        digest, size = hashlib.sha256(), 0
        with path.open("xb") as file:
            for chunk in read_chunks(self._store, root, max_bytes=self._left_bytes):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        self._left_bytes -= size
        return digest.digest(), size


def _file_node(cid: bytes, block: bytes) -> tuple[_Data, tuple[Link, ...]]:
    """Return the record and links of an inner node of a file, checked against each other."""
    node = _node(cid, block)
    record = _data(cid, node)
    if record.type == _FOLDER_TYPE:
        raise UsageError(f"{cid_text(cid)} is a folder, not a file", hint="Export it to a folder instead.")
    if record.type not in (_RAW_TYPE, _FILE_TYPE):
        raise UsageError(f"{cid_text(cid)} is a UnixFS node of type {record.type}, which is not supported")
    if len(record.sizes) != len(node.links) or record.size != len(record.data) + sum(record.sizes):
        raise IntegrityError(f"file node {cid_text(cid)} contradicts itself about its sizes")
    # An empty part is never needed, and nested ones would make a small DAG endless to read.
    if 0 in record.sizes:
        raise IntegrityError(f"file node {cid_text(cid)} has an empty part")
    return record, node.links


def _node(cid: bytes, block: bytes) -> dag_pb.Node:
    if codec_of(cid) != DAG_PB:
        raise UsageError(f"{cid_text(cid)} is neither a file nor a folder", hint="It is a record; read it as DAG-CBOR.")
    return dag_pb.decode(block)


def _data(cid: bytes, node: dag_pb.Node) -> _Data:
    kind, data, size, sizes = -1, b"", -1, []
    for tag, content in dag_pb.fields(node.data):
        if tag == 1 and isinstance(content, int):
            kind = content
        elif tag == 2 and isinstance(content, bytes):
            data = content
        elif tag == 3 and isinstance(content, int):
            size = content
        elif tag == 4 and isinstance(content, int):
            sizes.append(content)
    if kind < 0:
        raise IntegrityError(f"{cid_text(cid)} is no UnixFS node")
    return _Data(kind, data, size if size >= 0 else len(data) + sum(sizes), tuple(sizes))


def _replace(part: Path, target: Path) -> None:
    if target.is_dir() and not part.is_dir():
        target.rmdir()
    part.replace(target)


def _remove(path: Path) -> None:
    """Remove what an export that was cut off left at ``path``."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
