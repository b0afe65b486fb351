"""A client that leaves takes its requests with it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from fastblt.server.process.client import EngineClient
from tests.server.api.running import MAX_MODEL_LEN, RunningServer, tiny_settings, until

LONG = {"prompt": ["Hello", "Bye"], "n": 2, "max_tokens": MAX_MODEL_LEN - 100, "ignore_eos": True}


@pytest.fixture
def own_server(checkpoint: str) -> Iterator[RunningServer]:
    """A server of the test's own, since it counts what runs."""
    with RunningServer(EngineClient(tiny_settings(checkpoint))) as running:
        yield running
        running.assert_all_free()


@contextmanager
def posted(server: RunningServer, **body: object) -> Iterator[socket.socket]:
    """A connection on which a completion was asked for."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as sock:
        sock.sendall(head.encode() + b"\r\n\r\n" + content)
        yield sock


def aborted(server: RunningServer) -> float:
    return server.metric('fastblt_request_success_total{finished_reason="abort"}')


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_aborts_and_frees(own_server: RunningServer, stream: bool) -> None:
    with posted(own_server, **LONG, stream=stream) as sock:
        until(lambda: own_server.metric("fastblt_num_requests_running") == 4)
        if stream:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        free = own_server.client.stats().pages_free
        assert any(free[group] < total for group, total in own_server.client.stats().pages_total.items())
    own_server.assert_all_free()
    assert aborted(own_server) == 4
    assert len(own_server.complete(prompt="Hi", max_tokens=3, ignore_eos=True)["choices"]) == 1


def test_leaving_while_queued(checkpoint: str) -> None:
    with (
        RunningServer(EngineClient(tiny_settings(checkpoint, max_running=1))) as server,
        posted(server, **LONG | {"prompt": "a", "n": 1}, stream=True),
    ):
        until(lambda: server.metric("fastblt_num_requests_running") == 1)
        with posted(server, **LONG | {"prompt": "b", "n": 1}, stream=True):
            until(lambda: server.metric("fastblt_num_requests_waiting") == 1)
        until(lambda: aborted(server) == 1)
        # What the engine holds is told in snapshots.
        until(lambda: server.metric("fastblt_num_requests_waiting") == 0)
        assert server.metric("fastblt_num_requests_running") == 1


def test_leaving_before_the_body_is_complete(own_server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", int(own_server.url.rsplit(":", 1)[1]))) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
        )
    assert len(own_server.complete(prompt="Hi", max_tokens=3)["choices"]) == 1


def test_a_reader_that_does_not_read_holds_up_nobody(own_server: RunningServer) -> None:
    with posted(own_server, **LONG, stream=True):
        # Nothing is read; the engine still ends the four and takes others.
        until(lambda: own_server.metric("fastblt_num_requests_running") == 4)
        assert len(own_server.complete(prompt="Hi", max_tokens=3, ignore_eos=True)["choices"]) == 1


def test_many_come_and_go(own_server: RunningServer) -> None:
    def visit(number: int) -> None:
        with posted(own_server, **LONG | {"n": 1 + number % 3}, stream=number % 2 == 0) as sock:
            if number % 3:
                sock.settimeout(0.05 * (number % 5))
                with suppress(OSError):
                    sock.recv(64)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own_server.assert_all_free()
    assert len(own_server.complete(prompt="Hi", max_tokens=3, ignore_eos=True)["choices"]) == 1
