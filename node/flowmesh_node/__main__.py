"""``python -m flowmesh_node`` is ``flowmesh-node``."""

from flowmesh_node.cli import main

main()
