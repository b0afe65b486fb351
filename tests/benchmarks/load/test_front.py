"""The client that only reads: it counts what a server sent, and takes no broken stream for a whole one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from fastblt.benchmarks.load.front import stream_all
from fastblt.server.process.client import EngineClient
from fastblt.server.settings import EngineSettings
from tests.server.api import fake_engine
from tests.server.api.running import RunningServer

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'
TEXT = b'data: {"choices":[{"text":"\\"completion_tokens\\":7 data: [DONE]"}]}\n\n'
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    client = EngineClient(EngineSettings(), command=fake_engine.command(error_for="-1"))
    with RunningServer(client) as server:
        yield int(server.url.rsplit(":", 1)[1])


def answered(answer: bytes, *, end: bool = True) -> int:
    """Tokens of a server's only answer."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(1 << 16)
            sock.sendall(answer)
            if not end:
                over.wait(30)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with listener:
            _, [count] = stream_all(listener.getsockname()[1], [{"prompt": "x"}], 1, patience=30.0 if end else 0.1)
            return count
    finally:
        over.set()
        thread.join()


def test_counts_the_tokens_of_every_stream(port: int) -> None:
    seconds, tokens = stream_all(port, [{"prompt": "x", "max_tokens": count} for count in (3, 40, 5, 6, 7)], 2)
    assert seconds > 0
    assert sorted(tokens) == [3, 5, 6, 7, 40]


def test_a_refused_request_is_an_error(port: int) -> None:
    with pytest.raises(RuntimeError, match="400"):
        stream_all(port, [{"prompt": "x", "max_tokens": -1}], 1)


def test_a_completion_that_fails_is_an_error(port: int) -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        stream_all(port, [{"prompt": "x", "max_tokens": 9, "n": 2}], 1)


def test_only_a_stream_to_its_end_counts() -> None:
    assert answered(HEAD + chunk(TEXT) + chunk(USAGE + DONE) + LAST) == 7
    for broken in (
        b"",
        HEAD + chunk(TEXT),
        HEAD + chunk(TEXT) + LAST,
        HEAD + chunk(TEXT + DONE) + LAST,
        HEAD + chunk(TEXT) + chunk(USAGE) + LAST,
        HEAD + chunk(TEXT) + chunk(USAGE + DONE),
        HEAD.replace(b"200", b"500") + chunk(TEXT) + chunk(USAGE + DONE) + LAST,
    ):
        with pytest.raises(RuntimeError, match="no complete answer"):
            answered(broken)


def test_silence_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nothing has arrived"):
        answered(HEAD + chunk(TEXT), end=False)
