"""The command tree: one line per command, and a group that imports a command's module only when it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from flowmesh_mesh.cli.failure import boundary

_CLI = "flowmesh_mesh.cli"
_PLUGINS = "flowmesh.commands"

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("", "Start a mesh on this machine: broker, scheduler, nodes."),
    "down": ("", "Stop the mesh that `up` started."),
    "validate": (f"{_CLI}.workflows:validate", "Check a workflow; tell everything that is wrong with it."),
    "plan": (f"{_CLI}.plan:plan", "Tell what a workflow would take, before it is submitted."),
    "submit": (f"{_CLI}.workflows:submit", "Submit a workflow and return once the mesh has accepted it."),
    "ls": (f"{_CLI}.runs:ls", "List runs, newest first."),
    "status": (f"{_CLI}.meshes:status", "Show leader, nodes, queues and runs."),
    "nodes": (f"{_CLI}.meshes:nodes", "Show nodes with devices, load and models held."),
    "costs": (f"{_CLI}.costs:costs", "Show what running costs, as learned: predicted against measured."),
    "show": (f"{_CLI}.runs:show", "Show one run with its operators and outputs."),
    "why": (f"{_CLI}.why:why", "Tell why an operator runs where it does, or why it waits."),
    "watch": (f"{_CLI}.runs:watch", "Follow a run to its end."),
    "logs": (f"{_CLI}.runs:logs", "Print what operators printed."),
    "get": (f"{_CLI}.contents:get", "Write results, or any content by CID, into a folder."),
    "lineage": (f"{_CLI}.contents:lineage", "Show what led to a result: operators, inputs, models."),
    "cancel": (f"{_CLI}.runs:cancel", "End a run."),
    "audit": (f"{_CLI}.audit:audit", "Compare what the mesh should have with what it has; repair it."),
    "cordon": (f"{_CLI}.cordons:cordon", "Give a node no new work."),
    "uncordon": (f"{_CLI}.cordons:uncordon", "Give a node work again."),
    "unquarantine": (f"{_CLI}.cordons:unquarantine", "Let an operator be tried again that took nodes with it."),
    "replay": ("", "Run a recorded event log through the scheduler's core."),
    "sim": ("", "Compare scheduling policies in a simulator, over made-up fleets and workloads."),
    "doctor": ("", "Check a mesh: what is wrong or soon will be, and how to mend it."),
    "broker": ("", "Run brokers on machines of your own: one, or a cluster of three."),
    "scheduler": ("", "Run a scheduler (leader or standby)."),
    "version": (f"{_CLI}.meshes:version", "Show versions."),
}
"""Name -> (module:function, one line of help). Empty: the command of another component, found by its entry point."""


class LazyGroup(TyperGroup):
    """Knows the names and one line of help of every command, and loads the rest of the one that is run."""

    _is_listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        known = _plugins()
        own = [name for name, (target, _) in COMMANDS.items() if target or name in known]
        return own + sorted(name for name in known if name not in COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self._is_listing and cmd_name in COMMANDS:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1])
        target = COMMANDS.get(cmd_name, ("", ""))[0] or _plugins().get(cmd_name, "")
        return _load(cmd_name, target) if target else None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._is_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._is_listing = False


@functools.cache
def _plugins() -> dict[str, str]:
    """Return the commands that other components bring: name -> module:function."""
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in entry_points(group=_PLUGINS)}


@functools.cache
def _load(name: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: Callable[..., Any] | typer.Typer = getattr(import_module(module), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name=name, help=None if found.__doc__ else COMMANDS.get(name, ("", ""))[1])(boundary(found))
    return typer.main.get_command(single)


# Plain help at the root: drawing it with Rich doubles the time that `flowmesh --help` takes.
app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        typer.echo(f"flowmesh {version('flowmesh-nats')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A peer-to-peer worker mesh for LLM workflows. Begin with `flowmesh up`."""
