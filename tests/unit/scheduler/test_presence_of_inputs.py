"""What a submission refers to must be here, and sound, when its run is accepted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from flowmesh_cas.cid import RAW, cid_of
from flowmesh_cas.pack_store import PackStore
from flowmesh_scheduler.intake import InputsAbsentError, Submission, rejection
from flowmesh_scheduler.requests import Requests

BLOCK = b"rows of a tenant" * 4096
ROOT = cid_of(RAW, BLOCK)


def requests_on(store: PackStore) -> Requests:
    return Requests(cast("Any", SimpleNamespace(hub=SimpleNamespace(store=store))))


async def test_a_content_whose_bytes_have_gone_bad_counts_as_absent(tmp_path: Any) -> None:
    store = PackStore(tmp_path / "store")
    store.put(RAW, BLOCK)
    requests, submission = requests_on(store), Submission("ta", "r", "msgpack", elsewhere=[ROOT])
    await requests._check_present(submission)
    (pack,) = (tmp_path / "store").rglob("*.pack")
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(bytes(data))
    with pytest.raises(InputsAbsentError) as refused:
        await requests._check_present(submission)
    assert rejection(refused.value)["absent"] is True
    store.close()
