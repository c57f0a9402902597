"""Keys and signed claims: who may connect, as what, and who signed a result.

An nkey is an Ed25519 key in base32 with a letter that tells its kind: O operator, A account, U user (a seed begins
with S and that letter). Claims are JWTs signed with such keys: the operator signs accounts, an account or one of its
signing keys signs users. A signing key with a role is *scoped*: whoever it signs has exactly the rights of the role,
whatever their own claims say.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import nacl.exceptions
import nacl.signing

from flowmesh_cas.errors import NotFoundError, UsageError
from flowmesh_mesh.names import check_name

OPERATOR = 14 << 3
ACCOUNT = 0
USER = 20 << 3
_SEED = 18 << 3

_JWT_HEAD = base64.urlsafe_b64encode(b'{"typ":"JWT","alg":"ed25519-nkey"}').rstrip(b"=")
_JWT_BEGIN = "-----BEGIN NATS USER JWT-----"
_JWT_END = "------END NATS USER JWT------"
_SEED_BEGIN = "-----BEGIN USER NKEY SEED-----"
_SEED_END = "------END USER NKEY SEED------"


def _encode(body: bytes) -> str:
    """Return base32 of ``body`` and its checksum, as every nkey ends."""
    return base64.b32encode(body + binascii.crc_hqx(body, 0).to_bytes(2, "little")).rstrip(b"=").decode()


def _decode(text: str, what: str) -> bytes:
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"{what} is not a valid key", hint="Check that the key was copied completely.") from error
    body, checksum = raw[:-2], int.from_bytes(raw[-2:], "little")
    if len(body) < 33 or binascii.crc_hqx(body, 0) != checksum:
        raise UsageError(f"{what} is not a valid key", hint="Check that the key was copied completely.")
    return body


class Key:
    """A key pair. ``seed`` is the secret text, ``public_key`` the public one."""

    def __init__(self, seed: str) -> None:
        body = _decode(seed, "seed")
        if body[0] & 0xF8 != _SEED or len(body) != 34:
            raise UsageError(
                "seed is not a secret key", hint="A seed begins with S; what begins with another letter is a public key."
            )
        prefix = (body[0] & 7) << 5 | body[1] >> 3
        self.seed = seed
        self._signing = nacl.signing.SigningKey(body[2:])
        self.public_key = _encode(bytes([prefix]) + bytes(self._signing.verify_key))

    @classmethod
    def new(cls, kind: int) -> Key:
        """Make a key of ``kind`` (OPERATOR, ACCOUNT or USER)."""
        return cls(_encode(bytes([_SEED | kind >> 5, (kind & 31) << 3]) + os.urandom(32)))

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of ``data``."""
        signature: bytes = self._signing.sign(data).signature
        return signature


@functools.lru_cache(maxsize=4096)
def _verify_key(public_key: str) -> nacl.signing.VerifyKey:
    body = _decode(public_key, "public key")
    if len(body) != 33:
        raise UsageError("public key is not a valid key", hint="A public key has 56 characters.")
    return nacl.signing.VerifyKey(body[1:])


def verify(public_key: str, data: bytes, signature: bytes) -> bool:
    """Tell whether ``signature`` over ``data`` was made with the key behind ``public_key``; False for an unreadable key too."""
    try:
        _verify_key(public_key).verify(data, signature)
    except (nacl.exceptions.BadSignatureError, nacl.exceptions.ValueError, UsageError, ValueError):
        return False
    return True


def is_account_key(text: str) -> bool:
    """Tell whether ``text`` is the public key of an account."""
    try:
        body = _decode(text, "account")
    except UsageError:
        return False
    return text.startswith("A") and len(body) == 33


