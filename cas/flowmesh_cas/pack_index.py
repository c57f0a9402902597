"""The extent index of a pack store: which pack holds a block, and the pins. SQLite in WAL mode.

The index is what makes a block exist: a pack is synced first, then the index commits. One connection reads, one
writes, so that a slow commit holds up no reader; other processes may do the same on the same files.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flowmesh_cas.errors import IntegrityError, TransientError
from flowmesh_cas.store import Pin

BUSY_TIMEOUT_S = 30.0
_KEYS_PER_QUERY = 1000
_SCHEMA = """
CREATE TABLE extent(cid BLOB PRIMARY KEY, pack INTEGER NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL,
                    condemned_us INTEGER) WITHOUT ROWID;
CREATE TABLE pack(number INTEGER PRIMARY KEY AUTOINCREMENT, end_bytes INTEGER NOT NULL DEFAULT 0);
CREATE TABLE pin(root BLOB, owner TEXT, expires_us INTEGER, PRIMARY KEY(root, owner)) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


class Extent(NamedTuple):
    """Where a block lies: pack number, first byte, size in bytes."""

    pack: int
    start: int
    size: int


class Usage(NamedTuple):
    """How much of a pack is in use, in bytes; ``live_bytes`` counts blocks without their headers."""

    number: int
    end_bytes: int
    live_blocks: int
    live_bytes: int


