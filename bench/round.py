"""One round of one peer, in a process of its own: ``python -m bench.round PEER WORKLOADS SCALE SEED FILE``.

Figures go to FILE as JSON lines, because engines print to standard output as they please.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from bench.workloads import WORKLOADS, Peer

PEERS = ("flowmesh", "raw", "ray", "ray-actor")


def make_peer(name: str) -> Peer:
    """Return the peer of that name; imports only what that peer needs."""
    if name == "raw":
        from bench.raw import Raw

        return Raw()
    if name == "ray":
        from bench.ray_tasks import RayTasks

        return RayTasks()
    if name == "ray-actor":
        from bench.ray_tasks import RayActors

        return RayActors()
    if name == "flowmesh":
        from bench.flowmesh import FlowMesh

        return FlowMesh()
    raise SystemExit(f"unknown peer {name!r}; known: {', '.join(PEERS)}")


def main(peer_name: str, workloads: str, scale: str, seed: str, path: str) -> None:
    """Run the named workloads once."""
    peer = make_peer(peer_name)
    with Path(path).open("w", encoding="utf-8") as file:
        try:
            peer.start()
            for number, name in enumerate(workloads.split(",")):
                for figure in WORKLOADS[name].run(peer, float(scale), int(seed) * 10 + number):
                    file.write(json.dumps(asdict(figure)) + "\n")
                    file.flush()
        finally:
            peer.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
