"""Reads request bodies within a memory limit, and does long work on them in threads, outside the event loop."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastblt.server.api.errors import RETRY, ApiError

#: Seconds that a client has for its body, and for each piece of it.
BODY_SECONDS = 60.0
PIECE_SECONDS = 10.0

#: Bytes that may be held at once: bodies until they are parsed, answers of /tokenize and /detokenize until sent.
MAX_HELD_BYTES = 64 * 2**20
#: The first bytes of each body are not counted: a small body is never refused because others are large.
FREE_BYTES = 64 * 2**10

#: Up to this size, work takes a few milliseconds at most and is done in the event loop.
_SHORT_BYTES = 16 * 2**10
#: Bytes of an answer that are sent at a time.
_PIECE_BYTES = 64 * 2**10

#: Includes the +json suffix of RFC 6839. Other types are refused: browsers send some of them, such as text/plain, to
#: other origins without a preflight request.
_JSON = re.compile(r"application/(?:[\w.!#$&^-]+\+)?json")

_CLOSE = {"connection": "close"}

T = TypeVar("T")


class Bodies:
    """All bodies that one server holds."""

    def __init__(self) -> None:
        self.held = 0
        self._closed = False
        self._deadlines: set[asyncio.Timeout] = set()
        # Python runs one thread at a time: more would do no more, and delay the event loop's thread twice as long.
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="bodies")

    def close(self) -> None:
        """Refuse bodies that have not arrived yet, because the server shuts down."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            # A deadline that has just expired cannot be rescheduled.
            with suppress(RuntimeError):
                deadline.reschedule(now)

    async def read(self, request: Request, limit: int) -> Held:
        """The body, of at most `limit` bytes. The caller must `release` it.

        Raises ApiError: 415 for a wrong content type, 413 for a body that is too large, 408 for one that is too slow,
        429 when all bodies together are too large, 503 while the server shuts down. Raises ClientDisconnect when the
        client leaves first.
        """
        _check_kind(request)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)
        held = Held(self)
        try:
            await self._fill(held, request, limit)
        except BaseException:
            held.release()
            raise
        return held

    async def _fill(self, held: Held, request: Request, limit: int) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + BODY_SECONDS
        try:
            async with asyncio.timeout(0 if self._closed else PIECE_SECONDS) as deadline:
                self._deadlines.add(deadline)
                async for chunk in request.stream():
                    if len(held.data) + len(chunk) > limit:
                        raise _too_large(limit)
                    held.add(chunk)
                    if not self._closed:
                        deadline.reschedule(min(loop.time() + PIECE_SECONDS, end))
        except TimeoutError:
            if self._closed:
                message = "the server shuts down, and the body had not arrived"
                raise ApiError(503, message, code="draining", headers=RETRY | _CLOSE) from None
            message = f"the body did not arrive in {BODY_SECONDS:g} s, or nothing of it in {PIECE_SECONDS:g} s"
            raise ApiError(408, message, code="body_timeout", headers=_CLOSE) from None
        finally:
            self._deadlines.discard(deadline)

    async def work(self, size: int, do: Callable[[], T]) -> T:
        """Returns `do()`. `size` is how many bytes it works on: if that is not short, it runs in a thread."""
        if is_short(size):
            return do()
        return await asyncio.get_running_loop().run_in_executor(self._workers, copy_context().run, do)


def is_short(size: int) -> bool:
    """Whether work on `size` bytes is short enough for the event loop."""
    return size <= _SHORT_BYTES


class Held:
    """A body, and the memory that it holds."""

    def __init__(self, bodies: Bodies) -> None:
        self.data = bytearray()
        self._bodies = bodies
        self._counted = 0

    def add(self, chunk: bytes) -> None:
        """Append to the body. Raises ApiError as `hold` does."""
        self.data += chunk
        self.hold(0)

    def hold(self, size: int) -> None:
        """Count `size` bytes in addition to the body. Raises ApiError (429) if all bodies together hold too much."""
        # The allocated size: a bytearray over-allocates so that it need not be copied with every chunk.
        more = max(sys.getsizeof(self.data) + size - FREE_BYTES, 0) - self._counted
        if more > 0 and self._bodies.held + more > MAX_HELD_BYTES:
            message = f"the bodies of all requests may hold {MAX_HELD_BYTES} bytes, and they do; try again later"
            raise ApiError(429, message, code="bodies_full", headers=RETRY | _CLOSE)
        self._counted += more
        self._bodies.held += more

    def release(self) -> None:
        """Free the body and its count. May be called more than once."""
        self._bodies.held -= self._counted
        self._counted = 0
        self.data = bytearray()


class HeldAnswer(Response):
    """JSON that counts as held until it is sent. It is sent in pieces, each after the one before has been written."""

    def __init__(self, content: bytes, held: Held) -> None:
        super().__init__(content, media_type="application/json")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), _PIECE_BYTES):
                piece = self.body[start : start + _PIECE_BYTES]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                # To a client that reads fast, sending never waits, and nobody else would have a turn.
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._held.release()


def _check_kind(request: Request) -> None:
    """Raises ApiError (415) unless the content type is JSON and there is no content encoding."""
    kinds = request.headers.getlist("content-type")
    if len(kinds) != 1 or not _JSON.fullmatch(kinds[0].partition(";")[0].strip().lower()):
        raise ApiError(415, "the content type must be application/json", code="unsupported_media_type", headers=_CLOSE)
    codings = ", ".join(request.headers.getlist("content-encoding"))
    if codings.strip().lower() not in ("", "identity"):
        message = f"the body is encoded as {codings[:64]!r}; send it as it is"
        headers = {"accept-encoding": "identity", **_CLOSE}
        raise ApiError(415, message, code="unsupported_encoding", headers=headers)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large", headers=_CLOSE)
