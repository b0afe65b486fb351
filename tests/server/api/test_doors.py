"""Requests that one server might read otherwise than another, and connections that have to end."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fastblt.server.api import bodies as bodies_module
from fastblt.server.api import http as http_module
from fastblt.server.api import serve as serve_module
from fastblt.server.process.client import EngineClient, EngineState
from fastblt.server.settings import EngineSettings, HttpSettings, SchedulingPolicy
from tests.server.api import fake_engine
from tests.server.api.running import RunningServer, until
from tests.server.api.test_bad_requests import JSON, assert_error
from tests.server.api.test_security import make_certificate, raw

BODY = json.dumps({"prompt": "Hi", "max_tokens": 2}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def fake(**fields: object) -> EngineClient:
    return EngineClient(EngineSettings(), command=fake_engine.command(**fields))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    http = HttpSettings(cors_origins=("*",), scheduling_policy=SchedulingPolicy.PRIORITY, shutdown_timeout=0.0)
    with RunningServer(fake(), http) as server:
        yield server


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=20)


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


HIDDEN = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        # The end of one is by its length, that of the other by its chunks.
        POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(BODY, 64) + HIDDEN,
        POST + b"transfer-encoding: chunked\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY + HIDDEN,
        POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n" + chunked(BODY, 64) + HIDDEN,
        POST + b"content-length: 4\r\ncontent-length: 5\r\n\r\n" + BODY + HIDDEN,
        POST + b"content-length: +%d\r\n\r\n" % len(BODY) + BODY + HIDDEN,
        POST + b"content-length: -1\r\n\r\n" + BODY + HIDDEN,
        POST + b"transfer-encoding: identity\r\n\r\n" + BODY + HIDDEN,
        POST + b"transfer-encoding: gzip, chunked\r\n\r\n" + chunked(BODY, 64) + HIDDEN,
        POST + b"transfer-encoding : chunked\r\n\r\n" + chunked(BODY, 64) + HIDDEN,
        POST + b"transfer-encoding: \x0bchunked\r\n\r\n" + chunked(BODY, 64) + HIDDEN,
        POST + b"transfer-encoding: chunked\r\n\r\n" + b"0x10\r\n" + BODY + HIDDEN,
        POST + b"transfer-encoding: chunked\r\n\r\n" + b"2\r\n{}X0\r\n\r\n" + HIDDEN,
    ],
)
def test_what_others_might_cut_elsewhere_is_refused_and_ends_the_connection(
    server: RunningServer, request_: bytes
) -> None:
    answer = raw(server, request_)
    assert answer.startswith(b"HTTP/1.1 400 ") and b'"invalid_http"' in answer
    assert b"HTTP/1.1 2" not in answer


def test_head_with_a_wrong_body_is_refused_too(server: RunningServer) -> None:
    answer = raw(server, b"HEAD /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nno length\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.endswith(b"\r\n\r\n")


def test_a_chunked_body_is_served(server: RunningServer) -> None:
    for size in (1, 7, 1000):
        answer = raw(server, POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(BODY, size))
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_small_chunks_are_counted(server: RunningServer) -> None:
    body = json.dumps({"prompt": "x" * 500_000}).encode()
    start = time.monotonic()
    answer = raw(server, POST + b"transfer-encoding: chunked\r\n\r\n" + chunked(body, 1))
    assert answer.startswith(b"HTTP/1.1 400 ") and time.monotonic() - start < 5
    # Those of clients are larger, or few.
    answer = raw(server, POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(body, 1000))
    assert b'"invalid_value"' in answer


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/metrics", "/load", "/nowhere"])
def test_head_is_get_without_a_body(server: RunningServer, path: str) -> None:
    head, get = server.http.head(path), server.http.get(path)
    assert head.status_code == get.status_code and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    # The connection goes on.
    assert raw(server, b"HEAD %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode() * 2 + HIDDEN.replace(
        b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")).count(b"HTTP/1.1 ") == 3  # fmt: skip


@pytest.mark.parametrize("name", ["http://host", "HTTP://127.0.0.1:1", "https://u@[::1]:8000"])
def test_a_target_with_a_servers_name_is_its_path(server: RunningServer, name: str) -> None:
    """As proxies are sent it (RFC 9112, section 3.2.2)."""
    for path, status in (("/health", 200), ("/v1/models?x=1", 200), ("/nowhere", 404), ("", 200), ("?x=1", 200)):
        head = f"GET {name}{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        there = server.http.get(path or "/")
        answer = raw(server, head.encode())
        assert answer.startswith(b"HTTP/1.1 %d " % status) and there.status_code == status
        assert answer.endswith(there.content)
    answer = raw(server, POST.replace(b"/v1", name.encode() + b"/v1") + b"connection: close\r\n"
                 b"content-length: %d\r\n\r\n" % len(BODY) + BODY)  # fmt: skip
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip", "zstd"])
def test_encoded_bodies_are_told_so(server: RunningServer, coding: str) -> None:
    headers = JSON | {"content-encoding": coding}
    answer = server.http.post("/v1/completions", content=b"\x1f\x8b", headers=headers)
    assert coding in assert_error(answer, 415)["message"]
    assert answer.headers["accept-encoding"] == "identity"
    headers = JSON | {"content-encoding": "identity"}
    assert server.http.post("/v1/completions", content=BODY, headers=headers).status_code == 200


def test_the_javascript_client_may_ask(server: RunningServer) -> None:
    wanted = (
        "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
        "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout,"
        "openai-organization,openai-project"
    )
    headers = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": wanted,
    }
    answer = server.http.options("/v1/completions", headers=headers)
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].lower().split(",")}
    assert answer.status_code == 200 and set(wanted.split(",")) <= allowed
    assert answer.headers["access-control-allow-origin"] == "*"
    headers["access-control-request-method"] = "DELETE"
    assert assert_error(server.http.options("/v1/completions", headers=headers), 400)["code"] == "cors_refused"


def test_a_body_that_is_refused_is_not_a_reset(server: RunningServer) -> None:
    size = 30_000_000
    with connect(server) as sock:
        sock.sendall(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % size)
        # A client that reads only when it has sent all.
        for _ in range(0, size, 10**6):
            sock.sendall(b"x" * 10**6)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"body_too_large"' in answer


def test_who_never_ends_is_cut_off(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "LINGER_SECONDS", 0.5)
    with connect(server) as sock:
        sock.sendall(POST + b"content-length: 1000000000\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 413 ")
        with pytest.raises(OSError):
            for _ in range(100):
                sock.sendall(b"x" * 1000)
                time.sleep(0.05)


@contextmanager
def asked_slowly(folder: Path, *, tls: bool, stream: bool) -> Iterator[tuple[RunningServer, socket.socket]]:
    """A server, and a connection on which a large answer was asked for. Little of it waits in the system."""
    body = json.dumps({"prompt": "a", "max_tokens": 900, "n": 4, "logprobs": 20, "stream": stream}).encode()
    certificate, key = map(str, make_certificate(folder)) if tls else (None, None)
    http = HttpSettings(tls_certificate=certificate, tls_key=key, shutdown_timeout=0.0)
    server = RunningServer(fake(), http, wait=False)
    with server:
        until(lambda: server.client.state is EngineState.READY and server._server.started)
        server._server.config.timeout_keep_alive = 0.2  # type: ignore[assignment]
        server._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        trusted = ssl.create_default_context(cafile=certificate)
        with trusted.wrap_socket(sock, server_hostname="127.0.0.1") if tls else sock as slow:
            slow.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert slow.recv(1) == b"H"
            yield server, slow


@pytest.mark.parametrize(("tls", "stream"), [(False, False), (True, False), (False, True)])
def test_who_takes_an_answer_a_byte_at_a_time_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool, stream: bool
) -> None:
    monkeypatch.setattr(http_module, "TAKE_SECONDS", 0.6)
    with asked_slowly(tmp_path, tls=tls, stream=stream) as (server, slow):
        began, port = time.monotonic(), slow.getsockname()[1]
        # What the system has taken it sends by itself, so its end is seen here later.
        while any(one.client[1] == port for one in server._server.server_state.connections):
            assert time.monotonic() - began < 15
            slow.recv(1)
            time.sleep(0.02)


@pytest.mark.parametrize("tls", [False, True])
def test_who_takes_it_slowly_has_all_of_it(tmp_path: Path, tls: bool) -> None:
    """Also when the connection has been idle for long enough to be closed, as the server sees it."""
    with asked_slowly(tmp_path, tls=tls, stream=False) as (_, slow):
        head, _, body = b"", b"", b""
        while b"\r\n\r\n" not in head:
            head += slow.recv(1)
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        assert length > 100_000
        while data := slow.recv(2**15):
            body += data
            time.sleep(3 * len(data) / length)
        assert len(json.loads(body)["choices"]) == 4 and len(body) == length


def test_a_tls_handshake_that_never_ends_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "HANDSHAKE_SECONDS", 0.5)
    certificate, key = make_certificate(tmp_path)
    http = HttpSettings(tls_certificate=str(certificate), tls_key=str(key), shutdown_timeout=0.0)
    with RunningServer(fake(), http, wait=False) as server:
        until(lambda: server._server.started)
        for begun in (b"", b"\x16\x03\x01\x02\x00\x01"):
            with connect(server) as sock:
                sock.sendall(begun)
                began = time.monotonic()
                assert sock.recv(1) == b"" and time.monotonic() - began < 5


def test_who_resets_the_connection_meanwhile_is_no_fault(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(300):
        with connect(server) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\nno HTTP\r\n\r\n")
            time.sleep(number % 10 / 5000)
    assert server.http.get("/health").status_code == 200
    assert "Exception in ASGI application" not in caplog.text


def test_a_body_without_progress_ends(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "PIECE_SECONDS", 0.3)
    with connect(server) as sock:
        sock.sendall(POST + b"content-length: 1000\r\n\r\n{")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"body_timeout"' in answer


def test_all_bodies_together_are_bounded(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "MAX_HELD_BYTES", 500_000)
    several = [connect(server) for _ in range(4)]
    for sock in several:
        sock.sendall(POST + b"content-length: 200001\r\n\r\n" + b" " * 200_000)
    # Three of them fit; one has been told that it does not, and is closed.
    kept = []
    for sock in several:
        sock.settimeout(2)
        try:
            answer = b"".join(iter(lambda: sock.recv(65536), b""))  # noqa: B023
            assert answer.startswith(b"HTTP/1.1 429 ") and b'"bodies_full"' in answer and b"retry-after" in answer
        except TimeoutError:
            kept.append(sock)
    assert len(kept) == 3
    # Who sends little is served all the same,
    assert server.complete(prompt="Hi", max_tokens=2)["choices"][0]["text"] == "aa"
    for sock in several:
        sock.close()
    # and when bodies have ended or left, there is room again.
    large = {"prompt": "x" * 900, "max_tokens": 2, "no_such_field": "y" * 250_000}
    until(lambda: server.http.post("/v1/completions", json=large).status_code == 200)


def test_priorities_are_the_operators_to_allow(server: RunningServer) -> None:
    assert server.complete(prompt="Hi", max_tokens=2, priority=-1000)["choices"][0]["text"] == "aa"
    for priority in (-1001, 1001, -(2**63)):
        answer = server.http.post("/v1/completions", json={"prompt": "Hi", "priority": priority})
        assert_error(answer, 400, "priority")
    with RunningServer(fake()) as other:
        answer = other.http.post("/v1/completions", json={"prompt": "Hi", "priority": 1})
        assert "--scheduling-policy" in assert_error(answer, 400, "priority")["message"]
        assert other.complete(prompt="Hi", max_tokens=2, priority=0)["choices"][0]["text"] == "aa"


def test_idle_tls_connections_hold_up_nothing(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    http = HttpSettings(tls_certificate=str(certificate), tls_key=str(key), shutdown_timeout=0.0)
    context = ssl.create_default_context(cafile=str(certificate))
    server = RunningServer(fake(), http, wait=False)
    with server, httpx.Client(base_url=server.url.replace("http:", "https:"), verify=context) as client:
        until(lambda: client.get("/health").status_code == 200)
        # It neither asks nor reads, and so never agrees to an end.
        with context.wrap_socket(connect(server), server_hostname="127.0.0.1"):
            stop = time.monotonic()
            server._server.should_exit = True
            server._thread.join(20)
            assert not server._thread.is_alive() and time.monotonic() - stop < 8
