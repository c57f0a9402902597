"""``flow.delay``: a batch that takes a set time, shared by all that are in it, as on an engine. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable

from flowmesh_mesh.catalog import DelayParams
from flowmesh_node.operators.base import Batch, Emit, Produced, value
from flowmesh_node.operators.text import params_of


class Delay:
    """Runs flow.delay."""

    types: tuple[str, ...] = ("flow.delay",)

    def load(self, batch: Batch) -> None:
        """Do nothing: there is no model."""

    def run(self, batch: Batch, emit: Emit, log: Callable[[str], None]) -> None:
        """Sleep as long as the batch costs, then give every item its nonce, all at once as a batched engine does.

        Where the batch as such costs nothing, each item is given when its own time is over.
        """
        began = time.perf_counter()
        params = [params_of(item, DelayParams) for item in batch.items]
        if not params[0].batch_s:
            for index, each in enumerate(params):
                time.sleep(max(0.0, began + each.item_s * (index + 1) - time.perf_counter()))
                emit(index, Produced({"out": [value(each.nonce)]}, rows=1, exec_us=round(each.item_s * 1e6)))
            return
        time.sleep(params[0].batch_s + params[0].item_s * len(params))
        exec_us = round((time.perf_counter() - began) * 1e6 / len(params))
        for index, each in enumerate(params):
            emit(index, Produced({"out": [value(each.nonce)]}, rows=1, exec_us=exec_us))
