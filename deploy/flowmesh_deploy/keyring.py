"""The keys of an embedded mesh: made once, kept in one file that only its owner reads, and used to sign everything else."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flowmesh_cas.errors import IntegrityError, UsageError
from flowmesh_mesh import roles
from flowmesh_mesh.credentials import ACCOUNT, OPERATOR, Credentials, Key, account_jwt, issue, operator_jwt, scope, write_secret
from flowmesh_mesh.names import check_name

_RESERVED_TENANTS = frozenset({"mesh", "system"})


def check_tenant_name(name: str) -> str:
    """Return ``name`` if a tenant may bear it; raise UsageError otherwise."""
    check_name(name, "tenant")
    if name in _RESERVED_TENANTS:
        raise UsageError(f"tenant name {name!r} is reserved", hint="Choose another name.")
    return name


class _TenantSeeds(msgspec.Struct, frozen=True):
    account: str
    client: str


class _Seeds(msgspec.Struct):
    mesh: str
    operator: str
    system_account: str
    mesh_account: str
    roles: dict[str, str]
    tenants: dict[str, _TenantSeeds] = {}


class BrokerClaims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Operator and accounts as a broker is told of them: signed, public."""

    operator: str
    system_account: str
    accounts: dict[str, str]
    """Public key of an account -> its claims."""

    def config(self, resolver: Path) -> str:
        """Return the part of the broker's configuration that names them; ``resolver`` is where the broker keeps accounts."""
        preload = "\n".join(f'  {account}: "{jwt}"' for account, jwt in self.accounts.items())
        folder = msgspec.json.encode(str(resolver)).decode()
        return (
            f'operator: "{self.operator}"\n'
            f"system_account: {self.system_account}\n"
            f'resolver {{ type: full, dir: {folder}, allow_delete: true, interval: "2m" }}\n'
            f"resolver_preload: {{\n{preload}\n}}\n"
        )


class Keyring:
    """Operator, accounts and the signing key of each role. Seeds stay in ``path``; only what is signed leaves."""

    def __init__(self, path: Path, seeds: _Seeds) -> None:
        self._path = path
        self._seeds = seeds
        self._operator = Key(seeds.operator)
        self.mesh = seeds.mesh
        self.system_account = Key(seeds.system_account).public_key
        self.mesh_account = Key(seeds.mesh_account).public_key
        self._roles = {name: Key(seed) for name, seed in seeds.roles.items()}
        self._tenants = {name: (Key(entry.account).public_key, Key(entry.client)) for name, entry in seeds.tenants.items()}

    @classmethod
    def open(cls, path: Path, mesh: str) -> Keyring:
        """Read the keys, or make them when there are none; raise IntegrityError when the file is damaged."""
        if path.exists():
            try:
                found = cls(path, msgspec.json.decode(path.read_bytes(), type=_Seeds))
                found._add_roles()
                return found
            except (msgspec.DecodeError, UsageError) as error:
                raise IntegrityError(
                    f"the keys in {path} are damaged: {error}", hint="Restore the file, or begin anew in another folder."
                ) from error
        seeds = _Seeds(
            mesh=check_name(mesh, "mesh"),
            operator=Key.new(OPERATOR).seed,
            system_account=Key.new(ACCOUNT).seed,
            mesh_account=Key.new(ACCOUNT).seed,
            roles={},
        )
        keyring = cls(path, seeds)
        keyring._add_roles()
        return keyring

    def _add_roles(self) -> None:
        """Make signing keys for roles that have none: those of a later release have none in the file of an earlier one."""
        fresh = [role.name for role in roles.ROLES if role.account != "tenant" and role.name not in self._roles]
        for name in fresh:
            key = Key.new(ACCOUNT)
            self._seeds.roles[name] = key.seed
            self._roles[name] = key
        if fresh:
            self._save()

    def _save(self) -> None:
        write_secret(self._path, msgspec.json.format(msgspec.json.encode(self._seeds), indent=2).decode() + "\n")

    @property
    def tenants(self) -> dict[str, str]:
        """Name and account key of every tenant."""
        return {name: account for name, (account, _) in self._tenants.items()}

    def add_tenants(self, names: list[str]) -> list[str]:
        """Make accounts for tenants that have none; return their names. All names are checked before any is added."""
        for name in names:
            check_tenant_name(name)
        fresh = [name for name in dict.fromkeys(names) if name not in self._tenants]
        for name in fresh:
            account, client = Key.new(ACCOUNT), Key.new(ACCOUNT)
            self._seeds.tenants[name] = _TenantSeeds(account.seed, client.seed)
            self._tenants[name] = (account.public_key, client)
        if fresh:
            self._save()
        return fresh

    # --- what is signed

    def node(self, name: str) -> Credentials:
        """Return new credentials of a node; raise UsageError for a name that must not be signed."""
        return issue(self._roles["node"], roles.check_node_name(name), self.mesh_account)

    def scheduler(self) -> Credentials:
        """Return new credentials of the scheduler."""
        return issue(self._roles["scheduler"], "scheduler", self.mesh_account)

    def watcher(self) -> Credentials:
        """Return new credentials that see connections come and go, and nothing else."""
        return issue(self._roles["watcher"], "watcher", self.system_account)

    def registrar(self) -> Credentials:
        """Return new credentials that may hand accounts to the broker."""
        return issue(self._roles["registrar"], "registrar", self.system_account)

    def inspector(self) -> Credentials:
        """Return new credentials that may ask the brokers how they are."""
        return issue(self._roles["inspector"], "inspector", self.system_account)

    def client(self, tenant: str) -> Credentials:
        """Return new credentials of a tenant's client."""
        account, key = self._tenants[tenant]
        return issue(key, tenant, account)

    def tenant_jwt(self, tenant: str) -> str:
        """Return the claims of a tenant's account."""
        account, key = self._tenants[tenant]
        return account_jwt(
            self._operator,
            account,
            tenant,
            imports=roles.tenant_imports(self.mesh_account, account),
            scopes=[scope(key.public_key, roles.CLIENT.name, roles.CLIENT.template)],
        )

    def _scopes(self, account: str) -> list[dict[str, object]]:
        return [
            scope(self._roles[role.name].public_key, role.name, role.template) for role in roles.ROLES if role.account == account
        ]

    def claims(self) -> BrokerClaims:
        """Return what every broker of the mesh must know; it holds no secret."""
        accounts = {
            self.system_account: account_jwt(self._operator, self.system_account, "system", scopes=self._scopes("system")),
            self.mesh_account: account_jwt(
                self._operator,
                self.mesh_account,
                "mesh",
                has_jetstream=True,
                exports=roles.mesh_exports(),
                scopes=self._scopes("mesh"),
            ),
            **{account: self.tenant_jwt(name) for name, account in self.tenants.items()},
        }
        return BrokerClaims(operator_jwt(self._operator, self.mesh, self.system_account), self.system_account, accounts)

    def broker_config(self, resolver: Path) -> str:
        """Return the part of the broker's configuration that names operator and accounts; it holds no secret."""
        return self.claims().config(resolver)
