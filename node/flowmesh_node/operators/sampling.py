"""Draw the next token of one row from its own generator.

The draw of a row depends on its seed, its prompt's tokens, the number of the sample and of the token, and on the
logits: not on the batch, the order or the device. All of it is float64 on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256

import numpy
import numpy.typing

Logits = numpy.typing.NDArray[numpy.float32]


def stream(seed: int, tokens: Sequence[int], sample: int) -> bytes:
    """Return the name of the row's random stream, from its seed, its prompt's tokens and the sample's number."""
    head = b"flowmesh/draw/1" + seed.to_bytes(8, "big") + sample.to_bytes(8, "big")
    return sha256(head + numpy.asarray(tokens, dtype="<u4").tobytes()).digest()


def uniform(name: bytes, step: int) -> float:
    """Return number ``step`` of a stream, in [0, 1)."""
    return (int.from_bytes(sha256(name + step.to_bytes(8, "big")).digest()[:8], "big") >> 11) / 2**53


def draw(logits: Logits, temperature: float, top_p: float, u: float) -> int:
    """Return a token by inversion at ``u`` of the softmax at ``temperature``, cut to its ``top_p`` nucleus; 0 is greedy.

    ``logits`` has shape ``(vocabulary,)``. The first of equal logits wins.
    """
    if temperature == 0:
        return int(numpy.argmax(logits))
    scaled = logits.astype(numpy.float64) / temperature
    weights = numpy.exp(scaled - scaled.max())
    if top_p >= 1:
        return _inverted(weights, u)
    order = _nucleus(weights, top_p)
    return int(order[_inverted(weights[order], u)])


def _inverted(weights: numpy.typing.NDArray[numpy.float64], u: float) -> int:
    total = numpy.cumsum(weights)
    return min(int(numpy.searchsorted(total, u * total[-1], side="right")), len(weights) - 1)


def _nucleus(weights: numpy.typing.NDArray[numpy.float64], top_p: float) -> numpy.typing.NDArray[numpy.int64]:
    """Return the fewest tokens, likeliest first, that hold ``top_p`` of the weight; ties go by number."""
    wanted = top_p * float(weights.sum())
    size = min(len(weights), 256)
    while True:
        if size < len(weights):
            # Everything at least as heavy as the size-th heaviest, so that ties are not cut at random.
            floor = numpy.partition(weights, len(weights) - size)[len(weights) - size]
            heavy = numpy.flatnonzero(weights >= floor)
        else:
            heavy = numpy.arange(len(weights))
        order = heavy[numpy.argsort(-weights[heavy], kind="stable")]
        total = numpy.cumsum(weights[order])
        if total[-1] >= wanted or size >= len(weights):
            return order[: int(numpy.searchsorted(total, wanted, side="left")) + 1]
        size = min(len(weights), size * 8)


def log_softmax_at(logits: Logits, token: int) -> float:
    """Return the log-probability (nats) of a token under logits of shape ``(vocabulary,)``."""
    wide = logits.astype(numpy.float64)
    top = float(wide.max())
    return float(wide[token]) - top - math.log(float(numpy.exp(wide - top).sum()))
