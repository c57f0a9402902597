"""``flowmesh broker init``, ``join``, ``invite`` and ``run``: brokers on machines of your own, one or three."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowmesh_mesh.cli.failure import boundary

if TYPE_CHECKING:
    from flowmesh_deploy.broker import Broker
    from flowmesh_deploy.membership import Member

app = typer.Typer(
    help="Run brokers on machines of your own: one, or a cluster of three.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

STOP_S = 10.0

_Folder = Annotated[Path, typer.Option("--dir", metavar="DIR", help="Folder of this broker.")]
_Listen = Annotated[str, typer.Option("--listen", metavar="HOST", help="Address to listen on; else that of the broker.")]
_Store = Annotated[str, typer.Option("--store", metavar="DIR", help="Folder of the streams; else inside --dir.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
_DEFAULT = Path("flowmesh-broker")


def init(
    addresses: Annotated[
        list[str], typer.Argument(metavar="HOST[:PORT[:CLUSTER_PORT]]...", help="Where the brokers are; the first is here.")
    ],
    folder: _Folder = _DEFAULT,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the mesh.")] = "flowmesh",
    tenants: Annotated[str, typer.Option("--tenants", metavar="A,B", help="Tenants to make credentials for.")] = "",
    nodes: Annotated[str, typer.Option("--nodes", metavar="A,B", help="Nodes to make join files for.")] = "",
    schedulers: Annotated[
        int, typer.Option("--schedulers", min=1, max=9, metavar="N", help="Schedulers to make folders for.")
    ] = 1,
    listen: _Listen = "",
    store: _Store = "",
    as_json: _AsJson = False,
) -> None:
    """Make the keys of a mesh and this machine's broker; say what to do on the other machines."""
    from flowmesh_deploy import membership
    from flowmesh_deploy.layout import DEFAULT_TENANTS

    member = membership.init(
        folder,
        [membership.parse_address(address) for address in addresses],
        mesh=name,
        tenants=_words(tenants) or DEFAULT_TENANTS,
        nodes=_words(nodes),
        schedulers=schedulers,
        listen=listen,
        store=store,
    )
    _tell(member, folder, _words(nodes), schedulers, as_json=as_json)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _tell(member: Member, folder: Path, nodes: list[str], schedulers: int, *, as_json: bool) -> None:
    from flowmesh_deploy.membership import join_file

    others = {name: address for name, address in member.members.items() if name != member.name}
    if as_json:
        import json

        joins = {name: str(join_file(folder, name)) for name in others}
        print(json.dumps({"mesh": member.mesh, "urls": member.urls, "dir": str(folder), "joins": joins}))
        return
    print(f"mesh {member.mesh}: keys in {folder / 'keys'}, which must not leave this machine")
    print("here:")
    print(f"  flowmesh broker run --dir {folder}")
    for name, address in others.items():
        print(
            f"on {address.host}, with {join_file(folder, name)} copied there by a safe way (it holds the secret of the cluster):"
        )
        print(f"  flowmesh broker join {name}.join --dir {folder.name} && flowmesh broker run --dir {folder.name}")
    print("then, where schedulers and nodes shall run:")
    for number in range(1, schedulers + 1):
        print(f"  flowmesh scheduler --dir {folder / 'schedulers' / f'scheduler-{number}'}")
    for node in nodes:
        print(f"  flowmesh-node join {folder / 'nodes' / f'{node}.join'}")
    print(f"clients: --context {folder / 'context.json'}")
    if others:
        print("The brokers talk without TLS: let only them reach one another's second port, by a private network or a tunnel.")


def join(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Join file that `broker init` or `broker invite` wrote.")],
    folder: _Folder = _DEFAULT,
    listen: _Listen = "",
    store: _Store = "",
) -> None:
    """Make this machine's broker of a cluster from its join file."""
    from flowmesh_deploy import membership

    member = membership.join(file, folder, listen=listen, store=store)
    print(f"{member.name} of mesh {member.mesh}; next: flowmesh broker run --dir {folder}")


def invite(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Other brokers of the cluster; else all.")
    ] = None,
    folder: _Folder = _DEFAULT,
    nodes: Annotated[str, typer.Option("--nodes", metavar="A,B", help="Nodes to make join files for, instead.")] = "",
) -> None:
    """Write join files anew: of the other brokers, or of nodes."""
    from flowmesh_deploy import membership

    wanted = _words(nodes)
    for path in [membership.write_node(folder, node) for node in wanted] if wanted else membership.invite(folder, names or ()):
        print(path)


def run(
    folder: _Folder = _DEFAULT,
    stop_s: Annotated[
        float, typer.Option("--stop", min=0.0, metavar="S", help="Seconds that SIGTERM and Ctrl-C wait before they kill.")
    ] = STOP_S,
) -> None:
    """Run this machine's broker in the foreground until SIGTERM or Ctrl-C."""
    from flowmesh_deploy import membership

    member = membership.load(folder)
    broker = membership.broker(member, folder)
    try:
        _run(broker, member, stop_s)
    finally:
        broker.stop(stop_s)


def _run(broker: Broker, member: Member, stop_s: float) -> None:
    import signal

    from flowmesh_cas.errors import TransientError

    stops, passed = {signal.SIGTERM, signal.SIGINT}, {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    watched = {*stops, *passed, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        broker.start()
        assert broker.child is not None
        print(f"{member.name} of mesh {member.mesh} listens at {member.address.url}, log in {broker.log}", flush=True)
        while broker.child.poll() is None:
            received = signal.sigwaitinfo(watched).si_signo
            if received in stops:
                print("stopping", file=sys.stderr)
                return
            if received in passed and broker.child.poll() is None:
                broker.child.send_signal(received)
        if broker.child.returncode:
            raise TransientError(f"the broker ended with status {broker.child.returncode}", hint=f"Look into {broker.log}.")
    finally:
        broker.stop(stop_s)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)


for _command in (init, join, invite, run):
    app.command(name=_command.__name__)(boundary(_command))
