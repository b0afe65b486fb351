"""What uvicorn leaves open: connections that never ask, are too many, or speak no HTTP."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from typing import Any, cast

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastblt.server.api.errors import error_object
from fastblt.server.api.security import MAX_HEADER_BYTES

#: Seconds a client has for the head of a request.
HEAD_SECONDS = 30.0

#: Bytes that may wait for a slow reader; what comes beyond them is merged where it arises.
_WAITING_BYTES = 16 * 2**10

#: Open files that are not connections.
_RESERVED_FILES = 128


#: Under this name the scope's extensions have the HttpProtocol that a request came by.
CONNECTION = "fastblt.connection"


class HttpProtocol(H11Protocol):
    """HTTP/1.1 with bounds on what a connection may do before it is a request.

    Streams write to it where their news arrives: through ASGI every write would wake a task, and cost as much again.
    """

    #: Called when `writable` has become true again.
    on_writable: Callable[[], None] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app = cast(ASGIApp, self.app)

        async def with_connection(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {CONNECTION: self}
            await app(scope, receive, send)

        self.app = cast(Any, with_connection)

    @property
    def writable(self) -> bool:
        """Whether no more waits for the reader than may."""
        return not self.flow.write_paused

    def write_body(self, data: bytes) -> None:
        """Write a part of the running response's body, whose head has been sent and says no length."""
        if self.cycle.disconnected or not data:
            return
        if self.cycle.scope["http_version"] >= "1.1":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.transport.write(data)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's own transports are of no class of asyncio's.
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_WAITING_BYTES)
        self._seen: Any = None
        self._timer: asyncio.TimerHandle | None = None
        if len(self.connections) > max_connections():
            # One more could be the file that the next log, or a new engine, needs.
            transport.abort()
            return
        self._check_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        body = error_object(
            400, f"this is no HTTP/1.1, or its head is larger than {MAX_HEADER_BYTES} bytes", "invalid_http"
        )
        content = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _check_later(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._check)

    def _check(self) -> None:
        """Close a connection that has made no request since the last check, and has none running."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._seen:
            self.transport.close()
            return
        self._seen = self.cycle
        self._check_later()


def raise_file_limit() -> None:
    """Let this process have as many open files, and so connections, as the system allows it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - _RESERVED_FILES, 1) if soft != resource.RLIM_INFINITY else 2**31
