"""Keys, signatures, claims, credentials files and the keys of an embedded mesh."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_cas.errors import FlowmeshError, IntegrityError, NotFoundError, UsageError
from flowmesh_deploy.keyring import Keyring
from flowmesh_mesh import roles
from flowmesh_mesh.credentials import ACCOUNT, OPERATOR, USER, Credentials, Key, claims, is_account_key, issue, user_jwt, verify
from flowmesh_mesh.roles import check_node_name

HOSTILE_NAMES = ["*", ">", "a.b", "a b", "", "n1.>", "x" * 300, "-a", "a-", "ä", "a\n", "{{name()}}", "$SYS"]


@pytest.mark.parametrize(("kind", "letter"), [(OPERATOR, "O"), (ACCOUNT, "A"), (USER, "U")])
def test_keys_are_those_of_other_nats_tools(kind: int, letter: str) -> None:
    key = Key.new(kind)
    theirs = nkeys.from_seed(bytearray(key.seed.encode()))
    assert theirs.public_key.decode() == key.public_key
    assert key.public_key.startswith(letter)
    assert key.seed.startswith("S" + letter)
    assert theirs.sign(b"data") == key.sign(b"data")


@given(st.binary(max_size=200), st.binary(min_size=1, max_size=200))
def test_a_signature_holds_for_its_data_only(data: bytes, other: bytes) -> None:
    key = Key.new(USER)
    assert verify(key.public_key, data, key.sign(data))
    assert not verify(key.public_key, data + other, key.sign(data))
    assert not verify(Key.new(USER).public_key, data, key.sign(data))


@pytest.mark.parametrize("public_key", ["", "U", "UABC", "nonsense", "ä" * 56, "U" + "A" * 55])
def test_an_unreadable_key_verifies_nothing(public_key: str) -> None:
    assert not verify(public_key, b"data", b"s" * 64)


@pytest.mark.parametrize("signature", [b"", b"x", b"x" * 63, b"x" * 65])
def test_a_signature_of_the_wrong_length_is_none(signature: bytes) -> None:
    assert not verify(Key.new(USER).public_key, b"data", signature)


def test_a_changed_letter_in_a_seed_is_noticed() -> None:
    seed = Key.new(USER).seed
    changed = seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:]
    with pytest.raises(UsageError):
        Key(changed)


def test_an_account_key_is_told_from_other_text() -> None:
    assert is_account_key(Key.new(ACCOUNT).public_key)
    assert not is_account_key(Key.new(USER).public_key)
    assert not is_account_key("team-a")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_would_widen_a_right_is_never_signed(name: str) -> None:
    signer, user = Key.new(ACCOUNT), Key.new(USER)
    with pytest.raises(UsageError):
        user_jwt(signer, user.public_key, name, signer.public_key)
    with pytest.raises(UsageError):
        check_node_name(name)


@pytest.mark.parametrize("name", ["hub", "all", "scheduler", "scheduler-2", "watcher", "registrar"])
def test_a_node_cannot_bear_a_word_of_the_subjects(name: str) -> None:
    with pytest.raises(UsageError):
        check_node_name(name)


def test_credentials_come_back_from_their_file_which_only_the_owner_reads(tmp_path: Path) -> None:
    made = issue(Key.new(ACCOUNT), "n1", Key.new(ACCOUNT).public_key)
    path = tmp_path / "secret" / "n1.creds"
    made.save(path)
    found = Credentials.load(path)
    assert (found.jwt, found.seed, found.public_key) == (made.jwt, made.seed, made.public_key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["n1.creds"]


def test_credentials_tell_name_account_and_inbox() -> None:
    account = Key.new(ACCOUNT).public_key
    made = issue(Key.new(ACCOUNT), "n1", account)
    assert (made.name, made.account, made.inbox) == ("n1", account, "_INBOX_n1")


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN NATS USER JWT-----\nx.y\n-----BEGIN USER NKEY SEED-----\nSUA\n"])
def test_unreadable_credentials_are_a_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.creds"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        Credentials.load(path)
    assert caught.value.hint


def test_missing_credentials_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.creds"):
        Credentials.load(tmp_path / "none.creds")


def test_claims_are_signed_by_their_issuer() -> None:
    signer = Key.new(ACCOUNT)
    made = issue(signer, "n1", Key.new(ACCOUNT).public_key, expires_at_s=4_000_000_000)
    head, body, signature = made.jwt.split(".")
    import base64

    raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    found = claims(made.jwt)
    assert verify(signer.public_key, f"{head}.{body}".encode(), raw)
    assert (found["iss"], found["sub"], found["exp"]) == (signer.public_key, made.public_key, 4_000_000_000)


def test_keys_of_a_mesh_are_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "keyring.json"
    first = Keyring.open(path, "mesh-1")
    assert first.add_tenants(["team-a", "team-b", "team-a"]) == ["team-a", "team-b"]
    second = Keyring.open(path, "other")
    assert (second.mesh, second.mesh_account, second.tenants) == ("mesh-1", first.mesh_account, first.tenants)
    assert second.add_tenants(["team-a"]) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_one_bad_tenant_name_adds_none(tmp_path: Path) -> None:
    keyring = Keyring.open(tmp_path / "keyring.json", "m")
    with pytest.raises(UsageError):
        keyring.add_tenants(["good", "not.good"])
    assert keyring.tenants == {}
    with pytest.raises(UsageError, match="reserved"):
        keyring.add_tenants(["mesh"])


def test_damaged_keys_are_not_replaced_by_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "keyring.json"
    Keyring.open(path, "m")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(IntegrityError):
        Keyring.open(path, "m")


def test_no_secret_stands_in_the_configuration_of_the_broker(tmp_path: Path) -> None:
    keyring = Keyring.open(tmp_path / "keyring.json", "m")
    keyring.add_tenants(["team-a"])
    text = keyring.broker_config(tmp_path)
    secrets = [word for word in (tmp_path / "keyring.json").read_text().split('"') if word.startswith("S") and len(word) == 58]
    assert len(secrets) >= 8
    assert not [secret for secret in secrets if secret in text]


def test_a_role_without_subjects_may_nothing() -> None:
    role = roles.Role("x", "mesh", publish=(), subscribe=())
    assert role.template["pub"] == {"deny": [">"]}
    assert role.template["sub"] == {"deny": [">"]}


def test_errors_of_names_say_how_to_mend_them() -> None:
    with pytest.raises(FlowmeshError) as caught:
        check_node_name("a b")
    assert caught.value.hint