class Credentials:
    """A user's claims and secret: what a process needs to connect, and to sign."""

    def __init__(self, jwt: str, seed: str) -> None:
        self.jwt = jwt
        self.seed = seed
        self._key = Key(seed)

    @property
    def public_key(self) -> str:
        return self._key.public_key

    @property
    def name(self) -> str:
        """The name that was signed: a node's or a tenant's."""
        return str(claims(self.jwt)["name"])

    @property
    def account(self) -> str:
        """Public key of the account that the user belongs to."""
        body = claims(self.jwt)
        return str(body["nats"].get("issuer_account") or body["iss"])

    @property
    def inbox(self) -> str:
        """The inbox prefix on which a user of this name may listen."""
        return f"_INBOX_{self.name}"

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of ``data``."""
        return self._key.sign(data)

    def text(self) -> str:
        """Return the form in which every NATS tool reads credentials."""
        return f"{_JWT_BEGIN}\n{self.jwt}\n{_JWT_END}\n\n{_SEED_BEGIN}\n{self.seed}\n{_SEED_END}\n"

    @classmethod
    def parse(cls, text: str) -> Credentials:
        """Read the form of :meth:`text`; raise UsageError when a part is missing."""
        lines = [line.strip() for line in text.splitlines()]
        try:
            jwt = lines[lines.index(_JWT_BEGIN) + 1]
            seed = lines[lines.index(_SEED_BEGIN) + 1]
            claims(jwt)
        except (ValueError, IndexError) as error:
            raise UsageError(
                "unreadable credentials", hint="A credentials file holds a user JWT and a seed, as `flowmesh up` writes it."
            ) from error
        return cls(jwt, seed)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Credentials:
        """Read a credentials file; raise NotFoundError or UsageError."""
        try:
            return cls.parse(Path(path).read_text())
        except OSError as error:
            raise NotFoundError(
                f"cannot read the credentials {os.fspath(path)}: {error.strerror}", hint="Start the mesh with `flowmesh up`."
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a credentials file that only its owner can read."""
        write_secret(path, self.text())


def write_secret(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to a file of mode 0600, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(target)


# --- claims


def claims(jwt: str) -> dict[str, Any]:
    """Return the claims of a JWT without checking its signature; raise ValueError when unreadable."""
    parts = jwt.split(".")
    if len(parts) != 3:
        raise ValueError("a JWT has three parts")
    body: dict[str, Any] = msgspec.json.decode(
        base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)), type=dict[str, Any]
    )
    return body


def sign_claims(body: dict[str, Any], signer: Key) -> str:
    """Return the JWT of ``body``, issued now by ``signer``."""
    issued = {"iat": int(time.time()), "iss": signer.public_key, **body}
    issued["jti"] = base64.b32encode(hashlib.sha256(msgspec.json.encode(issued)).digest()).rstrip(b"=").decode()
    head = _JWT_HEAD + b"." + base64.urlsafe_b64encode(msgspec.json.encode(issued)).rstrip(b"=")
    return (head + b"." + base64.urlsafe_b64encode(signer.sign(head)).rstrip(b"=")).decode()


_NO_LIMITS = {"subs": -1, "data": -1, "payload": -1}


def operator_jwt(operator: Key, name: str, system_account: str) -> str:
    """Return the operator's claims, signed by itself."""
    nats = {"type": "operator", "version": 2, "system_account": system_account}
    return sign_claims({"sub": operator.public_key, "name": check_name(name, "mesh"), "nats": nats}, operator)


def account_jwt(
    operator: Key,
    account: str,
    name: str,
    *,
    has_jetstream: bool = False,
    exports: list[dict[str, Any]] | None = None,
    imports: list[dict[str, Any]] | None = None,
    scopes: list[dict[str, Any]] | None = None,
    revocations: dict[str, int] | None = None,
) -> str:
    """Return an account's claims, signed by the operator. ``revocations`` maps user keys to a time in seconds."""
    limits: dict[str, Any] = {**_NO_LIMITS, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    if has_jetstream:
        limits |= {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "max_ack_pending": -1}
    nats: dict[str, Any] = {
        "type": "account",
        "version": 2,
        "limits": limits,
        "exports": exports or [],
        "imports": imports or [],
        "signing_keys": scopes or [],
        "default_permissions": {"pub": {}, "sub": {}},
    }
    if revocations:
        nats["revocations"] = revocations
    return sign_claims({"sub": account, "name": check_name(name, "account"), "nats": nats}, operator)


def user_jwt(signer: Key, user: str, name: str, account: str, *, expires_at_s: int = 0) -> str:
    """Return the claims of a user in a role: ``signer`` is the scoped key of the role, which holds all rights.

    ``name`` is checked before it is signed: the broker pastes it into the role's subjects.
    """
    nats: dict[str, Any] = {"type": "user", "version": 2, "issuer_account": account}
    body: dict[str, Any] = {"sub": user, "name": check_name(name, "user"), "nats": nats}
    if expires_at_s:
        body["exp"] = expires_at_s
    return sign_claims(body, signer)


def scope(signing_key: str, role: str, template: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of an account that binds a signing key to the rights of a role (flowmesh_mesh.roles)."""
    return {"kind": "user_scope", "key": signing_key, "role": role, "template": template}


def issue(signer: Key, name: str, account: str, *, expires_at_s: int = 0) -> Credentials:
    """Make a new user key and return its credentials in the role of ``signer``."""
    user = Key.new(USER)
    return Credentials(user_jwt(signer, user.public_key, name, account, expires_at_s=expires_at_s), user.seed)
