"""Notices: the documented answers of providers, files, and who may be asked."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flowmesh_cas.errors import UsageError
from flowmesh_node.notices import UNTOLD_S, ask, check_address, leaving_at_us, wait_for_notice

NOW = 1_700_000_000_000_000
SOON = NOW + int(UNTOLD_S * 1e6)
AT = 1_700_000_100_000_000  # 2023-11-14T22:15:00Z


@pytest.mark.parametrize(
    ("answer", "at_us"),
    [
        ("", 0),
        ("FALSE", 0),
        ("TRUE", SOON),
        ("90", NOW + 90_000_000),
        ('{"action": "terminate", "time": "2023-11-14T22:15:00Z"}', AT),
        ('{"action": "stop"}', SOON),
        ('{"DocumentIncarnation": 1, "Events": []}', 0),
        ('{"Events": [{"EventType": "Freeze", "NotBefore": "Tue, 14 Nov 2023 22:15:00 GMT"}]}', 0),
        ('{"Events": [{"EventType": "Preempt", "NotBefore": "Tue, 14 Nov 2023 22:15:00 GMT"}]}', AT),
        ('{"Events": [{"EventType": "Terminate", "NotBefore": ""}]}', SOON),
        ("<html>not found</html>", 0),
        ("[1, 2]", 0),
        ('{"Events": "none"}', 0),
    ],
)
def test_an_answer_tells_when_the_machine_goes(answer: str, at_us: int) -> None:
    assert leaving_at_us(answer, NOW) == at_us


class _Metadata(BaseHTTPRequestHandler):
    """Wants a token first, as AWS does."""

    def do_GET(self) -> None:
        has_token = self.headers.get("X-aws-ec2-metadata-token") == "t"
        self.send_response(200 if has_token else 401)
        self.end_headers()
        if has_token:
            self.wfile.write(b'{"action": "terminate", "time": "2023-11-14T22:15:00Z"}')

    def do_PUT(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"t")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_metadata_service_that_wants_a_token_is_asked_with_one() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/latest/meta-data/spot/instance-action"
        assert leaving_at_us(ask(url), NOW) == AT
    finally:
        server.shutdown()
        server.server_close()


def test_only_this_machine_and_its_link_are_asked_unless_more_is_allowed() -> None:
    check_address("http://127.0.0.1:8080/x", anywhere=False)
    check_address("http://169.254.169.254/latest/meta-data/spot/instance-action", anywhere=False)
    check_address("http://192.0.2.1/x", anywhere=True)
    for url in ("http://192.0.2.1/x", "https://127.0.0.1/x", "file:///etc/passwd"):
        with pytest.raises(UsageError):
            check_address(url, anywhere=False)


async def test_a_file_that_appears_is_a_notice(tmp_path: Path) -> None:
    asked: list[str] = []

    def nothing(url: str) -> str:
        asked.append(url)
        if len(asked) == 2:
            (tmp_path / "notice").write_text("60")
        return ""

    at_us = await wait_for_notice(tmp_path / "notice", "http://127.0.0.1/", poll_s=0.01, ask=nothing)
    assert at_us
    assert len(asked) == 2
