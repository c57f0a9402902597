"""Results that the leader has not confirmed, on disk: they outlive the agent and are offered again when it is back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from flowmesh_cas.errors import UsageError
from flowmesh_mesh.messages import Done, decode


class Spool:
    """A folder with one file per message. All methods block: call them from a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, assignment: str, number: int) -> Path:
        return self.folder / f"{sha256(assignment.encode()).hexdigest()[:32]}.{number:06d}.done"

    def write(self, entries: Iterable[tuple[str, int, bytes]]) -> None:
        """Keep messages (assignment, number, bytes); they are on disk when this returns."""
        for assignment, number, data in entries:
            path = self._path(assignment, number)
            temporary = path.with_suffix(".part")
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def drop(self, assignment: str) -> None:
        """Forget the messages of an assignment."""
        for path in self.folder.glob(f"{sha256(assignment.encode()).hexdigest()[:32]}.*.done"):
            path.unlink(missing_ok=True)

    def read_all(self) -> list[tuple[int, Done, bytes]]:
        """Return what an earlier life of this agent left: number, message, its bytes. What is unreadable is removed."""
        found: list[tuple[int, Done, bytes]] = []
        for path in sorted(self.folder.glob("*.done")):
            data = path.read_bytes()
            try:
                found.append((int(path.name.split(".")[1]), decode(data, Done), data))
            except (UsageError, ValueError, IndexError):
                with contextlib.suppress(OSError):
                    path.unlink()
        return found
