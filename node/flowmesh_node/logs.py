"""Lines that operators print: sent on as they come, within a rate, and kept up to a size for whoever asks later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flowmesh_mesh.clock import monotonic_s

LINES_PER_S = 200
KEPT_MAX_BYTES = 1024 * 1024
LINE_MAX_CHARS = 8192
SEND_DELAY_S = 0.05


class LineTap:
    """Takes the lines of one item. ``send`` gets them in groups; what is above the rate is counted, not sent."""

    def __init__(self, send: Callable[[tuple[str, ...]], None]) -> None:
        self._send = send
        self._waiting: list[str] = []
        self._allowance = float(LINES_PER_S)
        self._refilled_s = monotonic_s()
        self._left_out = 0
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._cut_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def line(self, text: str) -> None:
        """Take one line, without its end; a long one is sent in pieces."""
        text = text.rstrip("\r\n")
        self._keep(text)
        for begin in range(0, len(text) or 1, LINE_MAX_CHARS):
            self._pass_on(text[begin : begin + LINE_MAX_CHARS])

    def _pass_on(self, text: str) -> None:
        if self._is_over_rate():
            self._left_out += 1
            return
        if self._left_out:
            self._waiting.append(f"[{self._left_out} lines left out here: more than {LINES_PER_S} a second]")
            self._left_out = 0
        self._waiting.append(text)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SEND_DELAY_S, self.flush)

    def _keep(self, text: str) -> None:
        data = text.encode(errors="replace") + b"\n"
        room = KEPT_MAX_BYTES - self._kept_bytes
        if room > 0:
            self._kept.append(data[:room])
        self._kept_bytes = min(KEPT_MAX_BYTES, self._kept_bytes + len(data))
        self._cut_bytes += max(0, len(data) - room)

    def _is_over_rate(self) -> bool:
        now = monotonic_s()
        self._allowance = min(LINES_PER_S, self._allowance + (now - self._refilled_s) * LINES_PER_S)
        self._refilled_s = now
        if self._allowance < 1:
            return True
        self._allowance -= 1
        return False

    def flush(self) -> None:
        """Send what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._left_out:
            self._waiting.append(f"[{self._left_out} lines left out here: more than {LINES_PER_S} a second]")
            self._left_out = 0
        if self._waiting:
            lines, self._waiting = tuple(self._waiting), []
            self._send(lines)

    def kept(self) -> bytes:
        """Return the log as it is kept, with a note about what was cut; empty when nothing was printed."""
        note = f"\n[cut here: {self._cut_bytes} more bytes]\n".encode() if self._cut_bytes else b""
        return b"".join(self._kept) + note
