"""Limits that uvicorn lacks: for connections that are idle, too many, send invalid HTTP, or never end."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastblt.server.api.errors import error_object
from fastblt.server.api.security import MAX_HEADER_BYTES

#: Seconds a client has for the head of a request.
HEAD_SECONDS = 30.0
#: Seconds for which a connection is kept after an answer. Longer than clients and proxies keep theirs (5 to 60): if the
#: server closes first, a request that is on its way is lost.
KEEP_ALIVE_SECONDS = 75
#: Seconds for the TLS opening handshake.
HANDSHAKE_SECONDS = 10.0
#: Seconds in which a client has to take what was written for it: a whole answer, or what waits of a stream.
TAKE_SECONDS = 600.0
#: Seconds between two looks at these.
_LOOK_SECONDS = 5.0

#: Seconds in which a refused client may still send the rest of its request, and read the answer.
LINGER_SECONDS = 10.0
#: Seconds for the TLS closing handshake. Many clients never answer it.
TLS_END_SECONDS = 1.0

#: Bytes of an answer that may wait for a slow reader. Beyond that, new deltas are merged in their stream.
_WAITING_BYTES = 16 * 2**10

#: Bytes that are received at a time.
_RECEIVED_BYTES = 64 * 2**10

#: Chunks that a body may have: _FREE_CHUNKS, and one more for each _CHUNK_BYTES. A chunk costs as much time as some
#: 10,000 bytes.
_FREE_CHUNKS = 256
_CHUNK_BYTES = 512

#: Open files that are not connections.
_RESERVED_FILES = 128


#: What stands before the path of an absolute request target. Proxies are sent these, and some clients send no other.
_ABSOLUTE = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)

#: The key in the ASGI scope's extensions for the HttpProtocol that a request arrived on.
CONNECTION = "fastblt.connection"


class _Connection(h11.Connection):
    """Raises h11.RemoteProtocolError for framing that h11 accepts but that is unsafe or too slow.

    `method` is that of the last request.
    """

    method = b""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks, self._bytes = 0, 0
            self.method = event.method
            _check_framing(event)
            event = _in_origin_form(event)
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._bytes // _CHUNK_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many small chunks")
        return event


def _check_framing(request: h11.Request) -> None:
    """Refuse a request whose end another server, such as a proxy, may see elsewhere (RFC 9112, sections 6.1, 6.3).

    Raises h11.RemoteProtocolError.
    """
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" not in names:
        return
    if b"content-length" in names:
        raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
    if request.http_version < b"1.1":
        raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")


def _in_origin_form(request: h11.Request) -> h11.Request:
    """The same request; for a target with a server's name (RFC 9112, section 3.2.2), with what comes after it."""
    if not (named := _ABSOLUTE.match(request.target)):
        return request
    rest = request.target[named.end() :]
    target = rest if rest.startswith(b"/") else b"/" + rest
    return h11.Request(method=request.method, headers=request.headers, target=target, http_version=request.http_version)


class _Transport:
    """A connection's transport that closes without losing the last answer.

    A client that is refused in the middle of its request still sends. Closing a connection with unread bytes resets it,
    and the client loses the answer. So the connection is half-closed first, and what still arrives is dropped. A TLS
    connection waits for the closing handshake.
    """

    def __init__(self, transport: asyncio.Transport, unfinished: Callable[[], bool]) -> None:
        self._transport = transport
        self._unfinished = unfinished
        self.lingers = False
        #: Bytes that were written so far.
        self.written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)

    @property
    def waiting(self) -> int:
        """Bytes that were written and that the system has not taken yet."""
        below = getattr(getattr(self._transport, "_ssl_protocol", None), "_transport", None)
        # What is encrypted waits in the transport below, for which asyncio has no public name.
        return self._transport.get_write_buffer_size() + (below.get_write_buffer_size() if below is not None else 0)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self._unfinished():
            self.end()
            return
        self.lingers = True
        if self._transport.can_write_eof():
            # The client may have closed the connection already.
            with suppress(OSError):
                self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self.end)

    def end(self) -> None:
        """Close, even while lingering, when all that was written is sent."""
        tls, later = self._transport.get_extra_info("ssl_object") is not None, asyncio.get_running_loop().call_later
        if tls and self.waiting:
            # The closing handshake is timed from its begin.
            self.lingers = True
            later(TLS_END_SECONDS, self.end)
            return
        self._transport.close()
        if tls:
            later(TLS_END_SECONDS, self._transport.abort)


