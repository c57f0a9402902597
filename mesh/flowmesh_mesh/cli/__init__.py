"""The ``flowmesh`` command line. Nothing heavy is imported before a command runs (``flowmesh --help`` must be instant)."""

from __future__ import annotations


def main() -> None:
    """Run the command line; exit codes stand in docs/cli.md."""
    from flowmesh_mesh.cli.app import app

    app()
