"""``python -m flowmesh_scheduler.sim``: the command line of the simulator by itself."""

import typer

from flowmesh_mesh.cli.failure import boundary
from flowmesh_scheduler.sim.cli import sim

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(boundary(sim))

if __name__ == "__main__":
    app()
