"""Functions that the workflows of chaos run on nodes. Each must stand alone: its source travels."""

from __future__ import annotations


def slept(seconds: float, text: str) -> str:
    """Sleep, print, and return something that can be told in advance."""
    import time

    for step in range(4):
        time.sleep(seconds / 4)
        print(f"{text}: step {step}", flush=True)
    return text[::-1]


def appended(path: str, token: str) -> str:
    """Leave a trace outside the mesh: one line, written at once."""
    import os
    import time

    line = f"{time.time_ns() // 1000} {token} {os.getpid()}\n".encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line)
    os.close(descriptor)
    time.sleep(0.3)
    return token


def failing(text: str) -> str:
    """Fail as users' code fails."""
    raise ValueError(text)