class PackIndex:
    """Extents and pins, safe for many threads and processes."""

    def __init__(self, path: Path, *, sync: bool) -> None:
        self._path = path
        self._read_lock = threading.Lock()
        self._write_lock = threading.RLock()
        with self._mended(), _alone_in(path.parent):
            self._writer = self._connect(sync)
            self._reader = self._connect(sync)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Give the writing connection for one transaction; committed, and synced, at the end. An inner one joins the outer."""
        with self._write_lock, self._mended():
            if self._writer.in_transaction:
                yield self._writer
                return
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def is_new(self) -> bool:
        """Tell whether the index holds no tables yet."""
        return not self._read("PRAGMA user_version")[0][0]

    def create(self, packs: Iterable[tuple[int, Iterable[tuple[bytes, int, int]]]]) -> None:
        """Make the tables, and fill them from packs found on disk: (number, blocks as ``pack.scan`` yields them)."""
        with self.transaction() as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0]:
                return
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            for number, blocks in packs:
                end = 0
                for cid, start, size in blocks:
                    connection.execute("INSERT OR IGNORE INTO extent VALUES (?, ?, ?, ?, NULL)", (cid, number, start, size))
                    end = start + size
                connection.execute("INSERT INTO pack VALUES (?, ?)", (number, end))

    def find(self, cids: Sequence[bytes]) -> dict[bytes, Extent]:
        """Return where the blocks lie, for those that are here; whatever was condemned among them is spared."""
        found: dict[bytes, Extent] = {}
        condemned: list[bytes] = []
        for at in range(0, len(cids), _KEYS_PER_QUERY):
            keys = cids[at : at + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(keys))
            for cid, pack, start, size, condemned_us in self._read(
                f"SELECT cid, pack, start, size, condemned_us FROM extent WHERE cid IN ({marks})", keys
            ):
                found[cid] = Extent(pack, start, size)
                if condemned_us is not None:
                    condemned.append(cid)
        if condemned:
            self._spare(condemned)
        return found

    def add(self, pack: int, end_bytes: int, extents: Iterable[tuple[bytes, int, int]]) -> None:
        """Commit blocks (CID, start, size) that a pack now holds up to ``end_bytes``."""
        rows = sorted((cid, pack, start, size) for cid, start, size in extents)
        with self.transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO extent VALUES (?, ?, ?, ?, NULL)", rows)
            connection.execute("UPDATE pack SET end_bytes = ? WHERE number = ?", (end_bytes, pack))

    def remove(self, cids: Iterable[bytes]) -> None:
        """Forget blocks."""
        with self.transaction() as connection:
            connection.executemany("DELETE FROM extent WHERE cid = ?", [(cid,) for cid in cids])

    def drop(self, cid: bytes, extent: Extent) -> None:
        """Forget a block that went bad, unless it lies somewhere else by now."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM extent WHERE cid = ? AND pack = ? AND start = ?", (cid, extent.pack, extent.start))

    def cids(self) -> list[bytes]:
        """Return every CID."""
        return [cid for (cid,) in self._read("SELECT cid FROM extent")]

    # --- packs

    def new_pack(self) -> int:
        """Return the number of a new pack; no number is ever given twice."""
        with self.transaction() as connection:
            return int(connection.execute("INSERT INTO pack DEFAULT VALUES").lastrowid or 0)

    def packs(self, max_bytes: int) -> list[tuple[int, int]]:
        """Return (number, end) of the packs smaller than ``max_bytes``, the newest first."""
        return self._read("SELECT number, end_bytes FROM pack WHERE end_bytes < ? ORDER BY number DESC", (max_bytes,))

    def pack_end(self, number: int) -> int | None:
        """Return where the committed blocks of a pack end, None when the pack is gone."""
        rows = self._read("SELECT end_bytes FROM pack WHERE number = ?", (number,))
        return rows[0][0] if rows else None

    def usage(self) -> list[Usage]:
        """Return how much of each pack is in use."""
        return [
            Usage(*row)
            for row in self._read(
                "SELECT number, end_bytes, count(cid), coalesce(sum(size), 0)"
                " FROM pack LEFT JOIN extent ON pack = number GROUP BY number"
            )
        ]

    def extents_in(self, pack: int) -> list[tuple[bytes, Extent]]:
        """Return the blocks of one pack in their order."""
        rows = self._read("SELECT cid, pack, start, size FROM extent WHERE pack = ? ORDER BY start", (pack,))
        return [(cid, Extent(pack, start, size)) for cid, pack, start, size in rows]

    def move(self, pack: int, end_bytes: int, moved: Iterable[tuple[bytes, Extent, int]]) -> None:
        """Commit that blocks (CID, old place, new start) lie in ``pack`` now; those removed meanwhile stay so."""
        rows = [(pack, start, cid, old.pack, old.start) for cid, old, start in moved]
        with self.transaction() as connection:
            connection.executemany("UPDATE extent SET pack = ?, start = ? WHERE cid = ? AND pack = ? AND start = ?", rows)
            connection.execute("UPDATE pack SET end_bytes = ? WHERE number = ?", (end_bytes, pack))

    def forget_pack(self, number: int) -> None:
        """Remove a pack that holds nothing any more."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM pack WHERE number = ?", (number,))

    # --- pins and sweep

    def pin(self, roots: Iterable[bytes], owner: str, expires_us: int | None) -> None:
        """Add pins, or extend them; a pinned root is spared."""
        rows = [(root, owner, expires_us) for root in roots]
        with self.transaction() as connection:
            connection.executemany(
                # max() of NULL and anything is NULL, which is never: what we want.
                "INSERT INTO pin VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET expires_us = max(expires_us, excluded.expires_us)",
                rows,
            )
            connection.executemany("UPDATE extent SET condemned_us = NULL WHERE cid = ?", [(root,) for root, _, _ in rows])

    def unpin(self, root: bytes, owner: str) -> None:
        """Remove a pin."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM pin WHERE root = ? AND owner = ?", (root, owner))

    def pins(self) -> list[Pin]:
        """Return every pin."""
        return [Pin(*row) for row in self._read("SELECT root, owner, expires_us FROM pin")]

    def pins_on(self, root: bytes) -> list[Pin]:
        """Return the pins on one root."""
        return [Pin(*row) for row in self._read("SELECT root, owner, expires_us FROM pin WHERE root = ?", (root,))]

    def expire_pins(self, now_us: int) -> int:
        """Remove expired pins; return how many."""
        with self.transaction() as connection:
            return connection.execute("DELETE FROM pin WHERE expires_us <= ?", (now_us,)).rowcount

    def condemned(self) -> list[tuple[bytes, int, int | None]]:
        """Return (CID, size, since when condemned or None) of every block."""
        return self._read("SELECT cid, size, condemned_us FROM extent")

    def condemn(self, cids: Iterable[bytes], now_us: int) -> None:
        """Note that blocks were found unreachable; what was noted before stays."""
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE extent SET condemned_us = ? WHERE cid = ? AND condemned_us IS NULL", [(now_us, cid) for cid in cids]
            )

    def _spare(self, cids: Iterable[bytes]) -> None:
        with self.transaction() as connection:
            connection.executemany("UPDATE extent SET condemned_us = NULL WHERE cid = ?", [(cid,) for cid in cids])

    # --- connections

    def close(self) -> None:
        """Close the connections; the last one to do so folds the journal into the database."""
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    def _read(self, query: str, arguments: Sequence[object] = ()) -> list[tuple]:  # type: ignore[type-arg]
        with self._read_lock, self._mended():
            return self._reader.execute(query, arguments).fetchall()

    def _connect(self, sync: bool) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if sync else 'OFF'}")
        connection.execute("PRAGMA cache_size = -16000")
        return connection

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise TransientError(
                f"store index {self._path}: {error}", hint="Check free space, or what else uses the store."
            ) from error
        except sqlite3.DatabaseError as error:
            raise IntegrityError(
                f"store index {self._path} is damaged: {error}", hint="Move index.db* away; it is rebuilt from the packs."
            ) from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process after the other open an index: SQLite refuses two at once that make a new one a write-ahead log."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
