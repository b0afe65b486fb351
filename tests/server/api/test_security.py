"""Who is let in, and with how much."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from fastblt.server.api import http as http_module
from fastblt.server.api.serve import CertificateError
from fastblt.server.process.client import EngineClient
from fastblt.server.settings import EngineSettings, HttpSettings
from tests.server.api import fake_engine
from tests.server.api.running import RunningServer, until
from tests.server.api.test_bad_requests import assert_error

KEYS = ("first-key", "schlüssel")


def fake() -> EngineClient:
    return EngineClient(EngineSettings(), command=fake_engine.command())


@pytest.fixture(scope="module")
def closed() -> Iterator[RunningServer]:
    """A server that wants a key, and lets pages of one origin ask."""
    http = HttpSettings(api_keys=KEYS, cors_origins=("https://good.example",), shutdown_timeout=0.0)
    with RunningServer(EngineClient(EngineSettings(), command=fake_engine.command()), http) as server:
        yield server


def raw(server: RunningServer, head: bytes) -> bytes:
    """What is answered to bytes sent as they are."""
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as sock:
        sock.sendall(head)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
        return answer


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models", "/v1/completions", "/metrics", "/version", "/load", "/openapi.json", "/nowhere", "/page",
        "//v1/models", "/health/", "/health/../v1/models", "/health%2f..%2fv1/models", "/ready;/v1/models", "/HEALTH",
        "/v1/models?/health", "/./v1/models", "/health//", "//health", "/v1/models#/health",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_every_path_but_the_probes_needs_a_key(closed: RunningServer, method: str, path: str) -> None:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    assert raw(closed, head).startswith(b"HTTP/1.1 401 ")


def test_absolute_targets_need_a_key_too(closed: RunningServer) -> None:
    head = b"GET http://x/v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert raw(closed, head).startswith(b"HTTP/1.1 401 ")


def test_probes_need_none(closed: RunningServer) -> None:
    assert closed.http.get("/health").status_code == closed.http.get("/ready").status_code == 200


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(closed: RunningServer, key: str) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"authorization": f"{scheme} {key}".encode()}
        answer = closed.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, headers=headers)
        assert answer.json()["choices"][0]["text"] == "aa"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer first-ke",
        "Bearer first-key2",
        "first-key",
        "Basic first-key",
        "Bearer x first-key",
    ],
)
def test_nothing_else_does(closed: RunningServer, value: str) -> None:
    answer = closed.http.post("/v1/completions", json={"prompt": "Hi"}, headers={"authorization": value})
    assert assert_error(answer, 401)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer" and answer.headers["x-request-id"]


def test_an_empty_key_opens_nothing() -> None:
    for keys in (("",), ("a-key", " ")):
        with pytest.raises(ValueError, match="empty"):
            HttpSettings(api_keys=keys)


def test_refusals_are_counted(closed: RunningServer) -> None:
    def refused() -> None:
        closed.http.post("/v1/completions", json={"prompt": "Hi"}, headers={"authorization": "Bearer no"})

    closed.http.headers["authorization"] = "Bearer first-key"
    try:
        # A cause is counted from its first time on.
        refused()
        before = closed.metric('fastblt_requests_rejected_total{cause="invalid_api_key"}')
        refused()
        assert closed.metric('fastblt_requests_rejected_total{cause="invalid_api_key"}') == before + 1
    finally:
        del closed.http.headers["authorization"]


def test_pages_of_one_origin_may_ask(closed: RunningServer) -> None:
    def preflight(origin: str) -> httpx.Response:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        return closed.http.options("/v1/completions", headers=headers)

    assert preflight("https://good.example").headers["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-origin" not in preflight("https://bad.example").headers
    # A page can read why it was refused.
    refused = closed.http.get("/v1/models", headers={"origin": "https://good.example"})
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


def test_by_default_no_page_may(server: RunningServer) -> None:
    answer = server.http.get("/v1/models", headers={"origin": "https://good.example"})
    assert answer.status_code == 200 and not [name for name in answer.headers if name.startswith("access-control")]


def test_too_many_or_too_large_headers(server: RunningServer) -> None:
    assert assert_error(server.http.get("/health", headers={f"x-{i}": "1" for i in range(200)}), 431)
    # More than the parser takes in one piece, and so much that it never sees the end.
    for size in (20_000, 10_000_000):
        head = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        head += b"".join(b"a%d: %s\r\n" % (i, b"x" * size) for i in range(3))
        try:
            answer = raw(server, head + b"\r\n")
        except ConnectionError:
            continue
        assert answer.split(b" ")[1] in (b"400", b"431") and b'"error"' in answer
    assert server.http.get("/health").status_code == 200


def test_what_is_no_http_is_told_so(server: RunningServer) -> None:
    for data in (b"\x16\x03\x01\x00\xa5\x01\x00\r\n\r\n", b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        answer = raw(server, data)
        assert answer.startswith(b"HTTP/1.1 400 ") and b'"invalid_http"' in answer


def test_connections_that_never_ask_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "HEAD_SECONDS", 0.3)
    with RunningServer(fake()) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        with socket.create_connection(address) as silent, socket.create_connection(address) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nhost:")
            silent.settimeout(5)
            slow.settimeout(5)
            assert silent.recv(1) == b"" and slow.recv(1) == b""
        # Also after an answer.
        with socket.create_connection(address) as again:
            again.settimeout(5)
            again.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /health HTTP/1.1\r\nhost:")
            assert b"".join(iter(lambda: again.recv(4096), b"")).count(b"HTTP/1.1 200") == 1
        # One that asks in time is not, however long its answer takes.
        long = EngineClient(EngineSettings(), command=fake_engine.command(pause=0.2))
        with RunningServer(long) as other:
            assert other.complete(prompt="Hi", max_tokens=6)["choices"][0]["text"] == "a" * 6


def test_a_connection_outlasts_those_who_reuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Clients keep connections for 5 seconds and more. If the server closes first, it loses what is on its way.
    with RunningServer(fake()) as server:
        # It raises RemoteDisconnected where the server has closed.
        kept = http.client.HTTPConnection("127.0.0.1", int(server.url.rsplit(":", 1)[1]), timeout=5)
        for pause in (5.5, 0):
            kept.request("GET", "/health")
            assert kept.getresponse().read()
            time.sleep(pause)
        kept.close()
    # But not for ever, and a head that has begun has to come in time.
    monkeypatch.setattr(http_module, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(http_module, "KEEP_ALIVE_SECONDS", 2.5)
    with RunningServer(fake()) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        lasted = []
        for begun in (b"", b"GET /health HTTP/1.1\r\nhost:"):
            with socket.create_connection(address) as idle:
                idle.settimeout(5)
                idle.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + begun)
                clock = time.monotonic()
                while idle.recv(4096):
                    pass
                lasted.append(time.monotonic() - clock)
        assert lasted[0] >= 2.5 > lasted[1]


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "max_connections", lambda: 5)
    with RunningServer(fake()) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        several = [socket.create_connection(address) for _ in range(4)]
        with socket.create_connection(address) as last:
            last.settimeout(5)
            with suppress(ConnectionError):
                assert last.recv(1) == b""
        for sock in several:
            sock.close()
        until(lambda: server.http.get("/health").status_code == 200)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_https(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    http = HttpSettings(tls_certificate=str(certificate), tls_key=str(key), shutdown_timeout=0.0)
    with RunningServer(fake(), http, wait=False) as server:
        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=server.url.replace("http:", "https:"), verify=context) as client:
            deadline = time.monotonic() + 10
            while client.get("/health").status_code != 200:
                assert time.monotonic() < deadline
            answer = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
            assert answer.json()["choices"][0]["text"] == "aa"


def test_certificates_of_no_use_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    http = HttpSettings(tls_certificate=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "cert.pem"))
    with pytest.raises(CertificateError):
        RunningServer(fake(), http)
