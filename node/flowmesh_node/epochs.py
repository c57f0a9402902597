"""The highest epoch that this node has seen, kept on disk: what carries a lower one comes from a deposed leader."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path


class Epochs:
    """``highest`` never goes back, also across restarts.

    ``wire`` is the version that the leader of that epoch speaks, as far as it has told: 1 is the oldest, which tells nothing.
    """

    def __init__(self, path: Path) -> None:
        self.wire = 1
        self._path = path
        self.highest = int(path.read_text()) if path.exists() else 0
        self._written = self.highest
        self._lock = asyncio.Lock()

    def is_stale(self, epoch: int) -> bool:
        """Tell whether ``epoch`` is below the highest seen."""
        return epoch < self.highest

    @property
    def is_written(self) -> bool:
        """Tell whether the highest epoch is on disk, so that work under it may begin."""
        return self._written == self.highest

    def see(self, epoch: int, wire: int = 1) -> bool:
        """Take notice of an epoch that is not stale, and of its leader's version; tell whether the epoch is new."""
        if epoch <= self.highest:
            self.wire = max(self.wire, wire) if epoch == self.highest else self.wire
            return False
        self.highest, self.wire = epoch, wire
        return True

    async def write(self) -> None:
        """Wait until the highest epoch is on disk."""
        async with self._lock:
            if self._written < self.highest:
                epoch = self.highest
                await asyncio.to_thread(self._write, epoch)
                self._written = epoch

    def _write(self, epoch: int) -> None:
        temporary = self._path.with_suffix(".part")
        with temporary.open("w") as file:
            file.write(str(epoch))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
