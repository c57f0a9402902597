"""What makes two operators the same, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from flowmesh_cas.cid import DAG_CBOR, cid_from_digest, cid_of
from flowmesh_mesh.identity import batch_key, effect_salt, identity_record, operator_key, private_salt
from flowmesh_mesh.manifest import Operator, Ref


def generate(model: str = "wheel:a==1", **changes: Any) -> Operator:
    params = {"model": model, "prompt": "{{ q }}", "dtype": "float32", "seed": 1, **changes}
    return Operator(name="a", type="llm.generate", version=1, params=params, models={"model": model})


def content(data: bytes, *, chunker: bytes = b"one") -> Ref:
    return Ref("rows", cid_of(0x55, chunker + data), data.ljust(32, b"\0"), len(data))


def key(operator: Operator, *, rows: Ref | None = None, digest: str = "sha256:1", salt: bytes = b"") -> bytes:
    return operator_key(identity_record(operator, {"rows": [rows or content(b"x")]}, {"model": digest}, salt))


def test_the_identity_record_is_a_block_whose_digest_is_the_operator_key() -> None:
    record = identity_record(generate(), {}, {})
    assert cid_of(DAG_CBOR, record) == cid_from_digest(DAG_CBOR, operator_key(record))


def test_names_priorities_and_limits_do_not_change_the_key() -> None:
    other = Operator(
        name="b",
        type="llm.generate",
        version=1,
        params=generate().params,
        models={"model": "wheel:a==1"},
        priority=3,
        timeout_s=9,
    )
    assert key(generate()) == key(other)


def test_the_same_weights_by_another_reference_are_the_same_model() -> None:
    assert key(generate("wheel:a==1")) == key(generate("hf:org/a@main"))


def test_the_chunker_and_the_place_of_an_input_do_not_change_the_key() -> None:
    assert key(generate(), rows=content(b"x", chunker=b"one")) == key(generate(), rows=content(b"x", chunker=b"two"))


@pytest.mark.parametrize(
    "other",
    [
        key(generate(seed=2)),
        key(generate(), rows=content(b"y")),
        key(generate(), digest="sha256:2"),
        key(generate(), salt=private_salt(b"secret", "team-a")),
        key(generate(), salt=effect_salt("team-a", "run", "a")),
    ],
)
def test_what_changes_the_result_changes_the_key(other: bytes) -> None:
    assert key(generate()) != other


def test_private_salts_differ_by_tenant_and_by_secret() -> None:
    salts = {private_salt(b"one", "a"), private_salt(b"one", "b"), private_salt(b"two", "a")}
    assert len(salts) == 3


def test_operators_batch_when_model_adapter_and_engine_options_agree() -> None:
    def batch(operator: Operator, adapter: bytes = b"", digest: str = "sha256:1") -> str:
        inputs = {"adapter": [content(adapter)]} if adapter else {}
        return batch_key(operator, inputs, {"model": digest}, b"k" * 32)

    assert batch(generate(seed=1)) == batch(generate(seed=2, prompt="other"))
    assert (
        len({batch(generate()), batch(generate(dtype="bfloat16")), batch(generate(), b"lora"), batch(generate(), digest="s")})
        == 4
    )


def test_an_operator_that_does_not_batch_has_a_batch_key_of_its_own() -> None:
    train = Operator(name="t", type="train.dpo", version=1)
    assert batch_key(train, {}, {}, b"1" * 32) != batch_key(train, {}, {}, b"2" * 32)
