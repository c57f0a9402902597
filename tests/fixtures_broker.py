"""Real brokers for tests: one per test, on a free port and a temporary folder, with the credentials of a real mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from flowmesh_deploy.broker import Broker
from flowmesh_deploy.keyring import Keyring
from flowmesh_mesh import streams
from flowmesh_mesh.bus import Bus
from flowmesh_mesh.credentials import Credentials

TENANTS = ("team-a", "team-b")


class MeshBroker:
    """A broker with keys and two tenants; connections made here are closed at the end of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keyring = Keyring.open(folder / "keys" / "keyring.json", "test")
        self.keyring.add_tenants(list(TENANTS))
        self.broker = Broker(folder / "broker", security=self.keyring.broker_config(folder / "accounts"))
        self.stack = AsyncExitStack()

    @property
    def url(self) -> str:
        return self.broker.url

    def account(self, tenant: str) -> str:
        """Return the account key of a tenant."""
        return self.keyring.tenants[tenant]

    async def connect(self, credentials: Credentials, **options: object) -> Bus:
        """Connect with ``credentials``."""
        found: dict[str, object] = {"name": credentials.name, "inbox": credentials.inbox, **options}
        bus = await Bus.connect(self.url, credentials, **found)  # type: ignore[arg-type]
        self.stack.push_async_callback(bus.close)
        return bus

    async def scheduler(self, **options: object) -> Bus:
        """Connect in the role scheduler."""
        return await self.connect(self.keyring.scheduler(), **options)

    async def node(self, name: str, **options: object) -> Bus:
        """Connect as a node."""
        return await self.connect(self.keyring.node(name), **options)

    async def client(self, tenant: str, **options: object) -> Bus:
        """Connect as a tenant's client."""
        return await self.connect(self.keyring.client(tenant), **options)

    async def watcher(self, **options: object) -> Bus:
        """Connect as the watcher of connections."""
        return await self.connect(self.keyring.watcher(), **options)


async def make_streams(bus: Bus, now_ms: int = 1_000_000) -> None:
    """Create every stream of a mesh."""
    for config in streams.mesh_streams(now_ms):
        await bus.ensure_stream(config)


@pytest.fixture
def broker_process(tmp_path: Path) -> Iterator[MeshBroker]:
    """A started broker, for tests that stop and start it themselves."""
    mesh = MeshBroker(tmp_path)
    mesh.broker.start()
    try:
        yield mesh
    finally:
        mesh.broker.stop(budget_s=1.0)


@pytest_asyncio.fixture
async def broker(broker_process: MeshBroker) -> AsyncIterator[MeshBroker]:
    """A started broker whose connections are closed at the end."""
    async with broker_process.stack:
        yield broker_process


@pytest_asyncio.fixture
async def mesh_broker(broker: MeshBroker) -> MeshBroker:
    """A started broker that has the streams of a mesh."""
    await make_streams(await broker.scheduler())
    return broker
