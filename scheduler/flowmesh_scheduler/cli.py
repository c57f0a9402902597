"""``flowmesh scheduler``: run one scheduler of a mesh; any number may run, one leads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def scheduler(
    folder: Annotated[Path, typer.Option("--dir", help="Folder with scheduler.json.")],
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
) -> None:
    """Run one scheduler; the others of the mesh stand by."""
    from flowmesh_scheduler.process import main

    main(["--dir", str(folder), *(["--verbose"] if verbose else [])])
