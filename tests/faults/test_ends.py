"""How a server ends while clients are in the middle of something."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

from tests.faults.faulty import serving
from tests.faults.test_client_faults import posted
from tests.server.api.running import until


def unread(port: int) -> int:
    """Bytes that have come to the server at this port, and that it has not read yet."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(
        int(queues.split(":")[1], 16) for _, local, _, _, queues, *_ in lines if int(local.split(":")[1], 16) == port
    )


def test_half_a_body_and_a_signal(checkpoint: str, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, "--shutdown-timeout", "20") as server:
        with (
            posted(server, b'{"prompt": ', length=1000) as half,
            posted(server, b" " * 200_000, length=300_000) as large,
            socket.create_connection(("127.0.0.1", server.port)) as silent,
        ):
            until(lambda: server.http.get("/load").status_code == 200)
            # Of whom nothing was read when it ends, it knows no request.
            until(lambda: unread(server.port) == 0)
            server.http.close()
            server.process.send_signal(signal.SIGTERM)
            # They need not be waited for: what they ask could not be taken any more.
            for sock in (half, large):
                sock.settimeout(10)
                answer = b"".join(iter(lambda sock=sock: sock.recv(65536), b""))  # type: ignore[misc]
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after" in head
                assert json.loads(body)["error"]["code"] == "draining"
            silent.settimeout(10)
            assert silent.recv(1) == b""
            assert server.process.wait(10) == 0
        assert "Traceback" not in server.log()
