"""What clients do to a server: leave, do not read, send too much, come all at once."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.faulty import SAFE, Server, ask, assert_one_end, run, serving
from tests.server.api.running import until

JSON = {"content-type": "application/json"}
LONG = {"prompt": "a", "max_tokens": 4000, **SAFE}


@pytest.fixture(scope="module")
def server(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Every pass takes a little, so that there is time to leave.
    folder = Path(tmp_path_factory.mktemp("clients"))
    with serving(checkpoint, folder, "--max-waiting", "64", pause=0.002, reader_seconds=1.0) as server:
        yield server


@contextmanager
def posted(
    server: Server, body: bytes, *, length: int | None = None, receive: int | None = None
) -> Iterator[socket.socket]:
    """A connection on which `body` was sent; `receive` is the size of its receive buffer."""
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {length or len(body)}"
    with socket.socket() as sock:
        if receive is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(head.encode() + b"\r\n\r\n" + body)
        yield sock


def encoded(**more: Any) -> bytes:
    return json.dumps({**LONG, **more}).encode()


def aborted(server: Server) -> float:
    return server.metrics().get('fastblt_requests_aborted_total{cause="client_left"}', 0.0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["queued", "before the first byte", "mid-stream"])
def test_clients_that_leave(server: Server, moment: str, stream: bool) -> None:
    before = aborted(server)
    with ExitStack() as others:
        if moment == "queued":
            for _ in range(16):
                others.enter_context(posted(server, encoded(stream=True)))
            until(lambda: server.metrics()["fastblt_num_requests_running"] == 16)
        # A long prompt is read in chunks before anything comes of it.
        prompt = "x" * 3500 if moment == "before the first byte" else "x"
        body = encoded(prompt=prompt, max_tokens=500, stream=stream)
        with posted(server, body) as sock:
            if moment == "queued":
                until(lambda: server.metrics()["fastblt_num_requests_waiting"] == 1)
            else:
                until(lambda: server.metrics()["fastblt_num_requests_running"] == 1)
            if moment == "mid-stream" and stream:
                data = b""
                while data.count(b"data: ") < 3:
                    data += sock.recv(4096)
        until(lambda: aborted(server) == before + 1)
        if moment == "queued":
            # The others did not notice.
            assert server.metrics()["fastblt_num_requests_running"] == 16
    server.assert_sound()


def test_a_client_that_reads_nothing(server: Server) -> None:
    body = encoded(prompt=["a"] * 8, stream=True, logprobs=20, max_tokens=1500)
    memory = server.memory()
    with posted(server, body, receive=4096) as sock:
        until(lambda: server.metrics()["fastblt_num_requests_running"] == 8)
        # It holds up nobody,
        assert assert_one_end(run(*(ask(server, prompt="b", stream=True) for _ in range(8)))) == {"length": 8}
        # it costs no more than its requests' outputs,
        assert server.memory() - memory < 100e6
        # and after a while the connection is cut.
        until(lambda: _cut(sock))
    server.assert_sound()


def _cut(sock: socket.socket) -> bool:
    try:
        # Nothing is read: the error is that of the connection.
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or sock.send(b" ") == 0
    except OSError:
        return True


def test_bodies_of_no_use(server: Server) -> None:
    deep = b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    nested = b'{"a": ' * 10_000 + b"1" + b"}" * 10_000
    for body in (deep, nested, b'{"prompt": "a", "decoding": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"):
        answer = server.http.post("/v1/completions", content=body, headers=JSON)
        assert answer.status_code == 400 and len(answer.content) < 1000, answer.text
    for content in (b"x" * 50_000_000, (b"x" * 1_000_000 for _ in range(50))):
        # Announced, or in chunks; the server may close before all is sent.
        with suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            answer = server.http.post("/v1/completions", content=content, headers=JSON)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    # A body that never ends, and one that is shorter than it says.
    for length in (10**12, 1000):
        with posted(server, b'{"prompt": "a"', length=length):
            pass
    server.assert_sound()


def test_headers_of_no_use(server: Server) -> None:
    for lines in (b"x: " + b"y" * 10_000_000, b"\r\n".join(b"h%d: 1" % i for i in range(100_000))):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock, suppress(ConnectionError):
            sock.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n\r\n")
            assert sock.recv(100).split(b" ")[1] in (b"400", b"431")
    server.assert_sound()


def test_two_thousand_connections(server: Server) -> None:
    async def visit(number: int, opened: asyncio.Semaphore) -> int:
        async with opened:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps({"prompt": f"p{number}", "max_tokens": 2, **SAFE}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
        writer.write(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        data = await reader.read()
        writer.close()
        return int(data.split(b" ")[1])

    async def all_at_once() -> list[int]:
        opened = asyncio.Semaphore(200)
        return await asyncio.gather(*(visit(number, opened) for number in range(2000)))

    rejected = 'fastblt_requests_rejected_total{cause="queue_full"}'
    before, ended = server.metrics().get(rejected, 0.0), server.ended()["length"]
    statuses = asyncio.run(all_at_once())
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 64
    # Whoever was taken got an answer, and whoever was not is in the metric.
    assert server.metrics().get(rejected, 0.0) - before == statuses.count(429)
    assert server.ended()["length"] - ended == statuses.count(200)
    server.assert_sound()


def test_memory_is_flat(server: Server) -> None:
    def nuisance(rounds: int) -> None:
        for number in range(rounds):
            with posted(server, encoded(stream=True, n=4)), posted(server, encoded()), posted(server, b"{", length=9):
                run(*(ask(server, prompt=f"p{number}-{i}", stream=True, max_tokens=30) for i in range(4)))
            server.http.post("/v1/completions", content=b"[" * 5000, headers=JSON)
            server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": -1})
        server.assert_sound()

    nuisance(3)
    before = server.memory()
    nuisance(8)
    assert server.memory() - before < 8e6
