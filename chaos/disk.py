"""Disks that fail: full, rotten, and as a power loss leaves them.

The model of a power loss, and no more than that: what a process wrote to its block store and did not sync may be gone. The store
syncs a pack before its index names a block, and the index syncs each commit; so after SIGKILL everything of the pack files behind
what the index names is overwritten with zeros or cut off (seeded), and half-written temporary files are removed. Not modelled:
syncs that the disk only claims, reordered or lost index pages, the brokers' own files (of those, three copies on machines of
their own are the protection).
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
from pathlib import Path

FULL_BYTES = 24 * 1024 * 1024
"""Size of the small disk that a process gets whose disk is to fill up."""

FLIPS = 8
"""Bytes that rot at once."""

_LEFT_BYTES = 4096


def can_mount() -> bool:
    """Tell whether small disks can be made here: that takes the right to mount."""
    return os.geteuid() == 0 and Path("/proc/self/mounts").exists()


def mount(folder: Path) -> bool:
    """Put a small disk of its own under ``folder``; tell whether that went well."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES},mode=0700", "chaos", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    """Take the small disk away; processes that still have files on it keep them."""
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def fill(folder: Path) -> Path:
    """Fill the disk under ``folder`` nearly to the last byte; return the file that does."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        free = os.statvfs(folder)
        left = max(0, free.f_bavail * free.f_frsize - _LEFT_BYTES)
        while left > 0:
            left -= file.write(b"\0" * min(left, 1 << 20))
    return ballast


def corrupt(store: Path, source: random.Random) -> str:
    """Flip bytes here and there in a pack; return where, empty when there is nothing to flip."""
    packs = [path for path in sorted((store / "packs").glob("*.pack")) if path.stat().st_size > 64]
    if not packs:
        return ""
    pack = source.choice(packs)
    places = sorted({source.randrange(40, pack.stat().st_size) for _ in range(FLIPS)})
    with pack.open("r+b") as file:
        for at in places:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 0xFF]))
    return f"bytes {', '.join(map(str, places))} of {pack.name}"


def lose_power(store: Path, source: random.Random) -> str:
    """Drop what a process that was killed had not synced, by the model above; return what was done."""
    lost = 0
    ends = _named_ends(store / "index.db")
    for pack in sorted((store / "packs").glob("*.pack")):
        end = ends.get(int(pack.stem), 0)
        size = pack.stat().st_size
        if size <= end:
            continue
        lost += size - end
        with pack.open("r+b") as file:
            if source.random() < 0.5:
                file.truncate(end)
            else:
                file.seek(end)
                file.write(b"\0" * (size - end))
    for temporary in store.parent.rglob("*.part"):
        temporary.unlink(missing_ok=True)
    return f"{lost} bytes dropped"


def _named_ends(index: Path) -> dict[int, int]:
    """Return up to where the index names each pack."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True)) as connection:
            return {int(number): int(end) for number, end in connection.execute("SELECT number, end_bytes FROM pack")}
    except sqlite3.Error:
        return {}
