"""Ports that a broker can keep: outside the range from which the system takes those of outgoing connections.

A port inside that range may be taken while its broker is down, by any client that tries again and again to reach it; it may even
connect to itself.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_FIRST, _LAST = 20_000, 32_767
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Tell whether a server could listen on ``port`` now."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        return False
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _lasting() -> tuple[int, int]:
    try:
        first = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = _LAST + 1
    return _FIRST, min(_LAST, first - 1)


def choose_port(taken: set[int] | frozenset[int] = frozenset()) -> int:
    """Return a free port for a server that is not in ``taken``; -1 (the system chooses) when none was found."""
    first, last = _lasting()
    for _ in range(200 if last > first else 0):
        port = random.randint(first, last)
        if port not in taken and is_free(port):
            return port
    return -1


def read_port(path: Path) -> int:
    """Return the port kept in a file, -1 when there is none."""
    try:
        port = int(path.read_text())
    except (OSError, ValueError):
        return -1
    return port if 0 < port < 65536 else -1


def keep_port(path: Path, taken: set[int]) -> int:
    """Return the port kept in a file; choose and keep one when there is none. It is added to ``taken``."""
    port = read_port(path)
    if port == -1:
        port = choose_port(taken)
        if port != -1:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(str(port))
    taken.add(port)
    return port
