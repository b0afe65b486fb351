"""How a stream's events leave: over the connection where there is one of ours, through ASGI elsewhere."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastblt.server.api.bodies import Bodies
from fastblt.server.api.http import CONNECTION
from fastblt.server.api.streaming import EventStream
from fastblt.server.process.client import EngineClient
from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import Delta, FinishReason, Request, SamplingParams
from fastblt.server.settings import EngineSettings
from tests.server.api import fake_engine
from tests.server.api.running import RunningServer, parse_events, until


@dataclass
class Connection:
    """Stands for an HttpProtocol."""

    writable: bool = True
    on_writable: Callable[[], None] | None = None
    written: list[bytes] = field(default_factory=list)

    def write_body(self, data: bytes) -> None:
        self.written.append(data)


@dataclass
class Events:
    """An item is the number of bytes in it; a failure is `!`."""

    failed: bool = False
    bytes: int = 0

    def render(self, deltas: list[Delta]) -> bytes:
        if any(None in delta.ids for delta in deltas):
            raise ValueError("a fault")
        self.failed = any(delta.finish_reason is FinishReason.ERROR for delta in deltas)
        return b"!" if self.failed else b"%d " % sum(len(delta.ids) for delta in deltas)

    def size(self, deltas: list[Delta]) -> int:
        return self.bytes

    def last(self) -> bytes:
        return b"" if self.failed else b"end"


class Run:
    """An answer under way. `sent` are the bodies of ASGI's messages."""

    def __init__(self, connection: Connection | None, size: int = 0) -> None:
        self.aborted: list[str] = []
        requests = [Request(name, [1], SamplingParams(), 0.0) for name in "ab"]
        self.stream = DeltaStream(lambda name, _: self.aborted.append(name), requests)
        self.sent: list[bytes] = []
        self.left = asyncio.Event()
        scope = {"type": "http", **({"extensions": {CONNECTION: connection}} if connection is not None else {})}
        self.task = asyncio.ensure_future(
            EventStream(self.stream, Events(bytes=size), Bodies())(scope, self._receive, self._send)
        )

    async def _receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message.get("body", b"head"))

    async def push(self, name: str, ids: list[Any], end: FinishReason | None = None) -> None:
        self.stream.push(Delta(name, ids, finish_reason=end))
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("size", [0, 10**6])
@pytest.mark.parametrize("direct", [True, False])
async def test_events_leave_as_they_come(direct: bool, size: int) -> None:
    connection = Connection()
    run = Run(connection if direct else None, size)
    await run.push("a", [5])
    await run.push("b", [5, 6])
    await run.push("a", [7], FinishReason.LENGTH)
    await run.push("b", [], FinishReason.LENGTH)
    await run.task
    items = [b"1 ", b"2 ", b"1 ", b"0 "]
    assert (connection.written, run.sent) == ((items, [b"head", b"end"]) if direct else ([], [b"head", *items, b"end"]))
    assert not run.aborted and connection.on_writable is None


@pytest.mark.parametrize("size", [0, 10**6])
@pytest.mark.parametrize("direct", [True, False])
async def test_a_failure_ends_the_stream_and_the_others_requests(direct: bool, size: int) -> None:
    connection = Connection()
    run = Run(connection if direct else None, size)
    await run.push("a", [5])
    await run.push("b", [], FinishReason.ERROR)
    await run.task
    assert connection.written + run.sent[1:] == [b"1 ", b"!", b""]
    assert run.aborted == ["a"]
    await run.push("a", [5])
    assert len(connection.written) + len(run.sent) == 4


@pytest.mark.parametrize("size", [0, 10**6])
@pytest.mark.parametrize("direct", [True, False])
async def test_a_fault_is_the_answer_s_own(direct: bool, size: int) -> None:
    run = Run(Connection() if direct else None, size)
    await run.push("a", [5])
    await run.push("b", [None])
    with pytest.raises(ValueError, match="a fault"):
        await run.task
    assert set(run.aborted) == {"a", "b"}


async def test_what_a_slow_reader_leaves_is_merged() -> None:
    connection = Connection()
    run = Run(connection)
    await run.push("a", [5])
    connection.writable = False
    for token in range(4):
        await run.push("a", [token])
    assert connection.written == [b"1 "]
    connection.writable = True
    assert connection.on_writable is not None
    connection.on_writable()
    assert connection.written == [b"1 ", b"4 "]
    connection.writable = False
    await run.push("a", [5], FinishReason.LENGTH)
    await run.push("b", [5], FinishReason.LENGTH)
    assert not run.task.done()
    connection.writable = True
    connection.on_writable()
    await run.task
    assert connection.written == [b"1 ", b"4 ", b"2 "] and run.sent == [b"head", b"end"]


async def test_leaving_ends_the_writing() -> None:
    connection = Connection()
    run = Run(connection)
    await run.push("a", [5])
    run.left.set()
    await run.task
    assert set(run.aborted) == {"a", "b"} and connection.on_writable is None
    await run.push("a", [5])
    assert connection.written == [b"1 "]


def test_http_1_0_gets_the_bare_events() -> None:
    client = EngineClient(EngineSettings(), command=fake_engine.command(pause=0.005))
    with RunningServer(client) as server:
        content = json.dumps({"prompt": "x", "max_tokens": 40, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
            content
        )
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as sock:
            sock.sendall(head + content)
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        *events, done = parse_events(iter([body]))
        assert "".join(event["choices"][0]["text"] for event in events) == "a" * 40 and done == "[DONE]"


def test_a_reader_that_pauses_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastblt.server.api.http._WAITING_BYTES", 256)
    monkeypatch.setattr("fastblt.server.process.stream.ITEM_SECONDS", 0.0)
    client = EngineClient(EngineSettings(), command=fake_engine.command(pause=0.0005))
    with RunningServer(client) as server:
        # What the system itself keeps for a reader is far more than these streams are long.
        server._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        content = json.dumps({"prompt": ["x"] * 8, "max_tokens": 900, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
            content
        )
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
            sock.sendall(head + content)
            until(lambda: server.metric('fastblt_request_success_total{finished_reason="length"}') == 8)
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        *events, _ = parse_events(iter([answer.partition(b"\r\n\r\n")[2]]))
        texts = [""] * 8
        for event in events:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == ["a" * 900] * 8
        # Most of it was merged while it waited.
        assert len(events) < 8 * 900 / 2