class HttpProtocol(H11Protocol):
    """HTTP/1.1 with limits on connections that have not sent a complete request.

    Streams write to it directly when deltas arrive. Through ASGI every write would wake a task, which doubles the cost.
    """

    #: Most connections at once, if the limit of open files allows them.
    limit = 2**31

    #: Called when `writable` has become true again.
    on_writable: Callable[[], None] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: _Connection = _Connection(h11.SERVER, MAX_HEADER_BYTES)
        app = cast(ASGIApp, self.app)

        async def with_connection(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {CONNECTION: self}
            await app(scope, receive, send)

        self.app = cast(Any, with_connection)

    @property
    def writable(self) -> bool:
        """Whether the reader keeps up: at most _WAITING_BYTES are waiting for it."""
        return not self.flow.write_paused

    def write_body(self, data: bytes) -> None:
        """Write a part of the current response's body. Its head has been sent, without a content length."""
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
        # A cast and not an assertion: uvloop's transports are not instances of asyncio's classes.
        transport = cast(asyncio.Transport, transport)
        self._ending = _Transport(transport, self._unfinished)
        super().connection_made(cast(asyncio.Transport, self._ending))
        transport.set_write_buffer_limits(high=_WAITING_BYTES)
        if hasattr(transport, "max_size"):
            # asyncio's default is 256 KiB: as much memory for each slow connection, or many small requests at once.
            transport.max_size = _RECEIVED_BYTES
        #: The last request and whether the connection rests since, as of the last look.
        self._seen: tuple[Any, bool] = (None, False)
        self._idle_since = self._marked = self.loop.time()
        self._mark = 0
        self._timer: asyncio.TimerHandle | None = None
        if len(self.connections) > min(self.limit, max_connections()):
            # Files must be left for logs and for a new engine process.
            transport.abort()
            return
        self._check_later()

    def data_received(self, data: bytes) -> None:
        if not self._ending.lingers:
            super().data_received(data)

    def shutdown(self) -> None:
        if self._ending.lingers:
            self._ending.end()
        else:
            super().shutdown()

    def _unfinished(self) -> bool:
        """Whether the client may still be sending a request that has been answered."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with 400, and close. A handler that waits for the body sees a disconnect."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            text = f"this is no HTTP/1.1 that is served, or its head is larger than {MAX_HEADER_BYTES} bytes"
            content = json.dumps(error_object(400, text, "invalid_http")).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(content)).encode()),
                (b"connection", b"close"),
            ]
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            # The answer to HEAD has no body, whatever its content length says.
            head = self.conn.our_state is h11.SEND_RESPONSE and self.conn.method == b"HEAD"
            for event in (response, h11.Data(data=b"" if head else content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _check_later(self) -> None:
        self._timer = self.loop.call_later(min(_LOOK_SECONDS, HEAD_SECONDS, TAKE_SECONDS), self._check)

    def _check(self) -> None:
        """End a connection whose client has not taken what waited for it TAKE_SECONDS ago, or on which no request runs
        and none came for HEAD_SECONDS; between requests, where none has begun, for KEEP_ALIVE_SECONDS."""
        now, written = self.loop.time(), self._ending.written
        if written - self._ending.waiting >= self._mark:
            self._mark, self._marked = written, now
        elif now - self._marked >= TAKE_SECONDS:
            self._ending.abort()
            return
        idle = self.cycle is None or self.cycle.response_complete
        # Answered in full, and no byte of a next request has come.
        between = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if not idle or (self.cycle, between) != self._seen:
            self._seen, self._idle_since = (self.cycle, between), now
        elif now - self._idle_since >= (KEEP_ALIVE_SECONDS if between else HEAD_SECONDS):
            # This takes until all that was written is sent, so the look at it goes on.
            self.transport.close()
        self._check_later()


def limited(connections: int) -> type[HttpProtocol]:
    """The protocol class of a server with at most `connections` connections."""
    return type("HttpProtocol", (HttpProtocol,), {"limit": connections})


def raise_file_limit() -> None:
    """Raise this process's limit of open files, and so of connections, to the system's hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - _RESERVED_FILES, 1) if soft != resource.RLIM_INFINITY else 2**31
