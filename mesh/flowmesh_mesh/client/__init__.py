"""The asynchronous client: ``async with connect() as mesh: run = await mesh.submit(workflow); await run.result()``."""

from flowmesh_mesh.client.mesh import Mesh, connect
from flowmesh_mesh.client.run import Run

__all__ = ["Mesh", "Run", "connect"]
