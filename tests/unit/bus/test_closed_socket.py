"""A socket that the event loop has closed a moment ago: what is sent then is lost, and nothing breaks."""

from __future__ import annotations

from flowmesh_mesh.connection import Connection


class _Closed:
    """A transport as uvloop leaves it."""

    def write(self, _: bytes) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


async def test_sending_on_a_socket_that_was_just_closed_raises_nothing() -> None:
    connection = Connection()
    connection._status = Connection.CONNECTED
    connection._transport = _Closed()
    connection._pending = [b"PING\r\n"]
    connection.write_pending()
    assert connection._pending == []
